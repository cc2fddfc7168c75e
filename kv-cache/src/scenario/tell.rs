//! The commands about what the cache tells: hashes, events, residency and refusals.

use std::collections::BTreeMap;

use super::contents::Behind;
use super::words::Words;
use super::{Cache, list, said};
use crate::hash::AnyHash;
use crate::tier::{BlockKey, Medium};
use crate::{Event, GroupId, Location, Refusal, SequenceId, SequenceKey, Stored, Tick};

/// `hashes NAME`, behind the name.
pub(super) fn hashes(cache: &Cache, id: SequenceId, words: Words<'_>) -> Result<String, String> {
    words.end()?;
    Ok(format!("hashes={}", list(said(cache.hashes(id))?)))
}

/// `now N`.
pub(super) fn now(cache: &mut Cache, mut words: Words<'_>) -> Result<String, String> {
    let now = words.plain_number("the time")?;
    words.end()?;
    cache.set_now(Tick(now.into()));
    Ok(format!("now={now}"))
}

/// `events`, `tier_events`, `snapshot`, `residency` and `refusals`.
pub(super) fn all(cache: &mut Cache, mut behind: Option<&mut Behind>, verb: &str) -> String {
    match verb {
        "events" | "tier_events" => {
            let mut heard = Vec::new();
            let names = behind.as_ref().map(|behind| behind.names.clone());
            let hear = |number: u64, event: Event<'_, AnyHash>| {
                let text = event_text(&event, names.as_ref());
                let in_device = in_device(&event);
                heard.extend((verb == "events" || !in_device).then(|| format!("{number}:{text}")));
            };
            match &mut behind {
                Some(behind) => behind.offload.drain_events(cache, hear),
                None => cache.drain_events(hear),
            }
            format!("events={}", list(heard))
        }
        "snapshot" => {
            let snapshot = match &mut behind {
                Some(behind) => behind.offload.snapshot(cache),
                None => cache.snapshot(),
            };
            let names = behind.map(|behind| &behind.names);
            match snapshot {
                None => "no snapshot: `cache` without events=N".to_owned(),
                Some(snapshot) => {
                    let blocks = snapshot.stored().map(|stored| stored_text(&stored, names));
                    format!("snapshot next={} {}", snapshot.next_event(), list(blocks))
                }
            }
        }
        "residency" => {
            let lives = cache.drain_residency().map(|life| {
                let gaps: Vec<String> = life.gaps().iter().map(u64::to_string).collect();
                format!("{}:{}:{}", life.lifetime_ticks, life.idle_ticks, gaps.join(","))
            });
            format!("residency={}", list(lives.collect::<Vec<_>>()))
        }
        _ => {
            let refusals = cache.stats().refusals;
            let last = refusals.last.map_or_else(String::new, |last| {
                let Refusal { sequence, need, watermark, reserved, free } = last;
                format!(" last: sequence {sequence} need={need} watermark={watermark} reserved={reserved} free={free}")
            });
            let crate::Refusals { wait, next_step, never, over_limit, .. } = refusals;
            format!("refusals wait={wait} next_step={next_step} never={never} over_limit={over_limit}{last}")
        }
    }
}

type Names = BTreeMap<BlockKey<AnyHash>, String>;

fn in_device(event: &Event<'_, AnyHash>) -> bool {
    let (Event::Stored(Stored { location, .. })
    | Event::Removed { location, .. }
    | Event::Moved { from: location, .. }
    | Event::Cleared { location }) = event;
    *location == Location::Device
}

fn event_text(event: &Event<'_, AnyHash>, names: Option<&Names>) -> String {
    match event {
        Event::Stored(stored) => format!("stored:{}", stored_text(stored, names)),
        Event::Removed { block, group, location: Location::Device } => {
            format!("removed:{}@{group}", name(*block, *group, names))
        }
        Event::Removed { block, group, location } => {
            format!("removed:{}@{}", name(*block, *group, names), place(*location))
        }
        Event::Moved { block, group, from, to } => {
            format!("moved:{}@{}>{}", name(*block, *group, names), place(*from), place(*to))
        }
        Event::Cleared { location: Location::Device } => "cleared".to_owned(),
        Event::Cleared { location } => format!("cleared:{}", place(*location)),
    }
}

/// `parent>block>block@group+tokens`, `-` for no parent; of a tier `parent>block@tier:medium+tokens`, or the name
/// alone. Behind the tokens, where there is more: `+ahead`, and what the sequence is besides its tokens.
fn stored_text(stored: &Stored<'_, AnyHash>, names: Option<&Names>) -> String {
    let group = stored.group;
    let blocks: Vec<String> = stored.blocks.iter().map(|&block| name(block, group, names)).collect();
    let place = match stored.location {
        Location::Device => group.to_string(),
        location if stored.tokens.is_empty() => return format!("{}@{}", blocks.join(">"), place(location)),
        location => place(location),
    };
    let parent = stored.parent.map_or("-".to_owned(), |parent| name(parent, group, names));
    let ahead =
        if stored.lookahead.is_empty() { String::new() } else { format!("+{}", stored.lookahead.len()) };
    format!("{parent}>{}@{place}+{}{ahead}{}", blocks.join(">"), stored.tokens.len(), key_text(&stored.key))
}

/// `{adapter=name,salt=name,id@first:tokens,embeds=blocks}`, as far as there is any of it.
fn key_text(key: &SequenceKey<'_>) -> String {
    let adapter = key.adapter.map(|adapter| format!("adapter={}", adapter.name));
    let salt = key.salt.map(|salt| format!("salt={salt}"));
    let media = key.media.iter().map(|item| format!("{}@{}:{}", item.id, item.first.0, item.tokens));
    let embeds = key.embeds.map(|digests| format!("embeds={}", digests.len()));
    let told: Vec<String> = adapter.into_iter().chain(salt).chain(media).chain(embeds).collect();
    if told.is_empty() { String::new() } else { format!("{{{}}}", told.join(",")) }
}

/// What a content is called, or the first digits of its hash.
fn name(digest: AnyHash, group: GroupId, names: Option<&Names>) -> String {
    let known = names.and_then(|names| names.get(&BlockKey { digest, group }));
    known.cloned().unwrap_or_else(|| digest.to_string()[..4].to_owned())
}

fn place(location: Location) -> String {
    match location {
        Location::Device => "device".to_owned(),
        Location::Tier { tier, medium } => {
            let medium = match medium {
                Medium::Host => "host",
                Medium::Disk => "disk",
                Medium::Remote => "remote",
            };
            format!("{tier}:{medium}")
        }
    }
}
