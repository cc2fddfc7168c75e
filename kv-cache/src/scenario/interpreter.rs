//! Who is spoken to: a cache, the tiers behind it, and sequences by their names.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::contents::Behind;
use super::words::Words;
use super::{begin, keep, sequence, tell, tier, tiers};
use crate::evict::{Fair, Policy};
use crate::hash::AnyHasher;
use crate::{BlockCount, BlockId, Error, HitStats, KvCache, SequenceId};

/// The cache that is spoken to.
pub(super) type Cache = KvCache<AnyHasher, Fair<Policy>>;

/// A cache that is spoken to in commands, one line each.
#[derive(Debug, Default)]
pub struct Interpreter {
    cache: Option<Cache>,
    sequences: Named,
    behind: Option<Behind>,
}

/// What the interpreter, like any caller, remembers of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) id: SequenceId,
    pub(super) computed: u32,
    pub(super) computed_before: u32,
}

/// Sequences by name, numbered as they are first mentioned.
#[derive(Debug, Default)]
pub(super) struct Named(pub(super) BTreeMap<String, Progress>);

impl Named {
    pub(super) fn of(&mut self, name: &str) -> &mut Progress {
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
            self.behind = Some(tier::begin(words)?);
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

pub(super) fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("[{}]", items.join(" "))
}

pub(super) fn said<T>(result: Result<T, Error>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::transcript;
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
