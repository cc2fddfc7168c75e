//! Which of each request's drafts stand, and the token after them (arXiv 2211.17192; trees: arXiv 2305.09781).
//!
//! Drafts are a tree below the request's last token. The walk goes on to a child as long as one stands: without the
//! distributions that drafts were drawn from, the child that is the token drawn there; with them, child x of q with
//! probability p(x) / q(x), and if it does not, p becomes what p has more than q, and the next child is tried.

use super::sampling::{Distributions, draw, mass, share};
use super::workers::Workers;
use crate::{Drafts, Verified};

/// All rows and tokens are checked.
pub(crate) fn verify(
    workers: &Workers,
    target: &Distributions,
    drafted: Option<&Distributions>,
    requests: &[Drafts<'_>],
) -> Vec<Verified> {
    let nothing = Verified { accepted: Vec::new(), token: u32::MAX };
    let mut walks: Vec<_> = requests.iter().map(|request| (request, nothing.clone())).collect();
    workers.each(&mut walks, &mut Vec::new(), |(request, verified), left: &mut Vec<f32>| {
        *verified = walk(target, drafted, request, left);
    });
    walks.into_iter().map(|(_, verified)| verified).collect()
}

/// `left` is to work in: what of the target's distribution is left of the drafts that were refused.
fn walk(
    target: &Distributions,
    drafted: Option<&Distributions>,
    request: &Drafts<'_>,
    left: &mut Vec<f32>,
) -> Verified {
    let (mut accepted, mut at) = (Vec::new(), None);
    loop {
        let node = at.map_or(0, |draft: u32| draft as usize + 1);
        let (weights, mut total) = target.row(request.row + node);
        if total == 0 {
            return Verified { accepted, token: u32::MAX };
        }
        left.clear();
        left.extend_from_slice(weights);
        let mut children = (0..).zip(request.drafts).filter(|(_, draft)| draft.parent == at);
        let stands = if let Some(drafted) = drafted {
            children.find(|(_, draft)| {
                let (of_draft, of_target) = (drafted.row(draft.from), (&left[..], total));
                let probability =
                    |(weights, total): (&[f32], u64)| weights[draft.token as usize] * (1.0 / share(total));
                let stands = fraction_24(draft.accept) * probability(of_draft) < probability(of_target);
                if !stands {
                    total = without(left, total, of_draft);
                }
                stands
            })
        } else {
            let token = draw(left, total, request.random[node]);
            children.find(|(_, draft)| draft.token == token)
        };
        let Some((index, _)) = stands else {
            return Verified { accepted, token: draw(left, total, request.random[node]) };
        };
        accepted.push(index);
        at = Some(index);
    }
}

/// `p`, with this sum of masses, becomes what it has more than `q`, unless there is nothing. Gives back the sum.
fn without(p: &mut [f32], of_p: u64, (q, of_q): (&[f32], u64)) -> u64 {
    let (scale_p, scale_q) = (1.0 / share(of_p), 1.0 / share(of_q));
    let more = |(&p, &q): (&f32, &f32)| (p * scale_p - q * scale_q).max(0.0);
    let sum = p.iter().zip(q).map(|pair| mass(more(pair))).sum();
    if sum == 0 {
        return of_p;
    }
    p.iter_mut().zip(q).for_each(|(p, q)| *p = more((p, q)));
    sum
}

/// A fraction of 2^64 as a number.
#[expect(clippy::cast_precision_loss, reason = "24 bits are exact")]
fn fraction_24(x: u64) -> f32 {
    (x >> 40) as f32 / 16_777_216.0
}
