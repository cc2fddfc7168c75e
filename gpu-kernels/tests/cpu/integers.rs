//! Products with small integers against f64, the forms of checkpoints bit for bit, and the promise that a row's bits
//! know nothing of its surroundings.

use std::sync::Arc;

use half::f16;
use quayline_gpu_kernels::cpu::Weight;
use quayline_gpu_kernels::{
    Cpu, Dtype, Fp8Source, Int4Layout, Int4Source, Isa, Ops, Projection, Rounding, WeightPart,
};

use crate::common::{self, Random, bits, close, cpus, e4m3};

/// Matrix `[rows, cols]` of a checkpoint: its bytes, and what its elements are worth.
fn int4(
    random: &mut Random,
    layout: Int4Layout,
    (rows, cols, group): (usize, usize, usize),
) -> (Int4Source, Vec<f32>) {
    let groups = cols / group;
    let values: Vec<u32> = (0..rows * cols).map(|_| random.below(16) as u32).collect();
    let plain = random.flip();
    let zeros: Vec<u32> =
        (0..rows * groups).map(|_| if plain { 8 } else { random.below(16) as u32 }).collect();
    let scales: Vec<f16> = (0..rows * groups).map(|_| f16::from_f32(random.float() / 8.0)).collect();
    // One group after the other, or in another order (act-order).
    let mut group_of: Vec<u32> = (0..cols).map(|col| (col / group) as u32).collect();
    let reordered = random.flip();
    if reordered {
        random.shuffle(&mut group_of);
    }
    let value = |row: usize, col: usize| values[row * cols + col];
    let zero = |row: usize, group: usize| zeros[row * groups + group];
    // What AutoAWQ writes into the nibbles of a word, lowest first.
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    let outputs = |of: &dyn Fn(usize) -> u32, first: usize| match layout {
        Int4Layout::Awq => (0..8).map(|place| of(first + order[place]) << (4 * place)).sum::<u32>(),
        _ => (0..8).map(|place| of(first + place) << (4 * place)).sum(),
    };
    let mut words = Vec::new();
    match layout {
        Int4Layout::Awq => {
            for col in 0..cols {
                words.extend((0..rows).step_by(8).map(|first| outputs(&|row| value(row, col), first)));
            }
        }
        _ => {
            for col in (0..cols).step_by(8) {
                let word = |row| (0..8).map(|place| value(row, col + place) << (4 * place)).sum::<u32>();
                words.extend((0..rows).map(word));
            }
        }
    }
    let mut zero_words = Vec::new();
    for group in 0..groups {
        zero_words.extend((0..rows).step_by(8).map(|first| outputs(&|row| zero(row, group), first)));
    }
    // GPTQ's first version stores one less, by whole words.
    if layout == Int4Layout::Gptq {
        zero_words.iter_mut().for_each(|word| *word = word.wrapping_sub(0x1111_1111));
    }
    let scale_bytes: Vec<u8> = (0..groups)
        .flat_map(|group| (0..rows).map(move |row| row * groups + group))
        .flat_map(|at| scales[at].to_le_bytes())
        .collect();
    let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let part = |bytes: Vec<u8>| {
        // At an odd address.
        let range = 1..bytes.len() + 1;
        WeightPart { bytes: Arc::new([&[0xff], bytes.as_slice()].concat()), range }
    };
    let worth = (0..rows * cols)
        .map(|at| {
            let (row, col) = (at / cols, at % cols);
            let at = row * groups + group_of[col] as usize;
            (values[row * cols + col] as f32 - zeros[at] as f32) * scales[at].to_f32()
        })
        .collect();
    let (values, zeros, scales) = (part(bytes(&words)), part(bytes(&zero_words)), part(scale_bytes));
    let group_of = reordered.then(|| part(bytes(&group_of)));
    (Int4Source { layout, rows, cols, group, values, zeros, scales, group_of }, worth)
}

