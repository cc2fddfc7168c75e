//! A policy that is chosen at run time, for programs that take its name from a user.

use std::fmt;
use std::str::FromStr;

use super::{Arc, CostAware, Eviction, Facts, LeafFirst, Lru, Slru, Wanted};
use crate::{BlockCount, BlockId, BlockSize};

/// Any of the policies of this crate, as it is by default. Costs a branch per call; who knows the policy when he
/// writes his program names its type instead.
#[derive(Clone, Debug)]
pub enum Policy {
    /// [`Lru`].
    Lru(Lru),
    /// [`LeafFirst`].
    LeafFirst(LeafFirst),
    /// [`Slru`].
    Slru(Slru),
    /// [`Arc`].
    Arc(Arc),
    /// [`CostAware`].
    Cost(CostAware),
}

/// The name of a policy, as it is written in commands and reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyName {
    /// `lru`
    #[default]
    Lru,
    /// `leaf-first`
    LeafFirst,
    /// `slru`
    Slru,
    /// `arc`
    Arc,
    /// `cost`
    Cost,
}

impl PolicyName {
    /// All of them, the simplest first.
    pub const ALL: [PolicyName; 5] =
        [PolicyName::Lru, PolicyName::LeafFirst, PolicyName::Slru, PolicyName::Arc, PolicyName::Cost];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            PolicyName::Lru => "lru",
            PolicyName::LeafFirst => "leaf-first",
            PolicyName::Slru => "slru",
            PolicyName::Arc => "arc",
            PolicyName::Cost => "cost",
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No policy has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no policy: there are lru, leaf-first, slru, arc and cost")]
pub struct UnknownPolicy(pub String);

impl FromStr for PolicyName {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let found = PolicyName::ALL.into_iter().find(|policy| policy.as_str() == name);
        found.ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

impl Policy {
    /// A fresh policy of this name.
    pub fn new(name: PolicyName, blocks: BlockCount, block_size: BlockSize) -> Self {
        match name {
            PolicyName::Lru => Policy::Lru(Lru::new(blocks)),
            PolicyName::LeafFirst => Policy::LeafFirst(LeafFirst::new(blocks)),
            PolicyName::Slru => Policy::Slru(Slru::new(blocks, Slru::PROTECTED_PERCENT)),
            PolicyName::Arc => Policy::Arc(Arc::new(blocks)),
            PolicyName::Cost => Policy::Cost(CostAware::new(blocks, block_size)),
        }
    }
}

/// The same call on whichever policy it is.
macro_rules! whichever {
    ($policy:expr, $it:ident => $call:expr) => {
        match $policy {
            Policy::Lru($it) => $call,
            Policy::LeafFirst($it) => $call,
            Policy::Slru($it) => $call,
            Policy::Arc($it) => $call,
            Policy::Cost($it) => $call,
        }
    };
}

impl Eviction for Policy {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        whichever!(self, policy => policy.free(kept));
    }

    fn revive(&mut self, block: BlockId) {
        whichever!(self, policy => policy.revive(block));
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        whichever!(self, policy => policy.pick(wanted))
    }

    fn pick_all(&mut self, wanted: impl Iterator<Item = Wanted>, picked: &mut Vec<BlockId>) {
        whichever!(self, policy => policy.pick_all(wanted, picked));
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        let order: Vec<BlockId> = whichever!(self, policy => policy.order().collect());
        order.into_iter()
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        whichever!(self, policy => policy.take(block, wanted));
    }

    fn reused(&mut self, block: BlockId) {
        whichever!(self, policy => policy.reused(block));
    }

    fn given(&mut self, block: BlockId, wanted: Wanted) {
        whichever!(self, policy => policy.given(block, wanted));
    }

    fn forget(&mut self, block: BlockId) -> bool {
        whichever!(self, policy => policy.forget(block))
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        whichever!(self, policy => policy.reset(let_go));
    }

    fn check(&self) -> Result<(), BlockId> {
        whichever!(self, policy => policy.check())
    }
}
