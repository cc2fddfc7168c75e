//! A small command language for the cache, so that a rule, a question or a bug report is a text file.
//!
//! A scenario is a list of stanzas, apart by blank lines. A stanza is a list of commands, a line `----`, and
//! the answers. Lines that begin with `#` say why.
//!
//! ```text
//! # The same prompt twice: the second one shares the first block.
//! cache block_size=4 blocks=6
//! open A 1 2 3 4 5 6
//! claim A
//! open B 1 2 3 4 5 6
//! claim B
//! ----
//! cache free=5
//! A known=6
//! A cached=0 new=[1 2] free=3
//! B known=6
//! B cached=4 new=[3] free=2
//! ```
//!
//! | command | what it does |
//! |---|---|
//! | `cache block_size=N blocks=N ...` | begins anew with an empty cache |
//! | ` groups=KIND,KIND` | one of `full`, `window:N`, `window:N+sinks:N`, `window:N+prompt`, `local:N`, `state`, `cross` per group, each with `/N` for a block size of its own |
//! | ` [caching=off] [match_unit=N] [retention=prompt\|dense\|every:N] [draft_head] [report_lost]` | [`Config`](crate::Config) |
//! | ` [hash=xxh3\|blake3\|sha256\|vllm-sha256\|vllm-sha256-cbor\|vllm-xxhash\|vllm-xxhash-cbor\|dynamo]` | how blocks are named ([`hash`](crate::hash)) |
//! | ` [events=N] [residency=N]` | [`Config::events_max`](crate::Config::events_max), [`Config::residency_every`](crate::Config::residency_every) |
//! | ` [seed=N] [hash_lookahead=N] [tokens_max=N] [step_max=N]` | the same |
//! | ` [policy=NAME] [pinned_max=N]` | `lru`, `leaf-first`, `slru`, `slru:PERCENT`, `arc`, `cost` or `cost:TOKENS`, see [`evict`](crate::evict); [`Config::pinned_blocks_max`](crate::Config::pinned_blocks_max) |
//! | `open NAME TOKENS [tenant=N] [adapter=TEXT] [salt=TEXT] [media=ID@FIRST+TOKENS,...] [embeds=BYTE,...] [write_only]` | [`KvCache::open`]; an adapter may be `NAME@PATH`, the embeddings of block `n` have the digest of 32 times the `n`-th byte |
//! | `encoder NAME N` | [`KvCache::encoder`] |
//! | `media NAME ID@FIRST+TOKENS,...` | [`KvCache::add_media`] |
//! | `push NAME TOKENS` | [`KvCache::push`] |
//! | `fork NAME CHILD` | [`KvCache::fork`] |
//! | `lookup NAME` | [`KvCache::lookup`] |
//! | `chunk NAME [computed=N] [new=N]` | [`KvCache::chunk`] |
//! | `claim NAME [computed=N] [external=N] [new=N] [lookahead=N] [watermark=N] [whole]` | [`KvCache::reserve`], and commit if there is room; `copies=[3>7:2]`: of block 3 the first two tokens to block 7 |
//! | `reserve NAME ...` | the same without the commit: nothing changes |
//! | `loaded NAME N`, `load_failed NAME N` | of the external tokens of a claim, those up to `N` are there (and no more) |
//! | `settle NAME N` | [`KvCache::settle`]: the blocks given back, in this order |
//! | `truncate NAME N`, `rollback NAME N`, `trim NAME N` | keep `N` known tokens, take away `N`, keep room for `N` |
//! | `withdraw NAME`, `release NAME`, `close NAME` | the calls of these names |
//! | `copies`, `end_step` | what the step copies first; the step has begun |
//! | `evict BLOCKS`, `evict_hash NAME INDEX` | [`KvCache::evict`]; [`KvCache::evict_hash`] of a hash of the sequence |
//! | `pin NAME TOKENS as=N [until=N]`, `pin_hashes NAME COUNT as=N [until=N]` | [`KvCache::pin`]; [`KvCache::pin_hashes`] of the sequence's first `COUNT` hashes |
//! | `unpin N`, `expire NOW`, `pins` | [`KvCache::unpin`], [`KvCache::expire`], [`KvCache::pins`] |
//! | `quota TENANT [share=N] [limit=N]`, `tenant TENANT` | [`KvCache::set_quota`], [`KvCache::tenant`] |
//! | `lost` | [`KvCache::drain_lost`], as `block:group` |
//! | `hashes NAME` | [`KvCache::hashes`] |
//! | `events` | [`KvCache::drain_events`], each as `number:stored:parent>block>block@group+tokens`, with `+ahead` where names cover tokens behind them and `{adapter=..,salt=..,item@first:tokens,embeds=blocks}` where they cover such, `number:removed:block@group` or `number:cleared`; names by their first four digits. With tiers: [`Offload::drain_events`](crate::tier::Offload::drain_events), names as below, and of tiers `number:stored:parent>block@tier:medium+tokens`, `removed` and `cleared` alike, `number:moved:block@tier:medium>tier:medium` |
//! | `snapshot` | [`KvCache::snapshot`], or [`Offload::snapshot`](crate::tier::Offload::snapshot) with tiers, one block after the other as if stored now |
//! | `now N`, `residency` | [`KvCache::set_now`]; [`KvCache::drain_residency`], as `lifetime:idle:gap,gap` |
//! | `refusals` | [`Stats::refusals`](crate::Stats::refusals) |
//! | `reset` | [`KvCache::reset`] |
//! | `table NAME` | the blocks held, per group; 0 where none is needed, `*` marks those that others can find |
//! | `slots NAME FROM TO [group=N]` | where the tokens from `FROM` up to, not including, `TO` live |
//! | `compare NAME NAME` | how many leading block hashes are equal |
//! | `free` | the free blocks, next to be handed out first |
//! | `references BLOCKS` | how many sequences hold each block |
//! | `stats` | [`KvCache::stats`] |
//!
//! Commands about tiers name content by the sequence that knows it: `A.0` is the first hash of `A`, `A.0-3` the first
//! four, `A.0:1` the first in group 1.
//!
//! | command | what it does |
//! |---|---|
//! | `tiers MEDIUM:SLOTS[+OPTION...] ... [load_min=N] [promote_min=N] [patience=best_effort\|wait_complete\|timeout:N+N] [generation=N]` | puts empty tiers behind the cache, nearest first; a medium is `host`, `disk` or `remote` |
//! | ` OPTION` | `arc`, `staged`, `direct`, `after:OFFERS/TRACKED`, `back:AHEAD`, `asked:REMEMBERED`, `identity:N`: [`TierConfig`](crate::tier::TierConfig) |
//! | `elsewhere NAME [now=N]`, `load NAME` | [`Offload::external`](crate::tier::Offload::external), [`Offload::load`](crate::tier::Offload::load) |
//! | `computed NAME N`, `swap_out NAME N`, `rescue` | the calls of these names; `release`, `close` and `reset` are those of [`Offload`](crate::tier::Offload) as well |
//! | `done JOB [first=N \| bad=N,N]`, `made JOB N` | [`Offload::complete`](crate::tier::Offload::complete), all well if not told otherwise; [`Offload::progress`](crate::tier::Offload::progress) |
//! | `where CONTENT`, `reach CONTENT` | [`Tiers::lookup`](crate::tier::Tiers::lookup) of each; [`Tiers::reach`](crate::tier::Tiers::reach) |
//! | `store TIER CONTENT`, `offer CONTENT [leaving]`, `promote TIER CONTENT`, `flush TIER [most=N]` | the calls of [`Tiers`](crate::tier::Tiers) of these names |
//! | `touch CONTENT`, `settle_order CONTENT`, `keep CONTENT` | a use; the order at the end of a sequence; kept until `done` |
//! | `questions`, `answer TIER CONTENT yes\|no`, `forget_answers TIER` | what a shared store is asked, and says |
//! | `dump TIER`, `restore TIER CONTENT@SLOT ... [identity=N] [generation=N]` | what it holds, next to go first |
//! | `tier_events`, `tier_stats` | of the `events` those of tiers alone; numbers |
//! | `judge [patience=...] wanted=N arrived=N began=N now=N`, `agree N ...` | [`Patience::judge`](crate::tier::Patience::judge), [`agreed`](crate::tier::agreed) |
//!
//! Tokens are numbers: `7` is one token, `7*16` sixteen of them, `0-15` the sixteen from 0 to 15. A claim says
//! only what differs from the usual: by default `computed` is what was claimed before (or the hit, for a
//! sequence that holds nothing) and `new` is all other known tokens. The cache is audited after every command.

