//! One step of a beam search: which beams go on, which go on twice, which end. Carried out with
//! [`Batcher::fork`](crate::Batcher::fork) and [`Batcher::cancel`](crate::Batcher::cancel).

use crate::id::TokenId;

/// A beam and a token that could come next in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Continuation {
    /// Which beam, by its place among the beams.
    pub beam: usize,
    /// The token.
    pub token: TokenId,
    /// What the beam is worth with it: the sum of log-probabilities, or that sum with a penalty on length.
    pub score: f64,
}

/// What becomes of the beams, by their places.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BeamStep {
    /// Each of these beams goes on by this token. One for each beam that is not in `dropped`.
    pub kept: Vec<Continuation>,
    /// A copy of each of these beams goes on by this token. Fork them before the outputs of the kept are
    /// applied.
    pub forked: Vec<Continuation>,
    /// These beams end. Cancel them first: a fork needs their place.
    pub dropped: Vec<usize>,
}

/// The best `width` of the continuations of `beams` beams. Of equals the lower beam, then the lower token
/// goes first. A score that is not a number is worth nothing.
pub fn beam_step(beams: usize, width: usize, continuations: &[Continuation]) -> BeamStep {
    let mut best: Vec<Continuation> =
        continuations.iter().copied().filter(|next| next.beam < beams && !next.score.is_nan()).collect();
    best.sort_by(|one, other| {
        let place = |next: &Continuation| (next.beam, next.token);
        other.score.total_cmp(&one.score).then(place(one).cmp(&place(other)))
    });
    best.dedup_by_key(|next| (next.beam, next.token));
    best.truncate(width);
    let mut step = BeamStep::default();
    for next in best {
        let goes_on = step.kept.iter().any(|kept| kept.beam == next.beam);
        if goes_on { step.forked.push(next) } else { step.kept.push(next) }
    }
    step.dropped = (0..beams).filter(|&beam| step.kept.iter().all(|kept| kept.beam != beam)).collect();
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(beam: usize, token: u32, score: f64) -> Continuation {
        Continuation { beam, token: TokenId(token), score }
    }

    #[test]
    fn the_best_go_on_and_a_beam_may_go_on_twice() {
        let continuations = [next(0, 5, -1.0), next(0, 6, -1.5), next(1, 5, -2.0), next(1, 7, -3.0)];
        let step = beam_step(2, 2, &continuations);
        assert_eq!(step.kept, [next(0, 5, -1.0)]);
        assert_eq!(step.forked, [next(0, 6, -1.5)]);
        assert_eq!(step.dropped, [1]);
    }

    #[test]
    fn equals_are_told_apart_and_nonsense_is_left_out() {
        let continuations =
            [next(1, 2, -1.0), next(0, 9, -1.0), next(0, 3, -1.0), next(7, 0, 0.0), next(0, 1, f64::NAN)];
        let step = beam_step(2, 2, &continuations);
        assert_eq!(step.kept, [next(0, 3, -1.0)]);
        assert_eq!(step.forked, [next(0, 9, -1.0)]);
        assert_eq!(step.dropped, [1]);
    }
}
