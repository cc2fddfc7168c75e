//! Transcripts of scenario files, of any crate that has a scenario language.

/// A crate that decides, and can be spoken to in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crate {
    /// Which block holds which tokens.
    KvCache,
    /// What runs in the next step.
    Batching,
}

impl Crate {
    /// Runs a scenario and returns it with the answers written under its commands.
    pub fn transcript(self, scenario: &str) -> String {
        match self {
            Crate::KvCache => quayline_kv_cache::scenario::transcript(scenario),
            Crate::Batching => quayline_batching::scenario::transcript(scenario),
        }
    }
}
