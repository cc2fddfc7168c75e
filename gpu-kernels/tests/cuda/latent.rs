//! Latent attention (MLA) on the emulator.

use std::sync::atomic::Ordering;

use quayline_gpu_kernels::cuda::{Device, DeviceMemory, KvStrides};
use quayline_gpu_kernels::{Dtype, KvStorage, RopeStyle};

use crate::common::{Random, bits};
use crate::emulator;
use crate::heads;
use crate::latents::{self, Case};

fn check(name: &str, case: &Case) {
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    let sequences = latents::sequences(case, &mut random);
    let mut first: Option<(Vec<u32>, Vec<u32>)> = None;
    for (descending, wide) in [(false, false), (true, true)] {
        let Some((cuda, emulator)) = emulator::cuda(case.dtype, descending) else { return };
        if wide {
            emulator.shared_bytes_max.store(227 << 10, Ordering::Relaxed);
        }
        let (out, lse) = latents::attend(&cuda, case, &sequences, &mut random);
        let conflicts = emulator.bank_conflicts.load(Ordering::Relaxed);
        assert_eq!(conflicts, 0, "{name}: conflicts of banks in ldmatrix");
        let found = (bits(&out), bits(&lse));
        if let Some(first) = &first {
            assert!(*first == found, "{name}: order of threads or rows of a tile show in the bits");
            continue;
        }
        first = Some(found);
        latents::compare(name, case, &sequences, (&out, &lse), &mut random);
    }
}

#[test]
fn decoding_over_page_edges_and_no_context() {
    latents::decoding_over_page_edges_and_no_context(check);
}

#[test]
fn many_heads_and_several_tokens() {
    latents::many_heads_and_several_tokens(check);
}

#[test]
fn contexts_are_cut_and_merged() {
    latents::contexts_are_cut_and_merged(check);
}

#[test]
fn smaller_latents() {
    latents::smaller_latents(check);
}

#[test]
fn latents_of_eight_bits() {
    latents::latents_of_eight_bits(check);
}

#[test]
fn latents_in_memory_of_somebody_else() {
    let storage = KvStorage::Same;
    let case =
        Case { heads: 3, latent: 64, rope: 16, dtype: Dtype::Bf16, storage, lengths: vec![(2, 37), (1, 20)] };
    let sequences = latents::sequences(&case, &mut Random::new(7));
    let Some((cuda, emulator)) = emulator::cuda(case.dtype, false) else { return };
    if emulator::on_gpu() {
        return;
    }
    let own = latents::attend(&cuda, &case, &sequences, &mut Random::new(8));
    // Rows 8 elements apart, pages 16 more, both layers of a page side by side.
    let (token, layer) = (88, 88 * latents::BLOCK_SIZE + 16);
    let strides = KvStrides { layer, value: 0, page: 2 * layer, head: 0, token };
    let bytes = 64 * 2 * layer * 2;
    let address = emulator.allocate(bytes).unwrap();
    let theirs = latents::attend_in(&cuda, &case, &sequences, &mut Random::new(8), |shape| {
        let memory = DeviceMemory { address, bytes };
        let short = DeviceMemory { bytes: 4096, ..memory };
        // SAFETY: the memory is the emulator's, and nobody but the pool writes it.
        let over = |memory| unsafe { cuda.latent_pool_over(shape, storage, strides, memory) };
        assert!(over(short).unwrap_err().to_string().contains("the most allowed is 4096"));
        over(memory).unwrap()
    });
    assert_eq!((bits(&own.0), bits(&own.1)), (bits(&theirs.0), bits(&theirs.1)));
    let mut found = vec![0; bytes];
    emulator.download(address, &mut found).unwrap();
    for row in found[..2 * layer * 2].chunks(2 * layer).flat_map(|page| page[..2 * 88 * 16].chunks(2 * 88)) {
        assert!(row[160..].iter().all(|&byte| byte == 0xff), "written between rows");
    }
}

#[test]
fn appending_norms_rotates_and_keeps_to_its_slots() {
    for (dtype, style) in [(Dtype::Bf16, RopeStyle::Interleaved), (Dtype::F16, RopeStyle::Halves)] {
        let Some((cuda, _)) = emulator::cuda(dtype, false) else { return };
        latents::appending_norms_rotates_and_keeps_to_its_slots(dtype, style, &cuda);
    }
}

#[test]
fn shapes_that_disagree_are_refused() {
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    latents::shapes_that_disagree_are_refused(&cuda);
}

#[test]
fn heads_have_matrices_of_their_own() {
    emulator::each(|dtype, cuda, random| {
        heads::heads_have_matrices_of_their_own(dtype, cuda, random);
        heads::heads_that_do_not_fit_are_refused(cuda);
    });
}

#[test]
fn the_absorbed_form_is_attention() {
    emulator::each(|dtype, cuda, _| {
        let error = if dtype == Dtype::F16 { 4e-3 } else { 3e-2 };
        heads::the_absorbed_form_is_attention(dtype, cuda, error);
    });
}
