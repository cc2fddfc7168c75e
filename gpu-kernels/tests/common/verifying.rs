//! Draft verification as any implementation of the operators does it: walks against a host's walk, against sampling
//! one token at a time, and the distribution of what comes out.
#![allow(dead_code, reason = "each test file uses its part")]

use quayline_gpu_kernels::{Draft, Drafts, Draw, Error, Sampling, Verified};

use crate::common::Random;

/// Logits of `rows` rows, and their distributions at some temperature.
fn distributions<O: Sampling>(
    ops: &O,
    logits: &[f32],
    vocabulary: usize,
    draw: Draw<'_>,
) -> O::Distributions {
    let rows = logits.len() / vocabulary;
    let mut x = ops.tensor(rows, vocabulary).unwrap();
    ops.write(&mut x, logits).unwrap();
    ops.distributions(&x, &vec![draw; rows], &[]).unwrap()
}

/// One row of a distribution on the host.
#[derive(Clone)]
struct Weights {
    weights: Vec<f32>,
    total: u64,
}

fn mass(weight: f32) -> u64 {
    (weight * 2_f32.powi(40)) as u64
}

impl Weights {
    fn scale(&self) -> f32 {
        2_f32.powi(40) / self.total as f32
    }

    fn draw(&self, random: u64) -> u32 {
        let target = ((u128::from(self.total) * u128::from(random)) >> 64) as u64;
        let mut sum = 0;
        let reached = self.weights.iter().position(|&weight| {
            sum += mass(weight);
            target < sum
        });
        reached.map_or(u32::MAX, |i| i as u32)
    }

    fn without(self, other: &Self) -> Self {
        let (ours, theirs) = (self.scale(), other.scale());
        let more = |(p, q): (&f32, &f32)| (p * ours - q * theirs).max(0.0);
        let weights: Vec<f32> = self.weights.iter().zip(&other.weights).map(more).collect();
        let total = weights.iter().map(|&weight| mass(weight)).sum();
        if total == 0 { self } else { Self { weights, total } }
    }
}

fn rows<O: Sampling>(ops: &O, distributions: &O::Distributions, vocabulary: usize) -> Vec<Weights> {
    let (weights, totals) = ops.read_distributions(distributions).unwrap();
    let row = |(weights, &total): (&[f32], &u64)| Weights { weights: weights.to_vec(), total };
    weights.chunks(vocabulary).zip(&totals).map(row).collect()
}

/// The walk as the papers write it.
fn walk(target: &[Weights], drafted: Option<&[Weights]>, request: &Drafts<'_>) -> Verified {
    let (mut accepted, mut at): (Vec<u32>, Option<u32>) = (Vec::new(), None);
    loop {
        let node = at.map_or(0, |draft| draft as usize + 1);
        let mut p = target[request.row + node].clone();
        if p.total == 0 {
            return Verified { accepted, token: u32::MAX };
        }
        let drawn = p.draw(request.random[node]);
        let children = (0..).zip(request.drafts).filter(|(_, draft)| draft.parent == at);
        let mut stands = None;
        for (index, draft) in children {
            let token = draft.token as usize;
            let Some(drafted) = drafted else {
                stands = stands.or((draft.token == drawn).then_some(index));
                continue;
            };
            let q = &drafted[draft.from];
            let share = (draft.accept >> 40) as f32 * 2_f32.powi(-24);
            if share * (q.weights[token] * q.scale()) < p.weights[token] * p.scale() {
                stands = Some(index);
                break;
            }
            p = p.without(q);
        }
        let Some(index) = stands else {
            return Verified { accepted, token: p.draw(request.random[node]) };
        };
        accepted.push(index);
        at = Some(index);
    }
}

/// A random tree; a chain when it has no branches.
fn tree(random: &mut Random, vocabulary: usize, len: usize, chain: bool) -> (Vec<Draft>, Vec<u64>) {
    let drafts = (0..len).map(|i| {
        let before = if chain { i } else { random.below(i + 1) };
        Draft {
            token: random.below(vocabulary) as u32,
            parent: before.checked_sub(1).map(|parent| parent as u32),
            from: before,
            accept: random.next(),
        }
    });
    let drafts: Vec<_> = drafts.collect();
    let randoms = (0..=len).map(|_| random.next()).collect();
    (drafts, randoms)
}

pub(crate) fn walks_of_chains_and_trees_are_those_of_the_host<O: Sampling>(ops: &O) {
    let (mut stood, mut fell) = (0, 0);
    for seed in 0..25 {
        let mut random = Random::new(seed);
        let vocabulary = random.pick(&[1, 2, 7, 33, 700]);
        let trees: Vec<_> = (0..4)
            .map(|i| {
                let len = random.below(9);
                tree(&mut random, vocabulary, len, i % 2 == 0)
            })
            .collect();
        let size = random.pick(&[0.0, 1.0, 6.0]);
        let all: usize = trees.iter().map(|(drafts, _)| drafts.len() + 1).sum();
        let logits = |random: &mut Random| -> Vec<f32> {
            (0..all * vocabulary).map(|_| random.float() * size).collect()
        };
        let draw = Draw {
            temperature: random.pick(&[0.0, 0.7, 1.0]),
            top_k: random.pick(&[0, 3]),
            ..Draw::default()
        };
        let target = distributions(ops, &logits(&mut random), vocabulary, draw);
        let drafted = distributions(ops, &logits(&mut random), vocabulary, Draw::default());
        let (target_rows, drafted_rows) = (rows(ops, &target, vocabulary), rows(ops, &drafted, vocabulary));
        let mut row = 0;
        let mut requests = Vec::new();
        for (drafts, random) in &trees {
            requests.push(Drafts { row, drafts, random });
            row += drafts.len() + 1;
        }
        for with in [false, true] {
            let found = ops.verify(&target, with.then_some(&drafted), &requests).unwrap();
            for (request, found) in requests.iter().zip(found) {
                let expected = walk(&target_rows, with.then_some(&drafted_rows), request);
                assert_eq!(
                    found, expected,
                    "seed {seed}, vocabulary {vocabulary}, drafted {with}: {request:?}"
                );
                stood += found.accepted.len();
                fell += request.drafts.len() - found.accepted.len();
            }
        }
    }
    assert!(stood > 50 && fell > 50, "{stood} stand, {fell} fall");
}

