//! A guest finds every completion that its controller posts, also when another controller goes on with its queues: the state
//! carries where each completion queue is and which phase tag its first slot has (S0PT).

use super::super::event::{Event, Violation};
use super::violation;

/// Something happened.
///
/// # Errors
/// When a completion was posted where, or with a phase tag by which, its guest does not find it. Nothing excuses that: not a
/// fault, nor a suspended or fenced controller, which posts nothing at all.
pub fn see(event: &Event) -> Result<(), Violation> {
    match event {
        Event::Unseen { guest, id } => {
            let what = format!("the completion of {id:#x} is in a queue of guest {guest}, which looks there and does not see it");
            Err(violation("completions are found", what))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use super::super::super::event::End;

    #[test]
    fn a_completion_that_is_not_found_is_never_right() {
        assert!(see(&Event::Unseen { guest: 0, id: 5 }).is_err());
        see(&Event::Ended { guest: 0, id: 5, end: End::Lost }).expect("its controller was reset");
    }
}
