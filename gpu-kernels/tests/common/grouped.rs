//! Mixtures of experts and adapters as any implementation of the operators computes them: choices against a sort,
//! products against `linear`, bit for bit.
#![allow(dead_code, reason = "each test file uses its part")]

use quayline_gpu_kernels::{Dtype, Error, Grouped, Ops, Projection, Router};

use crate::common::{Random, bits, close, rounded, store};

fn floats(random: &mut Random, dtype: Dtype, n: usize) -> Vec<f32> {
    (0..n).map(|_| rounded(dtype, random.float())).collect()
}

fn tensor<O: Ops>(ops: &O, cols: usize, elements: &[f32]) -> O::Tensor {
    let mut x = ops.tensor(elements.len() / cols, cols).unwrap();
    ops.write(&mut x, elements).unwrap();
    x
}

fn matrix<O: Ops>(ops: &O, dtype: Dtype, cols: usize, elements: &[f32]) -> O::Weight {
    ops.weight(store(dtype, &[elements.len() / cols, cols], elements, 1).source).unwrap()
}

/// Rows of `x` times a weight.
fn linear<O: Ops>(ops: &O, x: &O::Tensor, weight: &O::Weight, (rows, out): (usize, usize)) -> Vec<f32> {
    let mut y = ops.tensor(rows, out).unwrap();
    ops.linear(x, &mut [Projection { weight, bias: None, out: &mut y }]).unwrap();
    ops.read(&y).unwrap().into_owned()
}

/// A token's experts and weights, by a sort in f64.
fn choose<O: Ops>(logits: &[f32], bias: &[f32], router: Router<'_, O>) -> Vec<(u32, f64)> {
    let n = logits.len();
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let score = |&x: &f32| {
        if router.sigmoid { 1.0 / (1.0 + (-f64::from(x)).exp()) } else { f64::from(x - most).exp() }
    };
    let mut scores: Vec<f64> = logits.iter().map(score).collect();
    if !router.sigmoid {
        let total: f64 = scores.iter().sum();
        scores.iter_mut().for_each(|s| *s /= total);
    }
    let choice = |i: usize| scores[i] + f64::from(bias[i]);
    let size = n / router.groups;
    let mut groups: Vec<(usize, f64)> = (0..router.groups)
        .map(|g| {
            let mut of: Vec<f64> = (g * size..(g + 1) * size).map(choice).collect();
            of.sort_by(|a, b| b.total_cmp(a));
            (g, if router.bias.is_some() { of.iter().take(2).sum() } else { of[0] })
        })
        .collect();
    groups.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut experts: Vec<usize> =
        groups[..router.groups_chosen].iter().flat_map(|&(g, _)| g * size..(g + 1) * size).collect();
    experts.sort_by(|&a, &b| choice(b).total_cmp(&choice(a)).then(a.cmp(&b)));
    experts.truncate(router.chosen);
    let total: f64 = if router.renormalise { experts.iter().map(|&e| scores[e]).sum() } else { 1.0 };
    experts.into_iter().map(|e| (e as u32, scores[e] / total * f64::from(router.factor))).collect()
}

pub(crate) fn the_best_experts_are_chosen<O: Grouped>(dtype: Dtype, ops: &O, random: &mut Random) {
    for (experts, chosen, groups, groups_chosen) in
        [(1, 1, 1, 1), (8, 2, 1, 1), (60, 4, 1, 1), (64, 6, 8, 3), (256, 8, 8, 4)]
    {
        for (sigmoid, biased, renormalise) in
            [(false, false, true), (false, false, false), (true, true, true)]
        {
            let tokens = 7;
            // Far apart enough that rounding does not decide.
            let mut order: Vec<usize> = (0..experts).collect();
            let logits: Vec<f32> = (0..tokens)
                .flat_map(|_| {
                    random.shuffle(&mut order);
                    order.iter().map(|&i| rounded(dtype, i as f32 / 32.0 - 3.0)).collect::<Vec<_>>()
                })
                .collect();
            let bias: Vec<f32> =
                (0..experts).map(|_| if biased { random.float() * 0.2 } else { 0.0 }).collect();
            let on_device = ops.floats(&bias).unwrap();
            let router = Router {
                chosen,
                sigmoid,
                bias: biased.then_some(&on_device),
                groups,
                groups_chosen,
                renormalise,
                factor: 2.5,
            };
            let routing = ops.route(&tensor(ops, experts, &logits), router).unwrap();
            let (found, weights) = ops.read_routing(&routing).unwrap();
            for (token, logits) in logits.chunks(experts).enumerate() {
                let expected = choose(logits, &bias, router);
                for (i, (expert, weight)) in expected.into_iter().enumerate() {
                    let at = token * chosen + i;
                    let what =
                        || format!("{experts} experts, {chosen} chosen, sigmoid {sigmoid}, token {token}");
                    assert_eq!(found[at], expert, "{}, choice {i}", what());
                    close(weights[at], weight, 1e-5, what);
                }
            }
        }
    }
}

