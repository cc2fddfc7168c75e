//! The tokens of a step, and how large a piece of them one request may have.

use crate::config::{Config, Prefill};
use crate::reason::Reason;

/// What is left of a step.
#[derive(Debug)]
pub(crate) struct Budget {
    max: u32,
    left: u32,
    /// Of these, the most for prompts: the others are for those who generate.
    prompts_left: u32,
    /// One token for each who generates and has not had it yet: drafts of those before take it from prompts.
    sure_left: u32,
    /// The most for one request.
    cap: u32,
    /// Tokens that each request takes besides, for a proposer.
    slots: u32,
    /// Pieces are whole or not at all.
    whole: bool,
}

/// A piece of a step, and why it is smaller than was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) tokens: u32,
    pub(crate) cut: Option<Reason>,
}

impl Budget {
    /// A whole step, for `requests` that run or wait, of whom `generating` take one token each, and up to
    /// `drafts_max` drafts.
    pub(crate) fn new(config: &Config, requests: usize, generating: u32, drafts_max: u32) -> Budget {
        let max = config.step_tokens_max;
        let (max, prompts_left, sure_left) = match config.mixed_prefill() {
            Some(prefill) if generating > 0 => {
                let sure = generating.saturating_mul(1 + config.drafts.slots);
                let likely = sure.saturating_add(generating.saturating_mul(drafts_max));
                let prompts = prefill.min(max.saturating_sub(sure));
                (max.min(likely.saturating_add(prefill)), prompts, sure)
            }
            _ => (max, max, 0),
        };
        Budget {
            max,
            left: max,
            prompts_left,
            sure_left,
            cap: cap(config, requests),
            slots: config.drafts.slots,
            whole: config.prefill == Prefill::Whole,
        }
    }

    /// The reason why no prompt gets anything any more.
    #[inline]
    pub(crate) fn is_spent(&self) -> Option<Reason> {
        let spent = self.left_for_prompts() <= self.slots;
        spent.then_some(Reason::StepSpent { step_tokens_max: self.max })
    }

    /// The piece that a request gets if it wants `wanted` tokens: first the cap, then what is left.
    #[inline]
    pub(crate) fn share(&self, wanted: u32) -> Result<Share, Reason> {
        let left = if wanted > 1 { self.left_for_prompts() } else { self.left };
        let left = left.saturating_sub(self.slots);
        if left == 0 {
            return Err(Reason::StepSpent { step_tokens_max: self.max });
        }
        if self.whole && wanted > left {
            return Err(Reason::NotCut { wanted_tokens: wanted, left_tokens: left });
        }
        let allowed = wanted.min(self.cap);
        let tokens = allowed.min(left);
        let cut = if tokens == wanted {
            None
        } else if tokens < allowed {
            Some(Reason::StepLeft { wanted_tokens: wanted, left_tokens: tokens })
        } else {
            Some(Reason::LongPrefill { wanted_tokens: wanted, cap_tokens: tokens })
        };
        Ok(Share { tokens, cut })
    }

    #[inline]
    fn left_for_prompts(&self) -> u32 {
        self.prompts_left.min(self.left.saturating_sub(self.sure_left))
    }

    /// How many tokens may go beyond a piece of `tokens`, if each of `others` must have one.
    #[inline]
    pub(crate) fn beyond(&self, tokens: u32, others: usize) -> u32 {
        let others = u32::try_from(others).unwrap_or(u32::MAX).saturating_mul(1 + self.slots);
        let left = self.left.saturating_sub(tokens + self.slots).saturating_sub(others);
        left.min(self.cap.saturating_sub(tokens))
    }

    /// Takes tokens of a prompt, or of one who generates.
    #[inline]
    pub(crate) fn take(&mut self, tokens: u32, generates: bool) {
        self.left -= tokens + self.slots;
        if generates {
            self.sure_left = self.sure_left.saturating_sub(1 + self.slots);
        } else {
            self.prompts_left -= tokens + self.slots;
        }
    }

    pub(crate) fn give_back(&mut self, tokens: u32, generates: bool) {
        self.left += tokens + self.slots;
        self.prompts_left += if generates { 0 } else { tokens + self.slots };
    }
}