/// A matrix of all codes that are numbers, in blocks.
fn fp8(random: &mut Random, (rows, cols): (usize, usize), block: (usize, usize)) -> (Fp8Source, Vec<f32>) {
    let codes = std::iter::repeat_with(|| random.next() as u8).filter(|code| code & 0x7f != 0x7f);
    let codes: Vec<u8> = codes.take(rows * cols).collect();
    let across = cols.div_ceil(block.1);
    // Powers of two, so that what an element is worth is one number however it is computed.
    let scale = |_| 2.0_f32.powi(random.below(9) as i32 - 12);
    let scales: Vec<f32> = (0..rows.div_ceil(block.0) * across).map(scale).collect();
    let worth = codes
        .iter()
        .enumerate()
        .map(|(at, &code)| e4m3(code) as f32 * scales[at / cols / block.0 * across + at % cols / block.1]);
    let worth = worth.collect();
    let elements = WeightPart { range: 0..codes.len(), bytes: Arc::new(codes) };
    (Fp8Source { rows, cols, elements, scales, block }, worth)
}

/// Blocks of a matrix: one, one for each output, and those of published checkpoints and smaller.
fn blocks((rows, cols): (usize, usize)) -> [(usize, usize); 4] {
    [(rows, cols), (1, cols), (128, 128), (3, 16)]
}

/// All rows of a matrix, as embedding reads them.
pub(crate) fn rows(cpu: &Cpu, weight: &Weight, (rows, cols): (usize, usize)) -> Vec<f32> {
    let mut out = cpu.tensor(rows, cols).unwrap();
    cpu.embed(weight, &(0..rows as u32).collect::<Vec<_>>(), &mut out).unwrap();
    cpu.read(&out).unwrap().into_owned()
}

fn product(
    cpu: &Cpu,
    weight: &Weight,
    bias: Option<&Weight>,
    x: &[f32],
    (out, into): (usize, usize),
) -> Vec<f32> {
    let mut from = cpu.tensor(x.len() / into, into).unwrap();
    cpu.write(&mut from, x).unwrap();
    let mut to = cpu.tensor(x.len() / into, out).unwrap();
    cpu.linear(&from, &mut [Projection { weight, bias, out: &mut to }]).unwrap();
    cpu.read(&to).unwrap().into_owned()
}

/// Holds products of rows of `x` against sums in f64 of what a weight's elements are worth.
fn products_are_right(
    cpu: &Cpu,
    weight: &Weight,
    (worth, (out, into)): (&[f32], (usize, usize)),
    x: &[f32],
    bias: &[f32],
    what: &str,
) {
    let found = product(cpu, weight, Some(&common::vector(cpu, bias)), x, (out, into));
    for (row, x) in common::before_integers(cpu, x).chunks(into).enumerate() {
        for (output, worth) in worth.chunks(into).enumerate() {
            let terms = x.iter().zip(worth).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let exact = terms.clone().sum::<f64>() + f64::from(bias[output]);
            let size = terms.map(f64::abs).sum::<f64>() + 1.0;
            close(found[row * out + output], exact, size * 1e-6, || {
                format!("{what} {cpu:?} {weight:?}: row {row}, output {output}")
            });
        }
    }
}

const LAYOUTS: [Int4Layout; 3] = [Int4Layout::Awq, Int4Layout::Gptq, Int4Layout::GptqV2];

#[test]
fn integers_of_a_checkpoint_are_kept_bit_for_bit_and_multiplied() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let layout = random.pick(&LAYOUTS);
        let group = random.pick(&[8, 32, 64, 128]);
        let shape = (8 * (1 + random.below(7)), group * (1 + random.below(3)));
        let (source, worth) = int4(&mut random, layout, (shape.0, shape.1, group));
        for cpu in cpus() {
            let weight = cpu.weight_int4(&source).unwrap();
            let what = format!("seed {seed} {layout:?} by {group}");
            assert_eq!(rows(&cpu, &weight, shape), worth, "{what} {cpu:?} {shape:?}");
            let (x, bias) = (random.floats(3 * shape.1), random.floats(shape.0));
            products_are_right(&cpu, &weight, (&worth, shape), &x, &bias, &what);
        }
    }
}

#[test]
fn fp8_of_a_checkpoint_is_kept_bit_for_bit() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let shape = shape(&mut random);
        for block in blocks(shape) {
            let (source, worth) = fp8(&mut random, shape, block);
            for cpu in cpus() {
                let weight = cpu.weight_fp8(&source).unwrap();
                assert_eq!(rows(&cpu, &weight, shape), worth, "seed {seed} {cpu:?} {shape:?} by {block:?}");
            }
        }
    }
}

