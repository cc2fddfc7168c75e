//! The prompts of a trace, as a prefix cache sees them.

use std::collections::HashMap;

use crate::trace::Arrival;

/// The prompts of a trace in the order in which they came. Blocks are numbered from 0 as they first appear.
#[derive(Clone, Debug)]
pub struct Prompts {
    prompts: Vec<Prompt>,
    distinct_blocks: u32,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its blocks, the first tokens first. Prompts that begin alike have equal leading blocks.
    pub blocks: Vec<u32>,
    /// Its tokens; the last block may be partly filled.
    pub tokens: u32,
}

/// Why a trace says nothing about caches.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoBlocks {
    /// No request names its blocks.
    #[error("the trace does not say which blocks its prompts share (`hash_ids`)")]
    Unnamed,
    /// There are more blocks than have numbers.
    #[error("the trace names more than 4,294,967,295 blocks")]
    TooMany,
}

impl Prompts {
    /// Numbers the blocks of a trace.
    ///
    /// # Errors
    /// When there are none, or too many.
    pub fn of(trace: &[Arrival]) -> Result<Prompts, NoBlocks> {
        let mut numbers = HashMap::new();
        let mut prompts = Vec::with_capacity(trace.len());
        for arrival in trace {
            let mut blocks = Vec::with_capacity(arrival.blocks.len());
            for &name in &arrival.blocks {
                let next = u32::try_from(numbers.len()).map_err(|_| NoBlocks::TooMany)?;
                blocks.push(*numbers.entry(name).or_insert(next));
            }
            prompts.push(Prompt { blocks, tokens: arrival.prompt_tokens });
        }
        let distinct_blocks = u32::try_from(numbers.len()).map_err(|_| NoBlocks::TooMany)?;
        if distinct_blocks == 0 { Err(NoBlocks::Unnamed) } else { Ok(Prompts { prompts, distinct_blocks }) }
    }

    /// The prompts, first come first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Prompt> + ExactSizeIterator {
        self.prompts.iter()
    }

    /// How many different blocks there are: a cache of so many never evicts.
    pub fn distinct_blocks(&self) -> u32 {
        self.distinct_blocks
    }

    /// How many blocks all prompts have together.
    pub fn blocks(&self) -> u64 {
        self.prompts.iter().map(|prompt| prompt.blocks.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn blocks_are_numbered_as_they_appear() {
        let arrival = |blocks| Arrival { at: Duration::ZERO, prompt_tokens: 600, output_tokens: 1, blocks };
        let prompts = Prompts::of(&[arrival(vec![90, 7]), arrival(vec![90, u64::MAX])]).unwrap();
        let blocks: Vec<_> = prompts.iter().map(|prompt| prompt.blocks.clone()).collect();
        assert_eq!(blocks, [[0, 1], [0, 2]]);
        assert_eq!((prompts.distinct_blocks(), prompts.blocks()), (3, 4));
        assert_eq!(Prompts::of(&[arrival(vec![])]).unwrap_err(), NoBlocks::Unnamed);
    }
}
