//! Quotas of tenants, in front of any policy.

use std::collections::BTreeMap;

use super::heap::Heap;
use super::links::Links;
use super::{Eviction, Facts, OverLimit, Wanted, order_by_picking};
use crate::{BlockCount, BlockHasher, BlockId, KvCache, TenantId};

/// How many blocks a tenant may have. Without a quota a tenant may have all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// What it may keep while others want room. Cached blocks above that go before those of tenants who have no
    /// more than their share.
    pub share: BlockCount,
    /// What it may have at all. A claim for more is refused, and its new content takes the place of its own old one.
    pub limit: BlockCount,
}

impl Default for Quota {
    fn default() -> Self {
        Quota { share: BlockCount(u32::MAX), limit: BlockCount(u32::MAX) }
    }
}

/// The blocks that are charged to a tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantUse {
    /// Blocks that sequences or pins hold, its own or others'.
    pub used: BlockCount,
    /// Blocks that nobody holds and that still have its content.
    pub cached: BlockCount,
    /// What it may have.
    pub quota: Quota,
}

/// Fair eviction: `E` chooses as long as nobody has more than his share; else the tenant who is furthest above it
/// loses what it has not used for longest.
///
/// A block is charged to the tenant whose sequence took it, until what it holds is lost: who computes pays, and who
/// shares does not. O(log tenants) per block beyond what `E` costs, and 24 bytes a block.
#[derive(Clone, Debug)]
pub struct Fair<E> {
    policy: E,
    ledger: Ledger,
}

impl<E: Eviction> Fair<E> {
    /// Puts quotas in front of `policy`, which is fresh. Until the first one is set, `policy` alone decides.
    pub fn new(blocks: BlockCount, policy: E) -> Self {
        Fair { policy, ledger: Ledger::new(blocks) }
    }

    /// The policy that decides while all tenants are within their shares.
    pub fn policy(&self) -> &E {
        &self.policy
    }

    /// Sets what a tenant may have from now on. What it has above that it keeps until others want it.
    pub fn set_quota(&mut self, tenant: TenantId, quota: Quota) {
        let place = self.ledger.place(tenant);
        self.ledger.tenants[place as usize].quota = quota;
        self.ledger.rank(place);
    }

    /// What a tenant has.
    pub fn tenant(&self, tenant: TenantId) -> TenantUse {
        self.ledger.tenant(tenant)
    }
}

/// Who pays for which block.
#[derive(Clone, Debug)]
struct Ledger {
    tenants: Vec<Tenant>,
    /// Place in `tenants`.
    places: BTreeMap<TenantId, u32>,
    /// By block: place of the tenant to whom it is charged, [`NOBODY`] if to none.
    payer: Vec<u32>,
    /// The free blocks that the policy has: those that it keeps though nobody can find what they hold, then a list for
    /// each tenant in order of the last use.
    free: Links,
    /// The tenants who have more than their share and something to lose, the furthest above first.
    above: Heap,
}

#[derive(Clone, Debug)]
struct Tenant {
    id: TenantId,
    quota: Quota,
    charged: u32,
}

const NOBODY: u32 = u32::MAX;
const FORGOTTEN: usize = 0;

impl Ledger {
    fn new(blocks: BlockCount) -> Self {
        Ledger {
            tenants: Vec::new(),
            places: BTreeMap::new(),
            payer: vec![NOBODY; blocks.get() as usize],
            free: Links::new(blocks.get(), 1),
            above: Heap::new(0),
        }
    }

    fn tenant(&self, tenant: TenantId) -> TenantUse {
        self.places.get(&tenant).map_or_else(TenantUse::default, |&place| {
            let Tenant { quota, charged, .. } = self.tenants[place as usize];
            let cached = self.free.len(list_of(place));
            TenantUse { used: BlockCount(charged - cached), cached: BlockCount(cached), quota }
        })
    }

    /// The place of a tenant. A new one is entered: the only time that memory is allocated.
    fn place(&mut self, id: TenantId) -> u32 {
        if let Some(&place) = self.places.get(&id) {
            return place;
        }
        let place = u32::try_from(self.tenants.len()).expect("tenants are counted in u32");
        self.tenants.push(Tenant { id, quota: Quota::default(), charged: 0 });
        self.places.insert(id, place);
        self.free.add_list();
        self.above.add_item();
        place
    }

    /// Puts a tenant where it belongs among those above their share.
    fn rank(&mut self, place: u32) {
        let Tenant { quota, charged, .. } = self.tenants[place as usize];
        self.above.remove(place);
        if charged > quota.share.0 && self.free.len(list_of(place)) > 0 {
            self.above.set_rank(place, (u64::MAX - u64::from(charged - quota.share.0), place.into()));
            self.above.push(place);
        }
    }

    /// The block that must go for `tenant`, unless the policy is to choose.
    fn victim(&self, tenant: u32) -> Option<BlockId> {
        let Tenant { quota, charged, .. } = self.tenants[tenant as usize];
        let list = if charged >= quota.limit.0 {
            list_of(tenant)
        } else {
            let above = self.above.first()?;
            if self.free.len(FORGOTTEN) > 0 { FORGOTTEN } else { list_of(above) }
        };
        self.free.first(list).map(BlockId)
    }

    /// A free block is free no more.
    fn leave(&mut self, block: BlockId) {
        let payer = self.payer[block.index()];
        if payer == NOBODY {
            return self.free.remove(FORGOTTEN, block.get());
        }
        self.free.remove(list_of(payer), block.get());
        self.rank(payer);
    }

