//! Which free block is handed out next, and so whose content is lost.
//!
//! | policy | loses first | an operation costs |
//! |---|---|---|
//! | [`Lru`] | what was unused longest | O(1) |
//! | [`LeafFirst`] | of what nothing cached hangs on, what was unused longest | O(log n) |
//! | [`Slru`] | what was never asked for again, then what was unused longest | O(1) |
//! | [`Arc`] | of the contents seen once and of those seen again, whichever part has grown too large | O(1) |
//! | [`CostAware`] | of what nothing cached hangs on, what is cheapest to compute again and least asked for | O(log n) |
//!
//! Whatever the policy, a block that holds nothing findable goes before all others. [`Fair`] puts quotas of tenants in
//! front of any of them; [`Policy`] is any of them, chosen at run time.

mod arc;
mod cost;
mod fair;
mod ghosts;
mod heap;
mod leaf_first;
mod leaves;
mod links;
mod lru;
mod policy;
mod slru;

use std::fmt::Debug;

use crate::{BlockCount, BlockId, TenantId};

pub use arc::Arc;
pub use cost::CostAware;
pub use fair::{Fair, Quota, TenantUse};
pub use leaf_first::LeafFirst;
pub use lru::Lru;
pub use policy::{Policy, PolicyName, UnknownPolicy};
pub use slru::Slru;

/// What a policy may judge a free block by that others can find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The block's place in the table it leaves: 0 is the beginning of the sequence.
    pub index: u32,
    /// The block before it in that table. Its content is of no use without the content of that one.
    pub before: Option<BlockId>,
    /// 32 bits of the hash under which it is found. A policy that remembers what it evicted knows it by these; two
    /// contents of one name mislead it a little and break nothing.
    pub content: u32,
}

/// What a free block is wanted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// 32 bits of the hash that it will be found under, if it is to hold known tokens.
    pub content: Option<u32>,
    /// Who will have it.
    pub tenant: TenantId,
}

/// Why a tenant gets no room, see [`Fair`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverLimit {
    /// The tenant.
    pub tenant: TenantId,
    /// Blocks that the claim takes.
    pub need: BlockCount,
    /// Blocks charged to the tenant that sequences use now.
    pub used: BlockCount,
    /// The most it may have.
    pub limit: BlockCount,
}

/// Keeps the free blocks whose content can be found, and chooses among them, by three hooks: [`free`](Eviction::free)
/// brings blocks that nobody uses any more, [`revive`](Eviction::revive) takes out one that was asked for,
/// [`pick`](Eviction::pick) chooses. The other calls have answers that do for a policy which needs no more than these.
///
/// Blocks that hold nothing are no matter of choice: the cache keeps them itself, and hands them out before it asks. A
/// fresh policy holds no block.
pub trait Eviction: Clone + Debug {
    /// These blocks are free from now on, with what they hold.
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>);

    /// A free block has a user again, because its content was asked for.
    fn revive(&mut self, block: BlockId);

    /// Hands out a free block. There is one.
    fn pick(&mut self, wanted: Wanted) -> BlockId;

    /// Hands out a free block for each thing wanted, in this order, and appends them to `picked`. There are as many.
    fn pick_all(&mut self, wanted: impl Iterator<Item = Wanted>, picked: &mut Vec<BlockId>) {
        picked.extend(wanted.map(|wanted| self.pick(wanted)));
    }

    /// The blocks it has, next to be handed out first, if nothing else happens: for reports and audits.
    fn order(&self) -> impl Iterator<Item = BlockId> + '_;

    /// Hands out this very free block, whatever the policy would choose.
    fn take(&mut self, block: BlockId, _wanted: Wanted) {
        self.revive(block);
    }

    /// The content of a block in use was asked for by one more sequence.
    fn reused(&mut self, _block: BlockId) {}

    /// A block that held nothing was handed out. It is not one that the policy has.
    fn given(&mut self, _block: BlockId, _wanted: Wanted) {}

    /// A block in use is free, and holds nothing. The policy does not get it.
    fn emptied(&mut self, _block: BlockId) {}

    /// What a free block held cannot be found any more, though nobody took the block. Answers whether the policy lets
    /// it go, so that it is handed out next; otherwise it is handed out in its turn.
    fn forget(&mut self, _block: BlockId) -> bool {
        false
    }

    /// All blocks are free, and nothing they hold can be found any more. Appends to `let_go` those that the policy lets
    /// go: the last of them is handed out next.
    fn reset(&mut self, _let_go: &mut Vec<BlockId>) {}

    /// How many blocks that hold nothing a tenant may get; for more it loses what it has, as `pick` chooses.
    fn allowance(&self, _tenant: TenantId) -> BlockCount {
        BlockCount(u32::MAX)
    }

    /// Whether a tenant may take `new` blocks and revive `revived`.
    ///
    /// # Errors
    /// When its limit forbids that.
    fn admits(
        &self,
        _tenant: TenantId,
        _new: BlockCount,
        _revived: impl Iterator<Item = BlockId>,
    ) -> Result<(), OverLimit> {
        Ok(())
    }

    /// Whether what the policy keeps besides the order is sound; else a block where it is not.
    ///
    /// # Errors
    /// The block.
    fn check(&self) -> Result<(), BlockId> {
        Ok(())
    }
}

/// The order in which `policy` would hand out `free` blocks for contents that it does not know.
fn order_by_picking<E: Eviction>(policy: &E, free: usize) -> impl Iterator<Item = BlockId> + use<E> {
    let mut order = Vec::with_capacity(free);
    policy.clone().pick_all(std::iter::repeat_n(Wanted::default(), free), &mut order);
    order.into_iter()
}
