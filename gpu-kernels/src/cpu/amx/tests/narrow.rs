//! Weights of eight bits and four on tiles: bit by bit a plain loop, near f64, and the same in any company.
#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

use std::sync::Arc;

use half::f16;

use super::super::super::integers::Integers;
use super::super::super::tiles::Word;
use super::*;
use crate::{Fp8Source, Int4Layout, Int4Source, WeightPart};

/// `weight = scale · (value - zero)`.
struct Matrix {
    packed: Integers,
    /// `[outputs][cols]`
    values: Vec<f32>,
    /// `[outputs][groups]`: powers of two, so that no product with them is rounded.
    scales: Vec<f32>,
    zeros: Option<Vec<f32>>,
}

fn random(n: usize, seed: usize, below: usize) -> Vec<usize> {
    (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 7) % below).collect()
}

fn scales(n: usize) -> Vec<f32> {
    random(n, 9, 5).into_iter().map(|power| 1.0 / (1 << power) as f32).collect()
}

fn part(bytes: Vec<u8>) -> WeightPart {
    WeightPart { range: 0..bytes.len(), bytes: Arc::new(bytes) }
}

impl Matrix {
    fn eight((n, cols): (usize, usize)) -> Self {
        let values: Vec<i8> = random(n * cols, 1, 255).into_iter().map(|x| (x as i32 - 127) as i8).collect();
        let scales = scales(n);
        let workers = Workers::new(NonZeroUsize::new(1)).unwrap();
        let with = (&workers, Word::Pair, &Arena::default());
        let packed = Integers::bytes(with, (n, cols), false, (bytemuck::cast_slice(&values), &scales));
        let values = values.into_iter().map(f32::from).collect();
        Self { packed: packed.unwrap(), values, scales, zeros: None }
    }

    fn e4m3((n, cols): (usize, usize), block: (usize, usize)) -> Self {
        let codes: Vec<u8> =
            random(n * cols, 2, 254).into_iter().map(|x| (x % 127 + x / 127 * 128) as u8).collect();
        let values = codes.iter().map(|&code| crate::fp8::small(code)).collect();
        let across = cols.div_ceil(block.1);
        let of_blocks = scales(n.div_ceil(block.0) * across);
        let scale =
            |row: usize| of_blocks[row / block.0 * across..][..across].iter().map(|x| x * crate::fp8::SCALE);
        let scales = (0..n).flat_map(scale).collect();
        let source = Fp8Source { rows: n, cols, elements: part(codes), scales: of_blocks.clone(), block };
        let workers = Workers::new(NonZeroUsize::new(1)).unwrap();
        let packed = Integers::fp8((&workers, Word::Pair, &Arena::default()), &source).unwrap();
        Self { packed, values, scales, zeros: None }
    }

    fn four((n, cols): (usize, usize), group: usize, plain: bool) -> Self {
        let (values, groups) = (random(n * cols, 3, 16), cols / group);
        let zeros: Vec<_> =
            random(n * groups, 4, 16).into_iter().map(|x| if plain { 8 } else { x }).collect();
        let scales = scales(n * groups);
        let word =
            |nibbles: [usize; 8]| (0..8).map(|i| (nibbles[i] as u32) << (4 * i)).sum::<u32>().to_le_bytes();
        let of_inputs = |at: usize| word(std::array::from_fn(|i| values[at % n * cols + at / n * 8 + i]));
        let of_outputs = |at: usize| {
            let (group, output) = (at / (n / 8), at % (n / 8) * 8);
            word(std::array::from_fn(|i| zeros[(output + i) * groups + group]))
        };
        let of_groups = |at: usize| f16::from_f32(scales[at % n * groups + at / n]).to_le_bytes();
        let source = Int4Source {
            layout: Int4Layout::GptqV2,
            rows: n,
            cols,
            group,
            values: part((0..n * cols / 8).flat_map(of_inputs).collect()),
            zeros: part((0..n * groups / 8).flat_map(of_outputs).collect()),
            scales: part((0..n * groups).flat_map(of_groups).collect()),
            group_of: None,
        };
        let workers = Workers::new(NonZeroUsize::new(1)).unwrap();
        let packed = Integers::int4((&workers, Word::Pair, &Arena::default()), &source).unwrap();
        let less_eight = |x: Vec<usize>| x.into_iter().map(|x| x as f32 - 8.0).collect();
        Self { packed, values: less_eight(values), scales, zeros: (!plain).then(|| less_eight(zeros)) }
    }

