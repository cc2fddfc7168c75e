//! The commands about one sequence.

use super::tell;
use super::words::{Words, number};
use super::{Cache, Progress, keep, list, said};
use crate::{
    Adapter, Admission, BlockCopy, BlockCount, Claim, EmbedsDigest, Error, GroupId, Media, OverLimit, Reuse,
    SequenceId, SequenceKey, TenantId, TokenCount, TokenIndex,
};

/// Carries out a command, and answers without the sequence's name.
pub(super) fn run(
    cache: &mut Cache,
    progress: &mut Progress,
    verb: &str,
    mut words: Words<'_>,
) -> Result<String, String> {
    let id = progress.id;
    Ok(match verb {
        "open" => open(cache, id, words)?,
        "claim" => claim(cache, progress, words, true)?,
        "reserve" => claim(cache, progress, words, false)?,
        "table" => table(cache, id, words)?,
        "hashes" => tell::hashes(cache, id, words)?,
        "slots" => slots(cache, id, words)?,
        "push" => {
            let tokens = words.tokens()?;
            said(cache.push(id, &tokens))?;
            format!("known={}", said(cache.known(id))?)
        }
        "lookup" => {
            words.end()?;
            let hit = said(cache.lookup(id))?;
            let junction = hit.junction.map_or(String::new(), |tokens| format!(" junction={tokens}"));
            format!("hit={}{junction}", hit.tokens)
        }
        "chunk" => {
            let claim = read_claim(cache, *progress, words)?;
            let computed = claim.computed.plus(claim.external);
            format!("chunk={}", said(cache.chunk(id, computed, claim.new_tokens))?)
        }
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
        "pin" | "pin_hashes" => keep::pin(cache, id, verb, words)?,
        "media" => {
            let items = media(words.next("ID@FIRST+TOKENS")?)?;
            words.end()?;
            said(cache.add_media(id, &items))?;
            "noted".to_owned()
        }
        "encoder" | "settle" | "truncate" | "rollback" | "trim" | "loaded" | "load_failed" => {
            let tokens = TokenCount(words.plain_number("a number of tokens")?);
            words.end()?;
            by_tokens(cache, progress, verb, tokens)?
        }
        _ => return Err(format!("`{verb}` is no command")),
    })
}

/// The calls that take a number of tokens.
fn by_tokens(
    cache: &mut Cache,
    progress: &mut Progress,
    verb: &str,
    tokens: TokenCount,
) -> Result<String, String> {
    let id = progress.id;
    match verb {
        "encoder" => {
            said(cache.encoder(id, tokens))?;
            return Ok(format!("encoder={tokens}"));
        }
        "settle" => {
            let settled = list(said(cache.settle(id, tokens))?);
            return Ok(format!("settled={settled} free={}", cache.stats().free));
        }
        "loaded" => {
            said(cache.loaded(id, tokens))?;
            return Ok("loaded".to_owned());
        }
        "load_failed" => {
            progress.computed = said(cache.load_failed(id, tokens))?.0;
            progress.computed_before = progress.computed;
            return Ok(format!("computed={} free={}", progress.computed, cache.stats().free));
        }
        "truncate" => said(cache.truncate(id, tokens))?,
        "rollback" => said(cache.rollback(id, tokens))?,
        _ => said(cache.trim(id, tokens))?,
    }
    let known = said(cache.known(id))?;
    progress.computed = progress.computed.min(if verb == "trim" { tokens.0 } else { known.0 });
    progress.computed_before = progress.computed_before.min(progress.computed);
    Ok(format!("known={known} computed={} free={}", progress.computed, cache.stats().free))
}

