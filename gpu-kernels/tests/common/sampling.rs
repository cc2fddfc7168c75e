//! Sampling as any implementation of the operators does it, against a sort, in f64.
#![allow(dead_code, reason = "each test file uses its part")]

use half::bf16;
use quayline_gpu_kernels::{Draw, Error, Sampled, Sampling, Seen};

use crate::common::{self, Random};

fn sample<O: Sampling>(ops: &O, rows: &[Vec<f32>], draws: &[Draw<'_>], mask: &[u32]) -> Vec<Sampled> {
    let vocabulary = rows.first().map_or(1, Vec::len);
    let mut logits = ops.tensor(rows.len(), vocabulary).unwrap();
    ops.write(&mut logits, &rows.concat()).unwrap();
    ops.sample(&logits, draws, mask).unwrap()
}

fn logits(random: &mut Random, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| bf16::from_f32(random.float() * size).to_f32()).collect()
}

/// The tokens that stay, with their probabilities, in order of the vocabulary.
fn exact(logits: &[f32], draw: &Draw<'_>, allowed: impl Fn(usize) -> bool) -> Vec<(usize, f64)> {
    let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for seen in draw.seen {
        let x = &mut x[seen.token as usize];
        *x = if *x > 0.0 { *x / f64::from(draw.repetition) } else { *x * f64::from(draw.repetition) };
        if seen.count > 0 {
            *x -= f64::from(draw.presence) + f64::from(draw.frequency) * f64::from(seen.count);
        }
    }
    let mut kept: Vec<(usize, f64)> = x.into_iter().enumerate().filter(|&(i, _)| allowed(i)).collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1));
    let Some(&(_, most)) = kept.first() else { return Vec::new() };
    if draw.temperature == 0.0 {
        let first = kept.iter().filter(|k| k.1 == most).map(|k| k.0).min();
        return first.map(|i| (i, 1.0)).into_iter().collect();
    }
    let weight = |x: f64| ((x - most) / f64::from(draw.temperature)).exp();
    kept.retain(|k| weight(k.1) >= f64::from(draw.min_p) * (1.0 - 1e-6));
    if let Some(&(_, last)) = kept.get((draw.top_k as usize).wrapping_sub(1)) {
        kept.retain(|k| k.1 >= last);
    }
    let total: f64 = kept.iter().map(|k| weight(k.1)).sum();
    if draw.top_p < 1.0 {
        let mut sum = 0.0;
        let reached = kept.iter().find(|k| {
            sum += weight(k.1);
            sum > f64::from(draw.top_p) * total
        });
        let last = reached.map_or(f64::NEG_INFINITY, |k| k.1);
        kept.retain(|k| k.1 >= last);
    }
    let total: f64 = kept.iter().map(|k| weight(k.1)).sum();
    kept.sort_by_key(|k| k.0);
    kept.into_iter().map(|(i, x)| (i, weight(x) / total)).collect()
}

/// A draw falls where the sorted distribution says. Gives back what was drawn.
pub(crate) fn draws<O: Sampling>(ops: &O) -> Vec<Sampled> {
    let mut all = Vec::new();
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let vocabulary: usize = random.pick(&[1, 2, 31, 111, 1000, 4000]);
        let (size, mut rows, mut draws) = (random.pick(&[0.1, 3.0, 20.0]), Vec::new(), Vec::new());
        let words = vocabulary.div_ceil(32);
        let mask: Vec<u32> = (0..words).map(|_| random.next() as u32 | 1).collect();
        let seen: Vec<Seen> = (0..vocabulary.min(9))
            .map(|i| Seen { token: (i * 7 % vocabulary) as u32, count: random.below(3) as u32 })
            .collect::<Vec<_>>();
        let seen = if vocabulary > 62 { seen } else { Vec::new() };
        for _ in 0..4 {
            rows.push(logits(&mut random, vocabulary, size));
            draws.push(Draw {
                temperature: random.pick(&[0.0, 0.5, 1.0, 2.0]),
                top_k: random.pick(&[0, 0, 1, 5, 50, 5000]),
                top_p: random.pick(&[1.0, 0.0, 0.3, 0.9, 0.999]),
                min_p: random.pick(&[0.0, 0.0, 0.05, 1.0]),
                repetition: random.pick(&[1.0, 1.3]),
                presence: random.pick(&[0.0, 0.5]),
                frequency: random.pick(&[0.0, 0.25]),
                seen: if random.flip() { &seen } else { &[] },
                mask_row: random.flip().then_some(0),
                random: random.next(),
            });
        }
        let found = sample(ops, &rows, &draws, &mask);
        for ((row, draw), found) in rows.iter().zip(&draws).zip(&found) {
            let allowed = |i: usize| draw.mask_row.is_none() || mask[i / 32] >> (i % 32) & 1 == 1;
            let kept = exact(row, draw, allowed);
            let at = draw.random as f64 / 2_f64.powi(64);
            // The token's share of [0, 1), and a hair for f32's exponentials.
            let mut before = 0.0;
            let share = kept.iter().find_map(|&(i, p)| {
                let from = before;
                before += p;
                (i == found.token as usize).then_some(from..before)
            });
            let what = format!("seed {seed} {vocabulary}: {draw:?}: {found:?}, kept {}", kept.len());
            assert!(share.is_some(), "{what}: not kept");
            let share = share.unwrap();
            assert!(share.start - 1e-5 <= at && at <= share.end + 1e-5, "{what}: {at} not in {share:?}");
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
            let logprob = f64::from(row[found.token as usize] - most) - sum.ln();
            common::close(found.logprob, logprob, 1e-4, || what.clone());
        }
        // A row alone draws the same.
        for i in 0..rows.len() {
            let alone = sample(ops, &rows[i..=i], &draws[i..=i], &mask);
            assert_eq!(alone[0], found[i], "seed {seed}");
        }
        all.extend(found);
    }
    all
}

