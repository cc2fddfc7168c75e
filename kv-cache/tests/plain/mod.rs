//! The policies, written to be read: plain lists, searched from end to end.

use std::collections::BTreeMap;

use quayline_kv_cache::evict::{Facts, OverLimit, Quota, Wanted};
use quayline_kv_cache::*;

fn without(list: &mut Vec<BlockId>, block: BlockId) -> bool {
    let place = list.iter().position(|&listed| listed == block);
    place.is_some_and(|place| list.remove(place) == block)
}

/// What picking one after the other gives.
fn picked<E: Eviction>(policy: &E, free: usize) -> std::vec::IntoIter<BlockId> {
    let mut order = Vec::new();
    policy.clone().pick_all((0..free).map(|_| Wanted::default()), &mut order);
    order.into_iter()
}

#[derive(Clone, Debug)]
pub(crate) struct PlainLru(Vec<BlockId>);

impl PlainLru {
    pub(crate) fn new(_blocks: BlockCount) -> Self {
        PlainLru(Vec::new())
    }
}

impl Eviction for PlainLru {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        self.0.extend(kept.into_iter().map(|(block, _)| block));
    }

    fn revive(&mut self, block: BlockId) {
        without(&mut self.0, block);
    }

    fn pick(&mut self, _wanted: Wanted) -> BlockId {
        self.0.remove(0)
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.0.iter().copied()
    }
}

/// Free blocks, each with what it hangs on and a rank.
#[derive(Clone, Debug, Default)]
struct Tree(Vec<(BlockId, Option<BlockId>, (u64, u64))>);

impl Tree {
    /// The block of the lowest rank on which no other hangs.
    fn first_leaf(&self) -> Option<BlockId> {
        let is_leaf = |block| self.0.iter().all(|&(_, before, _)| before != Some(block));
        let leaves = self.0.iter().filter(|&&(block, ..)| is_leaf(block));
        leaves.min_by_key(|&&(_, _, rank)| rank).map(|&(block, ..)| block)
    }

    /// A block that comes after the one before it, as one does that a transfer has kept, hangs on nothing.
    fn insert(&mut self, block: BlockId, before: Option<BlockId>, rank: (u64, u64)) {
        let before = before.filter(|&before| self.0.iter().all(|&(here, ..)| here != before));
        self.0.push((block, before, rank));
    }

    fn remove(&mut self, block: BlockId) -> Option<(u64, u64)> {
        let place = self.0.iter().position(|&(here, ..)| here == block)?;
        Some(self.0.remove(place).2)
    }

    /// `block` holds something else from now on.
    fn cut(&mut self, block: BlockId) {
        self.0
            .iter_mut()
            .filter(|(_, before, _)| *before == Some(block))
            .for_each(|(_, before, _)| *before = None);
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PlainLeafFirst {
    tree: Tree,
    freed: u64,
}

impl PlainLeafFirst {
    pub(crate) fn new(_blocks: BlockCount) -> Self {
        PlainLeafFirst { tree: Tree::default(), freed: 0 }
    }
}

impl Eviction for PlainLeafFirst {
    fn take(&mut self, block: BlockId, _wanted: Wanted) {
        self.tree.remove(block);
        self.tree.cut(block);
    }

    fn emptied(&mut self, block: BlockId) {
        self.tree.cut(block);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.tree.remove(block);
        self.tree.cut(block);
        true
    }

    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, facts) in kept {
            self.freed += 1;
            self.tree.insert(block, facts.before, (self.freed, 0));
        }
    }