pub(crate) fn without_distributions_the_tokens_are_those_of_sampling_one_at_a_time<O: Sampling>(ops: &O) {
    for (seed, temperature) in [(0, 0.0), (1, 0.8), (2, 1.5)] {
        let mut random = Random::new(seed);
        let (vocabulary, len) = (9, 6);
        let logits: Vec<f32> = (0..(len + 1) * vocabulary).map(|_| random.float() * 4.0).collect();
        let mut x = ops.tensor(len + 1, vocabulary).unwrap();
        ops.write(&mut x, &logits).unwrap();
        let (mut drafts, randoms) = tree(&mut random, vocabulary, len, true);
        let draws: Vec<_> = randoms
            .iter()
            .map(|&random| Draw { temperature, top_p: 0.95, random, ..Draw::default() })
            .collect();
        let sampled = ops.sample(&x, &draws, &[]).unwrap();
        let target = ops.distributions(&x, &draws, &[]).unwrap();
        // All right, then wrong from some draft on.
        for right in 0..=len {
            for (i, draft) in drafts.iter_mut().enumerate() {
                let token = sampled[i].token;
                draft.token = if i < right { token } else { (token + 1) % vocabulary as u32 };
            }
            let request = Drafts { row: 0, drafts: &drafts, random: &randoms };
            let found = ops.verify(&target, None, &[request]).unwrap();
            let accepted = (0..right as u32).collect();
            assert_eq!(found, [Verified { accepted, token: sampled[right].token }], "seed {seed}");
        }
    }
}

/// What a device's walk gives is what the host's gives, which the tests above show; so the law is tried on the
/// host's.
pub(crate) fn the_first_token_is_distributed_as_the_target<O: Sampling>(ops: &O) {
    let (vocabulary, mut random) = (6, Random::new(9));
    let logits: Vec<f32> = (0..2 * vocabulary).map(|_| random.float() * 2.0).collect();
    let both = distributions(ops, &logits, vocabulary, Draw::default());
    let both = rows(ops, &both, vocabulary);
    // Row 0 is the target after every node; row 1 is what all drafts are drawn from.
    let (draws, mut counts) = (100_000, vec![0_u32; vocabulary]);
    for _ in 0..draws {
        let mut draft =
            || Draft { token: both[1].draw(random.next()), parent: None, from: 0, accept: random.next() };
        let drafts = [draft(), draft(), draft()];
        let randoms = [0; 4].map(|_: u64| random.next());
        let request = Drafts { row: 0, drafts: &drafts, random: &randoms };
        let target = vec![both[0].clone(); 4];
        let verified = walk(&target, Some(&both[1..]), &request);
        let first = verified.accepted.first().map_or(verified.token, |&i| drafts[i as usize].token);
        counts[first as usize] += 1;
    }
    for (weight, &count) in both[0].weights.iter().zip(&counts) {
        let expected = f64::from(weight * both[0].scale());
        // Five standard deviations.
        let error = 5.0 * (expected * (1.0 - expected) / f64::from(draws)).sqrt();
        let share = f64::from(count) / f64::from(draws);
        assert!((share - expected).abs() < error, "{share} of {expected}, allowed {error}: {counts:?}");
    }
}

pub(crate) fn wrong_trees_are_refused_and_nothing_allowed_is_no_token<O: Sampling>(ops: &O) {
    let target = distributions(ops, &[1.0; 8], 4, Draw::default());
    let nowhere = distributions(ops, &[f32::NEG_INFINITY; 8], 4, Draw::default());
    let draft = Draft { token: 1, parent: None, from: 0, accept: 0 };
    let verify = |draft: Draft, row: usize, random: &[u64]| {
        ops.verify(&target, Some(&target), &[Drafts { row, drafts: &[draft], random }])
    };
    assert!(verify(draft, 0, &[0, 0]).is_ok());
    let wrong = [
        (verify(draft, 1, &[0, 0]), "row of the target", 2),
        (verify(Draft { token: 4, ..draft }, 0, &[0, 0]), "drafted token", 4),
        (verify(Draft { parent: Some(0), ..draft }, 0, &[0, 0]), "parent of a draft", 0),
        (verify(Draft { from: 2, ..draft }, 0, &[0, 0]), "row of the drafts", 2),
    ];
    for (refused, what, number) in wrong {
        let Err(Error::TooLarge { dimension, found, .. }) = refused else {
            unreachable!("{what}: {refused:?}")
        };
        assert_eq!((dimension, found), (what, number));
    }
    assert!(matches!(verify(draft, 0, &[0]), Err(Error::Shape { dimension: "random numbers", .. })));
    let request = Drafts { row: 0, drafts: &[draft], random: &[0, 0] };
    let nothing = [Verified { accepted: vec![], token: u32::MAX }];
    assert_eq!(ops.verify(&nowhere, None, &[request]).unwrap(), nothing);
    assert_eq!(ops.verify(&target, None, &[]).unwrap(), []);
}
