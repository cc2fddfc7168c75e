//! The cache and the model side by side: the same calls, the same answers, the same state after each.

mod behind;
mod compare;

use std::collections::BTreeMap;

use behind::cache_error;
use quayline_kv_cache::evict::Quota;
use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use crate::calls::{self, Call, From, KEYS, SEQUENCES};
use crate::model::behind::Behind;
use crate::model::{Granted, Model, Shape, Verdict};
use crate::seen::{saw, saw_if};

/// Tiers, and when content is fetched from them.
pub(crate) type Tiered = (Vec<TierConfig>, Fetch);

/// Sets the quota of a tenant in both.
pub(crate) type SetQuota<E, P> = fn(&mut KvCache<Xxh3, E>, &mut Model<P>, TenantId, Quota);

/// The cache and the model, told the same, and who hears nothing but events.
pub(crate) struct Pair<E: Eviction, P> {
    shape: Shape,
    /// The policies, as they begin.
    policies: (E, P),
    tiered: Option<Tiered>,
    cache: KvCache<Xxh3, E>,
    model: Model<P>,
    set_quota: SetQuota<E, P>,
    replica: Replica<BlockHash>,
    offload: Option<Offload<BlockHash>>,
    /// What the model calls the contents that the tiers know by name.
    names: BTreeMap<BlockKey<BlockHash>, u32>,
    /// The hashes of each sequence that are among them.
    learned: BTreeMap<u64, Vec<BlockHash>>,
    calls: u32,
    now: u64,
}

impl<E: Eviction + Clone, P: Eviction + Clone> Pair<E, P> {
    pub(crate) fn new(shape: &Shape, policy: E, plain: P, set_quota: SetQuota<E, P>) -> Self {
        Pair {
            cache: new_cache(shape, &policy),
            model: Model::new(shape, plain.clone()),
            shape: shape.clone(),
            policies: (policy, plain),
            tiered: None,
            set_quota,
            replica: Replica::new(),
            offload: None,
            names: BTreeMap::new(),
            learned: BTreeMap::new(),
            calls: 0,
            now: 0,
        }
    }

    pub(crate) fn play(mut self, behind: Option<Tiered>, calls: Vec<Call>) {
        if let Some((tiers, fetch)) = &behind {
            self.offload = Some(Offload::new(Tiers::new(tiers, 0).unwrap(), *fetch));
            self.model.behind = Some(Behind::new(tiers, *fetch));
        }
        self.tiered = behind;
        for call in calls {
            self.run(call);
        }
        self.wind_down();
    }

