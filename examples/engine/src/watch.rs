//! Looking at the engine from outside: what is going on, and whether all of it is sound.

use quayline_batching::{self as batching, Policy, Standing, TenantId};
use quayline_kv_cache::{self as kv_cache, BlockId};

use crate::adapt::sequence;
use crate::engine::Engine;
use crate::host_tier::HostTier;
use crate::request::RequestId;
use crate::snapshot::{BlockUse, Blocks, HostUse, PrefixUse, RequestState, Snapshot, StepShape};

impl Engine {
    /// What is going on. Cost: a pass over requests and blocks.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = |id: batching::RequestId| self.request(RequestId(id.0));
        let occupancy = self.occupancy();
        let stats = self.memory.cache.stats();
        let cached = occupancy.iter().filter(|&&block| block == BlockUse::Cached).count();
        Snapshot {
            running: self.batcher.running().filter_map(state).collect(),
            waiting: self.batcher.waiting().take(Snapshot::WAITING_SHOWN_MAX).filter_map(state).collect(),
            waiting_requests: self.batcher.stats().waiting,
            blocks: Blocks {
                size: self.memory.cache.config().block_size.get(),
                total: stats.blocks.get(),
                used: stats.used.get(),
                free: stats.free.get(),
                cached: u32::try_from(cached).unwrap_or(u32::MAX),
                bytes: self.sizes.bytes,
            },
            host: self.host_use(),
            disk: self.memory.host.as_ref().and_then(HostTier::disk_use),
            prefix: PrefixUse { queries: stats.first.tokens, hits: stats.first.hit_tokens },
            totals: self.totals,
            last_step: self.last_step,
            occupancy,
            reasons: self.reasons.counts(),
            turned_away: self.reasons.turned_away(),
        }
    }

    /// The composition of the last step that ran anything.
    #[must_use]
    pub fn last_step(&self) -> StepShape {
        self.last_step
    }

    /// How one request stands, wherever it is in the line; `None` if there is none by this id. Cost: O(n) in those
    /// who wait.
    #[must_use]
    pub fn request(&self, id: RequestId) -> Option<RequestState> {
        let beam = self.searches.requests_of(id).first().copied();
        let active = self.active.get(&beam.unwrap_or(id))?;
        let id = batching::RequestId(active.id.0);
        let (computed_tokens, waits_for) = match self.batcher.standing(id)? {
            Standing::Running { computed_tokens, reason, .. } => (computed_tokens, reason),
            Standing::Waiting { reason, .. } => (0, reason),
        };
        let table = self.memory.cache.table(sequence(id)).ok()?;
        Some(RequestState {
            id: active.search.unwrap_or(active.id),
            arrival: active.arrival,
            started: active.started,
            prompt_tokens: active.prompt_tokens,
            cached_tokens: active.cached_tokens,
            computed_tokens,
            output_tokens: active.output_tokens(),
            output_tokens_max: active.output_tokens_max,
            preemptions: active.preemptions,
            blocks: u32::try_from(table.blocks().len()).unwrap_or(u32::MAX),
            waits_for,
            preempted_for: active.preempted_for,
        })
    }

    /// What a tenant was served so far, in tokens (those generated count twice) divided by its weight: the lowest goes
    /// first. `None` if the order is not [`Policy::Fair`], or nothing is known of the tenant.
    #[must_use]
    pub fn served(&self, tenant: TenantId) -> Option<f64> {
        match self.batcher.order() {
            Policy::Fair(fair) => fair.counter(tenant),
            _ => None,
        }
    }

    fn host_use(&self) -> Option<HostUse> {
        let host = self.memory.host.as_ref()?;
        let stats = host.stats();
        let (saved_bytes, loaded_bytes) = host.copied_bytes();
        Some(HostUse {
            blocks: stats.free.get() + stats.ready.get() + stats.writing.get() + stats.gone.get(),
            used: stats.ready.get(),
            swapped_tokens: self.batcher.stats().counts.swapped_tokens,
            saved_bytes,
            loaded_bytes,
            evictions: stats.evictions,
            ..self.host_hits
        })
    }

    fn occupancy(&self) -> Vec<BlockUse> {
        let cache = &self.memory.cache;
        let of = |block| match cache.references(block) {
            0 if cache.hash_of(block).is_some() => BlockUse::Cached,
            0 => BlockUse::Free,
            1 => BlockUse::Held,
            _ => BlockUse::Shared,
        };
        // Block 0 is the null block.
        (1..=self.sizes.blocks).map(|block| of(BlockId(block))).collect()
    }

    /// Audits every invariant of the engine, its cache and its batcher.
    ///
    /// # Errors
    /// A sentence about the first one that does not hold: a bug of ours.
    pub fn check(&self) -> Result<(), String> {
        self.batcher.check().map_err(|violation| format!("batcher: {violation}"))?;
        self.memory.cache.check().map_err(|violation| format!("cache: {violation}"))?;
        if let Some(host) = &self.memory.host {
            host.check(&self.memory.cache).map_err(|violation| format!("host tier: {violation}"))?;
        }
        let stats = self.batcher.stats();
        let (planned, active) = ((stats.running + stats.waiting) as usize, self.active.len());
        if planned != active {
            return Err(format!("the batcher has {planned} requests, the engine {active}"));
        }
        let open = self.memory.cache.stats().sequences as usize;
        let left = self.memory.elsewhere.handing_over.len() + self.memory.closing.len();
        if open != active + left {
            return Err(format!("the cache has {open} sequences, the engine {active} requests"));
        }
        for (id, request) in &self.active {
            let known =
                self.memory.cache.known(kv_cache::SequenceId(id.0)).map_err(|error| error.to_string())?;
            if known.get() as usize != request.tokens.len() {
                let (cache, engine) = (known.get(), request.tokens.len());
                return Err(format!("request {}: the cache knows {cache} tokens, the engine {engine}", id.0));
            }
        }
        Ok(())
    }
}