fn open(cache: &mut Cache, id: SequenceId, mut words: Words<'_>) -> Result<String, String> {
    let adapter = words.option("adapter").map(|word| {
        let (name, path) = word.split_once('@').unwrap_or((word, ""));
        Adapter { name, path }
    });
    let salt = words.option("salt");
    let media = words.option("media").map_or(Ok(Vec::new()), media)?;
    let embeds = words.option("embeds").map(embeds).transpose()?;
    let tenant = TenantId(words.number("tenant")?.unwrap_or(0));
    let key = SequenceKey { adapter, salt, media: &media, embeds: embeds.as_deref(), tenant };
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

/// Asks, and takes the room if there is some and `commit` says so.
fn claim(
    cache: &mut Cache,
    progress: &mut Progress,
    words: Words<'_>,
    commit: bool,
) -> Result<String, String> {
    let claim = read_claim(cache, *progress, words)?;
    let groups = cache.config().groups.len();
    let answer = match said(cache.reserve(progress.id, claim))? {
        Admission::NextStep => return Ok("waits: for the next step".to_owned()),
        Admission::Wait { need, watermark, reserved, free } => {
            let reserved = if reserved.0 > 0 { format!(" reserved={reserved}") } else { String::new() };
            return Ok(format!("waits: need={need} watermark={watermark}{reserved} free={free}"));
        }
        Admission::OverLimit(OverLimit { need, used, limit, .. }) => {
            return Ok(format!("over its limit: need={need} used={used} limit={limit}"));
        }
        Admission::Never { need, blocks } => return Ok(format!("never: need={need} blocks={blocks}")),
        Admission::Admit(room) if !commit => {
            let (hits, new) = (room.hit_blocks(), room.new_blocks());
            return Ok(format!("may have hit_blocks={hits} new_blocks={new}"));
        }
        Admission::Admit(room) => {
            let grant = room.commit();
            let new = (0..groups).map(|group| list(grant.new_blocks_in(GroupId::of(group))));
            let new = new.collect::<Vec<_>>().join(" ");
            let copies = if grant.copies.is_empty() { String::new() } else { copies(grant.copies) };
            format!("cached={} new={new}{copies}", grant.cached)
        }
    };
    progress.computed_before = progress.computed;
    progress.computed = claim.computed_after().0;
    Ok(format!("{answer} free={}", cache.stats().free))
}

/// ` copies=[3>7:2]`: of block 3, the first two tokens to block 7.
pub(super) fn copies(copies: &[BlockCopy]) -> String {
    let copies = copies.iter().map(|copy| format!("{}>{}:{}", copy.from, copy.to, copy.tokens));
    format!(" copies={}", list(copies))
}

/// A claim in full, what was left out filled in as a batcher would.
fn read_claim(cache: &mut Cache, progress: Progress, mut words: Words<'_>) -> Result<Claim, String> {
    let known = said(cache.known(progress.id))?.0;
    let done = match cache.lookup(progress.id) {
        Err(Error::Started { .. }) => progress.computed,
        hit => said(hit)?.tokens.0,
    };
    let computed = words.number("computed")?.unwrap_or(done);
    let external = words.number("external")?.unwrap_or(0);
    let rest = known.saturating_sub(computed).saturating_sub(external);
    let claim = Claim {
        computed: TokenCount(computed),
        external: TokenCount(external),
        new_tokens: TokenCount(words.number("new")?.unwrap_or(rest)),
        lookahead: TokenCount(words.number("lookahead")?.unwrap_or(0)),
        watermark: BlockCount(words.number("watermark")?.unwrap_or(0)),
        whole_sequence: words.flag("whole"),
    };
    words.end()?;
    Ok(claim)
}

fn table(cache: &Cache, id: SequenceId, words: Words<'_>) -> Result<String, String> {
    words.end()?;
    let mut tables = Vec::new();
    for group in (0..cache.config().groups.len()).map(GroupId::of) {
        let blocks = said(cache.table_in(id, group))?.blocks();
        tables.push(list(blocks.iter().map(|&block| {
            let mark = if cache.is_cached(block) { "*" } else { "" };
            format!("{block}{mark}")
        })));
    }
    Ok(format!("table={}", tables.join(" ")))
}

fn slots(cache: &Cache, id: SequenceId, mut words: Words<'_>) -> Result<String, String> {
    let group =
        words.number("group")?.map_or(Ok(0), |group| u8::try_from(group).map_err(|_| "no such group"))?;
    let [from, to] = [words.plain_number("the first token")?, words.plain_number("the end")?];
    words.end()?;
    let table = said(cache.table_in(id, GroupId(group)))?;
    Ok(format!("slots={}", list(table.slots(TokenIndex(from)..TokenIndex(to)).map(|slot| slot.get()))))
}
