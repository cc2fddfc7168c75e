//! Segmented LRU: what was asked for again is kept apart from what was seen once.

use super::links::Links;
use super::{Eviction, Facts, Wanted};
use crate::{BlockCount, BlockId};

/// Two lists in order of the last use: contents on probation, and contents that were asked for again, which are
/// protected. Those on probation go first. When more than a share of all blocks is protected, the protected block
/// that was unused longest goes back on probation, where it is the newest.
///
/// Karedla, Love, Wherry: Caching strategies to improve disk system performance, IEEE Computer 27(3), 1994.
#[derive(Clone, Debug)]
pub struct Slru {
    links: Links,
    /// By block: the list it is in, or goes to when it is free.
    standing: Vec<u8>,
    protected_max: u32,
}

const PROBATION: usize = 0;
const PROTECTED: usize = 1;

impl Slru {
    /// The protected share that is a good first choice. Prompts that come back do so a few times, so that a large
    /// protected part would only keep what has had its day.
    pub const PROTECTED_PERCENT: u32 = 30;

    /// A fresh policy that protects at most `protected_percent` of the blocks. 9 bytes a block.
    pub fn new(blocks: BlockCount, protected_percent: u32) -> Self {
        let percent = protected_percent.min(100);
        Slru {
            links: Links::new(blocks.get(), 2),
            standing: vec![list(PROBATION); blocks.get() as usize],
            protected_max: blocks.get() / 100 * percent + blocks.get() % 100 * percent / 100,
        }
    }

    fn list_of(&self, block: BlockId) -> usize {
        self.standing[block.index()].into()
    }

    /// Protected blocks above the share go back on probation.
    fn demote(&mut self) {
        while self.links.len(PROTECTED) > self.protected_max {
            let Some(block) = self.links.pop_first(PROTECTED) else { return };
            self.links.push_last(PROBATION, block);
            self.standing[block as usize] = list(PROBATION);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "there are two lists")]
const fn list(list: usize) -> u8 {
    list as u8
}

impl Eviction for Slru {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, _) in kept {
            self.links.push_last(self.list_of(block), block.get());
        }
        self.demote();
    }

    fn revive(&mut self, block: BlockId) {
        self.links.remove(self.list_of(block), block.get());
        self.standing[block.index()] = list(PROTECTED);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let block = self.links.first(PROBATION).or(self.links.first(PROTECTED));
        let block = block.map(BlockId).expect("no more blocks are picked than are free");
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        [PROBATION, PROTECTED].into_iter().flat_map(|list| self.links.iter(list)).map(BlockId)
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        self.links.remove(self.list_of(block), block.get());
        self.given(block, wanted);
    }

    fn given(&mut self, block: BlockId, _wanted: Wanted) {
        self.standing[block.index()] = list(PROBATION);
    }

    fn reused(&mut self, block: BlockId) {
        self.standing[block.index()] = list(PROTECTED);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.links.remove(self.list_of(block), block.get());
        true
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        for list in [PROTECTED, PROBATION] {
            let_go.extend(std::iter::from_fn(|| self.links.pop_first(list)).map(BlockId));
        }
    }

    fn check(&self) -> Result<(), BlockId> {
        let misplaced = [PROBATION, PROTECTED].into_iter().find_map(|list| {
            let stray =
                self.links.iter(list).find(|&block| usize::from(self.standing[block as usize]) != list);
            self.links.broken(list).or(stray)
        });
        misplaced.map(BlockId).map_or(Ok(()), Err)
    }
}
