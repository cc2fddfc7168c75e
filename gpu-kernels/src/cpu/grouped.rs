//! Mixtures of experts, and adapters: rows in the order of their weights, the products of each group, and the way back.
//!
//! A group's product is the one of `linear`, with the panels that hold the outputs of its expert or adapter. Such a
//! product gives a row the same bits among any others, so who shares an expert does not matter.

use std::sync::PoisonError;

use super::attention::Floats;
use super::matmul::Product;
use super::panels::Panels;
use super::sampling::exponentials;
use super::{Cpu, Isa, SharedOut, Tensor, Weight};
use crate::door::{self, Routed};
use crate::grouped::by_weight;
use crate::{Error, Grouped, Router};

/// Which experts each token goes to.
#[derive(Debug)]
pub struct Routing {
    of: Routed,
    /// `[tokens, chosen]`, both.
    experts: Vec<u32>,
    weights: Vec<f32>,
    /// Experts with their pairs of a token and a choice, in the order of the experts.
    list: Vec<(u32, u32)>,
}

impl Grouped for Cpu {
    type Routing = Routing;

    fn route(&self, logits: &Tensor, router: Router<'_, Self>) -> Result<Routing, Error> {
        let bias = router.bias.map(|bias| &bias.numbers[..]);
        let of = door::route(logits.shape(), router, bias.map(<[f32]>::len))?;
        let (mut experts, mut weights) = (vec![0; of.pairs()], vec![0.0; of.pairs()]);
        let chosen = experts.chunks_mut(of.chosen).zip(weights.chunks_mut(of.chosen));
        let mut tokens: Vec<_> = logits.data().chunks(of.experts).zip(chosen).collect();
        self.workers.each(&mut tokens, &mut Vec::new(), |(logits, (experts, weights)), memory| {
            choose(self.isa, (logits, bias), router, memory, (experts, weights));
        });
        let list = by_weight((0..).zip(&experts).map(|(pair, &expert)| (expert, pair)));
        Ok(Routing { of, experts, weights, list })
    }

    fn read_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>), Error> {
        Ok((routing.experts.clone(), routing.weights.clone()))
    }

    fn expert_linear(
        &self,
        x: &Tensor,
        routing: &Routing,
        weights: &Weight,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let weights = weights.floats("expert_linear")?;
        let Routed { chosen, .. } = routing.of;
        door::expert_linear(x.shape(), routing.of, (weights.rows, weights.cols), out.shape())?;
        out.set_rows(routing.of.pairs());
        let (cols, each) = (out.cols(), if x.rows() == routing.of.pairs() { 1 } else { chosen });
        let out = SharedOut::new(out.data_mut());
        self.grouped(x.data(), weights, cols, &routing.list, &|pair| pair / each, &|_, pair, sums| {
            // SAFETY: every pair is in the list once.
            unsafe { out.slice(pair * cols, cols) }.copy_from_slice(sums);
        });
        Ok(())
    }

    fn combine(
        &self,
        parts: &Tensor,
        routing: &Routing,
        accumulate: bool,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        door::combine(parts.shape(), routing.of, accumulate, out.shape())?;
        let Routed { tokens, chosen, .. } = routing.of;
        out.set_rows(tokens);
        let (cols, out, parts) = (parts.cols(), SharedOut::new(out.data_mut()), parts.data());
        self.workers.rows(tokens, chosen * cols, &|from, to| {
            for token in from..to {
                // SAFETY: this piece alone has the token.
                let out = unsafe { out.slice(token * cols, cols) };
                if !accumulate {
                    out.fill(0.0);
                }
                for pair in token * chosen..(token + 1) * chosen {
                    add(out, &parts[pair * cols..][..cols], routing.weights[pair]);
                }
            }
        });
        Ok(())
    }

    fn lora(
        &self,
        x: &Tensor,
        adapter_of: &[Option<u32>],
        (a, b): (&Weight, &Weight),
        factors: &Floats,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let (a, b, factors) = (a.floats("lora")?, b.floats("lora")?, &factors.numbers[..]);
        let shapes = ((a.rows, a.cols), (b.rows, b.cols));
        door::lora(x.shape(), adapter_of, shapes, factors.len(), out.shape())?;
        let list = by_weight((0..).zip(adapter_of).filter_map(|(row, of)| of.map(|adapter| (adapter, row))));
        let (rank, cols) = (b.cols, out.cols());
        let mut between = vec![0.0; x.rows() * rank];
        let to = SharedOut::new(&mut between);
        self.grouped(x.data(), a, rank, &list, &|row| row, &|_, row, sums| {
            // SAFETY: every row is in the list once.
            unsafe { to.slice(row * rank, rank) }.copy_from_slice(sums);
        });
        let out = SharedOut::new(out.data_mut());
        self.grouped(&between, b, cols, &list, &|row| row, &|adapter, row, sums| {
            // SAFETY: as above.
            add(unsafe { out.slice(row * cols, cols) }, sums, factors[adapter]);
        });
        Ok(())
    }
}

