//! Every policy against one written to be read: plain lists, searched from end to end. Two caches get the same random
//! calls, one with the policy and one with its plain twin; all answers and the order of the free blocks are equal.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

use quayline_kv_cache::evict::{Arc, CostAware, Fair, LeafFirst, Policy, PolicyName, Quota, Slru};
use quayline_kv_cache::*;

mod plain;

use plain::{PlainArc, PlainCost, PlainFair, PlainLeafFirst, PlainLru, PlainSlru};

const SIZE: u32 = 2;

#[test]
fn lru_does_what_its_plain_twin_does() {
    compare(1, Lru::new, PlainLru::new);
}

#[test]
fn leaf_first_does_what_its_plain_twin_does() {
    compare(2, LeafFirst::new, PlainLeafFirst::new);
}

#[test]
fn slru_does_what_its_plain_twin_does() {
    compare(3, |blocks| Slru::new(blocks, 30), |blocks| PlainSlru::new(blocks, 30));
    compare(4, |blocks| Slru::new(blocks, 80), |blocks| PlainSlru::new(blocks, 80));
}

#[test]
fn arc_does_what_its_plain_twin_does() {
    compare(5, Arc::new, PlainArc::new);
}

#[test]
fn cost_aware_does_what_its_plain_twin_does() {
    for (seed, doubles_after) in [(6, 1), (7, 12), (8, 131_072)] {
        let size = BlockSize::new(SIZE).unwrap();
        compare(
            seed,
            |blocks| CostAware::with_cost(blocks, size, TokenCount(doubles_after)),
            |blocks| PlainCost::new(blocks, doubles_after / SIZE),
        );
    }
}

#[test]
fn fair_does_what_its_plain_twin_does_over_any_policy() {
    let size = BlockSize::new(SIZE).unwrap();
    compare_with_quotas(20, Lru::new, PlainLru::new);
    compare_with_quotas(21, LeafFirst::new, PlainLeafFirst::new);
    compare_with_quotas(22, |blocks| Slru::new(blocks, 30), |blocks| PlainSlru::new(blocks, 30));
    compare_with_quotas(23, Arc::new, PlainArc::new);
    compare_with_quotas(
        24,
        |blocks| CostAware::with_cost(blocks, size, TokenCount(12)),
        |blocks| PlainCost::new(blocks, 12 / SIZE),
    );
}

fn compare_with_quotas<A: Eviction, B: Eviction>(
    seed: u64,
    policy: impl Fn(BlockCount) -> A,
    plain: impl Fn(BlockCount) -> B,
) {
    // Quotas are set with the policy, before anybody has a block.
    let quotas = |blocks: BlockCount| {
        let quota = |share, limit| Quota { share: BlockCount(share), limit: BlockCount(limit) };
        let part = blocks.0 / 3;
        [(TenantId(0), quota(part, 2 * part + 1)), (TenantId(1), quota(part / 2, u32::MAX))]
    };
    let fair = |blocks| {
        let mut fair = Fair::new(blocks, policy(blocks));
        quotas(blocks).into_iter().for_each(|(tenant, quota)| fair.set_quota(tenant, quota));
        fair
    };
    compare(seed, fair, |blocks| PlainFair::new(plain(blocks), &quotas(blocks)));
}

#[test]
fn without_quotas_fair_leaves_the_choice_to_its_policy() {
    for (seed, name) in (11..).zip(PolicyName::ALL) {
        let size = BlockSize::new(SIZE).unwrap();
        let policy = |blocks| Policy::new(name, blocks, size);
        compare(seed, policy, |blocks| Fair::new(blocks, policy(blocks)));
    }
}

/// A stream of numbers that looks random (a multiplicative generator's upper half).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(limit)) as u32
    }
}

fn compare<A: Eviction, B: Eviction>(
    seed: u64,
    policy: impl Fn(BlockCount) -> A,
    plain: impl Fn(BlockCount) -> B,
) {
    for run in 0..20 {
        let mut random = Random(seed * 1000 + run);
        let blocks = BlockCount(2 + random.below(15));
        let config = Config::new(BlockSize::new(SIZE).unwrap(), blocks);
        let hasher = || Xxh3::new(0);
        let mut a = KvCache::with(config.clone(), hasher(), &policy).unwrap();
        let mut b = KvCache::with(config, hasher(), &plain).unwrap();
        for step in 0..250 {
            let at = format!("seed {seed}, run {run}, step {step}, {blocks} blocks");
            let call = Call::random(&mut random);
            assert_eq!(call.on(&mut a), call.on(&mut b), "{at}: {call:?}");
            let order = [a.free_blocks().collect::<Vec<_>>(), b.free_blocks().collect()];
            assert_eq!(order[0], order[1], "{at}: free blocks after {call:?}");
            let stats = a.stats();
            assert_eq!(stats, b.stats(), "{at}");
            assert_eq!(stats.free.0 + stats.used.0 + stats.pinned.0, stats.blocks.0, "{at}: {call:?}");
            assert!(stats.pinned <= a.config().pinned_blocks_max, "{at}: {call:?}");
            assert_eq!(a.check(), Ok(()), "{at}: after {call:?}");
        }
    }
}