    fn run(&mut self, call: Call) {
        self.model.behind.iter_mut().for_each(Behind::note_busy);
        let Pair { cache, model, .. } = self;
        let id = SequenceId;
        match call {
            Call::Open { sequence, key, tenant, tokens, reuse } => {
                let tenant = TenantId(tenant);
                let key = &KEYS[key];
                let answer = cache.open(id(sequence), key.of(tenant), &tokens, reuse);
                assert_eq!(answer, model.open(sequence, (key, tenant), &tokens, reuse));
            }
            Call::Encoder { sequence, tokens } => {
                assert_eq!(cache.encoder(id(sequence), TokenCount(tokens)), model.encoder(sequence, tokens));
            }
            Call::Media { sequence, id: item, ahead } => {
                let known = model.sequences.get(&sequence).map_or(0, |of| of.tokens.len() as u32);
                let items = [calls::item(item, known.saturating_sub(2) + ahead)];
                assert_eq!(cache.add_media(id(sequence), &items), model.add_media(sequence, &items));
            }
            Call::Push { sequence, tokens } => {
                assert_eq!(cache.push(id(sequence), &tokens), model.push(sequence, &tokens));
            }
            Call::Lookup { sequence } => assert_eq!(cache.lookup(id(sequence)), model.lookup(sequence)),
            Call::Claim { sequence, mut claim, from, commit } => {
                if matches!(from, From::Usual | From::Rest) {
                    claim.computed = model.usual_start(sequence);
                }
                if matches!(from, From::Rest) {
                    let known = model.sequences.get(&sequence).map_or(0, |of| of.tokens.len() as u32);
                    let rest = known.saturating_sub(claim.computed.0).saturating_sub(claim.external.0);
                    claim.new_tokens = TokenCount(rest);
                }
                self.claim(sequence, claim, commit);
                if commit && self.offload.is_some() {
                    // What a step has computed is offered.
                    self.run_behind(Call::Computed { sequence, behind: 0 });
                }
            }
            Call::Settle { sequence, behind } => {
                let tokens = self.computed(sequence).saturating_sub(behind.saturating_sub(1));
                let tokens = if behind == 0 { tokens + 1 } else { tokens };
                let answer = self.cache.settle(id(sequence), TokenCount(tokens)).map(<[_]>::to_vec);
                assert_eq!(answer, self.model.settle(sequence, tokens));
            }
            // What the tiers load, they report.
            Call::Loaded { sequence, .. } if model.is_loaded_by_tiers(sequence) => {}
            Call::Loaded { sequence, behind, failed } => {
                let tokens = self.computed(sequence).saturating_sub(behind);
                if failed {
                    let answer = self.cache.load_failed(id(sequence), TokenCount(tokens));
                    saw_if(answer.is_ok(), "the caller's own load fails");
                    assert_eq!(answer, self.model.load_failed(sequence, tokens));
                } else {
                    let answer = self.cache.loaded(id(sequence), TokenCount(tokens));
                    assert_eq!(answer, self.model.loaded(sequence, tokens));
                }
            }
            Call::Fork { parent, child } => {
                let answer = cache.fork(id(parent), id(child));
                saw_if(answer.is_ok(), "a sequence forks");
                assert_eq!(answer, model.fork(parent, child));
            }
            Call::Truncate { sequence, keep } => {
                let answer = cache.truncate(id(sequence), TokenCount(keep));
                saw_if(answer.is_ok(), "a sequence is cut");
                saw_if(matches!(answer, Err(Error::Gone { .. })), "a sequence cannot go back");
                assert_eq!(answer, model.truncate(sequence, keep));
            }
            Call::Rollback { sequence, tokens } => {
                assert_eq!(
                    cache.rollback(id(sequence), TokenCount(tokens)),
                    model.rollback(sequence, tokens)
                );
            }
            Call::Trim { sequence, room } => {
                assert_eq!(cache.trim(id(sequence), TokenCount(room)), model.trim(sequence, room));
            }
            Call::Withdraw { sequence } => assert_eq!(cache.withdraw(id(sequence)), model.withdraw(sequence)),
            other => self.run_other(other),
        }
        self.learn();
        self.compare();
    }

