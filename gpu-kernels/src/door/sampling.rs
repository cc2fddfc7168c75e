//! What sampling and verification ask of their arguments.

use super::{Rows, number};
use crate::error::{below, multiple, same};
use crate::{Drafts, Draw, Error};

/// Draws from rows of logits, by rows of a mask.
pub(crate) fn sample(logits: Rows, draws: &[Draw<'_>], mask: &[u32]) -> Result<(), Error> {
    same("sample", "number of draws", draws.len(), logits.rows)?;
    if draws.is_empty() {
        return Ok(());
    }
    multiple("sample", "vocabulary", logits.cols, 1)?;
    let words = logits.cols.div_ceil(32);
    same("sample", "words of the mask beyond whole rows", mask.len() % words, 0)?;
    draws.iter().try_for_each(|draw| self::draw(draw, logits.cols, mask.len() / words))
}

fn draw(draw: &Draw<'_>, vocabulary: usize, mask_rows: usize) -> Result<(), Error> {
    let Draw { temperature, top_p, min_p, repetition, presence, frequency, .. } = *draw;
    let share = |x: f32| (0.0..=1.0).contains(&x);
    let above = repetition > 0.0 && repetition.is_finite();
    for (what, found, legal, supported) in [
        ("temperature", temperature, (0.0..=f32::MAX).contains(&temperature), "finite, at least 0"),
        ("top_p", top_p, share(top_p), "0 to 1"),
        ("min_p", min_p, share(min_p), "0 to 1"),
        ("repetition", repetition, above, "finite, above 0"),
        ("presence", presence, presence.is_finite(), "finite"),
        ("frequency", frequency, frequency.is_finite(), "finite"),
    ] {
        number("sample", what, found, legal, supported)?;
    }
    for seen in draw.seen {
        below("sample", "a token that occurred", seen.token as usize, vocabulary)?;
    }
    draw.mask_row.map_or(Ok(()), |row| below("sample", "row of the mask", row, mask_rows))
}

/// Drafts against the target's distributions and their own, rows and vocabulary of each.
pub(crate) fn verify(
    target: (usize, usize),
    drafted: Option<(usize, usize)>,
    requests: &[Drafts<'_>],
) -> Result<(), Error> {
    let (rows, vocabulary) = target;
    if let Some((_, found)) = drafted {
        same("verify", "vocabulary of the drafts", found, vocabulary)?;
    }
    for request in requests {
        below("verify", "row of the target", request.row.saturating_add(request.drafts.len()), rows)?;
        same("verify", "random numbers", request.random.len(), request.drafts.len() + 1)?;
        for (index, draft) in request.drafts.iter().enumerate() {
            below("verify", "drafted token", draft.token as usize, vocabulary)?;
            draft
                .parent
                .map_or(Ok(()), |parent| below("verify", "parent of a draft", parent as usize, index))?;
            drafted.map_or(Ok(()), |(rows, _)| below("verify", "row of the drafts", draft.from, rows))?;
        }
    }
    Ok(())
}
