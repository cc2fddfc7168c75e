//! Every policy against one written to be read: plain lists, searched from end to end. Two caches get the same random
//! calls, one with the policy and one with its plain twin; all answers and the order of the free blocks are equal.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

use quayline_kv_cache::evict::{Arc, CostAware, Fair, LeafFirst, Policy, PolicyName, Slru};
use quayline_kv_cache::*;

mod plain;

use plain::{PlainArc, PlainCost, PlainLeafFirst, PlainLru, PlainSlru};

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
    for run in 0..60 {
        let mut random = Random(seed * 1000 + run);
        let blocks = BlockCount(2 + random.below(24));
        let config = Config::new(BlockSize::new(SIZE).unwrap(), blocks);
        let hasher = || Xxh3::new(0);
        let mut a = KvCache::with(config.clone(), hasher(), &policy).unwrap();
        let mut b = KvCache::with(config, hasher(), &plain).unwrap();
        for step in 0..300 {
            let at = format!("seed {seed}, run {run}, step {step}, {blocks} blocks");
            let call = Call::random(&mut random);
            assert_eq!(call.on(&mut a), call.on(&mut b), "{at}: {call:?}");
            let order = [a.free_blocks().collect::<Vec<_>>(), b.free_blocks().collect()];
            assert_eq!(order[0], order[1], "{at}: free blocks after {call:?}");
            assert_eq!(a.stats(), b.stats(), "{at}");
            assert_eq!(a.check(), Ok(()), "{at}: after {call:?}");
        }
    }
}

#[derive(Debug)]
enum Call {
    Open { sequence: SequenceId, tokens: Vec<TokenId>, reuse: Reuse },
    Push { sequence: SequenceId, tokens: Vec<TokenId> },
    Claim { sequence: SequenceId, new: u32 },
    Withdraw { sequence: SequenceId },
    Release { sequence: SequenceId },
    Close { sequence: SequenceId },
    Reset,
}

impl Call {
    fn random(random: &mut Random) -> Call {
        let sequence = SequenceId(random.below(5).into());
        match random.below(20) {
            0..5 => {
                let reuse = if random.below(6) == 0 { Reuse::WriteOnly } else { Reuse::ReadWrite };
                Call::Open { sequence, tokens: prompt(random), reuse }
            }
            5 => Call::Push { sequence, tokens: vec![random.below(3); random.below(4) as usize] },
            6..13 => Call::Claim { sequence, new: random.below(12) },
            13 => Call::Withdraw { sequence },
            14 => Call::Release { sequence },
            15..19 => Call::Close { sequence },
            _ if random.below(8) == 0 => Call::Reset,
            _ => Call::Close { sequence },
        }
    }

    fn on<E: Eviction>(&self, cache: &mut KvCache<Xxh3, E>) -> String {
        match self {
            Call::Open { sequence, tokens, reuse } => {
                let key = SequenceKey::default();
                format!("{:?}", cache.open(*sequence, key, tokens, *reuse))
            }
            Call::Push { sequence, tokens } => format!("{:?}", cache.push(*sequence, tokens)),
            Call::Claim { sequence, new } => claim(cache, *sequence, *new),
            Call::Withdraw { sequence } => format!("{:?}", cache.withdraw(*sequence)),
            Call::Release { sequence } => format!("{:?}", cache.release(*sequence)),
            Call::Close { sequence } => format!("{:?}", cache.close(*sequence)),
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
