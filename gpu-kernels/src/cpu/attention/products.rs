//! The arithmetic of attention: in f32, in pairs of bf16 (`pairs.rs`), or on matrix tiles (`matrix.rs`).

use super::state::State;
use super::values::{Widened, add_values};
use super::{Lanes, pairs, scores};

/// How queries meet K, and weights V, once both are gathered in scratch.
pub(super) trait Products: Copy {
    /// Whether they are pairs of bf16: queries are rounded already, and all that the pool stores is exact in bf16.
    const PAIRS: bool;
    /// Whether few rows read K and V where they lie.
    const IN_PLACE: bool;

    /// Numbers to work in, for heads of `wide` elements.
    fn room(_wide: usize) -> usize {
        0
    }

    /// Before a thread's first product and after its last.
    fn begin(self) {}
    fn end(self) {}

    /// `weight[row][position] = scale · query[row] · key[position]` for rows that see something of chunk `keys.0`, with
    /// its `keys` gathered ([`super::pages::Pages::gather_keys`]). In f32 queries are scaled already.
    fn scores<L: Lanes>(
        self,
        lanes: L,
        room: &mut [f32],
        state: &mut State<'_>,
        keys: (usize, &[f32]),
        rows: (usize, usize),
        of: pairs::Dims,
    );

    /// `value[row] = value[row] · fade[row] + Σ weight[row][position] · v[position]` over what each row sees of
    /// positions `values.1` of chunk `to.0`, with its `values` gathered; of rows of `to.2[1]` columns the first
    /// `to.2[0]`.
    fn add_values<L: Lanes>(
        self,
        lanes: L,
        room: &mut [f32],
        state: &mut State<'_>,
        values: (&[f32], (usize, usize)),
        to: (usize, (usize, usize), [usize; 2]),
    );
}

/// In f32, on any machine.
#[derive(Clone, Copy)]
pub(super) struct InF32;

impl Products for InF32 {
    const PAIRS: bool = false;
    const IN_PLACE: bool = true;

    #[inline(always)]
    fn scores<L: Lanes>(
        self,
        lanes: L,
        _: &mut [f32],
        state: &mut State<'_>,
        keys: (usize, &[f32]),
        rows: (usize, usize),
        of: pairs::Dims,
    ) {
        scores::of_widened(lanes, state, keys, rows, (of.wide, of.dim));
    }

    #[inline(always)]
    fn add_values<L: Lanes>(
        self,
        lanes: L,
        _: &mut [f32],
        state: &mut State<'_>,
        (values, _): (&[f32], (usize, usize)),
        (chunk, rows, of): (usize, (usize, usize), [usize; 2]),
    ) {
        add_values(lanes, state, Widened { values, wide: of[1] }, (chunk, rows, of[0]));
    }
}