    /// The calls that give something back, or are about more than one sequence.
    fn run_other(&mut self, call: Call) {
        let Pair { cache, model, offload, .. } = self;
        let id = SequenceId;
        match call {
            Call::Release { sequence } => {
                let answer = match offload {
                    Some(offload) => cache_error(offload.release(cache, id(sequence))),
                    None => cache.release(id(sequence)),
                };
                assert_eq!(answer, model.part(sequence, false));
            }
            Call::Close { sequence } => {
                let answer = match offload {
                    Some(offload) => cache_error(offload.close(cache, id(sequence))),
                    None => cache.close(id(sequence)),
                };
                assert_eq!(answer, model.part(sequence, true));
            }
            Call::Evict { blocks } => assert_eq!(cache.evict(&blocks), model.evict(&blocks)),
            Call::EvictAll => {
                let blocks: Vec<_> = (1..cache.config().block_count.0).map(BlockId).collect();
                assert_eq!(cache.evict(&blocks), model.evict(&blocks));
            }
            Call::EvictHash { sequence, index } => {
                let hash = cache.hashes(id(sequence)).ok().and_then(|hashes| hashes.get(index).copied());
                if let Some(hash) = hash {
                    assert_eq!(cache.evict_hash(hash), model.evict_hash(sequence, index));
                }
            }
            Call::Pin { pin, sequence, tokens, until } => {
                let until = until.map(Tick);
                let answer = cache.pin(PinId(pin), id(sequence), TokenCount(tokens), until);
                saw(match answer {
                    Ok(Pinned::Held { .. }) => "a prefix is pinned",
                    Ok(Pinned::OverCap { .. }) => "a pin is over the cap",
                    Ok(Pinned::SetAside { .. }) | Err(_) => "a pin is refused",
                });
                assert_eq!(answer, model.pin(pin, sequence, tokens, until));
            }
            Call::PinHashes { pin, sequence, count } => {
                if let Ok(hashes) = cache.hashes(id(sequence)) {
                    let hashes = hashes[..hashes.len().min(count as usize)].to_vec();
                    let expected = model.pin_hashes(pin, sequence, hashes.len() as u32);
                    assert_eq!(cache.pin_hashes(PinId(pin), &hashes, None), expected);
                }
            }
            Call::Unpin { pin } => assert_eq!(cache.unpin(PinId(pin)), model.unpin(pin)),
            Call::Expire { now } => {
                let expired = cache.expire(Tick(now));
                saw_if(expired.0 > 0, "a pin expires");
                assert_eq!(expired, model.expire(Tick(now)));
            }
            Call::Quota { tenant, share, limit } => {
                let quota = Quota { share: BlockCount(share), limit: BlockCount(limit) };
                (self.set_quota)(cache, model, TenantId(tenant), quota);
                saw("a quota is set");
            }
            Call::EndStep => {
                cache.end_step();
                model.end_step();
            }
            Call::Reset { close } => {
                if close {
                    (0..SEQUENCES).for_each(|sequence| self.run(Call::Close { sequence }));
                    self.run(Call::EndStep);
                }
                self.reset();
            }
            Call::Restart => self.restart(),
            Call::Serve { sequence, key, tenant, tokens } => self.serve(sequence, key, tenant, tokens),
            of_tiers => {
                if self.offload.is_some() {
                    self.run_behind(of_tiers);
                }
            }
        }
    }

    fn serve(&mut self, sequence: u64, key: usize, tenant: u32, tokens: Vec<TokenId>) {
        let (claim, from, ends) = (Claim::default(), From::Rest, !tokens.len().is_multiple_of(4));
        for call in [
            Call::Close { sequence },
            Call::Open { sequence, key, tenant, tokens, reuse: Reuse::ReadWrite },
            Call::Fetch { sequence, whole: false },
            Call::Claim { sequence, claim, from, commit: true },
        ] {
            self.run(call);
        }
        if ends {
            self.run(Call::EndStep);
        }
    }

    fn reset(&mut self) {
        let answer = match &mut self.offload {
            Some(offload) => offload.reset(&mut self.cache),
            None => self.cache.reset(),
        };
        assert_eq!(answer, self.model.reset_all());
        saw_if(answer, "all is forgotten");
        let at_work = self.model.behind.as_ref().is_some_and(|behind| !behind.jobs.is_empty());
        saw_if(answer && at_work, "all is forgotten while jobs are at work");
    }

    fn new_cache(&self) -> KvCache<Xxh3, E> {
        new_cache(&self.shape, &self.policies.0)
    }

    fn new_model(&self) -> Model<P> {
        Model::new(&self.shape, self.policies.1.clone())
    }

    fn computed(&self, sequence: u64) -> u32 {
        self.model.sequences.get(&sequence).map_or(0, |sequence| sequence.computed)
    }

