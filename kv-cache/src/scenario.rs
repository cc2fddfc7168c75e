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
//! | `cache block_size=N blocks=N [caching=off] [seed=N] [hash_lookahead=N] [tokens_max=N]` | begins anew with an empty cache |
//! | `open NAME TOKENS [adapter=TEXT] [salt=TEXT] [media=ID@FIRST+TOKENS,...] [embeds=BYTE,...] [write_only]` | [`KvCache::open`]; an adapter may be `NAME@PATH`, the embeddings of block `n` have the digest of 32 times the `n`-th byte |
//! | `media NAME ID@FIRST+TOKENS,...` | [`KvCache::add_media`] |
//! | `push NAME TOKENS` | [`KvCache::push`] |
//! | `lookup NAME` | [`KvCache::lookup`] |
//! | `claim NAME [computed=N] [external=N] [new=N] [lookahead=N] [watermark=N] [whole]` | [`KvCache::reserve`], and commit if there is room |
//! | `reserve NAME ...` | the same without the commit: nothing changes |
//! | `loaded NAME N`, `load_failed NAME N` | of the external tokens of a claim, those up to `N` are there (and no more) |
//! | `withdraw NAME`, `release NAME`, `close NAME` | the calls of these names |
//! | `reset` | [`KvCache::reset`] |
//! | `table NAME` | the blocks held; `*` marks those that others can find |
//! | `slots NAME FROM TO` | where the tokens from `FROM` up to, not including, `TO` live |
//! | `compare NAME NAME` | how many leading block hashes are equal |
//! | `free` | the free blocks, next to be handed out first |
//! | `references BLOCKS` | how many sequences hold each block |
//! | `stats` | [`KvCache::stats`] |
//!
//! Tokens are numbers: `7` is one token, `7*16` sixteen of them, `0-15` the sixteen from 0 to 15. A claim says
//! only what differs from the usual: by default `computed` is what was claimed before (or the hit, for a
//! sequence that holds nothing) and `new` is all other known tokens. The cache is audited after every command.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Display, Write as _};

use crate::{
    Adapter, Admission, BlockCount, BlockId, BlockSize, Claim, Config, EmbedsDigest, Error, HitStats,
    KvCache, Media, Reuse, SequenceId, SequenceKey, TokenCount, TokenId, TokenIndex,
};

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

/// A cache that is spoken to in commands, one line each.
#[derive(Debug, Default)]
pub struct Interpreter {
    cache: Option<KvCache>,
    sequences: Named,
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
}