    fn product<U: TileUnit>(&self, unit: U, isa: Isa, x: &[f32], threads: usize) -> Vec<f32> {
        let rows = x.len() / self.packed.cols;
        let workers = Workers::new(NonZeroUsize::new(threads)).unwrap();
        // What was computed before may have left what is no number.
        workers.run(threads, &|_, scratch| scratch.take([1 << 18])[0].fill(f32::NAN));
        let mut out = vec![f32::NAN; rows * self.packed.rows];
        let bias = vec![0.5; self.packed.rows];
        let products = [Product { weight: &self.packed, bias: Some(&bias), out: SharedOut::new(&mut out) }];
        linear(unit, (&workers, isa), &mut Scratch::default(), x, rows, &products);
        out
    }

    /// What the same product is, one output after the other.
    fn plain_loop(&self, isa: Isa, x: &[f32]) -> Vec<f32> {
        let Integers { rows: n, cols, group, .. } = self.packed;
        let workers = Workers::new(NonZeroUsize::new(1)).unwrap();
        let (rows, groups) = (x.len() / cols, cols.div_ceil(group));
        let x_sums = group_sums((&workers, isa), x, (rows, cols), group);
        let x: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let mut out = Vec::new();
        for (row, output) in (0..rows).flat_map(|row| (0..n).map(move |output| (row, output))) {
            let (x, values) = (&x[row * cols..][..cols], &self.values[output * cols..][..cols]);
            let mut total = 0.0;
            for (index, (x, values)) in x.chunks(group).zip(values.chunks(group)).enumerate() {
                let mut sum = 0.0;
                for (x, values) in x.chunks(STEP).zip(values.chunks(STEP)) {
                    let chain = |first: usize| {
                        x.iter()
                            .zip(values)
                            .skip(first)
                            .step_by(2)
                            .fold(0.0, |sum: f32, (x, value)| sum + x * value)
                    };
                    sum += chain(0) + chain(1);
                }
                if let Some(zeros) = &self.zeros {
                    sum -= zeros[output * groups + index] * x_sums[row * groups + index];
                }
                total += sum * self.scales[output * groups + index];
            }
            out.push(total + 0.5);
        }
        out
    }

    /// What it is in f64, and the size of all that is added.
    fn exact(&self, x: &[f32], output: usize) -> (f64, f64) {
        let Integers { cols, group, .. } = self.packed;
        let groups = cols.div_ceil(group);
        let term = |(col, x): (usize, &f32)| {
            let at = output * groups + col / group;
            let zero = self.zeros.as_ref().map_or(0.0, |zeros| zeros[at]);
            f64::from(bf16::from_f32(*x).to_f32() * self.scales[at])
                * f64::from(self.values[output * cols + col] - zero)
        };
        let terms = x.iter().enumerate().map(term);
        (terms.clone().sum::<f64>() + 0.5, terms.map(f64::abs).sum::<f64>() + 0.5)
    }
}

/// Numbers of rows and matrices at every edge: of tiles, of panels and of what is walked at once, of groups and of
/// steps within them.
fn cases() -> Vec<(usize, Matrix)> {
    vec![
        (1, Matrix::eight((1, 1))),
        (2, Matrix::eight((17, 33))),
        (17, Matrix::eight((40, 520))),
        (40, Matrix::eight((150, 1100))),
        (530, Matrix::eight((20, 40))),
        (3, Matrix::e4m3((31, 100), (31, 100))),
        (16, Matrix::e4m3((50, 300), (128, 128))),
        (35, Matrix::e4m3((33, 72), (3, 16))),
        (3, Matrix::four((24, 40), 8, false)),
        (18, Matrix::four((40, 96), 32, true)),
        (5, Matrix::four((16, 120), 40, false)),
        (40, Matrix::four((152, 384), 128, false)),
        (33, Matrix::four((24, 640), 640, true)),
        (20, Matrix::four((16, 1152), 576, false)),
    ]
}

fn noise(n: usize) -> Vec<f32> {
    random(n, 5, 2003).into_iter().map(|x| x as f32 / 1000.0 - 1.0).collect()
}

