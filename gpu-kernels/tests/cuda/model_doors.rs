//! What sampling, mixtures of experts, adapters and latents refuse: on the CPU and on CUDA (in the emulator, or on a
//! GPU) with the same words, which name the dimension and the values; and then nothing has been written.

use quayline_gpu_kernels::{
    BatchInput, Cpu, Draft, Drafts, Draw, Dtype, Error, Grouped, KvStorage, Latent, LatentAttention,
    LatentQuery, LatentShape, Ops, Router, Sampling, Scores, Seen, Span,
};

use crate::common;
use crate::emulator;

fn ones<O: Ops>(ops: &O, rows: usize, cols: usize) -> O::Tensor {
    let mut x = ops.tensor(rows, cols).unwrap();
    ops.write(&mut x, &vec![1.0; rows * cols]).unwrap();
    x
}

fn weight<O: Ops>(ops: &O, rows: usize, cols: usize) -> O::Weight {
    ops.weight(common::store(Dtype::Bf16, &[rows, cols], &vec![1.0; rows * cols], 0).source).unwrap()
}

fn said<T>(result: Result<T, Error>) -> String {
    result.map(drop).unwrap_err().to_string()
}

fn draws<O: Sampling>(ops: &O) -> Vec<String> {
    let (x, draw, beyond) = (ones(ops, 1, 8), Draw::default(), [Seen { token: 8, count: 1 }]);
    let sample = |draw, mask: &[u32]| said(ops.sample(&x, &[draw], mask));
    let target = ops.distributions(&x, &[draw], &[]).unwrap();
    let other = ops.distributions(&ones(ops, 1, 9), &[draw], &[]).unwrap();
    let one = Draft { token: 0, parent: None, from: 0, accept: 0 };
    let verify = |drafts: &[Draft], random: &[u64]| {
        said(ops.verify(&target, Some(&target), &[Drafts { row: 0, drafts, random }]))
    };
    vec![
        said(ops.sample(&x, &[], &[])),
        sample(Draw { temperature: -1.0, ..draw }, &[]),
        sample(Draw { top_p: 1.5, ..draw }, &[]),
        sample(Draw { min_p: f32::NAN, ..draw }, &[]),
        sample(Draw { repetition: 0.0, ..draw }, &[]),
        sample(Draw { presence: f32::INFINITY, ..draw }, &[]),
        sample(Draw { mask_row: Some(1), ..draw }, &[0]),
        sample(Draw { seen: &beyond, ..draw }, &[]),
        said(ops.verify(&target, Some(&other), &[])),
        verify(&[], &[]),
        verify(&[one], &[0, 0]),
    ]
}

fn groups<O: Grouped>(ops: &O) -> Vec<String> {
    let logits = ones(ops, 2, 8);
    let route = |router| said(ops.route(&logits, router));
    let (router, biases) = (Router { chosen: 2, ..Router::default() }, ops.floats(&[0.0; 7]).unwrap());
    let routing = ops.route(&logits, router).unwrap();
    let mut out = ones(ops, 4, 3);
    let mut multiply = |rows, into, outs| {
        said(ops.expert_linear(&ones(ops, rows, into), &routing, &weight(ops, outs, 4), &mut out))
    };
    let mut all = vec![
        route(Router { chosen: 9, ..router }),
        route(Router { chosen: 0, ..router }),
        route(Router { groups: 3, ..router }),
        route(Router { groups: 2, groups_chosen: 3, ..router }),
        route(Router { groups: 8, ..router }),
        route(Router { bias: Some(&biases), ..router }),
        route(Router { factor: f32::NAN, ..router }),
        multiply(2, 5, 24),
        multiply(2, 4, 32),
        multiply(3, 4, 24),
    ];
    let mut sums = ones(ops, 1, 3);
    all.push(said(ops.combine(&ones(ops, 3, 3), &routing, false, &mut sums)));
    all.push(said(ops.combine(&out, &routing, true, &mut sums)));
    all.push(said(ops.combine(&out, &routing, false, &mut sums)));
    let (x, factors) = (ones(ops, 1, 4), ops.floats(&[1.0; 2]).unwrap());
    let mut lora = |of: &[Option<u32>], a: usize, b: usize| {
        said(ops.lora(&x, of, (&weight(ops, a, 4), &weight(ops, 6, b)), &factors, &mut sums))
    };
    all.extend([lora(&[None], 3, 2), lora(&[None], 4, 3), lora(&[], 4, 2), lora(&[Some(2)], 4, 2)]);
    assert_eq!(*ops.read(&sums).unwrap(), [1.0; 3]);
    all
}

