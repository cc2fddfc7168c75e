//! Products with weights of four and eight bits on the emulator: from the checkpoint's words to sums, against f64.

use std::sync::Arc;

use half::f16;
use quayline_gpu_kernels::{Cpu, Dtype, Fp8Source, Int4Layout, Int4Source, Ops, Rounding, WeightPart};

use crate::common::{Random, bits, e4m3, rounded, store};
use crate::emulator::{self, each};
use crate::quantised::{self, product, products_are_right};

/// Four-bit numbers `[out][in]`, zeros and scales `[group][out]`, and the input that is in each place of a group.
struct Four {
    numbers: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f16>,
}

fn four(random: &mut Random, (rows, cols): (usize, usize), group: usize) -> Four {
    let groups = cols.div_ceil(group);
    Four {
        numbers: (0..rows * cols).map(|_| random.below(16) as u32).collect(),
        zeros: (0..groups * rows).map(|_| 1 + random.below(15) as u32).collect(),
        scales: (0..groups * rows).map(|_| f16::from_f32(0.01 + random.float().abs() * 0.1)).collect(),
    }
}

impl Four {
    /// What each number stands for, rounded as the kernel does.
    fn exact(
        &self,
        dtype: Dtype,
        (rows, cols): (usize, usize),
        group_of: impl Fn(usize) -> usize,
    ) -> Vec<f64> {
        let of = |at: usize| {
            let (row, column) = (at / cols, at % cols);
            let g = group_of(column) * rows + row;
            let q = self.numbers[at] as f32 - self.zeros[g] as f32;
            f64::from(rounded(dtype, q * self.scales[g].to_f32()))
        };
        (0..rows * cols).map(of).collect()
    }
}

/// Words of eight four-bit numbers: of what they hold by word and place.
fn words(n: usize, of: impl Fn(usize, usize) -> u32) -> Vec<u32> {
    (0..n).map(|word| (0..8).map(|place| of(word, place) << (4 * place)).sum()).collect()
}

const SHAPES: [((usize, usize), usize); 5] =
    [((16, 128), 128), ((24, 64), 32), ((8, 1152), 128), ((40, 656), 16), ((16, 200), 200)];

fn part<A: bytemuck::NoUninit>(numbers: &[A]) -> WeightPart {
    let bytes: Vec<u8> = bytemuck::cast_slice(numbers).to_vec();
    WeightPart { range: 0..bytes.len(), bytes: Arc::new(bytes) }
}

/// A matrix of a checkpoint out of its words.
fn source(
    layout: Int4Layout,
    ((rows, cols), group): ((usize, usize), usize),
    (values, zeros, scales): (&[u32], &[u32], &[f16]),
    group_of: Option<&[u32]>,
) -> Int4Source {
    let (values, zeros, scales) = (part(values), part(zeros), part(scales));
    Int4Source { layout, rows, cols, group, values, zeros, scales, group_of: group_of.map(part) }
}

#[test]
fn gptq_words_with_and_without_order() {
    each(|dtype, cuda, random| {
        for ((rows, cols), group) in SHAPES {
            let four = four(random, (rows, cols), group);
            let qweight = words(rows * cols / 8, |word, place| {
                four.numbers[word % rows * cols + word / rows * 8 + place]
            });
            let qzeros = words(four.zeros.len() / 8, |word, place| four.zeros[word * 8 + place] - 1);
            let mut group_of: Vec<u32> = (0..cols).map(|column| (column / group) as u32).collect();
            for act_order in [false, true] {
                if act_order {
                    random.shuffle(&mut group_of);
                }
                let words = (&qweight[..], &qzeros[..], &four.scales[..]);
                let order = act_order.then_some(&group_of[..]);
                let source = source(Int4Layout::Gptq, ((rows, cols), group), words, order);
                let weight = cuda.weight_int4(&source).unwrap();
                let exact = four.exact(dtype, (rows, cols), |column| group_of[column] as usize);
                let what = format!("GPTQ {rows} x {cols}, groups of {group}, order {act_order}");
                products_are_right(&what, cuda, dtype, random, &weight, &exact, (rows, cols));
            }
        }
    });
}