    fn revive(&mut self, block: BlockId) {
        self.tree.remove(block);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let block = self.tree.first_leaf().unwrap();
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        picked(self, self.tree.0.len())
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        while let Some(block) = self.tree.first_leaf() {
            self.tree.remove(block);
            let_go.push(block);
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PlainSlru {
    probation: Vec<BlockId>,
    protected: Vec<BlockId>,
    /// Blocks in use that were asked for again.
    asked_again: Vec<BlockId>,
    protected_max: usize,
}

impl PlainSlru {
    pub(crate) fn new(blocks: BlockCount, percent: usize) -> Self {
        PlainSlru {
            probation: vec![],
            protected: vec![],
            asked_again: vec![],
            protected_max: blocks.0 as usize * percent / 100,
        }
    }
}

impl Eviction for PlainSlru {
    fn take(&mut self, block: BlockId, _wanted: Wanted) {
        for list in [&mut self.probation, &mut self.protected] {
            without(list, block);
        }
    }

    fn emptied(&mut self, block: BlockId) {
        without(&mut self.asked_again, block);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        without(&mut self.probation, block);
        without(&mut self.protected, block);
        true
    }

    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, _) in kept {
            let again = without(&mut self.asked_again, block);
            if again { self.protected.push(block) } else { self.probation.push(block) }
        }
        let above = self.protected.len().saturating_sub(self.protected_max);
        self.probation.extend(self.protected.drain(..above));
    }

    fn revive(&mut self, block: BlockId) {
        without(&mut self.probation, block);
        without(&mut self.protected, block);
        self.asked_again.push(block);
    }

    fn reused(&mut self, block: BlockId) {
        without(&mut self.asked_again, block);
        self.asked_again.push(block);
    }

    fn pick(&mut self, _wanted: Wanted) -> BlockId {
        let lists = [&mut self.probation, &mut self.protected];
        lists.into_iter().find(|list| !list.is_empty()).unwrap().remove(0)
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.probation.iter().chain(&self.protected).copied()
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        let_go.extend(self.protected.drain(..).chain(self.probation.drain(..)));
    }
}

/// Figure 4 of the paper over free blocks, each with the name of its content.
#[derive(Clone, Debug)]
pub(crate) struct PlainArc {
    c: usize,
    p: usize,
    t1: Vec<(BlockId, u32)>,
    t2: Vec<(BlockId, u32)>,
    b1: Vec<u32>,
    b2: Vec<u32>,
    /// Blocks in use that go to the second list.
    again: Vec<BlockId>,
}

impl PlainArc {
    pub(crate) fn new(blocks: BlockCount) -> Self {
        let c = blocks.0 as usize - 1;
        PlainArc { c, p: 0, t1: vec![], t2: vec![], b1: vec![], b2: vec![], again: vec![] }
    }

    fn lose(&mut self, content: u32, once: bool) {
        self.b1.retain(|&lost| lost != content);
        self.b2.retain(|&lost| lost != content);
        if once { self.b1.push(content) } else { self.b2.push(content) }
    }

    fn learn(&mut self, content: Option<u32>) -> Option<bool> {
        let content = content?;
        let (b1, b2) = (self.b1.len(), self.b2.len());
        if self.b1.contains(&content) {
            self.p = self.c.min(self.p + (b2 / b1).max(1));
            self.b1.retain(|&lost| lost != content);
            return Some(false);
        }
        if self.b2.contains(&content) {
            self.p = self.p.saturating_sub((b1 / b2).max(1));
            self.b2.retain(|&lost| lost != content);
            return Some(true);
        }
        None
    }

    fn replace(&mut self, from_b2: bool) -> BlockId {
        let t1 = self.t1.len();
        let once = t1 > 0 && (t1 > self.p || (from_b2 && t1 == self.p) || self.t2.is_empty());
        let (block, content) = if once { self.t1.remove(0) } else { self.t2.remove(0) };
        self.lose(content, once);
        block
    }

    fn make_room(&mut self) -> BlockId {
        if self.t1.len() + self.b1.len() >= self.c {
            if self.b1.is_empty() {
                return self.t1.remove(0).0;
            }
            self.b1.remove(0);
        } else if self.b1.len() + self.b2.len() == self.c {
            if self.b2.is_empty() {
                self.b1.remove(0)
            } else {
                self.b2.remove(0)
            };
        }
        self.replace(false)
    }
}

impl Eviction for PlainArc {
    fn given(&mut self, block: BlockId, wanted: Wanted) {
        if self.learn(wanted.content).is_some() {
            self.again.push(block);
        }
    }

