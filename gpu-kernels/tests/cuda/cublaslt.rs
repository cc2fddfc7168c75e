//! Products by cuBLASLt: through a library of our own that has its interface and computes on the host, so that the
//! orders, strides and epilogues that we describe are what is computed; on a GPU through NVIDIA's, where the machine
//! has it.

use std::path::Path;

use quayline_gpu_kernels::cuda::CublasLt;
use quayline_gpu_kernels::{Cpu, Cuda, Dtype, Error, Ops, Projection};

use crate::common::{self, Random, close, half_ulp, rounded};
use crate::emulator;
use crate::fake_cublaslt::Fake;

fn open(fake: &Fake) -> Result<CublasLt, Error> {
    CublasLt::open(&fake.path)
}

/// `x · weightᵀ`, and the same with a bias.
fn products<O: Ops>(ops: &O, dtype: Dtype, rows: usize, [x, weight, bias]: [&[f32]; 3]) -> [Vec<f32>; 2] {
    let (inner, outer) = (x.len() / rows, bias.len());
    let stored = |shape: &[usize], values| ops.weight(common::store(dtype, shape, values, 0).source).unwrap();
    let (weight, bias) = (stored(&[outer, inner], weight), stored(&[outer], bias));
    let mut input = ops.tensor(rows, inner).unwrap();
    ops.write(&mut input, x).unwrap();
    let (mut plain, mut moved) = (ops.tensor(rows, outer).unwrap(), ops.tensor(rows, outer).unwrap());
    let mut projections = [
        Projection { weight: &weight, bias: None, out: &mut plain },
        Projection { weight: &weight, bias: Some(&bias), out: &mut moved },
    ];
    ops.linear(&input, &mut projections).unwrap();
    [plain, moved].map(|out| ops.read(&out).unwrap().into_owned())
}

fn numbers(random: &mut Random, dtype: Dtype, n: usize) -> Vec<f32> {
    (0..n).map(|_| rounded(dtype, random.float())).collect()
}

const SHAPES: [(usize, usize, usize); 7] =
    [(1, 64, 16), (16, 8, 40), (17, 100, 24), (40, 64, 130), (65, 511, 33), (18, 7, 5), (20, 16, 13)];

/// Whether the library, and not our kernels, is to compute it.
fn is_librarys((rows, _, outer): (usize, usize, usize)) -> bool {
    rows > 16 && outer != 13
}

/// Compares all shapes with the CPU.
fn check(cuda: &Cuda, dtype: Dtype) {
    let mut random = Random::new(7);
    let cpu = Cpu::detect().unwrap();
    for (rows, inner, outer) in SHAPES {
        let values = [rows * inner, outer * inner, outer].map(|n| numbers(&mut random, dtype, n));
        let values = values.each_ref().map(Vec::as_slice);
        let (found, exact) = (products(cuda, dtype, rows, values), products(&cpu, dtype, rows, values));
        for (found, exact) in found.iter().flatten().zip(exact.iter().flatten()) {
            let error = f64::from(exact.abs()) * half_ulp(dtype) * 1.02 + inner as f64 * 2e-6;
            let coarse = if cpu.isa().name() == "amx" { inner as f64 / 256.0 } else { 0.0 };
            close(*found, f64::from(*exact), error + coarse, || {
                format!("{rows} x {inner} -> {outer} {dtype}")
            });
        }
    }
}

#[test]
fn products_of_many_rows_are_the_librarys_and_right() {
    if emulator::on_gpu() {
        let named = std::env::var_os("QUAYLINE_CUBLASLT").filter(|path| !path.is_empty());
        match named.map_or_else(CublasLt::find, |path| CublasLt::open(Path::new(&path))) {
            Ok(library) => {
                let cuda = Cuda::detect(Dtype::Bf16).unwrap().with_cublaslt(library).unwrap();
                check(&cuda, Dtype::Bf16);
            }
            Err(absent) => eprintln!("skipped: {absent}"),
        }
        return;
    }
    let Some(fake) = Fake::build("products", &["-DFAKE_VERSION=130000"]) else { return };
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let before = fake.counted("fake_products");
        let (cuda, _) = emulator::cuda(dtype, false).unwrap();
        let library = open(&fake).unwrap();
        assert_eq!(library.version(), 130_000);
        let cuda = cuda.with_cublaslt(library).unwrap();
        check(&cuda, dtype);
        let expected = 2 * SHAPES.iter().filter(|&&shape| is_librarys(shape)).count();
        assert_eq!(fake.counted("fake_products") - before, i32::try_from(expected).unwrap());
        drop(cuda);
        assert_eq!(fake.counted("fake_alive"), 0, "handles, descriptions and layouts are given back");
    }
}