#[test]
fn awq_words() {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    each(|dtype, cuda, random| {
        for ((rows, cols), group) in SHAPES {
            let four = four(random, (rows, cols), group);
            let across = rows / 8;
            let qweight = words(cols * across, |word, place| {
                four.numbers[(word % across * 8 + ORDER[place]) * cols + word / across]
            });
            let qzeros = words(four.zeros.len() / 8, |word, place| {
                four.zeros[word / across * rows + word % across * 8 + ORDER[place]]
            });
            let words = (&qweight[..], &qzeros[..], &four.scales[..]);
            let source = source(Int4Layout::Awq, ((rows, cols), group), words, None);
            let weight = cuda.weight_int4(&source).unwrap();
            let exact = four.exact(dtype, (rows, cols), |column| column / group);
            products_are_right(
                &format!("AWQ {rows} x {cols}, {group}"),
                cuda,
                dtype,
                random,
                &weight,
                &exact,
                (rows, cols),
            );
        }
    });
}

#[test]
fn bytes_with_one_scale_and_with_one_per_output() {
    each(quantised::bytes_with_one_scale_and_with_one_per_output);
}

#[test]
fn norms_to_one_byte() {
    each(quantised::norms_to_one_byte);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    quantised::what_does_not_fit_is_refused(&cuda);
}

#[test]
fn fp8_of_a_checkpoint_in_blocks() {
    each(|dtype, cuda, random| {
        for ((rows, cols), block) in [
            ((20_usize, 136_usize), (20, 136)),
            ((20, 136), (1, 136)),
            ((20, 136), (3, 16)),
            ((20, 136), (4, 24)),
            // As DeepSeek's checkpoints, with all dimensions of more than one block.
            ((150, 300), (128, 128)),
        ] {
            let across = cols.div_ceil(block.1);
            let scales: Vec<f32> =
                (0..rows.div_ceil(block.0) * across).map(|_| 0.01 + random.float().abs()).collect();
            let codes: Vec<u8> = (0..rows * cols).map(|_| random.below(127) as u8).collect();
            let elements = part(&codes);
            let source = Fp8Source { rows, cols, elements, scales: scales.clone(), block };
            let weight = cuda.weight_fp8(&source).unwrap();
            let worth = |(at, &code): (usize, &u8)| {
                e4m3(code) as f32 * scales[at / cols / block.0 * across + at % cols / block.1]
            };
            let worth: Vec<f32> = codes.iter().enumerate().map(worth).collect();
            // With several scales for a row, numbers are rounded once they are multiplied by theirs.
            let exact = worth.iter().map(|&x| f64::from(if across == 1 { x } else { rounded(dtype, x) }));
            let exact: Vec<f64> = exact.collect();
            let what = format!("fp8 by {block:?}");
            products_are_right(&what, cuda, dtype, random, &weight, &exact, (rows, cols));
            if across == 1 {
                continue;
            }
            // The bits of the same matrix in the activations' type, in products and as a table.
            let floats = cuda.weight(store(Dtype::F32, &[rows, cols], &worth, 0).source).unwrap();
            let x: Vec<f32> = (0..70 * cols).map(|_| rounded(dtype, random.float())).collect();
            let [found, expected] = [&weight, &floats].map(|weight| {
                let mut table = cuda.tensor(rows, cols).unwrap();
                let all: Vec<u32> = (0..rows as u32).rev().collect();
                cuda.embed(weight, &all, &mut table).unwrap();
                let product = product(cuda, &x, weight, &vec![0.0; rows], cols);
                (bits(&product), bits(&cuda.read(&table).unwrap()))
            });
            assert!(found == expected, "{what} {dtype}: other bits than those of floats");
        }
    });
}

