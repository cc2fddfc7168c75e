//! The commands about what is kept, and for whom: pins and quotas.

use super::words::Words;
use super::{Cache, list, said};
use crate::evict::{Quota, TenantUse};
use crate::{BlockCount, PinId, Pinned, SequenceId, TenantId, Tick, TokenCount};

/// `pin NAME TOKENS as=N [until=N]` and `pin_hashes NAME COUNT as=N [until=N]`, behind the name.
pub(super) fn pin(
    cache: &mut Cache,
    id: SequenceId,
    verb: &str,
    mut words: Words<'_>,
) -> Result<String, String> {
    let first = words.plain_number("how much is pinned")?;
    let pin = PinId(words.number("as")?.ok_or("a pin needs a number: as=N")?.into());
    let until = words.number("until")?.map(|until| Tick(until.into()));
    words.end()?;
    let answer = if verb == "pin" {
        said(cache.pin(pin, id, TokenCount(first), until))?
    } else {
        let hashes = said(cache.hashes(id))?;
        let hashes = hashes[..hashes.len().min(first as usize)].to_vec();
        cache.pin_hashes(pin, &hashes, until)
    };
    Ok(match answer {
        Pinned::Held { blocks } => format!("pinned={blocks} free={}", cache.stats().free),
        Pinned::OverCap { need, pinned, max } => {
            format!("not pinned: need={need} pinned={pinned} max={max}")
        }
        Pinned::SetAside { need, free } => format!("not pinned: need={need} free={free}"),
    })
}

/// `unpin N`, `expire NOW` and `pins`.
pub(super) fn pins(cache: &mut Cache, verb: &str, mut words: Words<'_>) -> Result<String, String> {
    if verb == "pins" {
        words.end()?;
        let pins = cache.pins().map(|(pin, blocks, until)| match until {
            None => format!("{pin}:{blocks}"),
            Some(Tick(until)) => format!("{pin}:{blocks}:{until}"),
        });
        return Ok(format!("pins={}", list(pins)));
    }
    let number = words.plain_number("a number")?.into();
    words.end()?;
    let blocks = if verb == "unpin" { said(cache.unpin(PinId(number)))? } else { cache.expire(Tick(number)) };
    Ok(format!("unpinned={blocks} free={}", cache.stats().free))
}

/// `quota TENANT [share=N] [limit=N]` and `tenant TENANT`.
pub(super) fn tenant(cache: &mut Cache, verb: &str, mut words: Words<'_>) -> Result<String, String> {
    let tenant = TenantId(words.plain_number("a tenant")?);
    if verb == "quota" {
        let everything = Quota::default();
        let quota = Quota {
            share: words.number("share")?.map_or(everything.share, BlockCount),
            limit: words.number("limit")?.map_or(everything.limit, BlockCount),
        };
        words.end()?;
        cache.set_quota(tenant, quota);
    } else {
        words.end()?;
    }
    let TenantUse { used, cached, quota } = cache.tenant(tenant);
    let blocks = |blocks: BlockCount| match blocks {
        BlockCount(u32::MAX) => "all".to_owned(),
        blocks => blocks.to_string(),
    };
    let (share, limit) = (blocks(quota.share), blocks(quota.limit));
    Ok(format!("tenant {tenant} used={used} cached={cached} share={share} limit={limit}"))
}
