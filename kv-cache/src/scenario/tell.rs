//! The commands about what the cache tells: hashes, events, residency and refusals.

use super::words::Words;
use super::{Cache, list, said};
use crate::hash::AnyHash;
use crate::tier::Medium;
use crate::{Event, Location, Refusal, SequenceId, Stored, Tick};

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

/// `events`, `snapshot`, `residency` and `refusals`.
pub(super) fn all(cache: &mut Cache, verb: &str) -> String {
    match verb {
        "events" => {
            let mut heard = Vec::new();
            cache.drain_events(|number, event| heard.push(format!("{number}:{}", event_text(&event))));
            format!("events={}", list(heard))
        }
        "snapshot" => match cache.snapshot() {
            None => "no snapshot: `cache` without events=N".to_owned(),
            Some(snapshot) => {
                let blocks = snapshot.stored().map(|stored| stored_text(&stored));
                format!("snapshot next={} {}", snapshot.next_event(), list(blocks))
            }
        },
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

fn event_text(event: &Event<'_, AnyHash>) -> String {
    match event {
        Event::Stored(stored) => format!("stored:{}", stored_text(stored)),
        Event::Removed { block, group, .. } => format!("removed:{}@{group}", short(block)),
        Event::Moved { block, group, from, to } => {
            format!("moved:{}@{group}:{}:{}", short(block), named(*from), named(*to))
        }
        Event::Cleared => "cleared".to_owned(),
    }
}

/// `parent>block>block@group+tokens`: names by their first four digits, `-` for no parent.
fn stored_text(stored: &Stored<'_, AnyHash>) -> String {
    let parent = stored.parent.as_ref().map_or("-".to_owned(), short);
    let blocks: Vec<String> = stored.blocks.iter().map(short).collect();
    format!("{parent}>{}@{}+{}", blocks.join(">"), stored.group, stored.tokens.len())
}

fn short(hash: &AnyHash) -> String {
    hash.to_string()[..4].to_owned()
}

fn named(location: Location) -> &'static str {
    match location {
        Location::Device => "device",
        Location::Tier(Medium::Host) => "host",
        Location::Tier(Medium::Disk) => "disk",
        Location::Tier(Medium::Remote) => "remote",
    }
}
