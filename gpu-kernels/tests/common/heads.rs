//! Products of heads with matrices of their own, around latent attention, as any implementation computes them.

use quayline_gpu_kernels::{
    BatchInput, Dtype, Latent, LatentAttention, LatentQuery, Ops, Projection, Scores, Span,
};

use crate::common::{Random, bits, close, store};
use crate::latents::{BLOCK_SIZE, Case, append, case, floats, pool, tensor};

/// `[heads · out, in]` of a head's own matrix.
fn matrix<O: Ops>(ops: &O, dtype: Dtype, into: usize, elements: &[f32]) -> O::Weight {
    ops.weight(store(dtype, &[elements.len() / into, into], elements, 0).source).unwrap()
}

/// Products of heads with matrices of their own: the sums, and the bits that each part has by itself.
pub(crate) fn heads_have_matrices_of_their_own<O: Latent>(dtype: Dtype, ops: &O, random: &mut Random) {
    for (tokens, heads, into, outs) in [(1, 16, 128, 512), (3, 3, 24, 8), (70, 2, 576, 136), (17, 1, 64, 64)]
    {
        let x = floats(random, dtype, tokens * heads * into, 1.0);
        let weights = floats(random, dtype, heads * outs * into, 1.0);
        let input = tensor(ops, heads * into, &x);
        let mut out = tensor(ops, heads * outs, &vec![f32::NAN; tokens * heads * outs]);
        ops.head_linear(&input, &matrix(ops, dtype, into, &weights), heads, &mut out).unwrap();
        let found = ops.read(&out).unwrap();
        for head in 0..heads {
            let own = &weights[head * outs * into..][..outs * into];
            let parts: Vec<f32> = x.chunks(into).skip(head).step_by(heads).flatten().copied().collect();
            let mut alone = ops.tensor(tokens, outs).unwrap();
            let (parts_in, own_in) = (tensor(ops, into, &parts), matrix(ops, dtype, into, own));
            let product = Projection { weight: &own_in, bias: None, out: &mut alone };
            ops.linear(&parts_in, &mut [product]).unwrap();
            let alone = ops.read(&alone).unwrap();
            for token in 0..tokens {
                let what = format!("{dtype}: token {token} of {tokens}, head {head} of {heads}");
                let part = &found[(token * heads + head) * outs..][..outs];
                assert_eq!(bits(part), bits(&alone[token * outs..][..outs]), "{what}");
                for (&found, own) in part.iter().zip(own.chunks(into)) {
                    let terms = || parts[token * into..][..into].iter().zip(own);
                    let exact: f64 = terms().map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    let size: f64 = terms().map(|(&x, &w)| (f64::from(x) * f64::from(w)).abs()).sum();
                    // Activations of bf16, where they are rounded, and products of pairs of it.
                    close(found, exact, exact.abs() / 200.0 + size / 200.0, || what.clone());
                }
            }
        }
    }
    // No tokens, and an output of other rows before.
    let mut out = tensor(ops, 16, &[f32::NAN; 32]);
    let nothing = ops.tensor(4, 16).unwrap();
    ops.head_linear(&nothing, &matrix(ops, dtype, 8, &[1.0; 128]), 2, &mut out).unwrap();
    assert!(ops.read(&out).unwrap().is_empty());
}

/// What products of heads refuse.
pub(crate) fn heads_that_do_not_fit_are_refused<O: Latent>(ops: &O) {
    let weights = |rows: usize, cols: usize| matrix(ops, Dtype::Bf16, cols, &vec![1.0; rows * cols]);
    let x = tensor(ops, 32, &[0.0; 64]);
    let mut out = ops.tensor(2, 48).unwrap();
    let mut said = |x, weights, heads| ops.head_linear(x, &weights, heads, &mut out).unwrap_err().to_string();
    for (rows, cols, heads, expected) in [
        (48, 8, 3, "width of x is 32, which is not a positive multiple of 3"),
        (48, 16, 0, "width of x is 32, which is not a positive multiple of 0"),
        (47, 16, 2, "out of the weights of all heads is 47, which is not a positive multiple of 2"),
        (48, 8, 2, "in of the weights is 8, expected 16"),
        (24, 4, 8, "in of a head is 4, which is not a positive multiple of 8"),
        (24, 16, 2, "out of a head is 12, which is not a positive multiple of 8"),
        (32, 16, 2, "width of the output is 48, expected 32"),
    ] {
        assert_eq!(said(&x, weights(rows, cols), heads), format!("head_linear: {expected}"));
    }
    let long = tensor(ops, 32, &[0.0; 96]);
    let expected = "head_linear: rows of the output is 3, the most allowed is 2";
    assert_eq!(said(&long, weights(48, 16), 2), expected);
}