#[test]
fn what_the_library_does_not_take_has_the_bits_of_our_kernels() {
    if emulator::on_gpu() {
        eprintln!("skipped: the stand-in computes on the host's memory");
        return;
    }
    let Some(fake) = Fake::build("refused", &["-DFAKE_VERSION=120000"]) else { return };
    let (own, _) = emulator::cuda(Dtype::Bf16, false).unwrap();
    let (cuda, _) = emulator::cuda(Dtype::Bf16, false).unwrap();
    let cuda = cuda.with_cublaslt(open(&fake).unwrap()).unwrap();
    let mut random = Random::new(11);
    for shape @ (rows, inner, outer) in SHAPES.into_iter().filter(|&shape| !is_librarys(shape)) {
        let values = [rows * inner, outer * inner, outer].map(|n| numbers(&mut random, Dtype::Bf16, n));
        let values = values.each_ref().map(Vec::as_slice);
        let [found, expected] = [&cuda, &own].map(|cuda| products(cuda, Dtype::Bf16, rows, values));
        assert_eq!(found, expected, "{shape:?}");
    }
}

#[test]
fn a_recorded_product_is_the_librarys_too() {
    if emulator::on_gpu() {
        eprintln!("skipped: the stand-in computes on the host's memory");
        return;
    }
    let Some(fake) = Fake::build("recorded", &["-DFAKE_VERSION=130000"]) else { return };
    let (cuda, _) = emulator::cuda(Dtype::F16, true).unwrap();
    let cuda = cuda.with_cublaslt(open(&fake).unwrap()).unwrap();
    let mut random = Random::new(3);
    let (rows, inner, outer) = (20, 24, 10);
    let weight =
        common::store(Dtype::F16, &[outer, inner], &numbers(&mut random, Dtype::F16, outer * inner), 0);
    let weight = cuda.weight(weight.source).unwrap();
    let (mut x, mut out) = (cuda.tensor(rows, inner).unwrap(), cuda.tensor(rows, outer).unwrap());
    let mut answers = Vec::new();
    cuda.write(&mut x, &vec![0.0; rows * inner]).unwrap();
    let graph = cuda
        .capture(|cuda| cuda.linear(&x, &mut [Projection { weight: &weight, bias: None, out: &mut out }]))
        .unwrap();
    let before = fake.counted("fake_products");
    for _ in 0..2 {
        let values = numbers(&mut random, Dtype::F16, rows * inner);
        cuda.write(&mut x, &values).unwrap();
        graph.replay().unwrap();
        let replayed = cuda.read(&out).unwrap().into_owned();
        cuda.linear(&x, &mut [Projection { weight: &weight, bias: None, out: &mut out }]).unwrap();
        assert_eq!(*cuda.read(&out).unwrap(), replayed);
        answers.push(replayed);
    }
    assert_ne!(answers[0], answers[1]);
    assert_eq!(fake.counted("fake_products") - before, 4);
}

#[test]
fn a_library_that_does_not_do_is_an_error_that_says_why() {
    let said = |opened: Result<CublasLt, Error>| opened.unwrap_err().to_string();
    let nowhere = said(CublasLt::open(Path::new("nowhere/libcublasLt.so.13")));
    assert!(nowhere.contains("nowhere/libcublasLt.so.13"), "{nowhere}");
    match CublasLt::find() {
        Ok(library) => eprintln!("skipped: this machine has one, {library:?}"),
        Err(absent) => assert!(absent.to_string().contains("libcublasLt.so.12"), "{absent}"),
    }
    let Some(old) = Fake::build("old", &["-DFAKE_VERSION=110800"]) else { return };
    let old = said(open(&old));
    assert!(old.contains("of version 110800, 120000 is the oldest"), "{old}");
    let part = Fake::build("part", &["-DFAKE_VERSION=120000", "-DWITHOUT_MATMUL"]).unwrap();
    let part = said(open(&part));
    assert!(part.ends_with("has no cublasLtMatmul"), "{part}");
}