/// The cap on one request. Who is alone starves nobody, so nothing caps it.
fn cap(config: &Config, requests: usize) -> u32 {
    match config.prefill {
        Prefill::Capped { tokens_max, adaptive } if requests > 1 => {
            let requests = u32::try_from(requests).unwrap_or(u32::MAX);
            let share = if adaptive { config.step_tokens_max / requests } else { 0 };
            tokens_max.get().max(share)
        }
        Prefill::Whole | Prefill::Chunked | Prefill::Capped { .. } => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::speculation::Drafts;

    fn budget(prefill: Prefill, requests: usize) -> Budget {
        Budget::new(&Config { step_tokens_max: 1024, prefill, ..Config::new(4096) }, requests, 0, 0)
    }

    fn capped(tokens: u32, adaptive: bool) -> Prefill {
        Prefill::Capped { tokens_max: NonZeroU32::new(tokens).unwrap(), adaptive }
    }

    #[test]
    fn the_cap_comes_before_what_is_left() {
        let mut budget = budget(capped(400, false), 3);
        let share = budget.share(800).unwrap();
        assert_eq!(share.tokens, 400);
        assert_eq!(share.cut, Some(Reason::LongPrefill { wanted_tokens: 800, cap_tokens: 400 }));
        budget.take(800, false);
        let share = budget.share(800).unwrap();
        assert_eq!(share.cut, Some(Reason::StepLeft { wanted_tokens: 800, left_tokens: 224 }));
        budget.take(224, false);
        assert_eq!(budget.share(1), Err(Reason::StepSpent { step_tokens_max: 1024 }));
    }

    #[test]
    fn nothing_caps_who_is_alone() {
        assert_eq!(budget(capped(400, false), 1).share(2000).unwrap().tokens, 1024);
    }

    #[test]
    fn an_adaptive_cap_is_at_least_an_equal_share() {
        assert_eq!(budget(capped(100, true), 2).share(2000).unwrap().tokens, 512);
        assert_eq!(budget(capped(100, true), 100).share(2000).unwrap().tokens, 100);
    }

    #[test]
    fn whole_prompts_are_not_cut() {
        let mut budget = budget(Prefill::Whole, 2);
        budget.take(1000, false);
        assert_eq!(budget.share(25), Err(Reason::NotCut { wanted_tokens: 25, left_tokens: 24 }));
        assert_eq!(budget.share(24), Ok(Share { tokens: 24, cut: None }));
    }

    #[test]
    fn who_generates_waits_for_few_prompt_tokens() {
        let mixed_prefill_tokens_max = NonZeroU32::new(48);
        let config =
            |prefill| Config { step_tokens_max: 256, prefill, mixed_prefill_tokens_max, ..Config::new(256) };
        let left = |prefill, generated| Budget::new(&config(prefill), 9, generated, 0).left;
        assert_eq!([0, 1, 8, 250].map(|generated| left(Prefill::Chunked, generated)), [256, 49, 56, 256]);
        assert_eq!(left(Prefill::Whole, 8), 256);
    }

    #[test]
    fn a_prompt_leaves_their_tokens_to_those_who_generate() {
        let mixed_prefill_tokens_max = NonZeroU32::new(48);
        let config = Config { step_tokens_max: 50, mixed_prefill_tokens_max, ..Config::new(256) };
        let prompt = |generating| Budget::new(&config, 9, generating, 3).share(100).unwrap().tokens;
        assert_eq!([1, 2, 3, 40].map(prompt), [48, 48, 47, 10]);
        let mut budget = Budget::new(&config, 9, 40, 3);
        budget.take(10, false);
        assert!(budget.is_spent().is_some());
        assert_eq!(budget.share(1).unwrap().tokens, 1, "the step has tokens for those who generate");
    }

    #[test]
    fn what_drafts_take_a_prompt_does_without() {
        let mixed_prefill_tokens_max = NonZeroU32::new(4);
        let config = Config { step_tokens_max: 9, mixed_prefill_tokens_max, ..Config::new(64) };
        // Three generate with two drafts each; the prompt's turn is before the last of them.
        let mut budget = Budget::new(&config, 4, 3, 2);
        budget.take(3, true);
        budget.take(3, true);
        let prompt = budget.share(20).unwrap().tokens;
        assert_eq!(prompt, 2);
        budget.take(prompt, false);
        assert_eq!(budget.share(1).unwrap().tokens, 1);
        budget.take(1, true);
        assert!(budget.share(1).is_err());
    }

    #[test]
    fn a_proposer_takes_its_slots_from_the_step() {
        let drafts = Drafts { slots: 3, ..Drafts::up_to(3) };
        let mut budget = Budget::new(&Config { step_tokens_max: 1024, drafts, ..Config::new(4096) }, 2, 0, 0);
        assert_eq!(budget.share(2000).unwrap().tokens, 1021);
        budget.take(1020, false);
        assert_eq!(budget.share(1), Err(Reason::StepSpent { step_tokens_max: 1024 }));
    }

    #[test]
    fn a_draft_never_takes_the_only_token_of_another() {
        let mut budget = budget(Prefill::Chunked, 9);
        budget.take(1018, false);
        assert_eq!(budget.beyond(1, 3), 2);
        assert_eq!(budget.beyond(1, 9), 0);
    }
}