pub(crate) fn pairs_have_the_bits_of_a_product_with_all_experts<O: Grouped>(
    dtype: Dtype,
    ops: &O,
    random: &mut Random,
) {
    for (tokens, experts, chosen, inner, outer) in [(1, 4, 2, 40, 24), (9, 3, 1, 8, 130), (150, 5, 2, 72, 16)]
    {
        let logits = floats(random, dtype, tokens * experts);
        let router = Router { chosen, ..Router::default() };
        let routing = ops.route(&tensor(ops, experts, &logits), router).unwrap();
        let (of, weights) = ops.read_routing(&routing).unwrap();
        let up: Vec<f32> = floats(random, dtype, experts * outer * inner);
        let down: Vec<f32> = floats(random, dtype, experts * inner * outer);
        let x = floats(random, dtype, tokens * inner);
        let input = tensor(ops, inner, &x);
        let (up, down) = (matrix(ops, dtype, inner, &up), matrix(ops, dtype, outer, &down));
        let mut middle = ops.tensor(tokens * chosen, outer).unwrap();
        ops.expert_linear(&input, &routing, &up, &mut middle).unwrap();
        let mut parts = ops.tensor(tokens * chosen, inner).unwrap();
        ops.expert_linear(&middle, &routing, &down, &mut parts).unwrap();
        // Every token through every expert; a pair must have the bits of its own.
        let (middle, found) = (ops.read(&middle).unwrap(), ops.read(&parts).unwrap());
        let ups = linear(ops, &input, &up, (tokens, experts * outer));
        let downs = linear(ops, &tensor(ops, outer, &middle), &down, (tokens * chosen, experts * inner));
        for (pair, &expert) in of.iter().enumerate() {
            let what = format!("{tokens} tokens, {experts} experts, pair {pair} {dtype}");
            let expected = &ups[(pair / chosen * experts + expert as usize) * outer..][..outer];
            assert_eq!(bits(&middle[pair * outer..][..outer]), bits(expected), "{what}");
            let expected = &downs[(pair * experts + expert as usize) * inner..][..inner];
            assert_eq!(bits(&found[pair * inner..][..inner]), bits(expected), "{what}");
        }
        let shared = floats(random, dtype, tokens * inner);
        for accumulate in [false, true] {
            let mut out = tensor(ops, inner, &shared);
            ops.combine(&parts, &routing, accumulate, &mut out).unwrap();
            for (i, &sum) in ops.read(&out).unwrap().iter().enumerate() {
                let (token, column) = (i / inner, i % inner);
                let pairs = token * chosen..(token + 1) * chosen;
                let exact: f64 = pairs
                    .map(|pair| f64::from(found[pair * inner + column]) * f64::from(weights[pair]))
                    .sum::<f64>()
                    + if accumulate { f64::from(shared[i]) } else { 0.0 };
                close(sum, exact, exact.abs() / 250.0 + 1e-5, || format!("token {token}, column {column}"));
            }
        }
    }
}