mod begin;
mod keep;
mod sequence;
mod tell;
mod tiers;
mod words;

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use self::words::Words;
use crate::evict::{Fair, Policy};
use crate::hash::AnyHasher;
use crate::{BlockCount, BlockId, Error, HitStats, KvCache, SequenceId};

/// Runs a scenario and returns it with the answers written under the commands. Answers that the text already
/// has are replaced, so a scenario is right when its transcript is the scenario itself.
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

/// The cache that is spoken to.
type Cache = KvCache<AnyHasher, Fair<Policy>>;

/// A cache that is spoken to in commands, one line each.
#[derive(Debug, Default)]
pub struct Interpreter {
    cache: Option<Cache>,
    sequences: Named,
    behind: Option<tiers::Behind>,
}

/// What the interpreter, like any caller, remembers of a sequence.
#[derive(Clone, Copy, Debug)]
struct Progress {
    id: SequenceId,
    computed: u32,
    computed_before: u32,
}

/// Sequences by name, numbered as they are first mentioned.
#[derive(Debug, Default)]
struct Named(BTreeMap<String, Progress>);

impl Named {
    fn of(&mut self, name: &str) -> &mut Progress {
        let id = SequenceId(self.0.len() as u64 + 1);
        self.0.entry(name.to_owned()).or_insert(Progress { id, computed: 0, computed_before: 0 })
    }

