//! ARC: recency and frequency, balanced by what turned out to be evicted too early.

use super::ghosts::Ghosts;
use super::links::Links;
use super::{Eviction, Facts, Wanted, order_by_picking};
use crate::{BlockCount, BlockId};

/// Adaptive replacement: one list of contents seen once, one of contents seen again, and the names of what each lost
/// lately. Content that is wanted while its name is among those was lost too early, so its list gets more room at
/// the cost of the other.
///
/// Megiddo, Modha: ARC: A self-tuning, low overhead replacement cache, FAST 2003, figure 4. What a cache with users
/// adds to it: blocks in use are in no list, so the lists together are shorter than the cache; and the target moves by
/// whole blocks.
#[derive(Clone, Debug)]
pub struct Arc {
    links: Links,
    /// By block: the list it is in, or goes to when it is free.
    list: Vec<u8>,
    /// By block: the name of its content, while it is free and has one.
    content: Vec<u32>,
    ghosts: Ghosts,
    /// How many blocks the list of contents seen once should have.
    target: u32,
    blocks: u32,
}

const ONCE: u8 = 0;
const AGAIN: u8 = 1;

/// The names of what the two lists lost.
const LOST_ONCE: u8 = 0;
const LOST_AGAIN: u8 = 1;

impl Arc {
    /// A fresh policy. 43 bytes a block.
    pub fn new(blocks: BlockCount) -> Self {
        Arc {
            links: Links::new(blocks.get(), 2),
            list: vec![ONCE; blocks.get() as usize],
            content: vec![0; blocks.get() as usize],
            ghosts: Ghosts::new(blocks.get() - 1, 2),
            target: 0,
            blocks: blocks.get() - 1,
        }
    }

    /// How many of the blocks are meant for contents seen once, as learned so far.
    pub fn target(&self) -> BlockCount {
        BlockCount(self.target)
    }

    fn len(&self, list: u8) -> u32 {
        self.links.len(list.into())
    }

    /// Which list lost the wanted content lately. Cases II and III: that list gets more room.
    fn learn(&mut self, wanted: Wanted) -> Option<u8> {
        let (once, again) = (self.ghosts.len(LOST_ONCE), self.ghosts.len(LOST_AGAIN));
        let (lost_from, _) = self.ghosts.take(wanted.content?)?;
        self.target = match lost_from {
            LOST_ONCE => self.target.saturating_add((again / once).max(1)).min(self.blocks),
            _ => self.target.saturating_sub((once / again).max(1)),
        };
        Some(lost_from)
    }

    /// Case IV: a content that nobody knows.
    fn make_room_for_news(&mut self) -> BlockId {
        if self.len(ONCE) + self.ghosts.len(LOST_ONCE) >= self.blocks {
            if self.ghosts.len(LOST_ONCE) == 0 {
                let block = self.links.pop_first(ONCE.into()).expect("the list is as long as the cache");
                return BlockId(block);
            }
            self.ghosts.forget_oldest(LOST_ONCE);
        } else if self.ghosts.is_full() {
            self.ghosts.forget_oldest(if self.ghosts.len(LOST_AGAIN) > 0 { LOST_AGAIN } else { LOST_ONCE });
        }
        self.replace(false)
    }

    /// Evicts from the list that is above its target.
    fn replace(&mut self, lost_again: bool) -> BlockId {
        let once = self.len(ONCE);
        let above = once > self.target || (lost_again && once == self.target);
        let from = if once > 0 && (above || self.len(AGAIN) == 0) { ONCE } else { AGAIN };
        let block = self.links.first(from.into()).expect("no more blocks are picked than are free");
        self.evict(BlockId(block));
        BlockId(block)
    }

    /// Takes a block out of its list and remembers what it held.
    fn evict(&mut self, block: BlockId) {
        let list = self.list[block.index()];
        self.links.remove(list.into(), block.get());
        let lost = if list == ONCE { LOST_ONCE } else { LOST_AGAIN };
        self.ghosts.remember(lost, self.content[block.index()], 0);
    }

    /// A block is given to a content that one of the lists lost lately, or to news.
    fn begin(&mut self, block: BlockId, lost_from: Option<u8>) {
        self.list[block.index()] = if lost_from.is_some() { AGAIN } else { ONCE };
    }
}