/// The absorbed form is the attention that it stands for: keys and values of each head, made of the latents.
pub(crate) fn the_absorbed_form_is_attention<O: Latent>(dtype: Dtype, ops: &O, error: f64) {
    let (heads, nope, rope, latent, value, context, queries) = (3, 24, 16, 64, 32, 37, 2);
    let random = &mut Random::new(41);
    let [q, q_rope] = [nope, rope].map(|n| floats(random, dtype, queries * heads * n, 1.0));
    let rows = floats(random, dtype, context * (latent + rope), 1.0);
    let [up_k, up_v] = [nope, value].map(|n| floats(random, dtype, heads * n * latent, 0.2));
    // The matrix of a head's keys, turned.
    let turned: Vec<f32> = (0..heads * latent * nope)
        .map(|at| up_k[(at / nope / latent * nope + at % nope) * latent + at / nope % latent])
        .collect();
    let mut absorbed = ops.tensor(queries, heads * latent).unwrap();
    let input = tensor(ops, heads * nope, &q);
    ops.head_linear(&input, &matrix(ops, dtype, nope, &turned), heads, &mut absorbed).unwrap();

    let case = Case { dtype, ..case(heads, (latent, rope), &[(queries, context)]) };
    let mut pool = pool(ops, &case, 3);
    append(ops, &case, &mut pool, &(0..context as i64).collect::<Vec<_>>(), &rows);
    let spans = [Span { query_start: 0, query_len: queries as u32, context_len: context as u32 }];
    let (positions, slots) = (vec![0; queries], vec![-1; queries]);
    let block_tables = &[0, 1, 2];
    let batch = BatchInput {
        positions: &positions,
        slots: &slots,
        spans: &spans,
        block_tables,
        block_size: BLOCK_SIZE,
    };
    let rotated = tensor(ops, heads * rope, &q_rope);
    let query = LatentQuery { latent: &absorbed, rope: &rotated };
    let scale = 1.0 / ((nope + rope) as f32).sqrt();
    let attention = LatentAttention { heads, scale, window: None };
    let mut latents = ops.tensor(queries, heads * latent).unwrap();
    let batch = ops.batch(batch).unwrap();
    ops.attend_latent(&pool, 1, &batch, query, attention, Scores::default(), &mut latents, None).unwrap();
    let mut out = ops.tensor(queries, heads * value).unwrap();
    ops.head_linear(&latents, &matrix(ops, dtype, latent, &up_v), heads, &mut out).unwrap();
    let found = ops.read(&out).unwrap();

    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    let up = |up: &[f32], n: usize, head: usize, row: &[f32]| -> Vec<f64> {
        up[head * n * latent..][..n * latent].chunks(latent).map(|line| dot(line, &row[..latent])).collect()
    };
    for (query, head) in (0..queries).flat_map(|query| (0..heads).map(move |head| (query, head))) {
        let seen = &rows[..(context - queries + query + 1) * (latent + rope)];
        let seen: Vec<&[f32]> = seen.chunks(latent + rope).collect();
        let at = query * heads + head;
        let own: Vec<f64> = q[at * nope..][..nope].iter().map(|&x| f64::from(x)).collect();
        let score = |row: &&[f32]| {
            let key: f64 = up(&up_k, nope, head, row).iter().zip(&own).map(|(k, q)| k * q).sum();
            ((key + dot(&q_rope[at * rope..][..rope], &row[latent..])) * f64::from(scale)).exp()
        };
        let weights: Vec<f64> = seen.iter().map(score).collect();
        let total: f64 = weights.iter().sum();
        for i in 0..value {
            let of = |(row, weight): (&&[f32], &f64)| up(&up_v, value, head, row)[i] * weight / total;
            let exact: f64 = seen.iter().zip(&weights).map(of).sum();
            let place = found[at * value + i];
            close(place, exact, error, || format!("{dtype}: query {query}, head {head}, element {i}"));
        }
    }
}
