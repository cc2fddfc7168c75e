//! bf16 in twelve bits, with nothing lost.
//!
//! The weights of a trained matrix are spread like a normal distribution, whose numbers have few exponents (less than
//! three bits of information, DFloat11, arXiv 2504.11651, section 2): all but some 150 of a million lie within fifteen
//! neighbouring powers of two. So four bits count exponents from the lowest of the fifteen, and 0 is that of zero.
//! Numbers with other exponents are kept apart, whole, and zeros stand in their place. All have one length, so a panel
//! is read as fast as memory gives it, a quarter sooner than in sixteen bits.
//!
//! What is left of a number is a bf16 again, times a power of two ([`Exponents::scale`]), if its four bits stand where
//! exponents end and the four before them are 0. There the parts of every fourth pair lie. So a line of a panel
//! ([`super::panels`]), eight elements of `in` for sixteen outputs, is three pairs of vectors and makes four:
//!
//! ```text
//! bits of a half of a word     15     14 13 12 11            10 9 8 7     6 … 0
//! first pair   64 bytes        sign   fourth's exponent      exponent     fraction
//! second       64 bytes        sign   fourth's fraction 6…3  exponent     fraction
//! third        64 bytes        sign   … 2…0 and its sign     exponent     fraction
//! ```
//!
//! Numbers that small need `x` large ([`X_SCALE`]), or their products would be denormal. Powers of two change no digit.

use std::ops::Range;
use std::sync::Arc;

use super::lanes::WIDTH;

/// Pairs of elements of `in` in a line.
pub(super) const PAIRS: usize = 4;
/// Bytes of a line.
pub(super) const LINE: usize = (PAIRS - 1) * 2 * NUMBERS;
/// What `x` is multiplied by. From 2^64 on it is infinite then.
pub(super) const X_SCALE: f32 = (1_u128 << X_SCALE_BITS) as f32;
const X_SCALE_BITS: u16 = 64;
/// Numbers of a pair of elements.
const NUMBERS: usize = 2 * WIDTH;
/// Exponents that are counted.
const COUNTED: u16 = 15;
/// The highest of those from which they may be counted, so that scales are numbers.
const LOWEST_MAX: u16 = 150;
/// Of so many numbers one may lie apart; with more, a matrix keeps its sixteen bits.
const RARE: usize = 1024;
/// Numbers that tell how a matrix is spread.
const SAMPLE: usize = 1 << 16;

/// Bytes of what has so many in sixteen bits.
pub(super) const fn bytes(whole: usize) -> usize {
    whole / PAIRS * (PAIRS - 1)
}

/// What the exponents of a matrix are, and the numbers that lie apart.
#[derive(Clone)]
pub(crate) struct Exponents {
    coder: Coder,
    /// The numbers that lie apart, of one panel after the other: a walk over panels finds them in a row.
    others: Arc<[Other]>,
    /// Where those of each panel end.
    ends: Arc<[u32]>,
    /// The panels they are of.
    panels: Range<usize>,
}

/// A number that lies apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Other {
    /// Its element of `in`.
    pub(super) element: u32,
    /// Its output among the sixteen of the panel.
    pub(super) lane: u16,
    /// It.
    bits: u16,
}

/// How numbers become short.
#[derive(Clone, Copy)]
pub(super) struct Coder {
    /// The lowest exponent that is counted, as 1.
    lowest: u16,
}

impl Coder {
    /// For bf16 numbers spread as these are; none if too many of them would lie apart.
    pub(super) fn new(bytes: &[u8]) -> Option<Self> {
        let (pieces, rest) = bytes.as_chunks::<64>();
        let mut counts = [0_usize; 256];
        let mut count = |piece: &[u8]| {
            for &number in piece.as_chunks::<2>().0 {
                counts[usize::from(exponent(u16::from_le_bytes(number)))] += 1;
            }
        };
        let every = (pieces.len() * 32).div_ceil(SAMPLE).max(1);
        pieces.iter().step_by(every).for_each(|piece| count(piece));
        count(rest);
        let counted =
            |lowest: u16| counts[usize::from(lowest)..][..usize::from(COUNTED)].iter().sum::<usize>();
        let lowest = (1..=LOWEST_MAX).max_by_key(|&lowest| counted(lowest))?;
        let all: usize = counts[1..].iter().sum();
        (all - counted(lowest) <= all / RARE).then_some(Self { lowest })
    }

    /// Whether a number has an exponent that is counted, or that of zero.
    #[inline(always)]
    const fn fits(self, number: u16) -> bool {
        exponent(number) == 0 || exponent(number).wrapping_sub(self.lowest) < COUNTED
    }

    /// A number that [fits](Coder::fits) with its exponent counted from the lowest.
    #[inline(always)]
    const fn short(self, number: u16) -> u16 {
        if exponent(number) == 0 { number } else { number.wrapping_sub((self.lowest - 1) << 7) }
    }

    /// The number that became this one.
    fn long(self, short: u16) -> u16 {
        if exponent(short) == 0 { short } else { short + ((self.lowest - 1) << 7) }
    }