impl Cpu {
    /// For each row of the list, row `from(row)` of `x` times its weight: outputs `weight · cols..` of `weights`. `put`
    /// gets weight, row and sums, on any thread.
    pub(super) fn grouped(
        &self,
        x: &[f32],
        weights: &Panels,
        cols: usize,
        list: &[(u32, u32)],
        from: &(dyn Fn(usize) -> usize + Sync),
        put: &(dyn Fn(usize, usize, &[f32]) + Sync),
    ) {
        let into = weights.cols;
        let groups: Vec<_> = list.chunk_by(|a, b| a.0 == b.0).map(<[_]>::len).collect();
        let mut parts = Vec::with_capacity(groups.len());
        let (mut places, mut size) = (Vec::with_capacity(list.len()), 0);
        for group in list.chunk_by(|a, b| a.0 == b.0) {
            let first = group[0].0 as usize * cols;
            let (part, before) = weights.part(first..first + cols);
            places.extend((0..group.len()).map(|row| size + row * part.rows + before));
            size += group.len() * part.rows;
            parts.push((group.len(), part));
        }
        let mut memory = self.grouped.lock().unwrap_or_else(PoisonError::into_inner);
        let [rows, sums] = memory.take([list.len() * into, size]);
        let to = SharedOut::new(rows);
        self.workers.rows(list.len(), into, &|start, end| {
            for (index, &(_, row)) in list.iter().enumerate().take(end).skip(start) {
                // SAFETY: this piece alone has the row.
                let to = unsafe { to.slice(index * into, into) };
                to.copy_from_slice(&x[from(row as usize) * into..][..into]);
            }
        });
        let (mut rows, mut rest) = (&*rows, &mut *sums);
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        for (count, part) in &parts {
            let (x, others) = rows.split_at(count * into);
            let (out, behind) = rest.split_at_mut(count * part.rows);
            (rows, rest) = (others, behind);
            let product = Product { weight: part, bias: None, out: SharedOut::new(out) };
            self.multiply(&mut packed, (x, *count), vec![product]);
        }
        self.workers.rows(list.len(), cols, &|start, end| {
            for (&(weight, row), &place) in list[start..end].iter().zip(&places[start..end]) {
                put(weight as usize, row as usize, &sums[place..][..cols]);
            }
        });
    }
}

/// `out += factor · x`.
fn add(out: &mut [f32], x: &[f32], factor: f32) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x);
}

/// The best experts of a token, the best first, and their weights. To work in: each expert's score, and what it is
/// chosen by.
fn choose(
    isa: Isa,
    (logits, bias): (&[f32], Option<&[f32]>),
    router: Router<'_, Cpu>,
    [score, choice]: &mut [Vec<f32>; 2],
    (experts, weights): (&mut [u32], &mut [f32]),
) {
    score.resize(logits.len(), 0.0);
    choice.clear();
    if router.sigmoid {
        exponentials(isa, logits, (0.0, -1.0), score);
        score.iter_mut().for_each(|x| *x = 1.0 / (1.0 + *x));
    } else {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        exponentials(isa, logits, (largest, 1.0), score);
        let sum: f32 = score.iter().sum();
        score.iter_mut().for_each(|x| *x /= sum);
    }
    choice.extend_from_slice(score);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
    }
    keep_groups(choice, router);
    let mut total = 0.0;
    for (expert, weight) in experts.iter_mut().zip(&mut *weights) {
        let index = best(choice);
        choice[index] = f32::NAN;
        (*expert, *weight) = (u32::try_from(index).unwrap_or(u32::MAX), score[index]);
        total += *weight;
    }
    let factor = if router.renormalise { router.factor / total } else { router.factor };
    weights.iter_mut().for_each(|weight| *weight *= factor);
}

/// Choices outside the best groups become minus infinity.
fn keep_groups(choice: &mut [f32], router: Router<'_, Cpu>) {
    if router.groups_chosen == router.groups {
        return;
    }
    let size = choice.len() / router.groups;
    let worth = |group: &[f32]| {
        let (first, second) =
            group.iter().fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(first, second), &x| {
                (x.max(first), second.max(x.min(first)))
            });
        if router.bias.is_some() && size > 1 { first + second } else { first }
    };
    let mut worths: Vec<f32> = choice.chunks(size).map(worth).collect();
    for _ in 0..router.groups_chosen {
        let group = best(&worths);
        worths[group] = f32::NAN;
    }
    for (group, _) in choice.chunks_mut(size).zip(&worths).filter(|(_, worth)| !worth.is_nan()) {
        group.fill(f32::NEG_INFINITY);
    }
}

/// The first of the largest numbers; the last place where there is none.
fn best(x: &[f32]) -> usize {
    let mut best: Option<usize> = None;
    for (index, candidate) in x.iter().enumerate().filter(|(_, x)| !x.is_nan()) {
        if best.is_none_or(|best| *candidate > x[best]) {
            best = Some(index);
        }
    }
    best.unwrap_or(x.len() - 1)
}