#[test]
fn fp8_in_blocks_takes_a_byte_for_a_number() {
    let Some((cuda, emulator)) = emulator::cuda(Dtype::Bf16, false) else { return };
    let (rows, cols) = (256, 512);
    let source = |block| Fp8Source {
        rows,
        cols,
        elements: part(&vec![0x38_u8; rows * cols]),
        scales: vec![1.0; rows.div_ceil(block) * cols.div_ceil(block)],
        block: (block, block),
    };
    let bytes = |block| {
        let before = emulator.allocated_bytes();
        let _weight = cuda.weight_fp8(&source(block)).unwrap();
        emulator.allocated_bytes() - before
    };
    if !emulator::on_gpu() {
        assert_eq!(bytes(128), rows * cols + 2 * 4 * 4);
        assert_eq!(bytes(8), 2 * rows * cols, "blocks that the kernels do not know");
    }
}

/// What matrices are rounded to is what the CPU rounds them to: products, and rows as of an embedding table.
#[test]
fn rounded_matrices_are_those_of_the_cpu() {
    let cpu = Cpu::detect().unwrap();
    each(|dtype, cuda, random| {
        for ((rows, cols), rounding) in [(16, 128), (10, 300)]
            .map(|shape| (shape, Rounding::Int4))
            .into_iter()
            .chain([Rounding::Int8, Rounding::Fp8].map(|rounding| ((33, 77), rounding)))
        {
            let stored = random.stored(Dtype::F32, &[rows, cols]);
            let on_cpu = cpu.weight_rounded(stored.source.clone(), rounding).unwrap();
            let weight = cuda.weight_rounded(stored.source, rounding).unwrap();
            let mut table = cpu.tensor(rows, cols).unwrap();
            cpu.embed(&on_cpu, &(0..rows as u32).collect::<Vec<_>>(), &mut table).unwrap();
            let worth = cpu.read(&table).unwrap();
            // Four bits are rounded with their scale, eight without.
            let exact = worth.iter().map(|&w| if rounding == Rounding::Int4 { rounded(dtype, w) } else { w });
            let exact: Vec<f64> = exact.map(f64::from).collect();
            let what = format!("{rounding:?} {rows} x {cols}");
            products_are_right(&what, cuda, dtype, random, &weight, &exact, (rows, cols));

            let tokens: Vec<u32> = (0..2 * rows).map(|_| random.below(rows) as u32).collect();
            let mut out = cuda.tensor(tokens.len(), cols).unwrap();
            cuda.embed(&weight, &tokens, &mut out).unwrap();
            for (found, &token) in cuda.read(&out).unwrap().chunks(cols).zip(&tokens) {
                let expected: Vec<f32> =
                    worth[token as usize * cols..][..cols].iter().map(|&w| rounded(dtype, w)).collect();
                assert_eq!(bits(found), bits(&expected), "{what}, row {token}");
            }
        }
    });
}

#[test]
fn parts_that_disagree_are_refused() {
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    let (words, zeros, scales) = (vec![0; 16 * 32 / 8], vec![0; 2], vec![f16::ONE; 16]);
    let int4 = |shape, layout, group_of: Option<&[u32]>| {
        let source = source(layout, shape, (&words, &zeros, &scales), group_of);
        cuda.weight_int4(&source).map(drop).map_err(|error| error.to_string())
    };
    let awq = |rows, cols, group| int4(((rows, cols), group), Int4Layout::Awq, None);
    assert_eq!(awq(16, 32, 32), Ok(()));
    assert_eq!(awq(16, 40, 40).unwrap_err(), "weight_int4: bytes of the values is 256, expected 320");
    assert_eq!(awq(16, 32, 16).unwrap_err(), "weight_int4: bytes of the zero points is 8, expected 16");
    assert_eq!(
        awq(16, 32, 24).unwrap_err(),
        "weight_int4: elements of a group is 24, which is not a positive multiple of 16"
    );
    assert_eq!(
        awq(12, 32, 32).unwrap_err(),
        "weight_int4: outputs is 12, which is not a positive multiple of 8"
    );
    let gptq = |group_of: &[u32]| int4(((16, 32), 32), Int4Layout::Gptq, Some(group_of));
    assert_eq!(gptq(&[0; 32]), Ok(()));
    assert_eq!(gptq(&[1; 32]).unwrap_err(), "weight_int4: group of an input is 1, the most allowed is 0");
    assert_eq!(
        gptq(&[0; 31]).unwrap_err(),
        "weight_int4: bytes of the groups of inputs is 124, expected 128"
    );
}