/// A matrix of any kind.
fn weight(cpu: &Cpu, random: &mut Random, shape: &mut (usize, usize)) -> Weight {
    let rounding = random.pick(&[Some(Rounding::Int8), Some(Rounding::Int4), Some(Rounding::Fp8), None]);
    let Some(rounding) = rounding else {
        if random.flip() {
            let block = random.pick(&blocks(*shape));
            return cpu.weight_fp8(&fp8(random, *shape, block).0).unwrap();
        }
        let group = random.pick(&[8, 32, 128]);
        *shape = (shape.0.next_multiple_of(8), shape.1.next_multiple_of(group));
        let layout = random.pick(&LAYOUTS);
        return cpu.weight_int4(&int4(random, layout, (shape.0, shape.1, group)).0).unwrap();
    };
    cpu.weight_rounded(random.stored(Dtype::Bf16, &[shape.0, shape.1]).source, rounding).unwrap()
}

fn shape(random: &mut Random) -> (usize, usize) {
    (random.pick(&[1, 15, 16, 17, 50, 130, 300]), random.pick(&[1, 7, 8, 64, 96, 129, 300, 1030]))
}

#[test]
fn products_are_right_at_every_edge() {
    for seed in 100..130 {
        for cpu in cpus() {
            let mut random = Random::new(seed);
            let mut shape = shape(&mut random);
            let weight = weight(&cpu, &mut random, &mut shape);
            let (out, into) = shape;
            let count = random.pick(&[0, 1, 2, 3, 5, 8, 11, 12, 13, 16, 27]);
            let x = random.floats(count * into);
            let bias = random.floats(out);
            let worth = rows(&cpu, &weight, shape);
            products_are_right(&cpu, &weight, (&worth, shape), &x, &bias, &format!("seed {seed}"));
        }
    }
}

