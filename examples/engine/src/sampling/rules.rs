//! What may not be chosen, and what is made more or less likely by name.

use crate::request::Sampling;

const FORBIDDEN: f32 = f32::NEG_INFINITY;

/// Masks and biases of one request.
#[derive(Debug)]
pub(crate) struct Rules {
    /// Ascending.
    allowed: Option<Vec<u32>>,
    bad_words: Vec<Vec<u32>>,
    /// Not to be chosen before `min_tokens`.
    ends: Vec<u32>,
    min_tokens: usize,
    bias: Vec<(u32, f32)>,
}

impl Rules {
    pub(crate) fn new(sampling: &Sampling, eos: Vec<u32>, bad_words: Vec<Vec<u32>>) -> Self {
        let mut allowed = sampling.allowed_token_ids.clone();
        if let Some(allowed) = &mut allowed {
            allowed.sort_unstable();
            allowed.dedup();
        }
        let mut ends = eos;
        ends.extend(&sampling.stop_token_ids);
        let min_tokens = sampling.min_tokens as usize;
        Self { allowed, bad_words, ends, min_tokens, bias: sampling.logit_bias.clone() }
    }

    /// Whether there are none.
    pub(crate) fn are_off(&self) -> bool {
        let Self { allowed, bad_words, ends: _, min_tokens, bias } = self;
        allowed.is_none() && bad_words.is_empty() && *min_tokens == 0 && bias.is_empty()
    }

    pub(crate) fn apply(&self, logits: &mut [f32], output: &[u32]) {
        if let Some(allowed) = &self.allowed {
            keep_only(logits, allowed);
        }
        self.forbidden(output).for_each(|id| forbid(logits, id));
        for &(id, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
    }

    /// Whether they are more than which tokens may come.
    pub(crate) fn add_to_logits(&self) -> bool {
        !self.bias.is_empty()
    }

    /// Whether some token may not come after this output.
    pub(crate) fn forbid_any(&self, output: &[u32]) -> bool {
        self.allowed.is_some() || self.forbidden(output).next().is_some()
    }

    /// Takes out of a mask, bits from the lowest, what may not come.
    pub(crate) fn mask(&self, mask: &mut [u32], output: &[u32]) {
        if let Some(allowed) = &self.allowed {
            let mut only = vec![0; mask.len()];
            allowed.iter().for_each(|id| only[*id as usize / 32] |= 1 << (id % 32));
            mask.iter_mut().zip(only).for_each(|(word, only)| *word &= only);
        }
        for id in self.forbidden(output) {
            if let Some(word) = mask.get_mut(id as usize / 32) {
                *word &= !(1 << (id % 32));
            }
        }
    }

    /// Tokens that may not come after this output.
    fn forbidden(&self, output: &[u32]) -> impl Iterator<Item = u32> {
        let bad = |word: &Vec<u32>| {
            let (&last, before) = word.split_last()?;
            output.ends_with(before).then_some(last)
        };
        let ends = if output.len() < self.min_tokens { &self.ends[..] } else { &[] };
        self.bad_words.iter().filter_map(bad).chain(ends.iter().copied())
    }

    /// What is chosen when the rules together forbid everything.
    pub(crate) fn last_resort(&self) -> u32 {
        self.allowed.as_ref().and_then(|allowed| allowed.first().copied()).unwrap_or(0)
    }
}

fn forbid(logits: &mut [f32], id: u32) {
    if let Some(logit) = logits.get_mut(id as usize) {
        *logit = FORBIDDEN;
    }
}

fn keep_only(logits: &mut [f32], allowed: &[u32]) {
    let mut from = 0;
    for &id in allowed {
        let at = (id as usize).min(logits.len());
        logits[from..at].fill(FORBIDDEN);
        from = (at + 1).min(logits.len());
    }
    logits[from..].fill(FORBIDDEN);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO: f32 = FORBIDDEN;

    fn apply(sampling: &Sampling, eos: &[u32], bad: &[&[u32]], output: &[u32]) -> Vec<f32> {
        let bad_words = bad.iter().map(|word| word.to_vec()).collect();
        let mut logits = vec![1.0; 5];
        Rules::new(sampling, eos.to_vec(), bad_words).apply(&mut logits, output);
        logits
    }

    #[test]
    fn only_allowed_tokens_stay() {
        let with = |ids: &[u32]| Sampling { allowed_token_ids: Some(ids.to_vec()), ..Sampling::default() };
        assert_eq!(apply(&with(&[3, 1, 3]), &[], &[], &[]), [NO, 1.0, NO, 1.0, NO]);
        assert_eq!(apply(&with(&[0, 4]), &[], &[], &[]), [1.0, NO, NO, NO, 1.0]);
    }

    #[test]
    fn a_bad_word_loses_its_last_token_after_the_ones_before() {
        let sampling = Sampling::default();
        assert_eq!(apply(&sampling, &[], &[&[2]], &[]), [1.0, 1.0, NO, 1.0, 1.0]);
        assert_eq!(apply(&sampling, &[], &[&[1, 2]], &[2, 1]), [1.0, 1.0, NO, 1.0, 1.0]);
        assert_eq!(apply(&sampling, &[], &[&[1, 2]], &[1, 3]), [1.0; 5]);
        assert_eq!(apply(&sampling, &[], &[&[0, 1, 2]], &[1]), [1.0; 5]);
    }

    #[test]
    fn ends_are_forbidden_until_the_minimum() {
        let sampling = Sampling { min_tokens: 2, stop_token_ids: vec![0], ..Sampling::default() };
        assert_eq!(apply(&sampling, &[4], &[], &[1]), [NO, 1.0, 1.0, 1.0, NO]);
        assert_eq!(apply(&sampling, &[4], &[], &[1, 1]), [1.0; 5]);
    }

    #[test]
    fn a_mask_takes_out_what_logits_lose() {
        let sampling =
            Sampling { min_tokens: 2, allowed_token_ids: Some(vec![0, 1, 3, 4]), ..Sampling::default() };
        for output in [&[][..], &[1], &[2, 1]] {
            let rules = Rules::new(&sampling, vec![4], vec![vec![1, 3], vec![0]]);
            let (mut logits, mut mask) = (vec![1.0; 5], [!0]);
            rules.apply(&mut logits, output);
            rules.mask(&mut mask, output);
            let bits = logits.iter().rev().fold(0, |bits, &logit| 2 * bits + u32::from(logit == 1.0));
            assert_eq!(mask, [bits], "{output:?}");
            assert!(rules.forbid_any(output));
        }
        assert!(!Rules::new(&Sampling::default(), vec![4], Vec::new()).forbid_any(&[]));
    }

    #[test]
    fn bias_is_added_but_revives_nothing() {
        let logit_bias = vec![(1, -100.0), (2, 5.0)];
        let sampling = Sampling { logit_bias, allowed_token_ids: Some(vec![0, 1]), ..Sampling::default() };
        assert_eq!(apply(&sampling, &[], &[], &[]), [1.0, -99.0, NO, NO, NO]);
    }
}