    fn emptied(&mut self, block: BlockId) {
        without(&mut self.again, block);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.t1.retain(|&(free, _)| free != block);
        self.t2.retain(|&(free, _)| free != block);
        true
    }

    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, facts) in kept {
            let again = without(&mut self.again, block);
            if again { self.t2.push((block, facts.content)) } else { self.t1.push((block, facts.content)) }
        }
        let above = (self.t1.len() + self.b1.len()).saturating_sub(self.c);
        self.b1.drain(..above);
    }

    fn revive(&mut self, block: BlockId) {
        self.t1.retain(|&(free, _)| free != block);
        self.t2.retain(|&(free, _)| free != block);
        self.again.push(block);
    }

    fn reused(&mut self, block: BlockId) {
        without(&mut self.again, block);
        self.again.push(block);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let lost_from = self.learn(wanted.content);
        let block = match lost_from {
            Some(from_b2) => self.replace(from_b2),
            None => self.make_room(),
        };
        if lost_from.is_some() {
            self.again.push(block);
        }
        block
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        let lost_from = self.learn(wanted.content);
        for once in [true, false] {
            let list = if once { &mut self.t1 } else { &mut self.t2 };
            if let Some(place) = list.iter().position(|&(free, _)| free == block) {
                let (_, content) = list.remove(place);
                if self.b1.len() + self.b2.len() == self.c
                    && !self.b1.contains(&content)
                    && !self.b2.contains(&content)
                {
                    let own_is_empty = if once { self.b1.is_empty() } else { self.b2.is_empty() };
                    if once != own_is_empty {
                        self.b1.remove(0)
                    } else {
                        self.b2.remove(0)
                    };
                }
                self.lose(content, once);
            }
        }
        if lost_from.is_some() {
            self.again.push(block);
        }
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        picked(self, self.t1.len() + self.t2.len())
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        let_go.extend(self.t2.drain(..).chain(self.t1.drain(..)).map(|(block, _)| block));
        self.b1.clear();
        self.b2.clear();
        self.p = 0;
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PlainCost {
    tree: Tree,
    uses: BTreeMap<BlockId, u64>,
    content: BTreeMap<BlockId, u32>,
    lost: Vec<(u32, u64)>,
    lost_max: usize,
    floor: u64,
    freed: u64,
    doubles_after: u64,
}

impl PlainCost {
    pub(crate) fn new(blocks: BlockCount, doubles_after_blocks: u32) -> Self {
        PlainCost {
            tree: Tree::default(),
            uses: BTreeMap::new(),
            content: BTreeMap::new(),
            lost: Vec::new(),
            lost_max: blocks.0 as usize - 1,
            floor: 0,
            freed: 0,
            doubles_after: u64::from(doubles_after_blocks.max(1)),
        }
    }
}

impl Eviction for PlainCost {
    fn take(&mut self, block: BlockId, wanted: Wanted) {
        let old = (self.content[&block], self.uses[&block]);
        self.tree.remove(block);
        self.given(block, wanted);
        self.lost.retain(|&(lost, _)| lost != old.0);
        self.lost.push(old);
        let above = self.lost.len().saturating_sub(self.lost_max);
        self.lost.drain(..above);
    }

    fn given(&mut self, block: BlockId, wanted: Wanted) {
        let known = self.lost.iter().position(|&(name, _)| Some(name) == wanted.content);
        let uses = known.map_or(0, |place| self.lost.remove(place).1);
        self.tree.cut(block);
        self.uses.insert(block, (uses + 1).min(255));
    }

    fn emptied(&mut self, block: BlockId) {
        self.tree.cut(block);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.tree.remove(block);
        self.tree.cut(block);
        true
    }

    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, facts) in kept {
            self.freed += 1;
            let cost = self.uses[&block] * (self.doubles_after + u64::from(facts.index)) / self.doubles_after;
            let rank = self.floor + cost;
            self.content.insert(block, facts.content);
            self.tree.insert(block, facts.before, (rank, self.freed));
        }
    }

    fn revive(&mut self, block: BlockId) {
        self.tree.remove(block);
        self.reused(block);
    }

    fn reused(&mut self, block: BlockId) {
        let uses = self.uses.get_mut(&block).unwrap();
        *uses = (*uses + 1).min(255);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let block = self.tree.first_leaf().unwrap();
        let (.., (rank, _)) = self.tree.0.iter().find(|&&(here, ..)| here == block).unwrap();
        self.floor = self.floor.max(*rank);
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        picked(self, self.tree.0.len())
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        while let Some(block) = self.tree.first_leaf() {
            self.tree.remove(block);
            let_go.push(block);
        }
        self.lost.clear();
        self.floor = 0;
    }
}

/// Who pays for each block, in a map; everything else is counted when it is asked for.
#[derive(Clone, Debug)]
pub(crate) struct PlainFair<E> {
    policy: E,
    quotas: BTreeMap<TenantId, Quota>,
    /// In the order in which they were first heard of, which decides between tenants who are equally far above.
    tenants: Vec<TenantId>,
    payer: BTreeMap<BlockId, TenantId>,
    /// Free blocks of which the policy has not let go though what they held is forgotten, the latest first.
    forgotten: Vec<BlockId>,
    /// Free blocks with content, the least recently used first.
    cached: Vec<BlockId>,
}