    /// Codes a panel, pairs of sixteen outputs as [`super::panels`] has them; what of it lies apart.
    #[inline(always)]
    pub(super) fn code(self, pairs: &[[u8; 2 * NUMBERS]], to: &mut [[u8; LINE]]) -> Vec<Other> {
        let mut others = Vec::new();
        // Loops over numbers, which compilers turn into vectors; in closures they would not.
        let mut short = [[0; NUMBERS]; PAIRS];
        for (line, (pairs, to)) in pairs.as_chunks::<PAIRS>().0.iter().zip(to).enumerate() {
            let mut missing = 0;
            for (pair, short) in pairs.iter().zip(&mut short) {
                for (number, short) in pair.as_chunks::<2>().0.iter().zip(short) {
                    let number = u16::from_le_bytes(*number);
                    let fits = self.fits(number);
                    *short = if fits { self.short(number) } else { 0 };
                    missing |= u16::from(!fits);
                }
            }
            join(&short, to);
            if missing != 0 {
                self.find_others(line, pairs, &mut others);
            }
        }
        others
    }

    /// Adds what of a line lies apart.
    #[cold]
    fn find_others(self, line: usize, pairs: &[[u8; 2 * NUMBERS]; PAIRS], others: &mut Vec<Other>) {
        for (pair, numbers) in pairs.iter().enumerate() {
            let numbers = numbers.as_chunks::<2>().0.iter().map(|number| u16::from_le_bytes(*number));
            others.extend(numbers.enumerate().filter(|(_, number)| !self.fits(*number)).map(|(at, bits)| {
                Other {
                    element: u32::try_from((line * PAIRS + pair) * 2 + at % 2).unwrap_or(u32::MAX),
                    lane: u16::try_from(at / 2).unwrap_or(u16::MAX),
                    bits,
                }
            }));
        }
    }
}

impl Exponents {
    /// What a coder made of a matrix of so many numbers, of which these lie apart in each panel; none if they are too
    /// many.
    pub(super) fn new(coder: Coder, others: Vec<Vec<Other>>, numbers: usize) -> Option<Self> {
        let end = |end: &mut usize, others: &Vec<Other>| {
            *end += others.len();
            Some(u32::try_from(*end).ok())
        };
        let ends: Option<Arc<[u32]>> = others.iter().scan(0, end).collect();
        let (panels, others) = (0..others.len(), others.concat());
        let rare = others.len() <= numbers / RARE;
        ends.filter(|_| rare).map(|ends| Self { coder, others: others.into(), ends, panels })
    }

    /// Those of some panels.
    pub(super) fn part(&self, panels: Range<usize>) -> Self {
        let panels = self.panels.start + panels.start..self.panels.start + panels.end;
        Self { panels, ..self.clone() }
    }

    /// What sums of products of short numbers and `x` times [`X_SCALE`] are multiplied by.
    #[inline(always)]
    pub(super) fn scale(&self) -> f32 {
        f32::from_bits(u32::from(self.coder.lowest - 1 + 127 - X_SCALE_BITS) << 23)
    }

    /// What of a panel lies apart, in the order of `in`.
    #[inline(always)]
    pub(super) fn others(&self, panel: usize) -> &[Other] {
        let panel = self.panels.start + panel;
        let start = panel.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.others[start as usize..self.ends[panel] as usize]
    }

    /// One of the sixteen outputs of a panel, widened.
    pub(super) fn read_lane(&self, panel: usize, lines: &[[u8; LINE]], lane: usize, out: &mut [f32]) {
        for (line, out) in lines.iter().zip(out.chunks_mut(2 * PAIRS)) {
            let words = line.as_chunks::<4>().0;
            let pairs = [0, 1, 2].map(|pair| words[pair * WIDTH + lane]);
            let halves = |pair: [u8; 4]| [[pair[0], pair[1]], [pair[2], pair[3]]].map(u16::from_le_bytes);
            let pairs = parted(pairs.map(halves));
            for (out, &short) in out.iter_mut().zip(pairs.as_flattened()) {
                *out = widened(self.coder.long(short));
            }
        }
        for other in self.others(panel).iter().filter(|other| usize::from(other.lane) == lane) {
            out[other.element as usize] = other.value();
        }
    }
}

impl Other {
    /// It as f32.
    #[inline(always)]
    pub(super) fn value(self) -> f32 {
        widened(self.bits)
    }
}

/// Four pairs become three, the fourth in bits that are 0 in the others.
#[inline(always)]
fn join([first, second, third, fourth]: &[[u16; NUMBERS]; PAIRS], to: &mut [u8; LINE]) {
    let (to, _) = to.as_chunks_mut::<{ 2 * NUMBERS }>();
    let [to_first, to_second, to_third] = to else { unreachable!("three pairs") };
    fill(to_first, first, fourth, |number| (number & 0x0780) << 4);
    fill(to_second, second, fourth, |number| (number & 0x0078) << 8);
    fill(to_third, third, fourth, |number| (number & 0x0007) << 12 | (number & 0x8000) >> 4);
}

