//! The `cache` command: what the cache is made of.

use super::words::{Words, number};
use super::{Cache, said};
use crate::evict::{CostAware, Fair, Policy, PolicyName, Slru, UnknownPolicy};
use crate::hash::{Algorithm, AnyHasher, UnknownAlgorithm};
use crate::kind::{ChunkedLocal, Cross, Full, Recurrent, SlidingWindow};
use crate::{BlockCount, BlockSize, Config, Group, KvCache, Retention, TokenCount};

/// A cache as the words say.
pub(super) fn begin(mut words: Words<'_>) -> Result<Cache, String> {
    let size = words.number("block_size")?.ok_or("`cache` needs block_size=N")?;
    let blocks = words.number("blocks")?.ok_or("`cache` needs blocks=N")?;
    let mut config = Config::new(said(BlockSize::new(size))?, BlockCount(blocks));
    if let Some(groups) = words.option("groups") {
        config.groups = groups.split(',').map(group).collect::<Result<_, _>>()?;
    }
    config.prefix_caching = words.option("caching") != Some("off");
    config.match_unit = words.number("match_unit")?.map(|unit| said(BlockSize::new(unit))).transpose()?;
    config.retention = words.option("retention").map_or(Ok(Retention::default()), retention)?;
    config.draft_head = words.flag("draft_head");
    config.report_lost = words.flag("report_lost");
    config.events_max = words.number("events")?.unwrap_or(0);
    config.residency_every = words.number("residency")?.unwrap_or(0);
    if let Some(blocks) = words.number("pinned_max")? {
        config.pinned_blocks_max = BlockCount(blocks);
    }
    let hash = words.option("hash").map_or(Ok(Algorithm::Xxh3), str::parse);
    let hash = hash.map_err(|error: UnknownAlgorithm| error.to_string())?;
    let (name, setting) = policy(words.option("policy").unwrap_or("lru"))?;
    config.hash_seed = words.number("seed")?.unwrap_or(0).into();
    config.hash_lookahead = TokenCount(words.number("hash_lookahead")?.unwrap_or(0));
    config.sequence_tokens_max = TokenCount(words.number("tokens_max")?.unwrap_or(u32::MAX));
    config.step_tokens_max = TokenCount(words.number("step_max")?.unwrap_or(u32::MAX));
    words.end()?;
    let (size, hasher) = (config.block_size, AnyHasher::new(hash, config.hash_seed));
    let policy = |blocks| Fair::new(blocks, chosen(name, setting, blocks, size));
    said(KvCache::with(config, hasher, policy))
}

/// `slru:30`: a policy, and the number that it may have.
fn policy(word: &str) -> Result<(PolicyName, Option<u32>), String> {
    let (name, setting) = word.split_once(':').map_or((word, None), |(name, setting)| (name, Some(setting)));
    let setting = setting.map(number).transpose()?;
    match (name.parse().map_err(|error: UnknownPolicy| error.to_string())?, setting) {
        (name @ (PolicyName::Lru | PolicyName::LeafFirst | PolicyName::Arc), Some(_)) => {
            Err(format!("{name} has nothing to set"))
        }
        policy => Ok(policy),
    }
}

fn chosen(name: PolicyName, setting: Option<u32>, blocks: BlockCount, size: BlockSize) -> Policy {
    match (name, setting) {
        (PolicyName::Slru, Some(percent)) => Policy::Slru(Slru::new(blocks, percent)),
        (PolicyName::Cost, Some(tokens)) => {
            Policy::Cost(CostAware::with_cost(blocks, size, TokenCount(tokens)))
        }
        _ => Policy::new(name, blocks, size),
    }
}

/// `window:8+sinks:2/32`: a kind with its numbers, and tokens per block.
fn group(word: &str) -> Result<Group, String> {
    let (kind, size) = word.split_once('/').map_or((word, None), |(kind, size)| (kind, Some(size)));
    let (name, rest) = kind.split_once(':').unwrap_or((kind, ""));
    let group = match name {
        "full" => Group::new(Full),
        "window" => Group::new(window(rest)?),
        "local" => Group::new(said(ChunkedLocal::new(TokenCount(number(rest)?)))?),
        "state" => Group::new(Recurrent),
        "cross" => Group::new(Cross),
        _ => return Err(format!("`{name}` is no kind of attention")),
    };
    match size {
        None => Ok(group),
        Some(size) => Ok(group.with_block_size(said(BlockSize::new(number(size)?))?)),
    }
}

/// `8`, `8+sinks:2` or `8+prompt`.
fn window(word: &str) -> Result<SlidingWindow, String> {
    let (window, keeps) = word.split_once('+').map_or((word, None), |(window, keeps)| (window, Some(keeps)));
    let window = said(SlidingWindow::new(TokenCount(number(window)?)))?;
    match keeps {
        None => Ok(window),
        Some("prompt") => Ok(window.with_prompt()),
        Some(keeps) => match keeps.strip_prefix("sinks:") {
            Some(sinks) => Ok(window.with_sinks(TokenCount(number(sinks)?))),
            None => Err(format!("a window keeps `prompt` or `sinks:N`, not `{keeps}`")),
        },
    }
}

/// `prompt`, `dense` or `every:N`.
fn retention(word: &str) -> Result<Retention, String> {
    match (word, word.strip_prefix("every:")) {
        ("prompt", _) => Ok(Retention::Prompt),
        ("dense", _) => Ok(Retention::Dense),
        (_, Some(tokens)) => Ok(Retention::Every(TokenCount(number(tokens)?))),
        _ => Err(format!("retention is `prompt`, `dense` or `every:N`, not `{word}`")),
    }
}