pub(crate) fn adapters_change_their_rows_alone<O: Grouped>(dtype: Dtype, ops: &O, random: &mut Random) {
    for (rows, adapters, rank, inner, outer) in
        [(1, 1, 8, 16, 16), (20, 3, 16, 100, 40), (200, 2, 4, 24, 150)]
    {
        let adapter_of: Vec<Option<u32>> =
            (0..rows).map(|_| random.below(adapters + 1).checked_sub(1).map(|a| a as u32)).collect();
        let x = floats(random, dtype, rows * inner);
        let (a, b) =
            (floats(random, dtype, adapters * rank * inner), floats(random, dtype, adapters * outer * rank));
        let before = floats(random, dtype, rows * outer);
        let factors: Vec<f32> = (0..adapters).map(|_| random.float()).collect();
        let weights = (&matrix(ops, dtype, inner, &a), &matrix(ops, dtype, rank, &b));
        let (input, mut out) = (tensor(ops, inner, &x), tensor(ops, outer, &before));
        let factors_on_device = ops.floats(&factors).unwrap();
        ops.lora(&input, &adapter_of, weights, &factors_on_device, &mut out).unwrap();
        let out = ops.read(&out).unwrap();
        for (row, of) in adapter_of.iter().enumerate() {
            let found = &out[row * outer..][..outer];
            let before = &before[row * outer..][..outer];
            let Some(of) = of.map(|of| of as usize) else {
                assert_eq!(found, before, "row {row} has no adapter");
                continue;
            };
            let x = &x[row * inner..][..inner];
            let dot = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
            };
            let between: Vec<f32> =
                (0..rank).map(|r| dot(x, &a[(of * rank + r) * inner..][..inner]) as f32).collect();
            for column in 0..outer {
                let b = &b[(of * outer + column) * rank..][..rank];
                let exact = f64::from(before[column]) + f64::from(factors[of]) * dot(&between, b);
                // The vector between is rounded, each number by itself.
                let size: f64 = between.iter().zip(b).map(|(x, b)| f64::from((x * b).abs())).sum();
                let error = (size + exact.abs()) / if dtype == Dtype::F16 { 2000.0 } else { 250.0 } + 1e-5;
                close(found[column], exact, error, || format!("{dtype} row {row}, column {column}"));
            }
        }
    }
}

pub(crate) fn numbers_that_do_not_fit_are_refused<O: Grouped>(ops: &O) {
    let dtype = Dtype::Bf16;
    let logits = tensor(ops, 8, &[0.0; 16]);
    let refused = |router| ops.route(&logits, router).map(drop).unwrap_err().to_string();
    let router = Router { chosen: 2, ..Router::default() };
    assert_eq!(
        refused(Router { chosen: 9, ..router }),
        "route: experts of a token is 9, the most allowed is 8"
    );
    assert_eq!(
        refused(Router { groups: 3, ..router }),
        "route: experts is 8, which is not a positive multiple of 3"
    );
    assert_eq!(
        refused(Router { groups: 8, ..router }),
        "route: experts of a token is 2, the most allowed is 1",
        "one expert is left of one group of eight"
    );
    let routing = ops.route(&logits, router).unwrap();
    let weights = matrix(ops, dtype, 4, &[0.0; 8 * 3 * 4]);
    let (x, mut out) = (tensor(ops, 4, &[0.0; 8]), ops.tensor(4, 3).unwrap());
    ops.expert_linear(&x, &routing, &weights, &mut out).unwrap();
    let mut wrong = ops.tensor(4, 4).unwrap();
    assert!(matches!(
        ops.expert_linear(&x, &routing, &weights, &mut wrong),
        Err(Error::Shape { dimension: "out of the weights of all experts", found: 24, expected: 32, .. })
    ));
    let (a, b, factors) =
        (matrix(ops, dtype, 4, &[0.0; 8]), matrix(ops, dtype, 2, &[0.0; 6]), ops.floats(&[1.0]).unwrap());
    let mut y = tensor(ops, 3, &[0.0; 6]);
    ops.lora(&x, &[None, Some(0)], (&a, &b), &factors, &mut y).unwrap();
    assert!(matches!(
        ops.lora(&x, &[None, Some(1)], (&a, &b), &factors, &mut y),
        Err(Error::TooLarge { dimension: "adapter", found: 1, max: 0, .. })
    ));
}
