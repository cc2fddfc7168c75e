//! Tiers as a scenario describes them.

use std::collections::BTreeMap;

use super::contents::Behind;
use super::words::{Words, number};
use crate::BlockCount;
use crate::tier::{Contents, Fetch, Medium, Offload, Patience, TierConfig, TierEviction, Tiers, Write};

/// `tiers host:4 disk:8+arc ...`: tiers as the words say, nearest first.
pub(super) fn begin(mut words: Words<'_>) -> Result<Behind, String> {
    let fetch = Fetch {
        load_min: BlockCount(words.number("load_min")?.unwrap_or(0)),
        promote_min: BlockCount(words.number("promote_min")?.unwrap_or(0)),
        patience: words.option("patience").map_or(Ok(Patience::default()), patience)?,
    };
    let generation = words.number("generation")?.unwrap_or(0);
    let mut configs = Vec::new();
    while let Ok(word) = words.next("a tier") {
        configs.push(config(word)?);
    }
    words.end()?;
    let tiers = Tiers::new(&configs, generation).map_err(|error| error.to_string())?;
    Ok(Behind { offload: Offload::new(tiers, fetch), names: BTreeMap::new() })
}

pub(super) fn patience(word: &str) -> Result<Patience, String> {
    match word.split_once(':') {
        None if word == "best_effort" => Ok(Patience::BestEffort),
        None if word == "wait_complete" => Ok(Patience::WaitComplete),
        Some(("timeout", ticks)) => {
            let (base, per_block) = ticks.split_once('+').unwrap_or((ticks, "0"));
            Ok(Patience::Timeout { base: number(base)?.into(), per_block: number(per_block)?.into() })
        }
        _ => Err(format!("`{word}` is no patience")),
    }
}

/// `disk:8+arc+back:2`: medium, slots, and what differs from the usual.
fn config(word: &str) -> Result<TierConfig, String> {
    let mut parts = word.split('+');
    let first = parts.next().unwrap_or_default();
    let (medium, slots) = first.split_once(':').ok_or_else(|| format!("`{first}` is not MEDIUM:SLOTS"))?;
    let medium = match medium {
        "host" => Medium::Host,
        "disk" => Medium::Disk,
        "remote" => Medium::Remote,
        _ => return Err(format!("`{medium}` is no medium")),
    };
    let mut config = TierConfig::new(medium, BlockCount(number(slots)?));
    for part in parts {
        let (name, value) = part.split_once(':').unwrap_or((part, ""));
        match name {
            "arc" => config.eviction = TierEviction::Arc,
            "staged" => config.staged = true,
            "direct" => config.staged = false,
            "back" => config.write = Write::Back { ahead: number(value)? },
            "asked" => config.contents = Contents::Asked { remembered: number(value)? },
            "identity" => config.identity = number(value)?.into(),
            "after" => {
                let (offers, tracked) = value.split_once('/').unwrap_or((value, "0"));
                config.write = Write::After { offers: number(offers)?, tracked: number(tracked)? };
            }
            _ => return Err(format!("`{part}` says nothing about a tier")),
        }
    }
    Ok(config)
}
