//! A small command language for the batcher, so that a rule, a question or a bug report is a text file.
//!
//! A scenario is a list of stanzas, apart by blank lines. A stanza is a list of commands, a line `----`,
//! and the answers. Lines that begin with `#` say why.
//!
//! ```text
//! # Three long prompts share a step: the cap lets nobody take more than 400 of its 1024 tokens.
//! batcher step_tokens_max=1024 prefill=capped:400
//! add A 800 new_tokens_max=2
//! add B 800 new_tokens_max=2
//! add C 800 new_tokens_max=2
//! step
//! ----
//! batcher ready
//! A waits
//! B waits
//! C waits
//! step 1: 1024 tokens
//!   A 0..400 new, 400 of 800 tokens: the cap on long prompts
//!   B 0..400 new, 400 of 800 tokens: the cap on long prompts
//!   C 0..224 new, 224 of 800 tokens: no more are left in the step
//! ```
//!
//! | command | what it does |
//! |---|---|
//! | `batcher FIELD=VALUE ...` | begins anew, with the fields of [`Config`] that differ from [`Config::new`]`(4096)`; `prefill` is `whole`, `chunked`, `capped:N` or `adaptive:N`; `order` is `first_come` or `priority`; checks are `on` or `off` |
//! | `memory blocks=N block_tokens=N [caching=on]` | begins anew with a small [`BlockMemory`]; without it there is room for everything |
//! | `add NAME PROMPT [priority=N] [arrival=N] [new_tokens_max=N] [new_tokens_min=N] [eos=N] [stop_ids=N,N]` | [`Batcher::add`]; 16 new tokens unless said otherwise |
//! | `now N` | sets the clock |
//! | `step` | [`Batcher::step`]. Of each request: the tokens to compute, whether it is `new` or `resumed` and with how many `cached`, whether it `samples`, and why it gets less than it wants |
//! | `apply [NAME or NAME=TOKEN ...]` | [`Batcher::apply`], for those named or for all whose output is due; the token is 0 unless said otherwise |
//! | `run [N]` | `apply`, then `step` and `apply` until nothing is scheduled, or `N` times; a line for each |
//! | `finish NAME`, `cancel NAME` | [`Batcher::finish`], [`Batcher::cancel`] |
//! | `flow open`, `draining`, `holding` or `stopped` | [`Batcher::set_flow`] |
//! | `standing NAME` | [`Batcher::standing`] |
//! | `lists` | who runs and who waits, in order, and the free blocks |
//! | `stats` | [`Batcher::stats`] |
//!
//! A prompt is a number of tokens that are the request's own, or pieces joined by `+`: `48@system+7` is 48
//! tokens that all requests with `@system` share, and 7 of its own. The batcher is audited after every
//! command.

mod blocks;
mod words;

use std::collections::BTreeMap;
use std::fmt::Write as _;

pub use blocks::BlockMemory;
use words::{Words, config};

use crate::{
    Batcher, Config, Finished, Flow, Note, Plan, Reason, Request, RequestId, Sampled, Standing, StopRules,
    Tick, TokenId,
};

/// Runs a scenario and returns it with the answers written under the commands. Answers that the text
/// already has are replaced, so a scenario is right when its transcript is the scenario itself.
pub fn transcript(scenario: &str) -> String {
    let mut interpreter = Interpreter::new();
    let mut stanzas = Vec::new();
    let lines: Vec<&str> = scenario.lines().map(str::trim_end).collect();
    for stanza in lines.split(|line| line.is_empty()).filter(|stanza| !stanza.is_empty()) {
        let mut text = String::new();
        let mut answers = String::new();
        for line in stanza.iter().take_while(|&&line| line != "----") {
            let _ = writeln!(text, "{line}");
            if !line.starts_with('#') {
                let _ = writeln!(answers, "{}", interpreter.execute(line));
            }
        }
        if !answers.is_empty() {
            let _ = write!(text, "----\n{answers}");
        }
        stanzas.push(text);
    }
    stanzas.join("\n")
}

/// A batcher, a memory, and what any caller remembers between two calls.
struct Interpreter {
    batcher: Batcher,
    memory: BlockMemory,
    plan: Plan,
    finished: Vec<Finished>,
    /// Whose output is due, in the order of the plans.
    due: Vec<RequestId>,
    names: Vec<String>,
    /// Numbers for the pieces of prompts, by name.
    pieces: BTreeMap<String, u64>,
    now: Tick,
    steps: u32,
}

