//! Latent attention (MLA) on the CPU, with all instructions that this machine has.

use quayline_gpu_kernels::{Cpu, Dtype, RopeStyle};

use crate::common::{Random, bits, cpu, cpus, isas};
use crate::heads;
use crate::latents::{self, Case};

/// Holds a case against the reference, on other pages and threads against itself, and each sequence alone.
fn check(name: &str, case: &Case) {
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    let sequences = latents::sequences(case, &mut random);
    for isa in isas() {
        let (one, many) = (cpu(1, isa), cpu(3, isa));
        let (out, lse) = latents::attend(&one, case, &sequences, &mut random);
        latents::compare(name, case, &sequences, (&out, &lse), &mut random);
        let again = latents::attend(&many, case, &sequences, &mut random);
        assert!(
            bits(&again.0) == bits(&out) && bits(&again.1) == bits(&lse),
            "{name}: threads show in the bits"
        );
        let (alone, lse_alone) = each_alone(&many, case, &sequences, &mut random);
        assert!(
            bits(&alone) == bits(&out) && bits(&lse_alone) == bits(&lse),
            "{name}: others show in the bits"
        );
    }
}

/// Output and LSE of each sequence in a batch of its own.
fn each_alone(
    cpu: &Cpu,
    case: &Case,
    sequences: &[latents::Sequence],
    random: &mut Random,
) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (sequence, &lengths) in sequences.iter().zip(&case.lengths) {
        let case = Case { lengths: vec![lengths], ..case.clone() };
        let found = latents::attend(cpu, &case, std::slice::from_ref(sequence), random);
        out.extend(found.0);
        lse.extend(found.1);
    }
    (out, lse)
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
fn appending_norms_rotates_and_keeps_to_its_slots() {
    for cpu in cpus() {
        for (dtype, style) in [(Dtype::Bf16, RopeStyle::Interleaved), (Dtype::F16, RopeStyle::Halves)] {
            latents::appending_norms_rotates_and_keeps_to_its_slots(dtype, style, &cpu);
        }
    }
}

#[test]
fn shapes_that_disagree_are_refused() {
    cpus().for_each(|cpu| latents::shapes_that_disagree_are_refused(&cpu));
}

#[test]
fn heads_have_matrices_of_their_own() {
    for cpu in cpus() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            heads::heads_have_matrices_of_their_own(dtype, &cpu, &mut Random::new(40));
        }
        heads::heads_that_do_not_fit_are_refused(&cpu);
    }
}

#[test]
fn the_absorbed_form_is_attention() {
    for cpu in cpus() {
        heads::the_absorbed_form_is_attention(Dtype::F32, &cpu, 1e-5);
    }
}

#[test]
fn of_equal_slots_the_last_token_wins() {
    let case = latents::case(1, (512, 64), &[]);
    let row = |bytes: &[u8], slot: usize| bytes[(latents::BLOCK_SIZE + slot) * 1152..][..1152].to_vec();
    // Every other token goes to slot 3, the rest to slot 5.
    let (rows, slots) =
        (Random::new(0).floats(200 * 576), (0..200).map(|i| 3 + i % 2 * 2).collect::<Vec<i64>>());
    for cpu in cpus() {
        let all = latents::appended(&cpu, &case, &slots, &rows);
        for (token, slot) in [(198, 3), (199, 5)] {
            let alone = latents::appended(&cpu, &case, &slots[token..=token], &rows[token * 576..][..576]);
            assert_eq!(row(&all, slot), row(&alone, slot), "slot {slot}");
        }
    }
}
