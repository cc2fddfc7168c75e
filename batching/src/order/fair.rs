//! Fair shares of tokens among tenants: the virtual token counter of Sheng et al., *Fairness in Serving
//! Large Language Models*, OSDI 2024 (arXiv 2401.00588).

use std::collections::BTreeMap;

use crate::error::WeightError;
use crate::id::TenantId;
use crate::order::{Candidate, Lane, Order, Rank, Service};
use crate::request::Request;

/// A counter for each tenant: what it was served, divided by its weight. Whoever has the lowest counter
/// goes next; within a tenant, first come first served.
///
/// A tenant that comes back after a pause starts from the lowest counter of those who wait (or, if nobody
/// does, from the counter of the one served last): it gets no credit for having been away. For any two
/// tenants that have requests waiting all the time, what they were served differs by at most
/// `2 * max(input_cost * longest prompt, output_cost * tokens that run at once)` (theorem 4.4, for equal
/// weights).
///
/// Prompt tokens that are cached cost nothing, and tokens that are computed again after a preemption are
/// not charged again.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Fair {
    input_cost: u32,
    output_cost: u32,
    accounts: Vec<Account>,
    by_tenant: BTreeMap<TenantId, u32>,
    /// With so many tenants it is time to forget some.
    tenants_max: usize,
    /// Places in `accounts` that belong to nobody.
    vacant: Vec<u32>,
    prices: Vec<(TenantId, u64)>,
    /// The counter of the tenant that was admitted last.
    last: u128,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Account {
    tenant: TenantId,
    /// What it was served, in token costs times [`SCALE`], divided by its weight.
    counter: u128,
    /// [`SCALE`] divided by its weight.
    price: u64,
    /// Its requests that are here.
    requests: u32,
}

/// The resolution of weights.
const SCALE: u64 = 1 << 24;

/// Weights are between this and its inverse.
const WEIGHT_MIN: f64 = 1.0 / 65_536.0;

impl Fair {
    /// A token of a prompt costs 1, a generated one 2, as in the paper.
    pub fn new() -> Fair {
        Fair::with_costs(1, 2)
    }

    /// With these costs of a prompt's token and of a generated one.
    pub fn with_costs(input_cost: u32, output_cost: u32) -> Fair {
        Fair {
            input_cost,
            output_cost,
            accounts: Vec::new(),
            by_tenant: BTreeMap::new(),
            tenants_max: 64,
            vacant: Vec::new(),
            prices: Vec::new(),
            last: 0,
        }
    }

    /// Gives a tenant a share in proportion to `weight`; everybody's is 1 until then. Takes effect for what
    /// is served from now on.
    ///
    /// # Errors
    /// [`WeightError::OutOfRange`] unless `weight` is between 2^-16 and 2^16.
    pub fn set_weight(&mut self, tenant: TenantId, weight: f64) -> Result<(), WeightError> {
        if !(WEIGHT_MIN..=1.0 / WEIGHT_MIN).contains(&weight) {
            return Err(WeightError::OutOfRange { weight });
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 2^8 and 2^40")]
        let price = (SCALE as f64 / weight).round() as u64;
        match self.prices.binary_search_by_key(&tenant, |&(tenant, _)| tenant) {
            Ok(place) => self.prices[place].1 = price,
            Err(place) => self.prices.insert(place, (tenant, price)),
        }
        if let Some(&index) = self.by_tenant.get(&tenant) {
            self.accounts[index as usize].price = price;
        }
        Ok(())
    }

    /// What a tenant was served, in token costs divided by its weight, lifts included. `None` if it is not
    /// known here (any more).
    pub fn counter(&self, tenant: TenantId) -> Option<f64> {
        let account = &self.accounts[*self.by_tenant.get(&tenant)? as usize];
        Some(account.counter as f64 / SCALE as f64)
    }

    fn open(&mut self, tenant: TenantId) -> u32 {
        self.forget_idle();
        let price = self.prices.binary_search_by_key(&tenant, |&(tenant, _)| tenant);
        let price = price.map_or(SCALE, |place| self.prices[place].1);
        let account = Account { tenant, counter: 0, price, requests: 0 };
        let index = if let Some(index) = self.vacant.pop() {
            self.accounts[index as usize] = account;
            index
        } else {
            self.accounts.push(account);
            u32::try_from(self.accounts.len() - 1).expect("fewer than 2^32 tenants")
        };
        self.by_tenant.insert(tenant, index);
        index
    }

    /// Forgets tenants that have nothing here and would be lifted anyway, once they are the larger part.
    fn forget_idle(&mut self) {
        if self.by_tenant.len() < self.tenants_max {
            return;
        }
        let active = self.accounts.iter().filter(|account| account.requests > 0);
        let lowest = active.map(|account| account.counter).min().unwrap_or(self.last).min(self.last);
        let Fair { accounts, by_tenant, vacant, .. } = self;
        by_tenant.retain(|_, &mut index| {
            let account = &accounts[index as usize];
            let keep = account.requests > 0 || account.counter > lowest;
            if !keep {
                vacant.push(index);
            }
            keep
        });
        self.tenants_max = (2 * self.by_tenant.len()).max(64);
    }

    fn account_mut(&mut self, lane: Lane) -> &mut Account {
        &mut self.accounts[lane.0 as usize]
    }
}

impl Default for Fair {
    fn default() -> Fair {
        Fair::new()
    }
}

impl Order for Fair {
    fn lane(&mut self, request: &Request) -> Lane {
        let index = match self.by_tenant.get(&request.tenant) {
            Some(&index) => index,
            None => self.open(request.tenant),
        };
        self.accounts[index as usize].requests += 1;
        Lane(index)
    }

    fn rank(&self, waiting: &Candidate<'_>) -> Rank {
        Rank(i128::from(waiting.turn), 0)
    }

    fn level(&self, lane: Lane) -> u128 {
        self.accounts[lane.0 as usize].counter
    }

    fn wakes(&mut self, lane: Lane, lowest: Option<u128>) {
        let floor = lowest.unwrap_or(self.last);
        let account = self.account_mut(lane);
        account.counter = account.counter.max(floor);
    }

    fn charge(&mut self, lane: Lane, service: Service) {
        let (cost, tokens) = match service {
            Service::Prompt { tokens } => (self.input_cost, tokens),
            Service::Output { tokens } => (self.output_cost, tokens),
        };
        if matches!(service, Service::Prompt { .. }) {
            self.last = self.last.max(self.level(lane));
        }
        let account = self.account_mut(lane);
        account.counter += u128::from(cost) * u128::from(tokens) * u128::from(account.price);
    }

    fn leaves(&mut self, lane: Lane) {
        self.account_mut(lane).requests -= 1;
    }

    /// The tenant that was served most yields first, its last admitted first.
    fn yields(&self, _: &Candidate<'_>, lane: Lane) -> Rank {
        Rank(i128::try_from(self.level(lane)).unwrap_or(i128::MAX), 0)
    }
}