    /// The same text with names in the place of numbers.
    fn named(&self, text: String) -> String {
        self.0.iter().fold(text, |text, (name, progress)| {
            text.replace(&format!("sequence {} ", progress.id), &format!("{name} "))
        })
    }
}

const NO_CACHE: &str = "there is no cache yet, `cache` makes one";

impl Interpreter {
    /// An interpreter that waits for its `cache` command.
    pub fn new() -> Self {
        Interpreter::default()
    }

    /// The answer to one command: a line, without its end. Never fails: what cannot be read or done is
    /// answered with the reason.
    pub fn execute(&mut self, command: &str) -> String {
        let answer = match Words::of(command).and_then(|words| self.run(words)) {
            Ok(answer) => answer,
            Err(reason) => format!("error: {}", self.sequences.named(reason)),
        };
        let of_tiers = self.cache.as_ref().zip(self.behind.as_ref());
        let of_tiers = of_tiers.map(|(cache, behind)| behind.offload.check(cache));
        match (self.cache.as_ref().map(Cache::check), of_tiers) {
            (Some(Err(violation)), _) => format!("{answer} VIOLATION: {violation}"),
            (_, Some(Err(violation))) => format!("{answer} VIOLATION: {violation}"),
            _ => answer,
        }
    }

    fn run(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let verb = words.next("a command")?;
        if verb == "cache" {
            let cache = begin::begin(words)?;
            let free = cache.stats().free;
            *self = Interpreter { cache: Some(cache), ..Interpreter::default() };
            return Ok(format!("cache free={free}"));
        }
        let cache = self.cache.as_mut().ok_or(NO_CACHE)?;
        if verb == "tiers" {
            self.behind = Some(tiers::begin(words)?);
            return Ok("tiers".to_owned());
        }
        if tiers::understands(verb) {
            let behind = self.behind.as_mut().ok_or("there are no tiers, `tiers` makes some")?;
            return tiers::run(cache, behind, &mut self.sequences, verb, words);
        }
        if let Some(behind) = &mut self.behind
            && let "release" | "close" | "reset" = verb
        {
            return behind.part(cache, &mut self.sequences, verb, words);
        }
        match verb {
            "references" => references(cache, words),
            "evict" => evict(cache, words),
            "evict_hash" => self.evict_hash(words),
            "fork" => self.fork(words),
            "compare" => self.compare(words),
            "unpin" | "expire" | "pins" => keep::pins(cache, verb, words),
            "quota" | "tenant" => keep::tenant(cache, verb, words),
            "now" => tell::now(cache, words),
            "events" | "tier_events" | "snapshot" | "residency" | "refusals" => {
                words.end()?;
                if let Some(behind) = &mut self.behind {
                    behind.learn_names(cache, &self.sequences);
                }
                let answer = tell::all(cache, self.behind.as_mut(), verb);
                Ok(self.sequences.named(answer))
            }
            "free" | "reset" | "stats" | "copies" | "end_step" | "lost" => {
                words.end()?;
                Ok(about_all(cache, verb))
            }
            _ => {
                let name = words.next("a sequence")?;
                let progress = self.sequences.of(name);
                sequence::run(cache, progress, verb, words).map(|answer| format!("{name} {answer}"))
            }
        }
    }