#[derive(Debug)]
enum Call {
    Open { sequence: SequenceId, tenant: TenantId, tokens: Vec<TokenId>, reuse: Reuse },
    Push { sequence: SequenceId, tokens: Vec<TokenId> },
    Claim { sequence: SequenceId, new: u32 },
    Withdraw { sequence: SequenceId },
    Release { sequence: SequenceId },
    Close { sequence: SequenceId },
    Evict { block: BlockId },
    Pin { pin: PinId, sequence: SequenceId, tokens: u32, until: Option<Tick> },
    PinHashes { pin: PinId, sequence: SequenceId },
    Unpin { pin: PinId },
    Expire { now: Tick },
    Reset,
}

impl Call {
    fn random(random: &mut Random) -> Call {
        let sequence = SequenceId(random.below(5).into());
        let pin = PinId(random.below(3).into());
        match random.below(25) {
            20 => Call::Evict { block: BlockId(random.below(26)) },
            21 => {
                let until = (random.below(2) == 0).then(|| Tick(random.below(100).into()));
                Call::Pin { pin, sequence, tokens: random.below(14), until }
            }
            22 => Call::PinHashes { pin, sequence },
            23 => Call::Unpin { pin },
            24 => Call::Expire { now: Tick(random.below(100).into()) },
            0..5 => {
                let reuse = if random.below(6) == 0 { Reuse::WriteOnly } else { Reuse::ReadWrite };
                Call::Open { sequence, tenant: TenantId(random.below(3)), tokens: prompt(random), reuse }
            }
            5 => Call::Push { sequence, tokens: vec![random.below(3); random.below(4) as usize] },
            6..13 => Call::Claim { sequence, new: random.below(12) },
            13 => Call::Withdraw { sequence },
            14 => Call::Release { sequence },
            15 if random.below(4) == 0 => Call::Reset,
            _ => Call::Close { sequence },
        }
    }

    fn on<E: Eviction>(&self, cache: &mut KvCache<Xxh3, E>) -> String {
        match self {
            Call::Open { sequence, tenant, tokens, reuse } => {
                let key = SequenceKey { tenant: *tenant, ..SequenceKey::default() };
                format!("{:?}", cache.open(*sequence, key, tokens, *reuse))
            }
            Call::Push { sequence, tokens } => format!("{:?}", cache.push(*sequence, tokens)),
            Call::Claim { sequence, new } => claim(cache, *sequence, *new),
            Call::Withdraw { sequence } => format!("{:?}", cache.withdraw(*sequence)),
            Call::Release { sequence } => format!("{:?}", cache.release(*sequence)),
            Call::Close { sequence } => format!("{:?}", cache.close(*sequence)),
            Call::Evict { block } => format!("{:?}", cache.evict(&[*block])),
            Call::Pin { pin, sequence, tokens, until } => {
                format!("{:?}", cache.pin(*pin, *sequence, TokenCount(*tokens), *until))
            }
            Call::PinHashes { pin, sequence } => match cache.hashes(*sequence).map(<[_]>::to_vec) {
                Ok(hashes) => format!("{:?}", cache.pin_hashes(*pin, &hashes, None)),
                Err(error) => error.to_string(),
            },
            Call::Unpin { pin } => format!("{:?}", cache.unpin(*pin)),
            Call::Expire { now } => format!("{:?}", cache.expire(*now)),
            Call::Reset => cache.reset().to_string(),
        }
    }
}

/// Few beginnings, many ends.
fn prompt(random: &mut Random) -> Vec<TokenId> {
    let (kind, alike, length) = (random.below(4), random.below(14), random.below(18));
    (0..length).map(|place| if place < alike { kind } else { 10 + random.below(3) }).collect()
}

/// Claims `new` tokens behind the hit, or behind what the sequence's blocks have room for.
fn claim<E: Eviction>(cache: &mut KvCache<Xxh3, E>, sequence: SequenceId, new: u32) -> String {
    let held = cache.table(sequence).map_or(0, |table| table.blocks().len() as u32);
    let computed = match cache.lookup(sequence) {
        Ok(hit) => hit.tokens,
        Err(_) => TokenCount(cache.known(sequence).map_or(0, TokenCount::get).min(held * SIZE)),
    };
    let claim = Claim { computed, new_tokens: TokenCount(new), ..Claim::default() };
    match cache.reserve(sequence, claim) {
        Err(error) => error.to_string(),
        Ok(Admission::Admit(reservation)) => format!("{:?}", reservation.commit()),
        Ok(no) => format!("{no:?}"),
    }
}