    fn claim(&mut self, sequence: u64, claim: Claim, commit: bool) {
        let expected = self.model.reserve(sequence, claim);
        match (self.cache.reserve(SequenceId(sequence), claim), expected) {
            (Err(error), Err(expected)) => {
                assert_eq!(error, expected);
                saw_if(matches!(error, Error::Gone { .. }), "a claim cannot go back");
                saw_if(matches!(error, Error::Loading { .. }), "a claim meets a load");
            }
            (Ok(Admission::NextStep), Ok(Verdict::NextStep)) => saw("a claim waits for the next step"),
            (Ok(Admission::OverLimit(refusal)), Ok(Verdict::OverLimit(expected))) => {
                assert_eq!(refusal, expected);
                saw("a claim is over its limit");
            }
            (Ok(Admission::Wait { need, reserved, free, .. }), Ok(Verdict::Wait(a, b, c))) => {
                assert_eq!((need.0, reserved.0, free.0), (a, b, c));
                saw("a claim waits");
                saw_if(reserved.0 > 0, "a claim finds blocks set aside");
            }
            (Ok(Admission::Never { need, .. }), Ok(Verdict::Never(expected))) => {
                assert_eq!(need.0, expected);
                saw("a claim can never be granted");
            }
            (Ok(Admission::Admit(reservation)), Ok(Verdict::Admit { hits, new })) => {
                assert_eq!((reservation.hit_blocks().0, reservation.new_blocks().0), (hits, new));
                if commit {
                    let grant = reservation.commit();
                    let granted = self.model.commit(sequence, claim);
                    let groups = (0..granted.new.len()).map(|group| GroupId(group as u8));
                    let new: Vec<_> = groups.map(|group| grant.new_blocks_in(group).to_vec()).collect();
                    assert_eq!((grant.cached.0, &new), (granted.cached, &granted.new));
                    assert_eq!(grant.copies, granted.copies);
                    assert_eq!(grant.covered.0, self.model.covered(sequence), "covered");
                    let taken = new.into_iter().flatten().chain(granted.copies.iter().map(|copy| copy.to));
                    let mut taken: Vec<_> = taken.filter(|&block| block != BlockId::NULL).collect();
                    let all = taken.len();
                    taken.sort_unstable();
                    taken.dedup();
                    assert_eq!(taken.len(), all, "no block is handed out twice, across groups");
                    self.count_grant(sequence, claim, &granted);
                    if self.offload.is_some() {
                        self.rescue();
                    }
                }
            }
            (answer, expected) => unreachable!("{answer:?}, {expected:?} expected"),
        }
    }

    fn count_grant(&self, sequence: u64, claim: Claim, granted: &Granted) {
        saw("a claim is granted");
        saw_if(claim.external.0 > 0, "external tokens are claimed");
        saw_if(claim.lookahead.0 > 0, "lookahead is claimed");
        saw_if(claim.whole_sequence, "a whole sequence is claimed");
        saw_if(!granted.copies.is_empty(), "a block is copied on write");
        let text = self.model.prefix(sequence, granted.cached);
        saw_if(granted.cached > 0, "a prefix is shared");
        saw_if(text.is_some_and(|text| !text.items.is_empty()), "a prefix with an item is shared");
        saw_if(granted.cached > 0 && granted.new.len() > 1, "groups share a prefix");
    }

    fn wind_down(&mut self) {
        for sequence in 0..SEQUENCES {
            self.run(Call::Close { sequence });
        }
        while self.model.behind.as_ref().is_some_and(|behind| !behind.jobs.is_empty()) {
            self.run(Call::Finish { job: 0, end: 9, copy: 0 });
        }
        self.run(Call::EndStep);
        self.run(Call::Expire { now: u64::MAX });
        self.run(Call::Reset { close: false });
        assert_eq!(self.cache.stats().free, self.cache.stats().blocks, "no block is lost");
    }
}

fn new_cache<E: Eviction + Clone>(shape: &Shape, policy: &E) -> KvCache<Xxh3, E> {
    let hasher = Xxh3::new(shape.config.hash_seed);
    KvCache::with(shape.config.clone(), hasher, |_| policy.clone()).unwrap()
}