/// Tokens that one command may spell out.
const TOKENS_MAX: usize = 1 << 24;

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
            Err(reason) => format!("error: {reason}"),
        };
        match self.cache.as_ref().map(KvCache::check) {
            Some(Err(violation)) => format!("{answer} VIOLATION: {violation}"),
            _ => answer,
        }
    }

    fn run(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let verb = words.next("a command")?;
        if verb == "cache" {
            return self.begin(words);
        }
        let cache = self.cache.as_mut().ok_or("there is no cache yet, `cache` makes one")?;
        match verb {
            "free" => words.end().map(|()| format!("free={}", list(cache.free_blocks()))),
            "reset" => words
                .end()
                .map(|()| if cache.reset() { "reset" } else { "not reset, blocks are in use" }.into()),
            "stats" => words.end().map(|()| stats(cache)),
            "references" => references(cache, words),
            "compare" => self.compare(words),
            _ => {
                let name = words.next("a sequence")?;
                let number = self.sequences.of(name).id;
                let named = |text: String| text.replace(&format!("sequence {number} "), &format!("{name} "));
                self.run_on_sequence(verb, name, words).map_err(named)
            }
        }
    }

    fn begin(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let size = words.number("block_size")?.ok_or("`cache` needs block_size=N")?;
        let blocks = words.number("blocks")?.ok_or("`cache` needs blocks=N")?;
        let mut config = Config::new(said(BlockSize::new(size))?, BlockCount(blocks));
        config.prefix_caching = words.option("caching") != Some("off");
        config.hash_seed = words.number("seed")?.unwrap_or(0).into();
        config.hash_lookahead = TokenCount(words.number("hash_lookahead")?.unwrap_or(0));
        config.sequence_tokens_max = TokenCount(words.number("tokens_max")?.unwrap_or(u32::MAX));
        words.end()?;
        let cache = said(KvCache::new(config))?;
        let free = cache.stats().free;
        *self = Interpreter { cache: Some(cache), sequences: Named::default() };
        Ok(format!("cache free={free}"))
    }

    fn run_on_sequence(&mut self, verb: &str, name: &str, mut words: Words<'_>) -> Result<String, String> {
        let progress = self.sequences.of(name);
        let cache = self.cache.as_mut().ok_or("there is no cache yet, `cache` makes one")?;
        let id = progress.id;
        let answer = match verb {
            "loaded" => {
                let tokens = words.plain_number("the tokens that are there")?;
                words.end()?;
                said(cache.loaded(id, TokenCount(tokens)))?;
                "loaded".to_owned()
            }
            "load_failed" => {
                let tokens = words.plain_number("the tokens that are there")?;
                words.end()?;
                progress.computed = said(cache.load_failed(id, TokenCount(tokens)))?.0;
                progress.computed_before = progress.computed;
                format!("computed={} free={}", progress.computed, cache.stats().free)
            }
            "open" => open(cache, id, words)?,
            "push" => {
                let tokens = words.tokens()?;
                said(cache.push(id, &tokens))?;
                format!("known={}", said(cache.known(id))?)
            }
            "lookup" => {
                words.end().and_then(|()| said(cache.lookup(id))).map(|hit| format!("hit={}", hit.tokens))?
            }
            "claim" => claim(cache, progress, words)?,
            "reserve" => reserve(cache, progress, words)?,
            "withdraw" => {
                words.end()?;
                said(cache.withdraw(id))?;
                progress.computed = progress.computed_before;
                "withdrawn".to_owned()
            }
            "release" | "close" => {
                words.end()?;
                said(if verb == "close" { cache.close(id) } else { cache.release(id) })?;
                (progress.computed, progress.computed_before) = (0, 0);
                format!("{verb}d free={}", cache.stats().free)
            }
            "media" => {
                let mut words = words;
                let items = media(words.next("ID@FIRST+TOKENS")?)?;
                words.end()?;
                said(cache.add_media(id, &items))?;
                "noted".to_owned()
            }
            "table" => words.end().and_then(|()| table(cache, id))?,
            "slots" => slots(cache, id, words)?,
            _ => return Err(format!("`{verb}` is no command")),
        };
        Ok(format!("{name} {answer}"))
    }

    fn compare(&mut self, mut words: Words<'_>) -> Result<String, String> {
        let names = [words.next("a sequence")?, words.next("another sequence")?];
        words.end()?;
        let [a, b] = names.map(|name| self.sequences.of(name).id);
        let cache = self.cache.as_ref().ok_or("there is no cache yet, `cache` makes one")?;
        let (a, b) = (said(cache.hashes(a))?, said(cache.hashes(b))?);
        let equal = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        Ok(format!("{} {} equal_hashes={equal} of {} and {}", names[0], names[1], a.len(), b.len()))
    }
}

fn open(cache: &mut KvCache, id: SequenceId, mut words: Words<'_>) -> Result<String, String> {
    let adapter = words.option("adapter").map(|word| {
        let (name, path) = word.split_once('@').unwrap_or((word, ""));
        Adapter { name, path }
    });
    let salt = words.option("salt");
    let media = words.option("media").map_or(Ok(Vec::new()), media)?;
    let embeds = words.option("embeds").map(embeds).transpose()?;
    let key = SequenceKey { adapter, salt, media: &media, embeds: embeds.as_deref() };
    let reuse = if words.flag("write_only") { Reuse::WriteOnly } else { Reuse::ReadWrite };
    let tokens = words.tokens()?;
    said(cache.open(id, key, &tokens, reuse))?;
    Ok(format!("known={}", tokens.len()))
}