/// The answer, or what is wrong with the command.
type Answer = Result<String, String>;

impl Interpreter {
    fn new() -> Interpreter {
        Interpreter::with(Config::new(4096)).expect("the defaults are sound")
    }

    fn with(config: Config) -> Result<Interpreter, crate::ConfigError> {
        Ok(Interpreter {
            batcher: Batcher::new(config)?,
            memory: BlockMemory::new(1 << 20, 16, false),
            plan: Plan::new(),
            finished: Vec::new(),
            due: Vec::new(),
            names: Vec::new(),
            pieces: BTreeMap::new(),
            now: Tick(0),
            steps: 0,
        })
    }

    fn execute(&mut self, line: &str) -> String {
        let answer = self.answer(line).unwrap_or_else(|wrong| format!("error: {wrong}"));
        match self.batcher.check() {
            Ok(()) => answer,
            Err(violation) => format!("{answer}\nbroken: {violation}"),
        }
    }

    fn answer(&mut self, line: &str) -> Answer {
        let mut words = Words::new(line)?;
        match words.command() {
            "batcher" => self.begin(&words),
            "memory" => self.replace_memory(&words),
            "add" => self.add(&mut words),
            "now" => self.set_clock(&mut words),
            "step" => Ok(self.step()),
            "apply" => self.apply(&words),
            "run" => self.run(&mut words),
            "finish" => self.remove(&mut words, "is finished", Batcher::finish),
            "cancel" => self.remove(&mut words, "is cancelled", Batcher::cancel),
            "flow" => self.flow(&mut words),
            "standing" => self.standing(&mut words),
            "lists" => Ok(self.lists()),
            "stats" => Ok(self.stats()),
            other => Err(format!("no command is called {other}")),
        }
    }

    fn begin(&mut self, words: &Words<'_>) -> Answer {
        *self = Interpreter::with(config(words)?).map_err(|error| error.to_string())?;
        Ok("batcher ready".into())
    }

    fn replace_memory(&mut self, words: &Words<'_>) -> Answer {
        if self.batcher.has_work() {
            return Err("the memory is in use".into());
        }
        words.only(&["blocks", "block_tokens", "caching"])?;
        let (blocks, block_tokens) = (words.number("blocks", 0)?, words.number("block_tokens", 16)?);
        if block_tokens == 0 {
            return Err("a block holds at least one token".into());
        }
        self.memory = BlockMemory::new(blocks, block_tokens, words.switch("caching", false)?);
        Ok(format!("{blocks} blocks of {block_tokens} tokens"))
    }

    fn add(&mut self, words: &mut Words<'_>) -> Answer {
        words.only(&["priority", "arrival", "new_tokens_max", "new_tokens_min", "eos", "stop_ids"])?;
        let name = words.next("a name")?;
        let prompt = self.prompt(name, words.next("a prompt")?)?;
        let id = self.id_of(name);
        let request = Request {
            id,
            prompt_tokens: u32::try_from(prompt.len()).map_err(|_| "a prompt that long")?,
            priority: words.number("priority", 0)?,
            arrival: Tick(words.number("arrival", self.now.0)?),
            stop: StopRules {
                new_tokens_max: words.number("new_tokens_max", 16)?,
                new_tokens_min: words.number("new_tokens_min", 0)?,
                eos: words.numbers("eos")?.first().copied().map(TokenId),
                stop_ids: words.numbers("stop_ids")?.into_iter().map(TokenId).collect(),
            },
        };
        match self.batcher.add(request) {
            Ok(()) => {
                self.memory.open(id, prompt);
                Ok(format!("{name} waits"))
            }
            Err(refusal) => Ok(format!("{name} refused: {}", refusal.reason)),
        }
    }

    /// The tokens of `48@system+7`: each is its piece's number and its place in it.
    fn prompt(&mut self, name: &str, pieces: &str) -> Result<Vec<u64>, String> {
        let mut tokens = Vec::new();
        for piece in pieces.split('+') {
            let (length, piece) = piece.split_once('@').unwrap_or((piece, name));
            let length: u32 = length.parse().map_err(|_| format!("{length} is not a number of tokens"))?;
            if length > 1 << 20 {
                return Err(format!("{length} tokens are more than a scenario needs"));
            }
            let next = self.pieces.len() as u64 + 1;
            let number = *self.pieces.entry(piece.to_owned()).or_insert(next);
            tokens.extend((0..u64::from(length)).map(|place| number << 32 | place));
        }
        Ok(tokens)
    }

