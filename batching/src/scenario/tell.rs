//! What the batcher decided, in words.

use std::fmt::Write as _;

use super::words::Words;
use super::{Answer, Interpreter};
use crate::{ForkError, Note, Reason, RefusalReason, Source, Standing};

impl Interpreter {
    pub(super) fn tell_step(&self) -> String {
        let plan = &self.plan;
        let mut text = format!("step {}: {} tokens", plan.step, plan.tokens);
        self.write_preempted(&mut text);
        self.write_notes(&mut text, "ended", &plan.ended);
        for load in &plan.loads {
            let (name, end) = (self.name(load.id), load.start + load.tokens);
            let _ = write!(text, "\n  {name} loads {}..{end}", load.start);
        }
        for encode in &plan.encode {
            let (name, item) = (self.name(encode.id), self.item(encode.item.content));
            let _ = write!(text, "\n  {name} has {item} encoded, {} tokens", encode.item.tokens);
        }
        for &content in &plan.encoded_gone {
            let _ = write!(text, "\n  {} encoded is forgotten", self.item(content));
        }
        for place in 0..plan.scheduled.len() {
            self.write_scheduled(&mut text, place);
        }
        self.write_notes(&mut text, "skipped", &plan.skipped);
        if plan.behind > 0 {
            let _ = write!(text, "\n  {} more behind", plan.behind);
        }
        text
    }

    /// A step in one line: who computes how many tokens.
    pub(super) fn tell_line(&self) -> String {
        let mut text = format!("step {}:", self.plan.step);
        for preempted in &self.plan.preempted {
            let _ = write!(text, " {} yields,", self.name(preempted.id));
        }
        for note in &self.plan.ended {
            let _ = write!(text, " {} ended,", self.name(note.id));
        }
        for scheduled in &self.plan.scheduled {
            let _ = write!(text, " {}+{}", self.name(scheduled.id), scheduled.tokens);
        }
        text.trim_end_matches(',').to_owned()
    }

    pub(super) fn tell_sleep(&self) -> String {
        let mut text = "asleep".to_owned();
        self.write_preempted(&mut text);
        text
    }

    fn write_scheduled(&self, text: &mut String, place: usize) {
        let plan = &self.plan;
        let scheduled = plan.scheduled[place];
        let _ = write!(text, "\n  {} {}..{}", self.name(scheduled.id), scheduled.start, scheduled.end());
        if let Some(admitted) = (place + plan.admitted.len()).checked_sub(plan.scheduled.len()) {
            self.write_admitted(text, admitted);
        }
        for (count, what) in [(scheduled.drafts, "drafts"), (scheduled.padding, "padding")] {
            if count > 0 {
                let _ = write!(text, " with {count} {what}");
            }
        }
        text.push_str(if scheduled.samples { " samples" } else { "" });
        text.push_str(if scheduled.masks_stops { " without stops" } else { "" });
        text.push_str(if scheduled.needs_mask { " masked" } else { "" });
        if let Some(cut) = plan.cut.iter().find(|note| note.id == scheduled.id) {
            let _ = write!(text, ", {}", self.sentence(cut.reason));
        }
    }

    fn write_admitted(&self, text: &mut String, place: usize) {
        let admitted = self.plan.admitted[place];
        text.push_str(if admitted.resumed { " resumed" } else { " new" });
        let cached = admitted.cached_tokens;
        let _ = match admitted.source {
            Source::Cache if cached == 0 => Ok(()),
            Source::Cache => write!(text, " {cached} cached"),
            Source::Swap => write!(text, " {cached} swapped in"),
            Source::Fork(leader) => write!(text, " {cached} of {}", self.name(leader)),
            Source::Remote { tokens } => write!(text, " {cached} cached, {tokens} of them remote"),
        };
        if admitted.waited_ticks > 0 {
            let _ = write!(text, " waited {}", admitted.waited_ticks);
        }
    }

    fn write_preempted(&self, text: &mut String) {
        for preempted in &self.plan.preempted {
            let (name, reason) = (self.name(preempted.id), self.sentence(preempted.reason));
            let _ = write!(text, "\n  {name} preempted: {reason}");
            if preempted.swapped_tokens > 0 {
                let _ = write!(text, ", {} tokens swapped out", preempted.swapped_tokens);
            }
        }
    }