/// `aaa@11+10,bbb@30+18`: id, first token, number of tokens.
fn media(word: &str) -> Result<Vec<Media>, String> {
    word.split(',')
        .map(|item| {
            let parts = item.split_once('@').and_then(|(id, place)| Some((id, place.split_once('+')?)));
            let (id, (first, tokens)) = parts.ok_or_else(|| format!("`{item}` is not ID@FIRST+TOKENS"))?;
            Ok(Media {
                id: id.into(),
                first: TokenIndex(number(first)?),
                tokens: TokenCount(number(tokens)?),
            })
        })
        .collect()
}

/// `1,2`: the first block's embeddings have the digest of thirty-two bytes 1, the second's of bytes 2.
fn embeds(word: &str) -> Result<Vec<EmbedsDigest>, String> {
    let digest =
        |word: &str| word.parse().map(|byte| [byte; 32]).map_err(|_| format!("`{word}` is not a byte"));
    word.split(',').map(digest).collect()
}

fn claim(cache: &mut KvCache, progress: &mut Progress, words: Words<'_>) -> Result<String, String> {
    let claim = read_claim(cache, *progress, words)?;
    let answer = match said(cache.reserve(progress.id, claim))? {
        Admission::NextStep => return Ok(NEXT_STEP.into()),
        Admission::Wait { need, watermark, reserved, free } => {
            return Ok(waits(need, watermark, reserved, free));
        }
        Admission::Never { need, blocks } => return Ok(never(need, blocks)),
        Admission::Admit(reservation) => {
            let grant = reservation.commit();
            format!("cached={} new={}", grant.cached, list(grant.new_blocks))
        }
    };
    progress.computed_before = progress.computed;
    progress.computed = claim.computed_after().0;
    Ok(format!("{answer} free={}", cache.stats().free))
}

fn reserve(cache: &mut KvCache, progress: &mut Progress, words: Words<'_>) -> Result<String, String> {
    let claim = read_claim(cache, *progress, words)?;
    Ok(match said(cache.reserve(progress.id, claim))? {
        Admission::NextStep => NEXT_STEP.into(),
        Admission::Wait { need, watermark, reserved, free } => waits(need, watermark, reserved, free),
        Admission::Never { need, blocks } => never(need, blocks),
        Admission::Admit(room) => {
            format!("may have hit_blocks={} new_blocks={}", room.hit_blocks(), room.new_blocks())
        }
    })
}

/// A claim in full, what was left out filled in as a batcher would.
fn read_claim(cache: &mut KvCache, progress: Progress, mut words: Words<'_>) -> Result<Claim, String> {
    let known = said(cache.known(progress.id))?.0;
    let holds_nothing = said(cache.table(progress.id))?.blocks().is_empty();
    let done = if holds_nothing { said(cache.lookup(progress.id))?.tokens.0 } else { progress.computed };
    let computed = words.number("computed")?.unwrap_or(done);
    let claim = Claim {
        computed: TokenCount(computed),
        new_tokens: TokenCount(words.number("new")?.unwrap_or(known.saturating_sub(computed))),
        external: TokenCount(words.number("external")?.unwrap_or(0)),
        lookahead: TokenCount(words.number("lookahead")?.unwrap_or(0)),
        watermark: BlockCount(words.number("watermark")?.unwrap_or(0)),
        whole_sequence: words.flag("whole"),
    };
    words.end()?;
    Ok(claim)
}

const NEXT_STEP: &str = "waits: for the next step";

fn waits(need: BlockCount, watermark: BlockCount, reserved: BlockCount, free: BlockCount) -> String {
    let reserved = if reserved.0 > 0 { format!(" reserved={reserved}") } else { String::new() };
    format!("waits: need={need} watermark={watermark}{reserved} free={free}")
}

fn never(need: BlockCount, blocks: BlockCount) -> String {
    format!("never: need={need} blocks={blocks}")
}

fn table(cache: &KvCache, id: SequenceId) -> Result<String, String> {
    let blocks = said(cache.table(id))?.blocks();
    let marked = blocks.iter().map(|&block| {
        let mark = if cache.hash_of(block).is_some() { "*" } else { "" };
        format!("{block}{mark}")
    });
    Ok(format!("table={}", list(marked)))
}