    fn fork(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let names = [words.next("a sequence")?, words.next("its fork")?];
        words.end()?;
        let parent = *self.sequences.of(names[0]);
        let child = self.sequences.of(names[1]);
        let cache = self.cache.as_mut().ok_or(NO_CACHE)?;
        said(cache.fork(parent.id, child.id))?;
        (child.computed, child.computed_before) = (parent.computed, parent.computed);
        Ok(format!("{} known={} free={}", names[1], said(cache.known(child.id))?, cache.stats().free))
    }

    fn evict_hash(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let (name, index) = (words.next("a sequence")?, words.plain_number("the index of a hash")?);
        words.end()?;
        let id = self.sequences.of(name).id;
        let cache = self.cache.as_mut().ok_or(NO_CACHE)?;
        let hash = said(cache.hashes(id))?.get(index as usize).copied();
        let hash = hash.ok_or_else(|| format!("{name} has no hash {index}"))?;
        Ok(format!("evicted={}", cache.evict_hash(hash)))
    }

    fn compare(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let names = [words.next("a sequence")?, words.next("another sequence")?];
        words.end()?;
        let [a, b] = names.map(|name| self.sequences.of(name).id);
        let cache = self.cache.as_ref().ok_or(NO_CACHE)?;
        let (a, b) = (said(cache.hashes(a))?, said(cache.hashes(b))?);
        let equal = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        Ok(format!("{} {} equal_hashes={equal} of {} and {}", names[0], names[1], a.len(), b.len()))
    }
}

/// The commands about the whole cache.
fn about_all(cache: &mut Cache, verb: &str) -> String {
    match verb {
        "free" => format!("free={}", list(cache.free_blocks())),
        "stats" => stats(cache),
        "copies" => sequence::copies(cache.copies()).trim_start().to_owned(),
        "lost" => {
            format!("lost={}", list(cache.drain_lost().map(|lost| format!("{}:{}", lost.block, lost.group))))
        }
        "end_step" => {
            cache.end_step();
            format!("step ended free={}", cache.stats().free)
        }
        _ => if cache.reset() { "reset" } else { "not reset, blocks are in use" }.to_owned(),
    }
}

fn evict(cache: &mut Cache, words: Words<'_>) -> Result<String, String> {
    let blocks: Vec<BlockId> = words.tokens()?.into_iter().map(BlockId).collect();
    Ok(format!("evicted={}", said(cache.evict(&blocks))?))
}

fn references(cache: &Cache, words: Words<'_>) -> Result<String, String> {
    let blocks = words.tokens()?;
    Ok(format!("references={}", list(blocks.iter().map(|&block| cache.references(BlockId(block))))))
}

fn stats(cache: &Cache) -> String {
    let stats = cache.stats();
    let hits = |hits: HitStats| format!("{}/{} in {}", hits.hit_tokens, hits.tokens, hits.admissions);
    let unusual = |name: &str, blocks: BlockCount| match blocks {
        BlockCount(0) => String::new(),
        blocks => format!(" {name}={blocks}"),
    };
    let (reserved, pinned) = (unusual("reserved", stats.reserved), unusual("pinned", stats.pinned));
    format!(
        "stats blocks={} free={}{reserved} used={}{pinned} cached={} sequences={} evictions={} first={} again={}",
        stats.blocks,
        stats.free,
        stats.used,
        stats.cached,
        stats.sequences,
        stats.evictions,
        hits(stats.first),
        hits(stats.again),
    )
}

fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("[{}]", items.join(" "))
}