    fn set_clock(&mut self, words: &mut Words<'_>) -> Answer {
        let moment = words.next("a moment")?;
        self.now = Tick(moment.parse().map_err(|_| format!("{moment} is not a moment"))?);
        Ok(format!("it is {}", self.now.0))
    }

    fn plan_step(&mut self) {
        self.steps += 1;
        self.batcher.step(self.now, &mut self.memory, &mut self.plan);
        self.due.extend(
            self.plan.scheduled.iter().filter(|scheduled| scheduled.samples).map(|scheduled| scheduled.id),
        );
        for note in &self.plan.ended {
            self.memory.close(note.id);
        }
    }

    fn step(&mut self) -> String {
        self.plan_step();
        let plan = &self.plan;
        let mut text = format!("step {}: {} tokens", self.steps, plan.tokens);
        self.write_notes(&mut text, "preempted", &plan.preempted);
        self.write_notes(&mut text, "ended", &plan.ended);
        for place in 0..plan.scheduled.len() {
            self.write_scheduled(&mut text, place);
        }
        self.write_notes(&mut text, "skipped", &plan.skipped);
        if plan.behind > 0 {
            let _ = write!(text, "\n  {} more behind", plan.behind);
        }
        text
    }

    fn write_scheduled(&self, text: &mut String, place: usize) {
        let plan = &self.plan;
        let scheduled = plan.scheduled[place];
        let _ = write!(text, "\n  {} {}..{}", self.name(scheduled.id), scheduled.start, scheduled.end());
        if let Some(admitted) = (place + plan.admitted.len()).checked_sub(plan.scheduled.len()) {
            let admitted = plan.admitted[admitted];
            text.push_str(if admitted.resumed { " resumed" } else { " new" });
            if admitted.cached_tokens > 0 {
                let _ = write!(text, " {} cached", admitted.cached_tokens);
            }
            if admitted.waited_ticks > 0 {
                let _ = write!(text, " waited {}", admitted.waited_ticks);
            }
        }
        text.push_str(if scheduled.samples { " samples" } else { "" });
        text.push_str(if scheduled.masks_stops { " without stops" } else { "" });
        if let Some(cut) = plan.cut.iter().find(|note| note.id == scheduled.id) {
            let _ = write!(text, ", {}", self.sentence(cut.reason));
        }
    }

    fn write_notes(&self, text: &mut String, verb: &str, notes: &[Note]) {
        for note in notes {
            let _ = write!(text, "\n  {} {verb}: {}", self.name(note.id), self.sentence(note.reason));
        }
    }

    fn apply(&mut self, words: &Words<'_>) -> Answer {
        let mut sampled = Vec::new();
        for name in words.rest() {
            sampled.push(Sampled { id: self.id_of(name), token: TokenId(0) });
        }
        for (name, token) in words.options() {
            let token = token.parse().map_err(|_| format!("{token} is not a token"))?;
            sampled.push(Sampled { id: self.id_of(name), token: TokenId(token) });
        }
        if sampled.is_empty() {
            sampled.extend(self.due.iter().map(|&id| Sampled { id, token: TokenId(0) }));
        }
        self.hand_in(&sampled)?;
        let mut text = format!("{} applied", sampled.len());
        for finished in &self.finished {
            let _ = write!(text, "\n  {} ends: {}", self.name(finished.id), finished.reason);
        }
        Ok(text)
    }

    fn hand_in(&mut self, sampled: &[Sampled]) -> Result<(), String> {
        let applied = self.batcher.apply(sampled, &mut self.memory, &mut self.finished);
        applied.map_err(|crate::Error::NotExpected { id }| {
            format!("no plan asked for an output of {}", self.name(id))
        })?;
        for output in sampled {
            self.due.retain(|&due| due != output.id);
            if self.batcher.standing(output.id).is_some() {
                self.memory.push(output.id, u64::from(output.token.0));
            }
        }
        for finished in &self.finished {
            self.memory.close(finished.id);
        }
        Ok(())
    }

