//! Matrix products against sums in f64, and the promise that a row's bits depend on the row alone.

use quayline_gpu_kernels::{Cpu, Dtype, Isa, Ops, Projection};

use crate::common::{self, Random, close, cpus, weight};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// One product on one CPU.
fn product(cpu: &Cpu, x: &[f32], k: usize, w: &common::Stored, bias: Option<&[f32]>) -> Vec<f32> {
    let n = w.shape[0];
    let rows = x.len() / k;
    let mut input = cpu.tensor(rows, k).unwrap();
    cpu.write(&mut input, x).unwrap();
    let mut out = cpu.tensor(rows, n).unwrap();
    let bias = bias.map(|bias| common::vector(cpu, bias));
    let weight = weight(cpu, w);
    cpu.linear(&input, &mut [Projection { weight: &weight, bias: bias.as_ref(), out: &mut out }]).unwrap();
    cpu.read(&out).unwrap().into_owned()
}

#[test]
fn products_are_right_at_every_edge() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let k = random.pick(&[1, 2, 15, 16, 17, 31, 33, 64, 100, 769, 1601]);
        let n = random.pick(&[1, 2, 7, 8, 9, 16, 23, 65]);
        let m = random.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 13, 26]);
        let dtype = random.pick(&DTYPES);
        let x = random.floats(m * k);
        let w = random.stored(dtype, &[n, k]);
        let bias = random.flip().then(|| random.floats(n));
        for cpu in cpus() {
            let out = product(&cpu, &x, k, &w, bias.as_deref());
            for (index, &found) in out.iter().enumerate() {
                let (row, column) = (index / n, index % n);
                let terms = (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w.values[column * k + i]));
                let size: f64 = terms.clone().map(f64::abs).sum();
                let exact = terms.sum::<f64>() + bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
                close(found, exact, common::linear_error(&cpu, dtype, size), || {
                    format!(
                        "seed {seed}, {cpu:?}: [{m}, {k}] x [{n}, {k}] {dtype}, row {row}, column {column}"
                    )
                });
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_company() {
    for seed in 100..116 {
        let mut random = Random::new(seed);
        let (k, n) = (random.pick(&[48, 288, 777, 1700, 2100]), random.pick(&[8, 50, 131]));
        let m = random.pick(&[2, 3, 4, 5, 9, 64, 200]);
        let dtype = random.pick(&DTYPES);
        let x = random.floats(m * k);
        let w = random.stored(dtype, &[n, k]);
        for cpu in cpus() {
            let together = product(&cpu, &x, k, &w, None);
            for row in [0, m / 2, m - 1] {
                let alone = product(&cpu, &x[row * k..(row + 1) * k], k, &w, None);
                assert_eq!(
                    common::bits(&alone),
                    common::bits(&together[row * n..(row + 1) * n]),
                    "seed {seed}, {cpu:?}: [{m}, {k}] x [{n}, {k}] {dtype}, row {row}"
                );
            }
        }
    }
}

#[test]
fn threads_and_wide_instruction_sets_do_not_change_bits() {
    let mut random = Random::new(7);
    // Few tiles, several depths, and panels that are widened for many tiles.
    for ((m, k, n), dtype) in [(37, 300, 123), (17, 2100, 70), (100, 1100, 70)]
        .into_iter()
        .flat_map(|shape| DTYPES.map(|dtype| (shape, dtype)))
    {
        let x = random.floats(m * k);
        let w = random.stored(dtype, &[n, k]);
        let bits = |threads, isa| common::bits(&product(&common::cpu(threads, isa), &x, k, &w, None));
        for isa in common::isas() {
            let one = bits(1, isa);
            for threads in 2..=4 {
                assert_eq!(bits(threads, isa), one, "{isa} {dtype} on {threads} threads");
            }
        }
        let wide = |isa: &Isa| matches!(isa.name(), "avx2" | "avx512");
        let of_wide: Vec<_> = common::isas().filter(wide).map(|isa| bits(1, isa)).collect();
        assert!(of_wide.windows(2).all(|pair| pair[0] == pair[1]), "AVX2 and AVX-512 differ for {dtype}");
    }
}

#[test]
fn several_projections_share_an_input() {
    let mut random = Random::new(8);
    let (m, k) = (5, 96);
    let x = random.floats(m * k);
    let stored = [40, 8, 9].map(|n| random.stored(Dtype::Bf16, &[n, k]));
    for cpu in cpus() {
        let mut input = cpu.tensor(8, k).unwrap();
        cpu.write(&mut input, &x).unwrap();
        let weights = stored.each_ref().map(|stored| weight(&cpu, stored));
        let mut outs = stored.each_ref().map(|stored| cpu.tensor(8, stored.shape[0]).unwrap());
        let mut projections: Vec<_> = weights
            .iter()
            .zip(&mut outs)
            .map(|(weight, out)| Projection { weight, bias: None, out })
            .collect();
        cpu.linear(&input, &mut projections).unwrap();
        for (stored, out) in stored.iter().zip(&outs) {
            let single = product(&cpu, &x, k, stored, None);
            assert_eq!(common::bits(&cpu.read(out).unwrap()), common::bits(&single), "{cpu:?}");
        }
    }
}
