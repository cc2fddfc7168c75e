//! Rows of the embedding table.

use super::Isa;
use super::lanes::{AsBf16, AsF16, AsF32, Element, Kernel, Lanes, WIDTH, dispatch};
use super::norm::store;
use super::out::SharedOut;
use super::weight::{Rows, Table};
use super::workers::Workers;
use crate::Dtype;

/// `out[i] = table[tokens[i]]`, widened. Tokens are checked.
pub(crate) fn embed(workers: &Workers, isa: Isa, table: Rows<'_>, tokens: &[u32], out: &mut [f32]) {
    let (_, cols) = table.shape();
    let out = SharedOut::new(out);
    workers.rows(tokens.len(), cols, &|from, to| {
        let tokens = &tokens[from..to];
        match table {
            Rows::Packed(panels) => {
                for (row, &token) in (from..to).zip(tokens) {
                    // SAFETY: this piece alone writes the row.
                    panels.read_row(token as usize, unsafe { out.slice(row * cols, cols) });
                }
            }
            Rows::Integers(integers) => {
                for (row, &token) in (from..to).zip(tokens) {
                    // SAFETY: this piece alone writes the row.
                    integers.read_row(token as usize, unsafe { out.slice(row * cols, cols) });
                }
            }
            Rows::InPlace(table) => match table.dtype {
                Dtype::F32 => dispatch(isa, Embed::<AsF32>::new(table, tokens, from, out)),
                Dtype::Bf16 => dispatch(isa, Embed::<AsBf16>::new(table, tokens, from, out)),
                Dtype::F16 => dispatch(isa, Embed::<AsF16>::new(table, tokens, from, out)),
            },
        }
    });
}

struct Embed<'a, E> {
    table: Table<'a>,
    tokens: &'a [u32],
    from: usize,
    out: SharedOut,
    element: std::marker::PhantomData<E>,
}

impl<'a, E> Embed<'a, E> {
    fn new(table: Table<'a>, tokens: &'a [u32], from: usize, out: SharedOut) -> Self {
        Self { table, tokens, from, out, element: std::marker::PhantomData }
    }
}
impl<E: Element> Kernel for Embed<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let cols = self.table.cols;
        for (i, &token) in self.tokens.iter().enumerate() {
            let from = self.table.row(token as usize).as_ptr();
            let to = self.out.row(self.from + i, cols);
            for column in (0..cols).step_by(WIDTH) {
                let (whole, rest) = (column + WIDTH <= cols, cols - column);
                let at = from.wrapping_add(column * E::BYTES);
                let x = if whole {
                    // SAFETY: sixteen elements are left of the row.
                    unsafe { E::load(lanes, at) }
                } else {
                    // SAFETY: `rest` elements are left of the row.
                    unsafe { E::load_first(lanes, at, rest) }
                };
                // SAFETY: as above; this piece alone writes the row.
                unsafe { store(lanes, to.wrapping_add(column), x, whole, rest) };
            }
        }
    }
}