    fn run(&mut self, words: &mut Words<'_>) -> Answer {
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
            text.push(self.line());
            text.extend(self.apply_due()?);
        }
        if text.is_empty() { Ok("nothing to do".into()) } else { Ok(text.join("\n")) }
    }

    /// Applies all outputs that are due. Returns who ended, if anybody did.
    fn apply_due(&mut self) -> Result<Option<String>, String> {
        let sampled: Vec<Sampled> = self.due.iter().map(|&id| Sampled { id, token: TokenId(0) }).collect();
        self.hand_in(&sampled)?;
        let ends: Vec<String> =
            self.finished.iter().map(|done| format!("{} ends", self.name(done.id))).collect();
        Ok((!ends.is_empty()).then(|| format!("  {}", ends.join(", "))))
    }

    /// A step in one line: who computes how many tokens.
    fn line(&self) -> String {
        let mut text = format!("step {}:", self.steps);
        for note in &self.plan.preempted {
            let _ = write!(text, " {} yields,", self.name(note.id));
        }
        for note in &self.plan.ended {
            let _ = write!(text, " {} ended,", self.name(note.id));
        }
        for scheduled in &self.plan.scheduled {
            let _ = write!(text, " {}+{}", self.name(scheduled.id), scheduled.tokens);
        }
        text.trim_end_matches(',').to_owned()
    }

    fn remove(
        &mut self,
        words: &mut Words<'_>,
        done: &str,
        how: fn(&mut Batcher, RequestId, &mut BlockMemory) -> bool,
    ) -> Answer {
        let name = words.next("a name")?;
        let id = self.id_of(name);
        if how(&mut self.batcher, id, &mut self.memory) {
            self.memory.close(id);
            Ok(format!("{name} {done}"))
        } else {
            Ok(format!("no request is called {name}"))
        }
    }

    fn flow(&mut self, words: &mut Words<'_>) -> Answer {
        let word = words.next("a flow")?;
        self.batcher.set_flow(match word {
            "open" => Flow::Open,
            "draining" => Flow::Draining,
            "holding" => Flow::Holding,
            "stopped" => Flow::Stopped,
            other => return Err(format!("no flow is called {other}")),
        });
        Ok(format!("flow {word}"))
    }

    fn standing(&mut self, words: &mut Words<'_>) -> Answer {
        let name = words.next("a name")?;
        let id = self.id_of(name);
        Ok(match self.batcher.standing(id) {
            None => format!("no request is called {name}"),
            Some(Standing::Running { computed_tokens, known_tokens, preemptions }) => {
                format!(
                    "{name} runs: {computed_tokens} of {known_tokens} tokens computed, preempted {preemptions} times"
                )
            }
            Some(Standing::Waiting { since, known_tokens, preemptions, reason }) => {
                let reason = reason.map_or("no step has come to it".into(), |reason| self.sentence(reason));
                let since = since.0;
                format!(
                    "{name} waits since {since} with {known_tokens} tokens, preempted {preemptions} times: {reason}"
                )
            }
        })
    }

    fn lists(&self) -> String {
        let running: String = self.batcher.running().map(|id| format!(" {}", self.name(id))).collect();
        let waiting: String = self.batcher.waiting().map(|id| format!(" {}", self.name(id))).collect();
        format!("running{running}\nwaiting{waiting}\nfree {} of {}", self.memory.free(), self.memory.total())
    }

    fn stats(&self) -> String {
        let stats = self.batcher.stats();
        let counts = stats.counts;
        format!(
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
        )
    }

    fn id_of(&mut self, name: &str) -> RequestId {
        let place = self.names.iter().position(|known| known == name).unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        });
        RequestId(place as u64)
    }

    fn name(&self, id: RequestId) -> &str {
        let place = usize::try_from(id.0).expect("ids are places in the list of names");
        &self.names[place]
    }

    /// A reason, with names where it has ids.
    fn sentence(&self, reason: Reason) -> String {
        match reason {
            Reason::Yielded { to, need, free } => {
                format!("yielded to {}: {need} needed, {free} free", self.name(to))
            }
            Reason::Behind { head, ahead } => format!("{ahead} before it, {} at the head", self.name(head)),
            other => other.to_string(),
        }
    }
}