fn latents<O: Latent>(ops: &O) -> Vec<String> {
    let shape =
        LatentShape { layers: 1, blocks: 1, block_size: 16, latent_dim: 16, rope_dim: 8, dtype: Dtype::Bf16 };
    let refused = |shape, storage| said(ops.latent_pool(shape, storage));
    let mut all = vec![
        refused(LatentShape { latent_dim: 520, ..shape }, KvStorage::Same),
        refused(LatentShape { rope_dim: 60, ..shape }, KvStorage::Same),
        refused(LatentShape { blocks: 0, ..shape }, KvStorage::Same),
        refused(shape, KvStorage::Int8PerHead),
        refused(shape, KvStorage::Fp8 { key_scale: 0.0, value_scale: 1.0 }),
    ];
    let mut pool = ops.latent_pool(shape, KvStorage::Same).unwrap();
    let spans = [Span { query_start: 0, query_len: 1, context_len: 1 }];
    let batch = |slot: i64, block: u32| {
        let (spans, block_tables) = (&spans[..], &[block][..]);
        ops.batch(BatchInput { positions: &[0], slots: &[slot], spans, block_tables, block_size: 16 })
            .unwrap()
    };
    let mut append = |layer, batch: &O::Batch, latent, rope| {
        said(ops.append_latent(
            &mut pool,
            layer,
            batch,
            &ones(ops, 1, latent),
            &ones(ops, 1, rope),
            None,
            None,
        ))
    };
    all.extend([
        append(1, &batch(0, 0), 16, 8),
        append(0, &batch(16, 0), 16, 8),
        append(0, &batch(0, 0), 24, 8),
        append(0, &batch(0, 0), 16, 16),
    ]);
    let mut out = ones(ops, 1, 32);
    let mut attend = |block, heads, latent, rope| {
        let (latent, rope) = (ones(ops, 1, latent), ones(ops, 1, rope));
        let (q, asked) = (
            LatentQuery { latent: &latent, rope: &rope },
            LatentAttention { heads, scale: 1.0, window: None },
        );
        said(ops.attend_latent(&pool, 0, &batch(0, block), q, asked, Scores::default(), &mut out, None))
    };
    all.extend([
        attend(1, 2, 32, 16),
        attend(0, 0, 32, 16),
        attend(0, 2, 16, 16),
        attend(0, 2, 32, 8),
        attend(0, 1, 16, 8),
    ]);
    assert_eq!(*ops.read(&out).unwrap(), [1.0; 32]);
    all
}

fn all<O: Sampling + Grouped + Latent>(ops: &O) -> Vec<String> {
    [draws(ops), groups(ops), latents(ops)].concat()
}

#[test]
fn both_implementations_refuse_the_same_calls_in_the_same_words() {
    let found = all(&Cpu::detect().unwrap());
    assert_eq!(found, SAID);
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    assert_eq!(all(&cuda), found);
}

/// What is wrong with the calls above, in their order.
const SAID: &[&str] = &[
    "sample: number of draws is 0, expected 1",
    "sample: temperature -1 is not supported, only finite, at least 0",
    "sample: top_p 1.5 is not supported, only 0 to 1",
    "sample: min_p NaN is not supported, only 0 to 1",
    "sample: repetition 0 is not supported, only finite, above 0",
    "sample: presence inf is not supported, only finite",
    "sample: row of the mask is 1, the most allowed is 0",
    "sample: a token that occurred is 8, the most allowed is 7",
    "verify: vocabulary of the drafts is 9, expected 8",
    "verify: random numbers is 0, expected 1",
    "verify: row of the target is 1, the most allowed is 0",
    "route: experts of a token is 9, the most allowed is 8",
    "route: experts of a token is 0, which is not a positive multiple of 1",
    "route: experts is 8, which is not a positive multiple of 3",
    "route: groups chosen is 3, the most allowed is 2",
    "route: experts of a token is 2, the most allowed is 1",
    "route: biases is 7, expected 8",
    "route: a factor of NaN is not supported, only a finite one",
    "expert_linear: in of the weights is 4, expected 5",
    "expert_linear: out of the weights of all experts is 32, expected 24",
    "expert_linear: rows of x is 3, expected 2",
    "combine: rows of the parts is 3, expected 4",
    "combine: rows of the output is 1, expected 2",
    "combine: rows of the output is 2, the most allowed is 1",
    "lora: rows of a is 3, which is not a positive multiple of 2",
    "lora: rank of b is 3, expected 2",
    "lora: rows that have an adapter or none is 0, expected 1",
    "lora: adapter is 2, the most allowed is 1",
    "latent_pool: latent_dim is 520, the most allowed is 512",
    "latent_pool: rope_dim is 60, which is not a positive multiple of 8",
    "kv_pool: blocks is 0, which is not a positive multiple of 1",
    "latent_pool: latents as Int8PerHead is not supported, only the activations' type and E4M3",
    "kv_pool: keys with a scale of 0 is not supported, only a finite one above 0",
    "append_latent: layer is 1, the most allowed is 0",
    "append_latent: slot is 16, the most allowed is 15",
    "append_latent: width of the latent is 24, expected 16",
    "append_latent: width of the key is 16, expected 8",
    "attend_latent: block is 1, the most allowed is 0",
    "attend_latent: heads is 0, which is not a positive multiple of 1",
    "attend_latent: width of q is 16, expected 32",
    "attend_latent: width of the rotated q is 8, expected 16",
    "attend_latent: width of the output is 32, expected 16",
];