#[test]
fn a_row_with_something_that_is_no_number_spoils_no_other() {
    let (out, into) = (40, 200);
    for (seed, odd) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
        for cpu in cpus() {
            let mut random = Random::new(400 + seed as u64);
            for rounding in [Rounding::Int8, Rounding::Int4] {
                let source = random.stored(Dtype::Bf16, &[out, into]).source;
                let weight = cpu.weight_rounded(source, rounding).unwrap();
                let mut x = random.floats(3 * into);
                let right = product(&cpu, &weight, None, &x, (out, into));
                x[into + 130] = odd;
                let found = product(&cpu, &weight, None, &x, (out, into));
                assert_eq!(bits(&found[..out]), bits(&right[..out]), "{cpu:?} {rounding:?} {odd}");
                assert_eq!(bits(&found[2 * out..]), bits(&right[2 * out..]), "{cpu:?} {rounding:?} {odd}");
                let spoilt = found[out..2 * out].iter().filter(|x| !x.is_finite()).count();
                // With eight bits what is infinite, times a weight of nothing, is no number either.
                assert!(spoilt > out / 2, "{cpu:?} {rounding:?} {odd}: {spoilt} of {out}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_company_and_on_all_threads() {
    for seed in 200..230 {
        let mut wide = Vec::new();
        for isa in common::isas() {
            let mut random = Random::new(seed);
            let mut shape = shape(&mut random);
            let cpu = common::cpu(1, isa);
            let state = random.next();
            let alone = weight(&cpu, &mut Random::new(state), &mut shape);
            let x = random.floats(shape.1);
            let reference = product(&cpu, &alone, None, &x, shape);
            for threads in [1, 2, 5] {
                let cpu = common::cpu(threads, isa);
                let among = weight(&cpu, &mut Random::new(state), &mut shape.clone());
                let count = 1 + random.below(40);
                let row = random.below(count);
                let mut all = random.floats(count * shape.1);
                all[row * shape.1..][..shape.1].copy_from_slice(&x);
                let found = product(&cpu, &among, None, &all, shape);
                assert_eq!(
                    bits(&found[row * shape.0..][..shape.0]),
                    bits(&reference),
                    "seed {seed} {cpu:?} {among:?}: row {row} of {count}"
                );
            }
            if isa != Isa::Portable && !isa.rounds_activations() {
                wide.push(bits(&reference));
            }
        }
        assert!(wide.windows(2).all(|pair| pair[0] == pair[1]), "seed {seed}: instruction sets differ");
    }
}

#[test]
fn integers_and_floats_share_a_call() {
    for cpu in cpus() {
        let mut random = Random::new(7);
        let stored = random.stored(Dtype::Bf16, &[20, 50]);
        let floats = common::weight(&cpu, &stored);
        let integers = cpu.weight_rounded(stored.source, Rounding::Int8).unwrap();
        let x = random.floats(3 * 50);
        let mut from = cpu.tensor(3, 50).unwrap();
        cpu.write(&mut from, &x).unwrap();
        let mut outs = [cpu.tensor(3, 20).unwrap(), cpu.tensor(3, 20).unwrap()];
        let [first, second] = &mut outs;
        let first = Projection { weight: &integers, bias: None, out: first };
        let second = Projection { weight: &floats, bias: None, out: second };
        cpu.linear(&from, &mut [first, second]).unwrap();
        assert_eq!(cpu.read(&outs[0]).unwrap(), product(&cpu, &integers, None, &x, (20, 50)));
        assert_eq!(cpu.read(&outs[1]).unwrap(), product(&cpu, &floats, None, &x, (20, 50)));
    }
}

#[test]
fn doors_name_what_is_wrong() {
    let cpu = Cpu::detect().unwrap();
    let mut random = Random::new(1);
    let (good, _) = int4(&mut random, Int4Layout::Awq, (16, 64, 32));
    let says = |source: Int4Source| cpu.weight_int4(&source).unwrap_err().to_string();
    assert_eq!(
        says(Int4Source { rows: 12, ..good.clone() }),
        "weight_int4: outputs is 12, which is not a positive multiple of 8"
    );
    assert_eq!(
        says(Int4Source { group: 48, ..good.clone() }),
        "weight_int4: inputs is 64, which is not a positive multiple of 48"
    );
    assert_eq!(
        says(Int4Source { group: 0, ..good.clone() }),
        "weight_int4: elements of a group is 0, which is not a positive multiple of 8"
    );
    assert_eq!(
        says(Int4Source { cols: 128, ..good.clone() }),
        "weight_int4: bytes of the values is 512, expected 1024"
    );
    let one_group = WeightPart { range: 0..256, bytes: Arc::new(vec![0_u8; 256]) };
    assert_eq!(
        says(Int4Source { group_of: Some(one_group), ..good.clone() }),
        "weight_int4: inputs of a group is 64, expected 32"
    );
    let beyond = WeightPart { range: 1..1000, ..good.scales.clone() };
    assert_eq!(
        says(Int4Source { scales: beyond, ..good }),
        "weight_int4: bytes of the scales is 0, expected 64"
    );
    let (good, _) = fp8(&mut random, (20, 64), (16, 32));
    let says = |source: Fp8Source| cpu.weight_fp8(&source).unwrap_err().to_string();
    assert_eq!(
        says(Fp8Source { block: (16, 20), ..good.clone() }),
        "weight_fp8: inputs of a block is 20, which is not a positive multiple of 8"
    );
    assert_eq!(says(Fp8Source { block: (8, 32), ..good.clone() }), "weight_fp8: scales is 4, expected 6");
    assert_eq!(
        says(Fp8Source { cols: 56, ..good.clone() }),
        "weight_fp8: bytes of the elements is 1280, expected 1120"
    );
    let mut codes = vec![0_u8; 20 * 64];
    codes[3 * 64 + 5] = 0xff;
    let none = WeightPart { range: 0..codes.len(), bytes: Arc::new(codes) };
    assert_eq!(
        says(Fp8Source { elements: none, ..good.clone() }),
        "weight_fp8: the element that is no number at [3, 5] is not supported, only finite numbers"
    );
    assert_eq!(
        says(Fp8Source { scales: vec![1.0, 1.0, f32::NAN, 1.0], ..good }),
        "weight_fp8: the scale that is no finite number at [1, 0] is not supported, only finite numbers"
    );
    let vector = common::store(Dtype::F32, &[3], &[1.0, 2.0, 3.0], 0);
    assert!(cpu.weight_rounded(vector.source, Rounding::Int4).is_ok(), "a vector stays as it is");
}
