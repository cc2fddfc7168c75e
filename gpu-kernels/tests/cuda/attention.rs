//! Attention on the CPU, on every instruction set of this machine, and on CUDA in the emulator: cases that have broken
//! kernels elsewhere, at sizes that an emulator takes, against softmax in f64 (`attending.rs`). Cases 14, 18, 19 and 20
//! are in `pages.rs` and `states.rs`.
//!
//! Cases whose length is the point run at that length too (to 131,072 tokens): on a GPU, and on the CPU when
//! `QUAYLINE_FULL_CASES` is set. `QUAYLINE_FULL_CASES=1 cargo test -p quayline-gpu-kernels --test cuda
//! attention::case_` takes a minute and 2.2 GB on two cores.

use std::sync::atomic::Ordering;

use quayline_gpu_kernels::{Dtype, KvStorage};

use crate::attending::{Case, attend, compare, step};
use crate::cases::{Found, ORDERS, check, check_full, machines, repeat, sequences};
use crate::common::{Random, bits};
use crate::emulator;

#[test]
fn case_01_page_edges_and_no_context() {
    check("1", &Case::decode((32, 8, 128), 16, &[0, 1, 15, 16, 17, 31, 32, 33]));
}

#[test]
fn case_02_groups_of_seven() {
    check("2", &Case::decode((28, 4, 128), 16, &[1, 97, 2048]));
    check_full("2", &Case::decode((28, 4, 128), 16, &[1, 97, 2048, 16384]));
}

#[test]
fn case_03_groups_above_a_tile() {
    check("3 a", &Case::decode((64, 4, 128), 64, &[513, 1023]));
    check("3 b", &Case::decode((64, 1, 128), 64, &[513, 1023]));
    check_full("3 a", &Case::decode((64, 4, 128), 64, &[513, 8191]));
    check_full("3 b", &Case::decode((64, 1, 128), 64, &[513, 8191]));
    check("3 c", &Case::decode((100, 1, 64), 16, &[70]));
}

#[test]
fn case_04_many_heads_and_small_pages_in_f16() {
    let case = Case::decode((32, 32, 128), 8, &[300, 40]);
    check("4", &Case { dtype: Dtype::F16, ..case });
    let case = Case::decode((32, 32, 128), 8, &[4000, 4000]);
    check_full("4", &Case { dtype: Dtype::F16, ..case });
}

#[test]
fn case_05_all_lengths_of_a_small_head() {
    // All up to a tile and a bit, and around every later page.
    let lengths: Vec<usize> = (1..=300).filter(|n| *n < 70 || n % 16 < 2).collect();
    check("5", &Case::decode((14, 2, 64), 16, &lengths));
    check_full("5", &Case::decode((14, 2, 64), 16, &(1..=300).collect::<Vec<_>>()));
}

#[test]
fn case_06_window_and_cap_with_a_head_of_256() {
    let case = Case::decode((16, 8, 256), 32, &[95, 96, 97, 300]);
    check("6", &Case { window: Some(96), softcap: Some(50.0), ..case });
    let case = Case::decode((16, 8, 256), 32, &[4095, 4096, 4097, 9000]);
    check_full("6", &Case { window: Some(4096), softcap: Some(50.0), ..case });
    let case = Case::new((4, 2, 256), 32, &[(40, 97), (70, 200)]);
    check("6 prefill", &Case { window: Some(96), softcap: Some(2.0), ..case });
}

#[test]
fn case_07_heads_between_the_sizes() {
    for dim in [80, 96, 112, 192, 17, 8, 1] {
        check(&format!("7 {dim}"), &Case::new((4, 2, dim), 16, &[(1, 300), (30, 77)]));
    }
}

#[test]
fn case_08_ragged_prompts() {
    let lengths = [1, 2, 63, 64, 65, 127, 128, 129, 300].map(|n| (n, n));
    check("8", &Case::new((4, 1, 128), 16, &lengths));
    let lengths_full = [1, 2, 127, 128, 129, 1023, 1024, 1025].map(|n| (n, n));
    check_full("8", &Case::new((8, 2, 128), 16, &lengths_full));
    check("8 small", &Case::new((6, 2, 64), 16, &lengths));
}

