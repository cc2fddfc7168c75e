//! Penalties on tokens that came before.

use std::collections::BTreeMap;

use crate::request::Sampling;

/// The three penalties and the counts they need.
#[derive(Debug)]
pub(crate) struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// Distinct tokens of the prompt, ascending; empty when no penalty looks at them.
    prompt: Vec<u32>,
    /// How often each token is in the output.
    output: BTreeMap<u32, u32>,
}

impl Penalties {
    #[expect(clippy::float_cmp, reason = "1 is the value that switches it off")]
    pub(crate) fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let repetition = sampling.repetition_penalty;
        let mut prompt = if repetition == 1.0 { Vec::new() } else { prompt.to_vec() };
        prompt.sort_unstable();
        prompt.dedup();
        let (presence, frequency) = (sampling.presence_penalty, sampling.frequency_penalty);
        Self { repetition, presence, frequency, prompt, output: BTreeMap::new() }
    }

    #[expect(clippy::float_cmp, reason = "1 and 0 are the values that switch a penalty off")]
    fn are_off(&self) -> bool {
        self.repetition == 1.0 && self.presence == 0.0 && self.frequency == 0.0
    }

    pub(crate) fn push(&mut self, token: u32) {
        if !self.are_off() {
            *self.output.entry(token).or_insert(0) += 1;
        }
    }

    /// Repetition divides a positive logit and multiplies a negative one, for tokens of prompt and output
    /// (Keskar et al., CTRL, 2019); the other two subtract, for tokens of the output.
    pub(crate) fn apply(&self, logits: &mut [f32]) {
        if self.are_off() {
            return;
        }
        for &token in &self.prompt {
            if !self.output.contains_key(&token) {
                self.repeat(logits, token);
            }
        }
        for (&token, &count) in &self.output {
            self.repeat(logits, token);
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= self.frequency * count as f32;
                *logit -= self.presence;
            }
        }
    }

    fn repeat(&self, logits: &mut [f32], token: u32) {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(sampling: &Sampling, prompt: &[u32], output: &[u32]) -> Vec<f32> {
        let mut penalties = Penalties::new(sampling, prompt);
        output.iter().for_each(|&token| penalties.push(token));
        let mut logits = vec![4.0, -4.0, 4.0, -4.0];
        penalties.apply(&mut logits);
        logits
    }

    #[test]
    fn repetition_counts_prompt_and_output_once() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(apply(&sampling, &[0, 0, 1], &[0, 3, 3]), [2.0, -8.0, 4.0, -8.0]);
    }

    #[test]
    fn presence_and_frequency_count_the_output() {
        let presence = Sampling { presence_penalty: 1.0, ..Sampling::default() };
        assert_eq!(apply(&presence, &[0], &[2, 2]), [4.0, -4.0, 3.0, -4.0]);
        let frequency = Sampling { frequency_penalty: 1.0, ..Sampling::default() };
        assert_eq!(apply(&frequency, &[0], &[2, 2]), [4.0, -4.0, 2.0, -4.0]);
    }

    #[test]
    fn repetition_comes_first() {
        let sampling = Sampling { repetition_penalty: 2.0, presence_penalty: 1.0, ..Sampling::default() };
        assert_eq!(apply(&sampling, &[], &[0]), [1.0, -4.0, 4.0, -4.0]);
    }
}
