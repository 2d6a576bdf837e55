//! Who keeps a controller from fetching: the migration, and the client that has stopped it. The fence is up while either does.

use super::Board;
use dray_device::slot::Fence;
use dray_migration::{FenceControl, Owner};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// It does not serve, or is being handed over.
const MIGRATION: u8 = 1;
/// Its client has stopped it.
const CLIENT: u8 = 2;

/// The holds on a controller's fence. Clones are the same ones.
#[derive(Clone)]
pub(in crate::run) struct Gate {
    fence: Fence,
    holds: Arc<AtomicU8>,
    board: Arc<Board>,
}

impl Gate {
    /// A fence that is up is the migration's: the records want it so.
    pub(in crate::run) fn new(fence: Fence, board: &Arc<Board>) -> Self {
        let holds = if fence.is_up() { MIGRATION } else { 0 };
        Self { fence, holds: Arc::new(AtomicU8::new(holds)), board: Arc::clone(board) }
    }

    fn raise(&self, hold: u8) {
        self.holds.fetch_or(hold, Ordering::AcqRel);
        self.fence.raise();
    }

    fn lower(&self, hold: u8) {
        let left = self.holds.fetch_and(!hold, Ordering::AcqRel) & !hold;
        // An appliance that stops has raised every fence, for good.
        if left == 0 && !self.board.is_stopping() {
            self.fence.lower();
        }
    }

    /// The client stops it.
    pub(super) fn hold(&self) {
        self.raise(CLIENT);
    }

    /// The client lets it go on, as far as it is concerned.
    pub(super) fn let_go(&self) {
        self.lower(CLIENT);
    }
}

/// The gates of the pairs that move: the migration's source first.
pub(in crate::run) struct Gates(pub(in crate::run) Vec<[Gate; 2]>);

impl FenceControl for Gates {
    fn raise(&mut self, end: Owner) {
        self.0.iter().for_each(|pair| pair[end as usize].raise(MIGRATION));
    }

    fn lower(&mut self, end: Owner) {
        self.0.iter().for_each(|pair| pair[end as usize].lower(MIGRATION));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_is_down_when_nobody_holds_it_and_stays_up_at_the_end() {
        let (board, _asked) = Board::new(Owner::Source);
        let fences = [Fence::new(false), Fence::new(true)];
        let gates = fences.clone().map(|fence| Gate::new(fence, &board));
        let mut both = Gates(vec![gates.clone()]);
        gates[0].hold();
        both.raise(Owner::Source);
        gates[0].let_go();
        assert!(fences[0].is_up(), "the migration holds it");
        gates[0].hold();
        both.lower(Owner::Source);
        assert!(fences[0].is_up(), "its client holds it");
        gates[0].let_go();
        assert!(!fences[0].is_up());
        gates[1].let_go();
        assert!(fences[1].is_up(), "the records want it so");
        both.lower(Owner::Destination);
        assert!(!fences[1].is_up());
        gates[1].hold();
        board.stop();
        gates[1].let_go();
        assert!(fences[1].is_up());
    }
}