    fn write_notes(&self, text: &mut String, verb: &str, notes: &[Note]) {
        for note in notes {
            let _ = write!(text, "\n  {} {verb}: {}", self.name(note.id), self.sentence(note.reason));
        }
    }

    pub(super) fn standing(&mut self, words: &mut Words<'_>) -> Answer {
        let name = words.next("a name")?;
        let id = self.id_of(name);
        Ok(match self.batcher.standing(id) {
            None => format!("no such request: {name}"),
            Some(Standing::Running { computed_tokens, known_tokens, preemptions, reason }) => {
                let reason = reason.map_or(String::new(), |reason| format!(": {}", self.sentence(reason)));
                format!(
                    "{name} runs: {computed_tokens} of {known_tokens} tokens computed, \
                     preempted {preemptions} times{reason}"
                )
            }
            Some(Standing::Waiting { since, known_tokens, preemptions, reason }) => {
                let reason = reason.map_or("no step has come to it".into(), |reason| self.sentence(reason));
                let since = since.0;
                format!(
                    "{name} waits since {since} with {known_tokens} tokens, \
                     preempted {preemptions} times: {reason}"
                )
            }
        })
    }

    pub(super) fn lists(&self) -> String {
        let running: String = self.batcher.running().map(|id| format!(" {}", self.name(id))).collect();
        let waiting: String = self.batcher.waiting().map(|id| format!(" {}", self.name(id))).collect();
        format!("running{running}\nwaiting{waiting}\nfree {} of {}", self.memory.free(), self.memory.total())
    }

    pub(super) fn stats(&self) -> String {
        let stats = self.batcher.stats();
        let counts = stats.counts;
        let mut text = format!(
            "{} running, {} waiting with {} tokens\n{} steps, {} tokens scheduled, {} cached\n\
             {} admitted, {} preempted, {} finished, {} cancelled, {} refused, {} ended",
            stats.running,
            stats.waiting,
            stats.waiting_tokens,
            counts.steps,
            counts.scheduled_tokens,
            counts.cached_tokens,
            counts.admitted,
            counts.preemptions,
            counts.finished,
            counts.cancelled,
            counts.refused,
            counts.ended,
        );
        for (count, what) in [
            (counts.forked, "forked"),
            (counts.swapped_tokens, "tokens swapped out"),
            (counts.drafts, "drafts"),
            (counts.drafts_accepted, "accepted"),
            (u64::from(stats.remaining), "gone whose room is in use"),
        ] {
            if count > 0 {
                let _ = write!(text, "\n{count} {what}");
            }
        }
        text
    }

    pub(super) fn refusal(&self, reason: RefusalReason) -> String {
        match reason {
            RefusalReason::NoLeader { leader } => {
                format!("no request {} with such a prompt is here to fork from", self.name(leader))
            }
            other => other.to_string(),
        }
    }

    pub(super) fn fork_error(&self, error: ForkError) -> String {
        match error {
            ForkError::NotRunning { parent } => format!("{} does not run", self.name(parent)),
            ForkError::StillReading { parent, computed_tokens, known_tokens } => {
                format!("{} has computed {computed_tokens} of {known_tokens} tokens", self.name(parent))
            }
            ForkError::Duplicate { child } => format!("{} is still here", self.name(child)),
            ForkError::NotShared { parent } => format!("the tokens of {} are not shared", self.name(parent)),
            ForkError::RunningFull { .. } => error.to_string(),
        }
    }

    fn item(&self, content: u64) -> &str {
        let found = self.numbers.iter().find(|&(_, &number)| number == content);
        found.map_or("nothing", |(name, _)| name)
    }

    /// A reason, with names where it has ids.
    fn sentence(&self, reason: Reason) -> String {
        match reason {
            Reason::Yielded { to, need, free } => {
                format!("yielded to {}: {need} needed, {free} free", self.name(to))
            }
            Reason::Behind { head, ahead } => format!("{ahead} before it, {} at the head", self.name(head)),
            Reason::AdapterYields { to } => {
                format!(
                    "its adapter makes room for the one of {}, which has waited for too long",
                    self.name(to)
                )
            }
            Reason::LeaderReads { leader } => format!("{} is still to read their prompt", self.name(leader)),
            other => other.to_string(),
        }
    }
}