#[test]
fn case_09_chunks_of_prompts() {
    check("9", &Case::new((4, 2, 128), 16, &[(17, 600), (64, 700), (1, 1), (70, 139)]));
    check_full("9", &Case::new((4, 2, 128), 16, &[(17, 4096), (512, 32768), (1, 1), (256, 255 + 256)]));
}

#[test]
fn case_10_more_queries_than_context() {
    check("10", &Case::new((4, 2, 64), 16, &[(235, 2), (5, 3), (7, 0)]));
}

#[test]
fn case_11_mixed_batch() {
    let mut random = Random::new(11);
    let mut mixed = |count, long: &dyn Fn(&mut Random) -> usize, short: &dyn Fn(&mut Random) -> usize| {
        let of = |i| if i % 16 == 0 { (17, long(&mut random)) } else { (1, short(&mut random)) };
        (0..count).map(of).collect::<Vec<_>>()
    };
    let lengths = mixed(32, &|random| 200 + random.below(400), &|random| 10 + random.below(60));
    check("11", &Case::new((8, 2, 64), 16, &lengths));
    // The short ones have a twentieth of the long ones' context.
    let lengths = mixed(256, &|random| 1000 + random.below(10_000), &|random| 50 + random.below(500));
    check_full("11", &Case::new((8, 2, 128), 16, &lengths));
}

#[test]
fn case_12_one_long_and_many_short() {
    check("12", &Case::decode((8, 2, 128), 16, &[5000, 60, 61, 62, 63, 64, 65]));
    let contexts: Vec<usize> = [131_072].into_iter().chain([1000; 63]).collect();
    check_full("12", &Case::decode((8, 2, 128), 16, &contexts));
}

#[test]
fn case_13_a_chunk_far_into_a_prompt() {
    check("13", &Case::new((2, 1, 128), 16, &[(40, 4100)]));
    check_full("13", &Case::new((4, 2, 128), 16, &[(2048, 131_072)]));
}

#[test]
fn case_15_eight_bit_caches() {
    for dim in [64, 128, 256, 80] {
        let tensor = KvStorage::Fp8 { key_scale: 0.01, value_scale: 0.005 };
        for storage in [tensor, KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
            let case = Case::new((4, 2, dim), 16, &[(1, 54), (1, 300), (20, 90)]);
            check(&format!("15 {dim} {storage:?}"), &Case { storage, ..case });
        }
    }
    // Scales so small that numbers are cut at 448.
    let storage = KvStorage::Fp8 { key_scale: 0.002, value_scale: 0.001 };
    check("15 cut", &Case { storage, ..Case::decode((4, 2, 64), 16, &[70]) });
    for storage in [KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
        let f16 = Case { dtype: Dtype::F16, storage, ..Case::decode((4, 2, 128), 16, &[70]) };
        check(&format!("15 f16 {storage:?}"), &f16);
    }
}

#[test]
fn case_16_sinks_and_a_window() {
    let case = Case::decode((16, 2, 64), 16, &[0, 1, 127, 128, 129, 600]);
    check("16", &Case { window: Some(128), sinks: true, ..case });
    let case = Case::decode((64, 8, 64), 16, &[1, 127, 128, 129, 4096]);
    check_full("16", &Case { window: Some(128), sinks: true, ..case });
    check("16 prefill", &Case { window: Some(20), sinks: true, ..Case::new((4, 2, 64), 16, &[(50, 90)]) });
}

#[test]
fn case_17_alibi_and_trees_of_drafts() {
    check("17", &Case { slopes: true, ..Case::decode((40, 40, 128), 16, &[129]) });
    check_full("17", &Case { slopes: true, ..Case::decode((40, 40, 128), 16, &[729]) });
    check_full("17 tree", &Case { tree: true, ..Case::new((8, 2, 128), 16, &[(8, 2048); 8]) });
    check("17 prefill", &Case { slopes: true, ..Case::new((8, 8, 64), 16, &[(40, 100)]) });
    check(
        "17 tree",
        &Case { tree: true, ..Case::new((4, 2, 128), 16, &[(8, 300), (8, 8), (40, 41), (3, 1)]) },
    );
}

