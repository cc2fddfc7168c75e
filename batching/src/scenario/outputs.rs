//! `apply` and `run`: outputs, from words or as they come.

use std::fmt::Write as _;

use super::words::Words;
use super::{Answer, Interpreter};
use crate::{RequestId, Sampled, StepId, TokenId};

impl Interpreter {
    pub(super) fn apply(&mut self, words: &Words<'_>) -> Answer {
        let mut given: Vec<(RequestId, Vec<TokenId>)> = Vec::new();
        for name in words.rest() {
            given.push((self.id_of(name), vec![TokenId(0)]));
        }
        for &(name, tokens) in words.options().iter().filter(|&&(name, _)| name != "step") {
            let token =
                |token: &str| token.parse().map(TokenId).map_err(|_| format!("{token} is not a token"));
            let tokens = if tokens == "-" { Ok(Vec::new()) } else { tokens.split(',').map(token).collect() };
            given.push((self.id_of(name), tokens?));
        }
        let steps: Vec<StepId> = match (words.parsed("step")?, given.first()) {
            (Some(step), _) => vec![StepId(step)],
            (None, None) => self.due.iter().map(|&(step, _)| step).collect(),
            (None, Some(&(first, _))) => {
                let awaits = self.due.iter().find(|(_, ids)| ids.contains(&first));
                vec![awaits.or(self.due.front()).map_or(StepId(0), |&(step, _)| step)]
            }
        };
        let (mut applied, mut text) = (0, String::new());
        for step in steps {
            applied += self.hand_in(step, &given)?;
            for finished in &self.finished {
                let _ = write!(text, "\n  {} ends: {}", self.name(finished.id), finished.reason);
                if finished.dropped_tokens > 0 {
                    let _ = write!(text, ", {} tokens dropped", finished.dropped_tokens);
                }
            }
        }
        Ok(format!("{applied} applied{text}"))
    }

    /// Applies a step, with the tokens given, and token 0 for all others. Returns how many tokens.
    fn hand_in(&mut self, step: StepId, given: &[(RequestId, Vec<TokenId>)]) -> Result<usize, String> {
        let place = self.due.iter().position(|&(due, _)| due == step);
        let due = place.map_or(Vec::new(), |place| self.due[place].1.clone());
        let named = |id: RequestId| given.iter().find(|&&(given, _)| given == id);
        let mut sampled: Vec<Sampled> = Vec::new();
        let others = given.iter().map(|&(id, _)| id).filter(|id| !due.contains(id));
        for id in due.iter().copied().chain(others) {
            let tokens = named(id).map_or(&[TokenId(0)][..], |(_, tokens)| tokens);
            sampled.extend(tokens.iter().map(|&token| Sampled { id, token }));
        }
        let applied = self.batcher.apply(step, &sampled, &mut self.memory, &mut self.finished);
        applied.map_err(|error| self.error(error))?;
        self.due.retain(|&(due, _)| due != step);
        for output in &sampled {
            if self.batcher.standing(output.id).is_some() {
                self.memory.push(output.id, u64::from(output.token.0));
            }
        }
        for finished in &self.finished {
            self.memory.close(finished.id);
        }
        Ok(sampled.len())
    }

    pub(super) fn run(&mut self, words: &mut Words<'_>) -> Answer {
        let steps = words
            .rest()
            .next()
            .map_or(Ok(1000), |steps| steps.parse().map_err(|_| format!("{steps} steps")))?;
        let mut text = Vec::new();
        text.extend(self.apply_due()?);
        for _ in 0..steps {
            self.plan_step();
            if self.plan.is_empty() && self.plan.preempted.is_empty() && self.plan.ended.is_empty() {
                break;
            }
            text.push(self.tell_line());
            text.extend(self.apply_due()?);
        }
        if text.is_empty() { Ok("nothing to do".into()) } else { Ok(text.join("\n")) }
    }

    /// Applies all outputs that are due. Returns who ended, if anybody did.
    fn apply_due(&mut self) -> Result<Option<String>, String> {
        let mut ends = Vec::new();
        while let Some(&(step, _)) = self.due.front() {
            self.hand_in(step, &[])?;
            ends.extend(self.finished.iter().map(|done| format!("{} ends", self.name(done.id))));
        }
        Ok((!ends.is_empty()).then(|| format!("  {}", ends.join(", "))))
    }
}
