//! Products in which rows have weights of their own: mixtures of experts, and adapters.

use std::fmt;

use crate::{Error, Ops};

/// Mixtures of experts, and adapters (LoRA) for the rows of a step.
///
/// A row's bits do not depend on which other rows go to the same expert or adapter.
pub trait Grouped: Ops {
    /// Which experts each token goes to, and with what weights.
    type Routing;

    /// Chooses experts for each token from logits `[tokens, experts]`: the best by score, of equal ones the first.
    ///
    /// # Errors
    /// When numbers of experts and groups do not fit.
    fn route(&self, logits: &Self::Tensor, router: Router<'_, Self>) -> Result<Self::Routing, Error>;

    /// Each token's experts and their weights, `[tokens, chosen]`.
    ///
    /// # Errors
    /// When they cannot be brought here.
    fn read_routing(&self, routing: &Self::Routing) -> Result<(Vec<u32>, Vec<f32>), Error>;

    /// Each pair of a token and one of its experts times that expert's weight: `out` `[tokens · chosen, out]`,
    /// from `x` `[tokens, in]` or `[tokens · chosen, in]`. The experts' weights are one matrix `[experts · out,
    /// in]`. A row has the bits that [`Ops::linear`] gives it.
    ///
    /// # Errors
    /// When shapes disagree, or the weights are integers.
    fn expert_linear(
        &self,
        x: &Self::Tensor,
        routing: &Self::Routing,
        weights: &Self::Weight,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;

    /// Sums what the experts of each token gave, `[tokens · chosen, cols]`, by their weights: `out` `[tokens,
    /// cols]`, on top of what is there (a shared expert's) if `accumulate`.
    ///
    /// # Errors
    /// When shapes disagree.
    fn combine(
        &self,
        parts: &Self::Tensor,
        routing: &Self::Routing,
        accumulate: bool,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;

    /// `out += factor · (x · Aᵀ) · Bᵀ` for each row that has an adapter (LoRA, arXiv 2106.09685), all adapters at
    /// once. `a` is `[adapters · rank, in]`, `b` `[adapters · out, rank]`, `factors` has one number per adapter;
    /// an adapter of a smaller rank is filled up with zeros. Rows without one stay as they are. What lies between
    /// the two products is rounded to the activations' type.
    ///
    /// # Errors
    /// When shapes disagree, an adapter is not there, or the weights are integers.
    fn lora(
        &self,
        x: &Self::Tensor,
        adapter_of: &[Option<u32>],
        weights: (&Self::Weight, &Self::Weight),
        factors: &Self::Floats,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;
}

/// How a token's experts are chosen.
pub struct Router<'a, O: Ops + ?Sized> {
    /// Experts of a token.
    pub chosen: usize,
    /// Scores are sigmoids of the logits (DeepSeek-V3, arXiv 2412.19437), not a softmax over all experts.
    pub sigmoid: bool,
    /// Added to scores for the choice alone; one per expert.
    pub bias: Option<&'a O::Floats>,
    /// Experts are in this many equal groups; 1 is none.
    pub groups: usize,
    /// The best of the groups, from which experts are chosen. A group is as good as its two best experts together if
    /// there is a bias, else as its best.
    pub groups_chosen: usize,
    /// The weights of a token's experts are made to sum to 1.
    pub renormalise: bool,
    /// Multiplies the weights.
    pub factor: f32,
}

impl<O: Ops + ?Sized> Default for Router<'_, O> {
    fn default() -> Self {
        Self {
            chosen: 1,
            sigmoid: false,
            bias: None,
            groups: 1,
            groups_chosen: 1,
            renormalise: true,
            factor: 1.0,
        }
    }
}

impl<O: Ops + ?Sized> Clone for Router<'_, O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O: Ops + ?Sized> Copy for Router<'_, O> {}

impl<O: Ops + ?Sized> fmt::Debug for Router<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router")
            .field("chosen", &self.chosen)
            .field("sigmoid", &self.sigmoid)
            .field("bias", &self.bias.is_some())
            .field("groups", &self.groups)
            .field("groups_chosen", &self.groups_chosen)
            .field("renormalise", &self.renormalise)
            .field("factor", &self.factor)
            .finish()
    }
}

/// Rows that have weights of their own, each as `(weight, row)`, in the order of their weights and then of the rows.
pub(crate) fn by_weight(weight_of: impl Iterator<Item = (u32, u32)>) -> Vec<(u32, u32)> {
    let mut list: Vec<_> = weight_of.collect();
    list.sort_unstable();
    list
}