/// Prompts by the kernel for Hopper: within the bound, whatever the order of threads.
fn check_hopper(name: &str, case: &Case) {
    let (sequences, mut random) = sequences(name, case);
    let mut first: Option<Found> = None;
    for ((cuda, emulator), order) in machines(case.dtype).into_iter().zip(ORDERS) {
        let case = &Case { order, ..case.clone() };
        emulator.hopper.store(true, Ordering::Relaxed);
        emulator.shared_bytes_max.store(227 << 10, Ordering::Relaxed);
        let cuda = cuda.with_fast_prompts(true);
        let step = step(&cuda, case, &sequences, &mut random);
        let (out, lse) = attend(&cuda, case, &step);
        let launches = emulator.hopper_launches.load(Ordering::Relaxed);
        assert_eq!(launches, u64::from(!emulator::on_gpu()), "{name}: another kernel ran");
        let found = (bits(&out), bits(&lse));
        repeat(name, &cuda, case, &step, &found);
        match &first {
            Some(first) => {
                assert!(*first == found, "{name}: the order of threads or of the pool shows in the bits")
            }
            None => {
                compare(name, case, &sequences, (&out, &lse), f64::INFINITY, &mut random);
                first = Some(found);
            }
        }
    }
}

#[test]
fn hopper_cases_08_and_09_ragged_prompts_and_chunks() {
    check_hopper("hopper 8", &Case::new((4, 1, 128), 16, &[(1, 1), (2, 2), (40, 40), (129, 129), (3, 70)]));
    check_hopper("hopper 9", &Case::new((4, 2, 128), 16, &[(17, 300), (64, 140), (1, 1), (70, 139)]));
    if emulator::on_gpu() {
        check_hopper("hopper 8 at full length", &Case::new((8, 2, 128), 16, &[(1023, 1023), (1025, 1025)]));
        check_hopper("hopper 9 at full length", &Case::new((4, 2, 128), 16, &[(17, 4096), (512, 32768)]));
        check_hopper("hopper 13 at full length", &Case::new((4, 2, 128), 16, &[(2048, 131_072)]));
    }
}

#[test]
fn hopper_cases_02_to_07_groups_pages_and_heads() {
    check_hopper("hopper 2", &Case::new((7, 1, 64), 64, &[(20, 150), (9, 9)]));
    check_hopper("hopper 4", &Case { dtype: Dtype::F16, ..Case::new((2, 2, 128), 128, &[(70, 257)]) });
    for dim in [8, 40, 80, 112] {
        check_hopper("hopper 7", &Case::new((4, 2, dim), 8, &[(30, 77)]));
    }
    check_hopper("hopper large pages", &Case::new((4, 2, 64), 256, &[(30, 300)]));
}

#[test]
fn hopper_cases_06_10_and_16_windows_sinks_and_nothing_to_see() {
    let window = Case::new((4, 2, 64), 32, &[(50, 400)]);
    check_hopper("hopper 6", &Case { window: Some(96), softcap: Some(5.0), ..window });
    check_hopper("hopper 10", &Case::new((4, 2, 64), 16, &[(35, 2), (17, 0)]));
    let sinks = Case::new((4, 2, 64), 16, &[(50, 90)]);
    check_hopper("hopper 16", &Case { window: Some(20), sinks: true, ..sinks });
}

#[test]
fn hopper_case_15_eight_bit_caches() {
    let tensor = KvStorage::Fp8 { key_scale: 0.01, value_scale: 0.005 };
    for (dtype, storage) in [
        (Dtype::Bf16, tensor),
        (Dtype::Bf16, KvStorage::Fp8PerHead),
        (Dtype::Bf16, KvStorage::Int8PerHead),
        (Dtype::F16, tensor),
        (Dtype::F16, KvStorage::Fp8PerHead),
        (Dtype::F16, KvStorage::Int8PerHead),
    ] {
        let name = |what| format!("hopper 15 {what} {dtype} {storage:?}");
        let case =
            |heads, block_size, lengths| Case { dtype, storage, ..Case::new(heads, block_size, lengths) };
        // Three tiles, so that both stages are used twice; pages of which a tile has many, and one of two tiles.
        check_hopper(&name("pages"), &case((4, 2, 128), 16, &[(20, 300), (9, 9), (17, 0)]));
        let window = case((2, 1, 40), 256, &[(40, 400)]);
        check_hopper(&name("window"), &Case { window: Some(70), softcap: Some(5.0), sinks: true, ..window });
    }
}