/// A pair, with a part of another one.
#[inline(always)]
fn fill(to: &mut [u8; 2 * NUMBERS], pair: &[u16], other: &[u16], part: impl Fn(u16) -> u16) {
    for ((to, number), other) in to.as_chunks_mut::<2>().0.iter_mut().zip(pair).zip(other) {
        *to = (number | part(*other)).to_le_bytes();
    }
}

/// Three pairs become the four that they were.
#[inline(always)]
pub(super) fn parted<const N: usize>([first, second, third]: [[u16; N]; PAIRS - 1]) -> [[u16; N]; PAIRS] {
    let fourth = std::array::from_fn(|at| {
        let (exponent, upper) = (first[at] >> 4 & 0x0780, second[at] >> 8 & 0x0078);
        exponent | upper | third[at] >> 12 & 0x0007 | third[at] << 4 & 0x8000
    });
    let [first, second, third] = [first, second, third].map(|pair| pair.map(|number| number & 0x87ff));
    [first, second, third, fourth]
}

/// The eight bits of an exponent.
#[inline(always)]
const fn exponent(number: u16) -> u16 {
    number >> 7 & 0xff
}

/// A bf16 as f32.
#[inline(always)]
const fn widened(number: u16) -> f32 {
    f32::from_bits((number as u32) << 16)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// One of so many numbers of [`matrix`] has any exponent.
    const ANY: usize = 1500;

    /// Numbers spread like those of a matrix, and some of all exponents.
    fn matrix(count: usize) -> Vec<u16> {
        let number = |i: usize| {
            let bits = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let bits = (bits ^ bits >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let sum: f32 = (0..4).map(|part| (bits >> (16 * part) & 0xffff) as f32 / 65536.0 - 0.5).sum();
            bf16::from_f32(0.05 * sum).to_bits()
        };
        let any = |i: usize| u16::try_from(i / ANY % 256 * 128 + i % 128 + i % 2 * 0x8000).unwrap();
        (0..count).map(|i| if i % ANY == ANY - 1 { any(i) } else { number(i) }).collect()
    }

    /// Whether `numbers`, outputs of so many elements, are read as they were, and how many lie apart.
    fn comes_back(numbers: &[u16], cols: usize) -> Option<usize> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let coder = Coder::new(&bytes)?;
        let lines = cols.div_ceil(2 * PAIRS);
        let (mut others, mut coded) = (Vec::new(), Vec::new());
        for panel in numbers.chunks(WIDTH * cols) {
            let mut pairs = vec![[0_u8; 2 * NUMBERS]; lines * PAIRS];
            for (lane, row) in panel.chunks(cols).enumerate() {
                for (at, number) in row.iter().enumerate() {
                    pairs[at / 2][4 * lane + 2 * (at % 2)..][..2].copy_from_slice(&number.to_le_bytes());
                }
            }
            let mut to = vec![[0; LINE]; lines];
            others.push(coder.code(&pairs, &mut to));
            coded.push(to);
        }
        let exponents = Exponents::new(coder, others, numbers.len())?;
        for (row, expected) in numbers.chunks(cols).enumerate() {
            let mut out = vec![0.0; cols];
            exponents.read_lane(row / WIDTH, &coded[row / WIDTH], row % WIDTH, &mut out);
            for (out, number) in out.iter().zip(expected) {
                assert_eq!(out.to_bits(), u32::from(*number) << 16, "of {number:04x} in output {row}");
            }
        }
        Some((0..coded.len()).map(|panel| exponents.others(panel).len()).sum())
    }

    #[test]
    fn nothing_is_lost_and_little_lies_apart() {
        for (rows, cols) in [(256 * ANY / 1000, 1000), (33, 37), (16, 8), (1, 1)] {
            let apart = comes_back(&matrix(rows * cols), cols).expect("they are short");
            // Besides those of any exponent, of which fifteen and that of zero are short, 200 of a million.
            assert!(apart <= rows * cols / ANY + rows * cols / 5000, "{apart} of [{rows}, {cols}]");
        }
    }

    #[test]
    fn what_is_spread_over_all_exponents_keeps_its_bits() {
        let spread: Vec<u16> = (0..4096_u16).map(|i| i.wrapping_mul(40_503)).collect();
        assert_eq!(comes_back(&spread, 64), None);
        // Two of each thousand where the sample does not look.
        let mut numbers = matrix(SAMPLE * 32);
        numbers.chunks_mut(1024).for_each(|piece| piece[32..34].fill(0x7f80));
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        assert!(Coder::new(&bytes).is_some());
        assert_eq!(comes_back(&numbers, 1 << 11), None);
    }

    #[test]
    fn of_zeros_nothing_lies_apart() {
        assert_eq!(comes_back(&[0; 640], 40), Some(0));
        assert_eq!(comes_back(&[0x8000; 640], 40), Some(0));
    }
}
