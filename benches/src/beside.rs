//! What a figure is put beside: the limit of the machine, and the best peer on the same work.

/// Prints, above the figures of a bench, what they are to be read against. Peers' figures were measured in process on
/// one thread (vLLM 0.33.0 and nano-vllm bb823b3 under CPython 3.11.7, 2 vCPU Sapphire Rapids); run them again in
/// the same minutes before you claim a factor.
#[expect(clippy::print_stdout, reason = "a bench prints")]
pub fn beside(bench: &str, limit: &str, peer: &str) {
    println!("{bench}: limit {limit}; peer {peer}");
}
