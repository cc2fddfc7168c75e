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
//! | `batcher FIELD=VALUE ...` | begins anew, with the fields of [`Config`] that differ from [`Config::new`]`(4096)`; see below |
//! | `memory blocks=N block_tokens=N [caching=on] [host_blocks=N] [window=N]` | begins anew with a small [`BlockMemory`]; without it there is room for everything |
//! | `add NAME PROMPT OPTION=VALUE ...` | [`Batcher::add`]; 16 new tokens unless said otherwise; see below |
//! | `now N` | sets the clock |
//! | `step` | [`Batcher::step`]. Of each request: the tokens to compute, whether it is `new` or `resumed`, where its tokens came from, drafts and padding, whether it `samples`, and why it gets less than it wants |
//! | `apply [step=N] [NAME or NAME=TOKEN,TOKEN ... or NAME=-]` | [`Batcher::apply`]: of the step named, else of the oldest that awaits the first name, with these tokens, none for `-`, and token 0 for all not named. Without a name: of all steps in flight |
//! | `run [N]` | `apply`, then `step` and `apply` until nothing is scheduled, or `N` times; a line for each |
//! | `propose NAME N` | [`Batcher::propose`] |
//! | `finish NAME`, `cancel NAME` | [`Batcher::finish`], [`Batcher::cancel`] |
//! | `grammar NAME` | [`Batcher::grammar_ready`] |
//! | `loaded NAME`, `failed NAME N`, `handed NAME` | [`Batcher::loaded`], [`Batcher::load_failed`], [`Batcher::handed_over`] |
//! | `fork NAME CHILD` | [`Batcher::fork`] |
//! | `weight TENANT W` | [`Batcher::set_weight`] |
//! | `flow open`, `draining`, `holding` or `stopped` | [`Batcher::set_flow`] |
//! | `sleep` | [`Batcher::sleep`] |
//! | `restart` | [`Batcher::dump`], and [`Batcher::restore`] from it |
//! | `standing NAME` | [`Batcher::standing`] |
//! | `lists` | who runs and who waits, in order, and the free blocks |
//! | `stats` | [`Batcher::stats`] |
//!
//! Fields of `batcher` are called as in [`Config`]. Those with several numbers: `prefill` is `whole`,
//! `chunked`, `capped:N` or `adaptive:N`; `long_prefills=ABOVE:MAX`; `preemption` is `recompute`, `swap` or
//! `cheaper:BYTES_PER_TOKEN:BYTES_PER_SECOND:TRANSFER_NANOSECONDS:PREFILL_TOKENS_PER_SECOND`; `drafts=N`,
//! `draft_limits=ABOVE:N,ABOVE:N`, `draft_adaptive`, `draft_padding`, `draft_slots`; `encoder=STEP:CACHE`;
//! `failed_loads` is `recompute` or `end`. The `order` is `first_come`, `priority`, `deadline`,
//! `shortest_job`, `longest_prefix:N`, `fair` or `fair:INPUT:OUTPUT`. Switches are `on` or `off`.
//!
//! Options of `add`: `priority`, `arrival`, `new_tokens_max`, `new_tokens_min`, `eos`, `stop_ids=N,N`,
//! `tenant=NAME`, `targets=FIRST:TOKEN`, `expected=N`, `adapter=NAME`, `grammar=compiling` or `ready`,
//! `sample_of=NAME`, `hands_over=on`, `items=NAME@START+TOKENS,...`, and `remote=now:N`, `later:N` or
//! `unknown`, which says what another machine has.
//!
//! A prompt is a number of tokens that are the request's own, or pieces joined by `+`: `48@system+7` is 48
//! tokens that all requests with `@system` share, and 7 of its own. The batcher is audited after every
//! command.

mod asked;
mod blocks;
mod outputs;
mod settings;
mod tell;
mod words;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;

pub use blocks::BlockMemory;
use settings::number;
use words::Words;

