//! Activations as whole numbers of three digits, for products with integers.
//!
//! Within a group of elements `x = unit · n`, with whole numbers `|n| <= 2^21` and `unit` the power of two for which
//! they suffice: what rounding loses is less than the largest `x` of the group times `2^-21`. A number is
//! `n = (digit 2 · 162 + digit 1) · 162 + digit 0` with digits of -81..=81, small enough for the instructions that
//! multiply bytes. A group with an element that is infinite or no number has a unit that is no number.
//!
//! ```text
//! words     [tile][4 elements of `in`][row of the tile]: their digits 0, 1 and 2, four bytes each, and 4 of nothing;
//!           of the portable lanes four f32
//! scales    [row][group]: the unit, and the sum of the numbers
//! ```

use super::integers::STEP;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::norm::load;
use super::scratch::Scratch;
use super::workers::Workers;
use super::{Isa, SharedOut};

/// What a digit is worth in units of the one before it: the smallest even number with which three suffice.
pub(super) const BASE: f32 = 162.0;
/// Numbers are at most `2^BITS`.
const BITS: i32 = 21;
/// Elements whose digits lie together.
pub(super) const QUAD: usize = 4;
/// Floats that take as much room as the digits of four elements.
const QUAD_LEN: usize = 4;

/// The rows of `x` in tiles.
#[derive(Clone, Copy)]
pub(super) struct Digits<'a> {
    words: &'a [f32],
    scales: &'a [f32],
    /// Tiles.
    pub(super) count: usize,
    /// Rows of a tile.
    rows: usize,
    /// Fours of elements in a row.
    quads: usize,
    groups: usize,
}

impl<'a> Digits<'a> {
    /// Of `x`, `[rows, cols]`, in tiles of `of` rows and groups of `group` elements; in `memory`.
    pub(super) fn new(
        (workers, isa): (&Workers, Isa),
        memory: &'a mut Scratch,
        x: &[f32],
        (rows, cols): (usize, usize),
        (of, group): (usize, usize),
    ) -> Self {
        let (count, quads) = (rows.div_ceil(of), cols.next_multiple_of(STEP) / QUAD);
        let groups = cols.div_ceil(group);
        let [words, scales] = memory.take([count * of * quads * QUAD_LEN, 2 * count * of * groups]);
        let to = (SharedOut::new(words), SharedOut::new(scales));
        let fill = Fill { x, cols, of, group, quads, groups, to, from: 0, end: rows };
        // An element takes as long as four cheap ones.
        workers.rows(rows, 4 * cols, &|from, end| dispatch(isa, Fill { from, end, ..fill }));
        Self { words, scales, count, rows: of, quads, groups }
    }

    /// The words of one tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &'a [f32] {
        let len = self.quads * self.rows * QUAD_LEN;
        &self.words[tile * len..][..len]
    }

    /// The unit and the sum of each group of a tile's rows, and how many floats lie between two rows.
    #[inline(always)]
    pub(super) fn scales(&self, tile: usize) -> (&'a [f32], usize) {
        let row = 2 * self.groups;
        (&self.scales[tile * self.rows * row..][..self.rows * row], row)
    }
}

/// Rows `from..end`.
#[derive(Clone, Copy)]
struct Fill<'a> {
    x: &'a [f32],
    cols: usize,
    /// Rows of a tile.
    of: usize,
    group: usize,
    quads: usize,
    groups: usize,
    to: (SharedOut, SharedOut),
    from: usize,
    end: usize,
}

impl Kernel for Fill<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for row in self.from..self.end {
            let x = &self.x[row * self.cols..][..self.cols];
            // SAFETY: inside the scales, and of this piece of work.
            let scales = unsafe { self.to.1.slice(row * 2 * self.groups, 2 * self.groups) };
            for (index, (x, scales)) in x.chunks(self.group).zip(scales.as_chunks_mut::<2>().0).enumerate() {
                let first = index * self.group / QUAD;
                *scales = self.group(lanes, x, (row, first));
            }
        }
    }
}