impl<E: Eviction> PlainFair<E> {
    pub(crate) fn new(policy: E, quotas: &[(TenantId, Quota)]) -> Self {
        PlainFair {
            policy,
            quotas: quotas.iter().copied().collect(),
            tenants: quotas.iter().map(|&(tenant, _)| tenant).collect(),
            payer: BTreeMap::new(),
            forgotten: Vec::new(),
            cached: Vec::new(),
        }
    }

    #[allow(dead_code, reason = "one of the tests that share this sets quotas before anybody has a block")]
    pub(crate) fn set_quota(&mut self, tenant: TenantId, quota: Quota) {
        self.quotas.insert(tenant, quota);
        if !self.tenants.contains(&tenant) {
            self.tenants.push(tenant);
        }
    }

    fn quota(&self, tenant: TenantId) -> Quota {
        self.quotas.get(&tenant).copied().unwrap_or_default()
    }

    fn charged(&self, tenant: TenantId) -> u32 {
        self.payer.values().filter(|&&payer| payer == tenant).count() as u32
    }

    /// The tenant pays for the block from now on.
    fn charge(&mut self, block: BlockId, tenant: TenantId) {
        if !self.tenants.contains(&tenant) {
            self.tenants.push(tenant);
        }
        self.payer.insert(block, tenant);
    }

    fn oldest(&self, tenant: TenantId) -> Option<BlockId> {
        self.cached.iter().copied().find(|block| self.payer[block] == tenant)
    }

    fn victim(&self, tenant: TenantId) -> Option<BlockId> {
        if self.charged(tenant) >= self.quota(tenant).limit.0 {
            return self.oldest(tenant);
        }
        let above = |tenant| self.charged(tenant).saturating_sub(self.quota(tenant).share.0);
        let losers = self.tenants.iter().copied().filter(|&t| above(t) > 0 && self.oldest(t).is_some());
        // Of equals, max_by_key takes the last.
        let loser = losers.rev().max_by_key(|&tenant| above(tenant))?;
        self.forgotten.first().copied().or(self.oldest(loser))
    }
}

impl<E: Eviction> Eviction for PlainFair<E> {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        let kept: Vec<_> = kept.collect();
        self.policy.free(kept.iter().copied());
        self.cached.extend(kept.into_iter().map(|(block, _)| block));
    }

    fn revive(&mut self, block: BlockId) {
        without(&mut self.cached, block);
        self.policy.revive(block);
    }

    fn reused(&mut self, block: BlockId) {
        self.policy.reused(block);
    }

    fn given(&mut self, block: BlockId, wanted: Wanted) {
        self.policy.given(block, wanted);
        self.charge(block, wanted.tenant);
    }

    fn emptied(&mut self, block: BlockId) {
        self.policy.emptied(block);
        self.payer.remove(&block);
    }

    fn allowance(&self, tenant: TenantId) -> BlockCount {
        let left = self.quota(tenant).limit.0.saturating_sub(self.charged(tenant));
        BlockCount(if self.oldest(tenant).is_some() { left } else { u32::MAX })
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let victim = self.victim(wanted.tenant);
        let picked = victim.unwrap_or_else(|| self.policy.pick(wanted));
        if victim.is_some() {
            self.policy.take(picked, wanted);
        }
        without(&mut self.forgotten, picked);
        without(&mut self.cached, picked);
        self.charge(picked, wanted.tenant);
        picked
    }

    fn forget(&mut self, block: BlockId) -> bool {
        without(&mut self.cached, block);
        self.payer.remove(&block);
        let let_go = self.policy.forget(block);
        if !let_go {
            self.forgotten.insert(0, block);
        }
        let_go
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        picked(self, self.forgotten.len() + self.cached.len())
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        for tenant in self.tenants.clone() {
            while let Some(block) = self.oldest(tenant) {
                without(&mut self.cached, block);
                self.payer.remove(&block);
                self.forgotten.insert(0, block);
            }
        }
        self.policy.reset(let_go);
        self.forgotten.retain(|block| !let_go.contains(block));
    }

    fn admits(
        &self,
        tenant: TenantId,
        new: BlockCount,
        revived: impl Iterator<Item = BlockId>,
    ) -> Result<(), OverLimit> {
        let own = revived.filter(|block| self.payer.get(block) == Some(&tenant)).count() as u32;
        let cached = self.cached.iter().filter(|block| self.payer[block] == tenant).count() as u32;
        let (need, used, limit) = (new.0 + own, self.charged(tenant) - cached, self.quota(tenant).limit);
        if u64::from(used) + u64::from(need) <= u64::from(limit.0) {
            return Ok(());
        }
        Err(OverLimit { tenant, need: BlockCount(need), used: BlockCount(used), limit })
    }
}