pub(crate) fn edges_of_the_vocabulary<O: Sampling>(ops: &O) {
    let none = f32::NEG_INFINITY;
    let one = |row: Vec<f32>, draw: Draw<'_>, mask: &[u32]| sample(ops, &[row], &[draw], mask)[0];
    // All but one are impossible, or no number.
    assert_eq!(one(vec![none, none, 3.0, f32::NAN], Draw::default(), &[]).token, 2);
    // Nothing is allowed.
    let nothing = one(vec![1.0; 40], Draw { mask_row: Some(0), ..Draw::default() }, &[0, 0]);
    assert_eq!(nothing, Sampled { token: u32::MAX, logprob: none });
    // Equal logits: the first when greedy, all of them when drawn.
    let greedy = Draw { temperature: 0.0, random: u64::MAX, ..Draw::default() };
    assert_eq!(one(vec![1.0, 2.0, 2.0, 2.0], greedy, &[]).token, 1);
    assert_eq!(one(vec![-1.0, -0.0, 0.0], greedy, &[]).token, 1, "both are zero");
    let last = Draw { random: u64::MAX, top_k: 1, ..Draw::default() };
    assert_eq!(one(vec![1.0, 2.0, 2.0, 2.0], last, &[]).token, 3);
    // A temperature whose reciprocal is infinite.
    let cold = Draw { temperature: f32::from_bits(1), random: u64::MAX, ..Draw::default() };
    assert_eq!(one(vec![1.0, 3.0, 2.0], cold, &[]).token, 1);
    // min-p bounds the probability, not the logit.
    let bounded = Draw { min_p: 0.3, random: u64::MAX, ..Draw::default() };
    for (temperature, token) in [(0.5, 0), (1.0, 1), (2.0, 2)] {
        assert_eq!(one(vec![0.0, -1.0, -2.0], Draw { temperature, ..bounded }, &[]).token, token);
    }
    // A vocabulary of the size in use.
    let mut random = Random::new(5);
    let row = logits(&mut random, 151_936, 10.0);
    let draw = Draw { top_p: 0.9, top_k: 50, random: random.next(), ..Draw::default() };
    let kept = exact(&row, &draw, |_| true);
    let token = one(row, draw, &[]).token as usize;
    assert!(kept.iter().any(|k| k.0 == token));
}

pub(crate) fn numbers_that_mean_nothing_are_refused<O: Sampling>(ops: &O) {
    let mut x = ops.tensor(1, 8).unwrap();
    ops.write(&mut x, &[0.0; 8]).unwrap();
    let draw = Draw::default();
    for wrong in [
        Draw { temperature: f32::NAN, ..draw },
        Draw { temperature: -1.0, ..draw },
        Draw { top_p: 1.5, ..draw },
        Draw { min_p: -0.1, ..draw },
        Draw { repetition: 0.0, ..draw },
        Draw { mask_row: Some(0), ..draw },
        Draw { seen: &[Seen { token: 8, count: 1 }], ..draw },
    ] {
        assert!(ops.sample(&x, &[wrong], &[]).is_err(), "{wrong:?}");
    }
    assert!(matches!(ops.sample(&x, &[], &[]), Err(Error::Shape { found: 0, expected: 1, .. })));
    assert!(ops.sample(&x, &[draw], &[0, 0]).is_ok(), "two rows of a mask that nobody looks at");
}