impl Fill<'_> {
    /// One group of a row, whose first four elements are number `first`.
    #[inline(always)]
    fn group<L: Lanes>(self, lanes: L, x: &[f32], (row, first): (usize, usize)) -> [f32; 2] {
        let vector = |at: usize| {
            // SAFETY: sixteen elements, or as many as are left.
            unsafe { load(lanes, x.as_ptr().wrapping_add(at), at + WIDTH <= x.len(), x.len() - at) }
        };
        let zero = lanes.splat(0.0);
        let (mut most, mut odd) = (zero, zero);
        for at in (0..x.len()).step_by(WIDTH) {
            let x = vector(at);
            most = lanes.max(most, lanes.max(x, lanes.sub(zero, x)));
            // Nothing times what is infinite or no number is no number.
            odd = lanes.fma(x, zero, odd);
        }
        // The least power of two above the largest, unless that is next to nothing.
        let exponent = ((lanes.largest(most).to_bits() >> 23).cast_signed() - 126).max(-100);
        let power = |exponent: i32| f32::from_bits((exponent + 127).cast_unsigned() << 23);
        let units = lanes.splat(power(BITS - exponent));
        let (base, square) = (lanes.splat(-BASE), lanes.splat(-BASE * BASE));
        let (base_share, square_share) = (lanes.splat(1.0 / BASE), lanes.splat(1.0 / (BASE * BASE)));
        let mut sum = zero;
        for at in (0..x.len()).step_by(WIDTH) {
            let number = lanes.round(lanes.mul(vector(at), units));
            sum = lanes.add(sum, number);
            let high = lanes.round(lanes.mul(number, square_share));
            let rest = lanes.fma(high, square, number);
            let middle = lanes.round(lanes.mul(rest, base_share));
            let digits = [lanes.fma(middle, base, rest), middle, high];
            let quad = first + at / QUAD;
            let place = |quad| ((row / self.of * self.quads + quad) * self.of + row % self.of) * QUAD_LEN;
            if self.of == 1 && quad + WIDTH / QUAD <= self.quads {
                // SAFETY: inside the words, and of this row; what is beyond the group is written after this.
                unsafe { lanes.store_digits(self.to.0.row(place(quad), 1), digits) };
                continue;
            }
            let mut words = [0.0; WIDTH];
            // SAFETY: sixteen words.
            unsafe { lanes.store_digits(words.as_mut_ptr(), digits) };
            for (quad, words) in (quad..self.quads).zip(words.as_chunks::<QUAD_LEN>().0) {
                // SAFETY: as above.
                unsafe { self.to.0.slice(place(quad), QUAD_LEN) }.copy_from_slice(words);
            }
        }
        [power(exponent - BITS) + lanes.sum(odd), lanes.sum(sum)]
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    /// What the digits of an element are worth, and the unit of its group.
    fn number(
        isa: Isa,
        digits: &Digits<'_>,
        (tile, row): (usize, usize),
        col: usize,
        group: usize,
    ) -> (f32, f32) {
        let words = &digits.tile(tile)[(col / QUAD * digits.rows + row) * QUAD_LEN..][..QUAD_LEN];
        let digit = |which: usize| f32::from(words[which].to_ne_bytes()[col % QUAD].cast_signed());
        let (scales, len) = digits.scales(tile);
        let whole = if isa == Isa::Portable {
            words[col % QUAD]
        } else {
            (digit(2) * BASE + digit(1)) * BASE + digit(0)
        };
        (whole, scales[row * len + 2 * group])
    }

    #[test]
    fn digits_are_small_and_lose_little() {
        let (rows, cols, group) = (5, 104, 40);
        let x: Vec<f32> = (0..rows * cols)
            .map(|i| {
                let size = [1e-30, 0.01, 1.0, 3e38, 0.0][i / cols];
                size * ((i * 7919 % 1000) as f32 / 500.0 - 1.0)
            })
            .collect();
        let workers = Workers::new(Some(NonZeroUsize::MIN)).expect("no thread to start");
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            for of in [1, 2, 4] {
                let mut memory = Scratch::default();
                let digits = Digits::new((&workers, isa), &mut memory, &x, (rows, cols), (of, group));
                for (row, x) in x.chunks(cols).enumerate() {
                    for (index, x) in x.chunks(group).enumerate() {
                        let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                        for (at, x) in x.iter().enumerate() {
                            let (n, unit) =
                                number(isa, &digits, (row / of, row % of), index * group + at, index);
                            assert!(n.abs() <= 2_097_152.0, "{isa}: row {row}, number {n}");
                            let lost = (f64::from(n) * f64::from(unit) - f64::from(*x)).abs();
                            let allowed = f64::from(most) / 2_097_152.0 + 1e-37;
                            assert!(lost <= allowed, "{isa}: row {row}, {x} became {n} times {unit}");
                        }
                    }
                }
            }
        }
    }
}