use crate::{Batcher, Config, Error, Finished, Flow, Plan, Policy, RequestId, StepId, TenantId, Tick};

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
    /// The steps in flight, and whose outputs they bring.
    due: VecDeque<(StepId, Vec<RequestId>)>,
    names: Vec<String>,
    /// Numbers for the pieces of prompts, for tenants, adapters and encoder items, by name.
    numbers: BTreeMap<String, u64>,
    now: Tick,
}

/// The answer, or what is wrong with the command.
type Answer = Result<String, String>;

impl Interpreter {
    fn new() -> Interpreter {
        Interpreter::with(Config::new(4096), Policy::FirstCome).expect("the defaults are sound")
    }

    fn with(config: Config, order: Policy) -> Result<Interpreter, crate::ConfigError> {
        Ok(Interpreter {
            batcher: Batcher::with_order(config, order)?,
            memory: BlockMemory::new(1 << 12, 1 << 12, false),
            plan: Plan::new(),
            finished: Vec::new(),
            due: VecDeque::new(),
            names: Vec::new(),
            numbers: BTreeMap::new(),
            now: Tick(0),
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
            "propose" => self.propose(&mut words),
            "finish" => self.finish(&mut words),
            "cancel" => self.cancel(&mut words),
            "grammar" => self.grammar(&mut words),
            "loaded" => self.loaded(&mut words),
            "failed" => self.failed(&mut words),
            "handed" => self.handed(&mut words),
            "fork" => self.fork(&mut words),
            "weight" => self.weight(&mut words),
            "flow" => self.flow(&mut words),
            "sleep" => Ok(self.sleep()),
            "restart" => self.restart(),
            "standing" => self.standing(&mut words),
            "lists" => Ok(self.lists()),
            "stats" => Ok(self.stats()),
            other => Err(format!("no command is called {other}")),
        }
    }

    fn begin(&mut self, words: &Words<'_>) -> Answer {
        let (config, order) = settings::config(words)?;
        *self = Interpreter::with(config, order).map_err(|error| error.to_string())?;
        Ok("batcher ready".into())
    }

    fn replace_memory(&mut self, words: &Words<'_>) -> Answer {
        if self.batcher.has_work() {
            return Err("the memory is in use".into());
        }
        words.only(&["blocks", "block_tokens", "caching", "host_blocks", "window"])?;
        let (blocks, block_tokens) = (words.number("blocks", 0)?, words.number("block_tokens", 16)?);
        if block_tokens == 0 {
            return Err("a block holds at least one token".into());
        }
        let host_blocks = words.number("host_blocks", 0)?;
        self.memory = BlockMemory::new(blocks, block_tokens, words.switch("caching", false)?)
            .with_host_blocks(host_blocks)
            .with_window(words.parsed("window")?);
        let host = if host_blocks > 0 { format!(", {host_blocks} behind them") } else { String::new() };
        Ok(format!("{blocks} blocks of {block_tokens} tokens{host}"))
    }

    fn set_clock(&mut self, words: &mut Words<'_>) -> Answer {
        let moment = words.next("a moment")?;
        self.now = Tick(moment.parse().map_err(|_| format!("{moment} is not a moment"))?);
        Ok(format!("it is {}", self.now.0))
    }

    fn plan_step(&mut self) {
        self.batcher.step(self.now, &mut self.memory, &mut self.plan);
        if !self.plan.is_empty() {
            let samples = self.plan.scheduled.iter().filter(|scheduled| scheduled.samples);
            self.due.push_back((self.plan.step, samples.map(|scheduled| scheduled.id).collect()));
        }
        for note in &self.plan.ended {
            self.memory.close(note.id);
        }
    }

    fn step(&mut self) -> String {
        self.plan_step();
        self.tell_step()
    }

    fn propose(&mut self, words: &mut Words<'_>) -> Answer {
        let (name, drafts) = (words.next("a name")?, words.next("a number of drafts")?);
        let id = self.id_of(name);
        let taken = self.batcher.propose(id, number(drafts)?);
        Ok(format!("{name} has {taken} drafts"))
    }

    fn finish(&mut self, words: &mut Words<'_>) -> Answer {
        self.named(words, "is finished", |batcher, id, memory| {
            let found = batcher.finish(id, memory);
            memory.close(id);
            found
        })
    }

    fn cancel(&mut self, words: &mut Words<'_>) -> Answer {
        self.named(words, "is cancelled", |batcher, id, memory| {
            let found = batcher.cancel(id, memory);
            memory.close(id);
            found
        })
    }

    fn grammar(&mut self, words: &mut Words<'_>) -> Answer {
        self.named(words, "has its grammar", |batcher, id, _| batcher.grammar_ready(id))
    }

    fn loaded(&mut self, words: &mut Words<'_>) -> Answer {
        self.named(words, "has its tokens", Batcher::loaded)
    }

    fn handed(&mut self, words: &mut Words<'_>) -> Answer {
        self.named(words, "is handed over", Batcher::handed_over)
    }

    fn failed(&mut self, words: &mut Words<'_>) -> Answer {
        let tokens = words.rest().nth(1).ok_or("failed needs a number of tokens")?;
        let tokens = number(tokens)?;
        self.named(words, &format!("has {tokens} tokens"), |batcher, id, memory| {
            batcher.load_failed(id, tokens, memory)
        })
    }

    /// A command about one request that may not be there.
    fn named(
        &mut self,
        words: &mut Words<'_>,
        done: &str,
        how: impl Fn(&mut Batcher, RequestId, &mut BlockMemory) -> bool,
    ) -> Answer {
        let name = words.next("a name")?;
        let id = self.id_of(name);
        if how(&mut self.batcher, id, &mut self.memory) {
            Ok(format!("{name} {done}"))
        } else {
            Ok(format!("no such request: {name}"))
        }
    }

    fn fork(&mut self, words: &mut Words<'_>) -> Answer {
        let (parent, child) = (words.next("a name")?, words.next("a name for the fork")?);
        let (parent_id, child_id) = (self.id_of(parent), self.id_of(child));
        match self.batcher.fork(parent_id, child_id, &mut self.memory) {
            Ok(()) => {
                self.memory.copy_text(parent_id, child_id);
                for (_, due) in &mut self.due {
                    if let Some(place) = due.iter().position(|&due| due == parent_id) {
                        due.insert(place + 1, child_id);
                    }
                }
                Ok(format!("{child} goes on from {parent}"))
            }
            Err(error) => Err(self.fork_error(error)),
        }
    }

    fn weight(&mut self, words: &mut Words<'_>) -> Answer {
        let (tenant, weight) = (words.next("a tenant")?, words.next("a weight")?);
        let id = TenantId(self.number_of(tenant));
        self.batcher.set_weight(id, number(weight)?).map_err(|error| error.to_string())?;
        Ok(format!("{tenant} weighs {weight}"))
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

    fn sleep(&mut self) -> String {
        self.batcher.sleep(self.now, &mut self.memory, &mut self.plan);
        self.tell_sleep()
    }

    fn restart(&mut self) -> Answer {
        self.batcher = Batcher::restore(self.batcher.dump()).map_err(|error| error.to_string())?;
        Ok("restarted".into())
    }

    fn error(&self, error: Error) -> String {
        match error {
            Error::NotExpected { id } => {
                format!("the step asked for no output of {}, or not for this one", self.name(id))
            }
            Error::Missing { id } => format!("the step asked for an output of {}", self.name(id)),
            Error::TooMany { id, tokens, tokens_max } => {
                format!("{tokens} tokens of {}, {tokens_max} at most", self.name(id))
            }
            Error::OutOfOrder { id, step } => {
                format!("step {step} has an output of {} and goes before", self.name(id))
            }
            Error::NotInFlight { .. } => error.to_string(),
        }
    }

    fn number_of(&mut self, name: &str) -> u64 {
        let next = self.numbers.len() as u64 + 1;
        *self.numbers.entry(name.to_owned()).or_insert(next)
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
}