#[test]
fn they_have_the_bits_of_a_plain_loop_and_are_near_f64() {
    for (rows, matrix) in cases() {
        let Integers { rows: n, cols, .. } = matrix.packed;
        let x = noise(rows * cols);
        for isa in Isa::in_pairs() {
            let what = format!("{isa}: {rows} rows, {:?}", matrix.packed);
            let out = matrix.product(Emulated, isa, &x, 3);
            assert!(out == matrix.plain_loop(isa, &x), "{what}");
            for (index, found) in out.iter().enumerate() {
                let (exact, size) = matrix.exact(&x[index / n * cols..][..cols], index % n);
                // As many roundings as there are products and sums, each at most of half a unit of all that is added.
                let allowed = (2 * cols + 2) as f64 * size * 2.0_f64.powi(-24);
                assert!(
                    (f64::from(*found) - exact).abs() <= allowed,
                    "{what} at {index}: {found}, exact {exact}"
                );
            }
        }
    }
}

#[test]
fn a_row_knows_nothing_of_others_even_of_such_that_are_no_number() {
    for (rows, matrix) in cases() {
        let Integers { rows: n, cols, .. } = matrix.packed;
        let mut x = noise(rows * cols);
        for isa in Isa::in_pairs() {
            let alone: Vec<_> = [0, rows / 2, rows - 1]
                .map(|row| (row, matrix.product(Emulated, isa, &x[row * cols..][..cols], 1)))
                .to_vec();
            for bad in [None, Some(rows / 2), Some(rows - 1)] {
                if let Some(bad) = bad {
                    x[bad * cols..][..cols].fill(f32::NAN);
                }
                let out = matrix.product(Emulated, isa, &x, 2);
                for (row, alone) in &alone {
                    let found = &out[row * n..][..n];
                    let spoilt = x[row * cols].is_nan();
                    let same = if spoilt { found.iter().all(|x| x.is_nan()) } else { found == alone };
                    assert!(same, "{isa}: row {row} of {rows}, {:?}", matrix.packed);
                }
            }
            x = noise(rows * cols);
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod instructions {
    use std::sync::Mutex;

    use super::super::super::super::weight::Matrix as Packed;
    use super::*;
    use crate::{Cpu, Ops, Projection, Rounding, WeightSource};

    /// With all other instructions of such a machine, which is where it can be tried.
    #[test]
    fn a_cpu_with_tiles_takes_them_for_all_weights_that_fit() {
        if !Isa::Avx512Bf16.available() {
            return;
        }
        let (rows, cols, n) = (5, 300, 40);
        let (arena, packed, grouped) = <(Arena, Mutex<Scratch>, Mutex<Scratch>)>::default();
        let cpu = Cpu {
            isa: Isa::Amx,
            workers: Arc::new(Workers::new(NonZeroUsize::new(2)).unwrap()),
            arena,
            packed,
            grouped,
        };
        let (x, w) = (noise(rows * cols), noise(n * cols + 1));
        let bytes =
            Arc::new(w[1..].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect::<Vec<_>>());
        let source = WeightSource { range: 0..bytes.len(), bytes, dtype: Dtype::Bf16, shape: vec![n, cols] };
        let mut from = cpu.tensor(rows, cols).unwrap();
        cpu.write(&mut from, &x).unwrap();
        for rounding in [None, Some(Rounding::Int8), Some(Rounding::Fp8), Some(Rounding::Int4)] {
            let weight = match rounding {
                Some(rounding) => cpu.weight_rounded(source.clone(), rounding).unwrap(),
                None => cpu.weight(source.clone()).unwrap(),
            };
            let mut out = cpu.tensor(rows, n).unwrap();
            cpu.linear(&from, &mut [Projection { weight: &weight, bias: None, out: &mut out }]).unwrap();
            let (mut expected, with, memory) =
                (vec![f32::NAN; rows * n], (&*cpu.workers, cpu.isa), &mut Scratch::default());
            let to = SharedOut::new(&mut expected);
            match weight.matrix("linear").unwrap() {
                Packed::Floats(weight) => {
                    linear(Emulated, with, memory, &x, rows, &[Product { weight, bias: None, out: to }])
                }
                Packed::Integers(weight) => {
                    linear(Emulated, with, memory, &x, rows, &[Product { weight, bias: None, out: to }])
                }
            }
            assert_eq!(cpu.read(&out).unwrap(), expected, "{rounding:?}");
        }
    }

    #[test]
    fn they_have_the_bits_of_the_loops() {
        let unit = Hardware::or_trapped();
        for (rows, matrix) in cases() {
            let x = noise(rows * matrix.packed.cols);
            for isa in Isa::in_pairs() {
                let expected = matrix.product(Emulated, isa, &x, 2);
                assert!(
                    matrix.product(unit, isa, &x, 2) == expected,
                    "{isa}: {rows} rows, {:?}",
                    matrix.packed
                );
            }
        }
    }
}