fn said<T>(result: Result<T, Error>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_replaced_and_what_cannot_be_read_is_answered() {
        let text = "# why\ncache block_size=4 blocks=3\nopen A 1-5\nclaim A\n----\nold answer\n\n# alone\n\nfly A\nclaim A new=x\n";
        let expected = "# why\ncache block_size=4 blocks=3\nopen A 1-5\nclaim A\n----\ncache free=2\nA known=5\n\
                        A cached=0 new=[1 2] free=0\n\n# alone\n\nfly A\nclaim A new=x\n----\n\
                        error: `fly` is no command\nerror: `x` is not a number\n";
        assert_eq!(transcript(text), expected);
        assert_eq!(transcript(expected), expected);
    }

    #[test]
    fn no_line_makes_the_interpreter_fail() {
        let lines = [
            "",
            "cache",
            "free",
            "cache block_size=0 blocks=4",
            "cache block_size=4 blocks=1",
            "open",
            "open A 5-1",
            "cache block_size=4 blocks=4",
            "open A 1*4294967295",
            "open A 0-4294967295",
            "open A 1 x=2",
            "claim A",
            "open A",
            "claim A",
            "claim A new=4294967295 lookahead=4294967295",
            "slots A 0 4294967295",
            "compare A",
            "compare A B",
            "table B",
            "references 0 3 4 4294967295",
            "free now",
            "reset",
            "stats",
            "open A 1 1=1 1=2",
            "fork A",
            "fork A B",
            "fork A A",
            "evict 0",
            "evict 4",
            "evict_hash A 9",
            "settle A 4294967295",
            "truncate A 99",
            "rollback A 99",
            "trim A 0",
            "loaded A 1",
            "load_failed A 1",
            "encoder A 1",
            "chunk A",
            "cache block_size=4 blocks=4 groups=window:0",
            "cache block_size=4 blocks=4 groups=local:0",
            "cache block_size=4 blocks=4 groups=window:4+x",
            "cache block_size=4 blocks=4 groups=full/0",
            "cache block_size=4 blocks=4 groups=",
            "cache block_size=4 blocks=4 match_unit=3",
            "cache block_size=4 blocks=4 match_unit=0",
            "cache block_size=4 blocks=4 retention=none",
            "cache block_size=4 blocks=4294967295",
            "cache block_size=4 blocks=4 policy=lfu",
            "cache block_size=4 blocks=4 policy=arc:3",
            "cache block_size=4 blocks=4 policy=cost:0 pinned_max=4294967295",
            "open A 1*9",
            "claim A",
            "pin A 4294967295 as=4294967295 until=4294967295",
            "pin A 1",
            "pin B 1 as=1",
            "pin_hashes A 4294967295 as=2",
            "unpin 3",
            "expire 4294967295",
            "quota 4294967295 limit=0",
            "tenant 4294967295",
            "quota 1 share=1 limit=0 x",
            "store 0 A.0",
            "tiers host:4",
            "cache block_size=4 blocks=4",
            "tiers",
            "tiers host",
            "tiers host:0",
            "tiers host:4+x",
            "tiers tape:4",
            "tiers host:4+after:0",
            "tiers host:4 patience=none",
            "tiers host:4 remote:4+asked:1",
            "open A 1-9",
            "store 0 A",
            "store 0 A.9",
            "store 0 A.0",
            "store 9 A.0",
            "store 4294967295 A.0",
            "where A.0-4294967295",
            "where B.0",
            "where A.1-0",
            "load A",
            "elsewhere A now=4294967295",
            "done 0",
            "done 1 bad=x",
            "made 1 4294967295",
            "restore 0 A.0@x",
            "dump 7",
            "flush 0",
            "answer 0 A.0 yes",
            "computed A 4294967295",
            "judge patience=timeout:4294967295+4294967295 wanted=4294967295",
            "agree",
        ];
        let mut interpreter = Interpreter::new();
        for line in lines {
            let answer = interpreter.execute(line);
            assert!(!answer.is_empty() && !answer.contains("VIOLATION"), "{line}: {answer}");
        }
    }

    #[test]
    fn no_question_makes_it_fail_either() {
        let lines = [
            "events",
            "cache block_size=4 blocks=4 hash=md5",
            "cache block_size=4 blocks=4 hash=dynamo",
            "hashes A",
            "events",
            "snapshot",
            "residency",
            "refusals",
            "now x",
        ];
        let mut interpreter = Interpreter::new();
        for line in lines {
            let answer = interpreter.execute(line);
            assert!(!answer.is_empty() && !answer.contains("VIOLATION"), "{line}: {answer}");
        }
    }
}
