//! Driving polled parts to a result, for tools and tests.

use dray_device::poll::Time;

/// Calls `step` with the time of `clock` until it gives something, or until the clock has passed `deadline`: `None` then. The
/// last step is taken at or after the deadline, so a step that waits for a moment before it is never missed.
pub fn drive<T>(
    clock: &mut dyn FnMut() -> Time,
    step: &mut dyn FnMut(Time) -> Option<T>,
    deadline: Time,
) -> Option<T> {
    loop {
        let now = clock();
        if let Some(result) = step(now) {
            return Some(result);
        }
        if now >= deadline {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_the_result_or_the_deadline() {
        let mut now = 0;
        let mut clock = || {
            now += 10;
            Time(now)
        };
        assert_eq!(drive(&mut clock, &mut |t| (t.0 >= 50).then_some(t.0), Time(100)), Some(50));
        assert_eq!(drive(&mut clock, &mut |_| None::<()>, Time(100)), None);
    }
}
