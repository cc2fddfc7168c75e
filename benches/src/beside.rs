//! What a figure is put beside: the limit of the machine, and the best peer on the same work.

/// Prints, above the figures of a bench, what they are to be read against. Peers' figures were measured in process on
/// one thread (vLLM 0.33.0 and nano-vllm bb823b3 under CPython 3.11.7, 2 vCPU Sapphire Rapids); run them again in
/// the same minutes before you claim a factor.
#[expect(clippy::print_stdout, reason = "a bench prints")]
pub fn beside(bench: &str, limit: &str, peer: &str) {
    println!("{bench}: limit {limit}; peer {peer}");
}

/// What one call of an operator moves or computes: the limit that it runs into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// So many bytes.
    Bytes(usize),
    /// So many additions and multiplications.
    Flop(usize),
}

impl Work {
    /// Its rate in units of 1e9 a second, beside what the machine can do at most in the same unit:
    /// `25.1 GB/s of 28.3 (89 %)`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a call has far fewer than 2^52 of either")]
    pub fn beside(self, seconds: f64, limit: f64) -> String {
        let (count, unit) = match self {
            Self::Bytes(count) => (count, "GB/s"),
            Self::Flop(count) => (count, "GFLOP/s"),
        };
        let rate = count as f64 / seconds / 1e9;
        format!("{rate:.1} {unit} of {limit:.1} ({:.0} %)", 100.0 * rate / limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_stands_beside_its_limit() {
        assert_eq!(Work::Bytes(3_000_000).beside(1e-3, 4.0), "3.0 GB/s of 4.0 (75 %)");
        assert_eq!(Work::Flop(3_000_000_000).beside(0.5, 12.0), "6.0 GFLOP/s of 12.0 (50 %)");
    }
}
