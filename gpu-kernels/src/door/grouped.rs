//! What mixtures of experts and adapters ask of their arguments.

use super::{Rows, number};
use crate::error::{at_most, below, multiple, same};
use crate::{Error, Ops, Router};

/// What a routing is of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routed {
    pub(crate) tokens: usize,
    /// Experts of a token.
    pub(crate) chosen: usize,
    /// All experts.
    pub(crate) experts: usize,
}

impl Routed {
    /// Pairs of a token and one of its experts.
    pub(crate) fn pairs(self) -> usize {
        self.tokens * self.chosen
    }
}

/// A router, with as many biases, if any.
pub(crate) fn route<O: Ops>(
    logits: Rows,
    router: Router<'_, O>,
    biases: Option<usize>,
) -> Result<Routed, Error> {
    let (operator, experts) = ("route", logits.cols);
    let Router { chosen, groups, groups_chosen, factor, .. } = router;
    multiple(operator, "experts of a token", chosen, 1)?;
    multiple(operator, "experts", experts, groups)?;
    multiple(operator, "groups chosen", groups_chosen, 1)?;
    at_most(operator, "groups chosen", groups_chosen, groups)?;
    at_most(operator, "experts of a token", chosen, experts / groups * groups_chosen)?;
    biases.map_or(Ok(()), |biases| same(operator, "biases", biases, experts))?;
    number(operator, "a factor of", factor, factor.is_finite(), "a finite one")?;
    Ok(Routed { tokens: logits.rows, chosen, experts })
}

/// Weights of all experts, outputs and inputs.
pub(crate) fn expert_linear(
    x: Rows,
    routed: Routed,
    (outs, into): (usize, usize),
    out: Rows,
) -> Result<(), Error> {
    let operator = "expert_linear";
    same(operator, "in of the weights", into, x.cols)?;
    same(operator, "out of the weights of all experts", outs, routed.experts * out.cols)?;
    if x.rows != routed.pairs() {
        same(operator, "rows of x", x.rows, routed.tokens)?;
    }
    at_most(operator, "rows of the output", routed.pairs(), out.rows_max)
}

pub(crate) fn combine(parts: Rows, routed: Routed, accumulate: bool, out: Rows) -> Result<(), Error> {
    let operator = "combine";
    same(operator, "rows of the parts", parts.rows, routed.pairs())?;
    if accumulate {
        same(operator, "rows of the output", out.rows, routed.tokens)?;
    }
    out.takes(operator, routed.tokens, parts.cols)
}

/// Outputs and inputs of both weights, and how many adapters they are of.
pub(crate) fn lora(
    x: Rows,
    adapter_of: &[Option<u32>],
    (a, b): ((usize, usize), (usize, usize)),
    adapters: usize,
    out: Rows,
) -> Result<(), Error> {
    let operator = "lora";
    multiple(operator, "rows of a", a.0, adapters)?;
    same(operator, "rank of b", b.1, a.0 / adapters)?;
    same(operator, "in of a", a.1, x.cols)?;
    same(operator, "out of b of all adapters", b.0, adapters * out.cols)?;
    same(operator, "rows that have an adapter or none", adapter_of.len(), x.rows)?;
    same(operator, "rows of the output", out.rows, x.rows)?;
    adapter_of
        .iter()
        .flatten()
        .try_for_each(|&adapter| below(operator, "adapter", adapter as usize, adapters))
}
