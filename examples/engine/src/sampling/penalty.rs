//! Penalties on tokens that came before.

use quayline_gpu_kernels::{Draw, Seen};

use crate::request::Sampling;

/// The three penalties and the counts they need.
#[derive(Debug)]
pub(crate) struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// The tokens that a penalty looks at, ascending, and how often each is in the output.
    seen: Vec<Seen>,
}

impl Penalties {
    #[expect(clippy::float_cmp, reason = "1 is the value that switches it off")]
    pub(crate) fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let repetition = sampling.repetition_penalty;
        let prompt = if repetition == 1.0 { &[] } else { prompt };
        let mut seen: Vec<Seen> = prompt.iter().map(|&token| Seen { token, count: 0 }).collect();
        seen.sort_unstable_by_key(|seen| seen.token);
        seen.dedup();
        let (presence, frequency) = (sampling.presence_penalty, sampling.frequency_penalty);
        Self { repetition, presence, frequency, seen }
    }

    #[expect(clippy::float_cmp, reason = "1 and 0 are the values that switch a penalty off")]
    pub(crate) fn are_off(&self) -> bool {
        self.repetition == 1.0 && self.presence == 0.0 && self.frequency == 0.0
    }

    pub(crate) fn push(&mut self, token: u32) {
        if self.are_off() {
            return;
        }
        match self.seen.binary_search_by_key(&token, |seen| seen.token) {
            Ok(at) => self.seen[at].count += 1,
            Err(at) => self.seen.insert(at, Seen { token, count: 1 }),
        }
    }

    /// Repetition divides a positive logit and multiplies a negative one, for tokens of prompt and output (Keskar et
    /// al., CTRL, 2019); the other two subtract, for tokens of the output, and as a GPU does it: rounded once.
    pub(crate) fn apply(&self, logits: &mut [f32]) {
        if self.are_off() {
            return;
        }
        for &Seen { token, count } in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            if count > 0 {
                *logit -= self.frequency.mul_add(count as f32, self.presence);
            }
        }
    }

    /// For a machine that does the same.
    pub(crate) fn parameters(&self) -> Draw<'_> {
        let Self { repetition, presence, frequency, ref seen } = *self;
        Draw { repetition, presence, frequency, seen, ..Draw::default() }
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