    /// A block in use is free, with what it holds.
    fn keep(&mut self, block: BlockId) {
        let payer = self.payer[block.index()];
        self.free.push_last(list_of(payer), block.get());
        self.rank(payer);
    }

    /// What a free block held cannot be found any more.
    fn forget(&mut self, block: BlockId) {
        self.leave(block);
        self.charge(block, NOBODY);
        self.free.push_behind(FORGOTTEN, None, block.get());
    }

    /// From now on `tenant` pays for a block in use.
    fn charge(&mut self, block: BlockId, tenant: u32) {
        let before = std::mem::replace(&mut self.payer[block.index()], tenant);
        if before != NOBODY {
            self.tenants[before as usize].charged -= 1;
            self.rank(before);
        }
        if tenant != NOBODY {
            self.tenants[tenant as usize].charged += 1;
            self.rank(tenant);
        }
    }

    /// A block of a list that is wrong, the null block if a count is.
    fn broken(&self) -> Option<BlockId> {
        let mut charged = vec![0; self.tenants.len()];
        for &payer in self.payer.iter().filter(|&&payer| payer != NOBODY) {
            charged[payer as usize] += 1;
        }
        for ((place, tenant), &charged) in (0..).zip(&self.tenants).zip(&charged) {
            let list = list_of(place);
            let stray = self.free.iter(list).find(|&block| self.payer[block as usize] != place);
            if let Some(block) = self.free.broken(list).or(stray) {
                return Some(BlockId(block));
            }
            let above = charged > tenant.quota.share.0 && self.free.len(list) > 0;
            let found = self.places.get(&tenant.id) == Some(&place);
            if !found || tenant.charged != charged || self.above.contains(place) != above {
                return Some(BlockId::NULL);
            }
        }
        self.free.broken(FORGOTTEN).map(BlockId)
    }
}

fn list_of(tenant: u32) -> usize {
    tenant as usize + 1
}

impl<E: Eviction> Eviction for Fair<E> {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        let Fair { policy, ledger } = self;
        policy.free(kept.inspect(|&(block, _)| ledger.keep(block)));
    }

    fn revive(&mut self, block: BlockId) {
        self.ledger.leave(block);
        self.policy.revive(block);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let Fair { policy, ledger } = self;
        let tenant = ledger.place(wanted.tenant);
        let block = match ledger.victim(tenant) {
            Some(block) => {
                policy.take(block, wanted);
                block
            }
            None => policy.pick(wanted),
        };
        ledger.leave(block);
        ledger.charge(block, tenant);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        let free = (0..=self.ledger.tenants.len()).map(|list| self.ledger.free.len(list) as usize).sum();
        order_by_picking(self, free)
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        let tenant = self.ledger.place(wanted.tenant);
        self.policy.take(block, wanted);
        self.ledger.leave(block);
        self.ledger.charge(block, tenant);
    }

    fn reused(&mut self, block: BlockId) {
        self.policy.reused(block);
    }

    fn given(&mut self, block: BlockId, wanted: Wanted) {
        let tenant = self.ledger.place(wanted.tenant);
        self.policy.given(block, wanted);
        self.ledger.charge(block, tenant);
    }

    fn emptied(&mut self, block: BlockId) {
        self.policy.emptied(block);
        self.ledger.charge(block, NOBODY);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.ledger.forget(block);
        let let_go = self.policy.forget(block);
        if let_go {
            self.ledger.leave(block);
        }
        let_go
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        for list in 1..=self.ledger.tenants.len() {
            while let Some(block) = self.ledger.free.first(list) {
                self.ledger.forget(BlockId(block));
            }
        }
        let before = let_go.len();
        self.policy.reset(let_go);
        let_go[before..].iter().for_each(|&block| self.ledger.leave(block));
    }

    fn allowance(&self, tenant: TenantId) -> BlockCount {
        let TenantUse { used, cached, quota } = self.tenant(tenant);
        let policy = self.policy.allowance(tenant);
        if cached.0 == 0 {
            policy
        } else {
            policy.min(BlockCount(quota.limit.0.saturating_sub(used.0 + cached.0)))
        }
    }

    fn admits(
        &self,
        tenant: TenantId,
        new: BlockCount,
        revived: impl Iterator<Item = BlockId>,
    ) -> Result<(), OverLimit> {
        let Some(&place) = self.ledger.places.get(&tenant) else { return Ok(()) };
        let TenantUse { used, quota: Quota { limit, .. }, .. } = self.tenant(tenant);
        let own = revived.filter(|block| self.ledger.payer[block.index()] == place).count();
        let need = u64::from(new.0) + own as u64;
        if u64::from(used.0) + need <= u64::from(limit.0) {
            return Ok(());
        }
        let need = BlockCount(u32::try_from(need).unwrap_or(u32::MAX));
        Err(OverLimit { tenant, need, used, limit })
    }

    fn check(&self) -> Result<(), BlockId> {
        self.policy.check()?;
        self.ledger.broken().map_or(Ok(()), Err)
    }
}

impl<H: BlockHasher, E: Eviction> KvCache<H, Fair<E>> {
    /// Sets what a tenant may have from now on. What it has above that it keeps until others want it.
    pub fn set_quota(&mut self, tenant: TenantId, quota: Quota) {
        self.blocks.pool.policy.set_quota(tenant, quota);
    }

    /// What a tenant has, and what it may have.
    pub fn tenant(&self, tenant: TenantId) -> TenantUse {
        self.blocks.pool.policy.tenant(tenant)
    }
}