fn slots(cache: &KvCache, id: SequenceId, mut words: Words<'_>) -> Result<String, String> {
    let [from, to] = [words.plain_number("the first token")?, words.plain_number("the end")?];
    words.end()?;
    let table = said(cache.table(id))?;
    Ok(format!("slots={}", list(table.slots(TokenIndex(from)..TokenIndex(to)).map(|slot| slot.get()))))
}

fn references(cache: &KvCache, words: Words<'_>) -> Result<String, String> {
    let blocks = words.tokens()?;
    Ok(format!("references={}", list(blocks.iter().map(|&block| cache.references(BlockId(block))))))
}

fn stats(cache: &KvCache) -> String {
    let stats = cache.stats();
    let hits = |hits: HitStats| format!("{}/{} in {}", hits.hit_tokens, hits.tokens, hits.admissions);
    format!(
        "stats blocks={} free={} used={} cached={} sequences={} evictions={} first={} again={}",
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

/// The words of a command: `name=value` options, in any place, and the rest in order.
#[derive(Debug)]
struct Words<'a> {
    plain: VecDeque<&'a str>,
    options: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn of(command: &'a str) -> Result<Self, String> {
        let mut words = Words { plain: VecDeque::new(), options: BTreeMap::new() };
        for word in command.split_whitespace() {
            match word.split_once('=') {
                None => words.plain.push_back(word),
                Some((name, value)) => {
                    if words.options.insert(name, value).is_some() {
                        return Err(format!("`{name}` is given twice"));
                    }
                }
            }
        }
        Ok(words)
    }

    fn next(&mut self, what: &str) -> Result<&'a str, String> {
        self.plain.pop_front().ok_or_else(|| format!("{what} is missing"))
    }

    fn plain_number(&mut self, what: &str) -> Result<u32, String> {
        number(self.next(what)?)
    }

    fn option(&mut self, name: &str) -> Option<&'a str> {
        self.options.remove(name)
    }

    fn number(&mut self, name: &str) -> Result<Option<u32>, String> {
        self.option(name).map(number).transpose()
    }

    fn flag(&mut self, name: &str) -> bool {
        let place = self.plain.iter().position(|&word| word == name);
        place.is_some_and(|place| self.plain.remove(place).is_some())
    }

    /// All remaining words as tokens; nothing may be left over.
    fn tokens(mut self) -> Result<Vec<TokenId>, String> {
        let mut tokens = Vec::new();
        for word in std::mem::take(&mut self.plain) {
            let (first, last, times) = spelled(word)?;
            let length = (u64::from(last) - u64::from(first) + 1) * u64::from(times);
            if tokens.len() as u64 + length > TOKENS_MAX as u64 {
                return Err(format!("more than {TOKENS_MAX} tokens in one command"));
            }
            for _ in 0..times {
                tokens.extend(first..=last);
            }
        }
        self.end().map(|()| tokens)
    }

    fn end(self) -> Result<(), String> {
        let left = self.plain.front().copied().or(self.options.keys().next().copied());
        left.map_or(Ok(()), |word| Err(format!("`{word}` has no meaning here")))
    }
}

/// `7`, `7*16` or `0-15`: first token, last token, how often.
fn spelled(word: &str) -> Result<(TokenId, TokenId, u32), String> {
    if let Some((token, times)) = word.split_once('*') {
        let token = number(token)?;
        return Ok((token, token, number(times)?));
    }
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let (first, last) = (number(first)?, number(last)?);
    if first > last { Err(format!("`{word}` runs backwards")) } else { Ok((first, last, 1)) }
}

fn number(word: &str) -> Result<u32, String> {
    word.parse().map_err(|_| format!("`{word}` is not a number"))
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
        ];
        let mut interpreter = Interpreter::new();
        for line in lines {
            let answer = interpreter.execute(line);
            assert!(!answer.is_empty() && !answer.contains("VIOLATION"), "{line}: {answer}");
        }
    }
}