impl Eviction for Arc {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, facts) in kept {
            self.content[block.index()] = facts.content;
            self.links.push_last(self.list[block.index()].into(), block.get());
        }
        // The cache with what it lost remembers no more contents seen once than it has blocks.
        while self.len(ONCE) + self.ghosts.len(LOST_ONCE) > self.blocks {
            self.ghosts.forget_oldest(LOST_ONCE);
        }
    }

    fn revive(&mut self, block: BlockId) {
        self.links.remove(self.list[block.index()].into(), block.get());
        self.list[block.index()] = AGAIN;
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let lost_from = self.learn(wanted);
        let block = match lost_from {
            Some(lost_from) => self.replace(lost_from == LOST_AGAIN),
            None => self.make_room_for_news(),
        };
        self.begin(block, lost_from);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        order_by_picking(self, (self.len(ONCE) + self.len(AGAIN)) as usize)
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        let lost_from = self.learn(wanted);
        self.evict(block);
        self.begin(block, lost_from);
    }

    fn given(&mut self, block: BlockId, wanted: Wanted) {
        let lost_from = self.learn(wanted);
        self.begin(block, lost_from);
    }

    fn reused(&mut self, block: BlockId) {
        self.list[block.index()] = AGAIN;
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.links.remove(self.list[block.index()].into(), block.get());
        true
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        for list in [AGAIN, ONCE] {
            let_go.extend(std::iter::from_fn(|| self.links.pop_first(list.into())).map(BlockId));
        }
        self.ghosts = Ghosts::new(self.blocks, 2);
        self.target = 0;
    }

    fn check(&self) -> Result<(), BlockId> {
        let misplaced = [ONCE, AGAIN].into_iter().find_map(|list| {
            let stray = self.links.iter(list.into()).find(|&block| self.list[block as usize] != list);
            self.links.broken(list.into()).or(stray)
        });
        let sound = self.ghosts.is_sound()
            && self.target <= self.blocks
            && self.len(ONCE) + self.ghosts.len(LOST_ONCE) <= self.blocks;
        match misplaced {
            Some(block) => Err(BlockId(block)),
            None if sound => Ok(()),
            None => Err(BlockId::NULL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The algorithm of the paper over a cache of `c` pages, on plain lists, oldest first.
    struct Paper {
        c: usize,
        p: usize,
        t1: Vec<u32>,
        t2: Vec<u32>,
        b1: Vec<u32>,
        b2: Vec<u32>,
    }

    impl Paper {
        fn new(c: usize) -> Self {
            Paper { c, p: 0, t1: vec![], t2: vec![], b1: vec![], b2: vec![] }
        }

        fn has(&self, x: u32) -> bool {
            self.t1.contains(&x) || self.t2.contains(&x)
        }

        fn request(&mut self, x: u32) {
            if self.has(x) {
                self.t1.retain(|&y| y != x);
                self.t2.retain(|&y| y != x);
                self.t2.push(x);
            } else if self.b1.contains(&x) {
                self.p = self.c.min(self.p + (self.b2.len() / self.b1.len()).max(1));
                self.replace(x);
                self.b1.retain(|&y| y != x);
                self.t2.push(x);
            } else if self.b2.contains(&x) {
                self.p = self.p.saturating_sub((self.b1.len() / self.b2.len()).max(1));
                self.replace(x);
                self.b2.retain(|&y| y != x);
                self.t2.push(x);
            } else {
                let l1 = self.t1.len() + self.b1.len();
                let all = l1 + self.t2.len() + self.b2.len();
                if l1 == self.c {
                    if self.t1.len() < self.c {
                        self.b1.remove(0);
                        self.replace(x);
                    } else {
                        self.t1.remove(0);
                    }
                } else if all >= self.c {
                    if all == 2 * self.c {
                        self.b2.remove(0);
                    }
                    self.replace(x);
                }
                self.t1.push(x);
            }
        }

        fn replace(&mut self, x: u32) {
            let t1 = self.t1.len();
            if t1 > 0 && (t1 > self.p || (self.b2.contains(&x) && t1 == self.p)) {
                self.b1.push(self.t1.remove(0));
            } else {
                self.b2.push(self.t2.remove(0));
            }
        }
    }

    /// The policy under a cache whose every request is one block, held for a moment.
    struct Cache {
        arc: Arc,
        holds: Vec<Option<u32>>,
    }

    impl Cache {
        fn request(&mut self, content: u32) {
            let facts = Facts { index: 0, before: None, content };
            if let Some(place) = self.holds.iter().position(|&held| held == Some(content)) {
                let block = BlockId(crate::id::count(place));
                self.arc.revive(block);
                return self.arc.free([(block, facts)].into_iter());
            }
            let wanted = Wanted { content: Some(content), ..Wanted::default() };
            let block = match (1..self.holds.len()).find(|&block| self.holds[block].is_none()) {
                Some(empty) => {
                    let empty = BlockId(crate::id::count(empty));
                    self.arc.given(empty, wanted);
                    empty
                }
                None => self.arc.pick(wanted),
            };
            self.holds[block.index()] = Some(content);
            self.arc.free([(block, facts)].into_iter());
        }

        fn contents(&self, list: u8) -> Vec<u32> {
            self.arc.links.iter(list.into()).map(|block| self.holds[block as usize].unwrap()).collect()
        }
    }

    #[test]
    fn does_what_the_paper_says() {
        for (seed, size, universe) in (0..60).map(|seed| (seed, 1 + seed % 9, 3 + seed * 7 % 31)) {
            let mut paper = Paper::new(size as usize);
            let mut cache =
                Cache { arc: Arc::new(BlockCount(size + 1)), holds: vec![None; size as usize + 1] };
            let mut random = u64::from(seed);
            for step in 0..3_000 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let [kind, which] = [random >> 61, random >> 33 & 0xFFFF].map(|n| u32::try_from(n).unwrap());
                // A few contents come often, some in runs, the rest now and then.
                let content = match kind {
                    0..3 => which % 3,
                    3 => step % universe,
                    _ => which % universe,
                };
                paper.request(content);
                cache.request(content);
                let at = format!("seed {seed}, step {step}");
                assert_eq!(cache.contents(ONCE), paper.t1, "{at}");
                assert_eq!(cache.contents(AGAIN), paper.t2, "{at}");
                let lost = [cache.arc.ghosts.len(LOST_ONCE), cache.arc.ghosts.len(LOST_AGAIN)];
                assert_eq!(lost.map(|n| n as usize), [paper.b1.len(), paper.b2.len()], "{at}");
                assert_eq!(cache.arc.target as usize, paper.p, "{at}");
                assert_eq!(cache.arc.check(), Ok(()), "{at}");
            }
        }
    }
}
