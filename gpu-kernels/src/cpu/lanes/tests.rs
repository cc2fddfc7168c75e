//! Every instruction set against the portable lanes, bit by bit.
#![expect(clippy::multiple_unsafe_ops_per_block, reason = "reads and writes of the same arrays")]

use super::*;

/// Numbers of all sizes and signs, with halves that round to even, and none.
fn numbers() -> Vec<[f32; WIDTH]> {
    let mut state = 7_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let mut all: Vec<_> = (0..64)
        .map(|_| std::array::from_fn(|_| (next() as f32 / 8_388_608.0 - 1.0) * (1 << (next() % 12)) as f32))
        .collect();
    all.push(std::array::from_fn(|i| i as f32 / 2.0 - 3.5));
    all.push(std::array::from_fn(|i| if i % 3 == 0 { f32::NAN } else { i as f32 - 90.0 }));
    all
}

/// With the instructions for pairs where there are some, else by way of memory.
fn dispatch_any<K: Kernel>(isa: Isa, kernel: K) {
    if isa.multiplies_pairs() { dispatch_pairs(isa, kernel) } else { dispatch(isa, kernel) }
}

fn load<L: Lanes>(lanes: L, from: &[f32; WIDTH]) -> L::F {
    // SAFETY: sixteen elements.
    unsafe { lanes.load(from.as_ptr()) }
}

fn store<L: Lanes>(lanes: L, a: L::F) -> [f32; WIDTH] {
    let mut out = [0.0; WIDTH];
    // SAFETY: sixteen elements.
    unsafe { lanes.store(out.as_mut_ptr(), a) };
    out
}

/// All that lanes do to `a`, `b` and `c`, one after the other. There is one zero, and one bit pattern for no number.
struct All<'a> {
    numbers: [&'a [f32; WIDTH]; 3],
    found: &'a mut Vec<u32>,
}

impl Kernel for All<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [a, b, c] = self.numbers.map(|numbers| load(lanes, numbers));
        let mut out = vec![
            lanes.add(a, b),
            lanes.sub(a, b),
            lanes.mul(a, b),
            lanes.div(a, b),
            lanes.max(a, b),
            lanes.min(a, b),
            lanes.round(a),
            lanes.times_power_of_two(
                lanes.splat(1.25),
                lanes.round(lanes.max(lanes.min(a, lanes.splat(127.0)), lanes.splat(-126.0))),
            ),
            lanes.zero_below(a, b, c),
        ];
        for (from, to) in [(0, 0), (0, 5), (3, 9), (7, 16), (0, 16)] {
            out.push(lanes.keep(a, from, to, -1.5));
        }
        out.extend(lanes.transpose(std::array::from_fn(|i| lanes.keep(a, i, WIDTH, 0.25))));
        out.push(lanes.join_pairs(a, b));
        out.extend([[false, true], [true, false], [true, true]].map(|keep| lanes.keep_of_pairs(a, keep)));
        let bytes: Vec<u8> =
            self.numbers.iter().flat_map(|x| x.iter().flat_map(|x| x.to_le_bytes())).collect();
        let at = bytes.as_ptr();
        for n in 0..WIDTH {
            // SAFETY: 192 bytes are readable, and at most 64 + 15 of them are read.
            unsafe {
                out.extend([lanes.load(at.add(n).cast()), lanes.load_first(at.add(n).cast(), n)]);
                out.extend([lanes.load_bf16(at.add(n)), lanes.load_f16(at.add(n)), lanes.load_i8(at.add(n))]);
                out.push(lanes.load_e4m3(at.add(n)));
                out.push(lanes.load_pairs_bf16([at.add(n), at.add(64 + n)]));
                out.extend([lanes.load_firsts_bf16(at.add(n)), lanes.load_seconds_bf16(at.add(n))]);
            }
            let mut some = [0.5; WIDTH];
            // SAFETY: `n` elements are writable.
            unsafe { lanes.store_first(some.as_mut_ptr(), a, n) };
            out.push(load(lanes, &some));
        }
        let digit =
            |x, most: f32| lanes.round(lanes.max(lanes.min(x, lanes.splat(most)), lanes.splat(-most)));
        // A high digit of 81 would be too much for sums in f32 to be exact.
        let digits = [digit(a, 81.0), digit(b, 81.0), digit(c, 1.0)];
        let mut words = [0.0; WIDTH];
        // SAFETY: sixteen words.
        unsafe { lanes.store_digits(words.as_mut_ptr(), digits) };
        let x = [words[4..].as_ptr(), words[12..].as_ptr()];
        let mut parts = [[0.0; WIDTH]; 5];
        for first in (0..WIDTH).step_by(WIDTH / L::PARTS) {
            // SAFETY: parts of sixteen elements, or of 64 bytes.
            unsafe {
                let part = |which: usize| lanes.load_part(self.numbers[which].as_ptr().add(first));
                lanes.store_part(parts[0].as_mut_ptr().add(first), lanes.mul_part(part(0), part(1)));
                lanes.store_part(parts[1].as_mut_ptr().add(first), lanes.splat_part(self.numbers[2][0]));
                lanes.store_part(parts[2].as_mut_ptr().add(first), lanes.load_part_bf16(at.add(2 * first)));
                lanes.store_part(parts[3].as_mut_ptr().add(first), lanes.load_part_f16(at.add(2 * first)));
                let values = lanes.load_nibbles(at.add(4 * first + 1));
                let zero = lanes.no_dots();
                let dots = [
                    lanes.dot::<0>(zero, values, x),
                    lanes.dot::<1>(zero, values, x),
                    lanes.dot::<2>(zero, values, x),
                ];
                let [low, middle, high] = dots.map(|dots| lanes.whole_part(dots));
                let base = lanes.splat_part(162.0);
                let sum = lanes.fma_part(lanes.fma_part(high, base, middle), base, low);
                lanes.store_part(parts[4].as_mut_ptr().add(first), sum);
            }
        }
        out.extend(parts.iter().map(|part| load(lanes, part)));
        for vector in out {
            self.found
                .extend(store(lanes, vector).map(|x| if x.is_nan() { f32::NAN } else { x + 0.0 }.to_bits()));
        }
        if a_number(self.numbers[0]) {
            self.found.extend([lanes.sum(a), lanes.largest(a)].map(f32::to_bits));
        }
    }
}

fn a_number(numbers: &[f32; WIDTH]) -> bool {
    numbers.iter().all(|x| !x.is_nan())
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_portable_lanes() {
    let numbers = numbers();
    for numbers in numbers.windows(3) {
        let numbers = [&numbers[0], &numbers[1], &numbers[2]];
        let mut expected = Vec::new();
        dispatch(Isa::Portable, All { numbers, found: &mut expected });
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            let mut found = Vec::new();
            dispatch(isa, All { numbers, found: &mut found });
            assert_eq!(found, expected, "{isa}: {numbers:?}");
            let mut found = Vec::new();
            dispatch_dots(isa, All { numbers, found: &mut found });
            assert_eq!(found, expected, "{isa} for dots: {numbers:?}");
        }
    }
}

struct MultiplyAdd<'a> {
    numbers: [&'a [f32; WIDTH]; 3],
    found: &'a mut [[f32; WIDTH]; 2],
}

impl Kernel for MultiplyAdd<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [a, b, c] = self.numbers.map(|numbers| load(lanes, numbers));
        self.found[0] = store(lanes, lanes.fma(a, b, c));
        for first in (0..WIDTH).step_by(WIDTH / L::PARTS) {
            // SAFETY: parts of sixteen elements.
            unsafe {
                let part = |which: usize| lanes.load_part(self.numbers[which].as_ptr().add(first));
                lanes.store_part(
                    self.found[1].as_mut_ptr().add(first),
                    lanes.fma_part(part(0), part(1), part(2)),
                );
            }
        }
    }
}

#[test]
fn a_multiply_add_rounds_once() {
    for numbers in numbers().windows(3).filter(|numbers| numbers.iter().all(a_number)) {
        let expected: [f32; WIDTH] =
            std::array::from_fn(|i| numbers[0][i].mul_add(numbers[1][i], numbers[2][i]));
        let numbers = [&numbers[0], &numbers[1], &numbers[2]];
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            if isa == Isa::Portable && !cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                continue;
            }
            let mut found = [[0.0; WIDTH]; 2];
            dispatch(isa, MultiplyAdd { numbers, found: &mut found });
            assert_eq!(found.map(|x| x.map(f32::to_bits)), [expected.map(f32::to_bits); 2], "{isa}");
        }
    }
}

/// `e^x`, `2^x` coarsely, and the hyperbolic tangent.
struct Curves<'a> {
    x: [f32; WIDTH],
    y: &'a mut [[f32; WIDTH]; 3],
}

impl Kernel for Curves<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let x = load(lanes, &self.x);
        // It knows no larger ones.
        let bounded = lanes.min(lanes.splat(127.0), x);
        *self.y = [lanes.exp(x), lanes.exp2_coarse(bounded), lanes.tanh(x)].map(|y| store(lanes, y));
    }
}

#[test]
fn curves_are_right_at_every_size() {
    let ends =
        [0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 9.0, -9.0, -125.9, -3e38, f32::INFINITY, f32::NEG_INFINITY];
    let between = (-20000..20000_i16).map(|i| f32::from(i) / 300.0);
    let all: Vec<f32> = ends.into_iter().chain(between).collect();
    // The bounds outside of which exponentials are flat, and how much of the number they are off.
    let bounds = [(-87.33, 88.37), (-126.0, 127.0)].map(|(low, high): (f32, f32)| (low.into(), high.into()));
    let exact = |x: f64, [exp, exp2]: [(f64, f64); 2]| {
        let curve =
            |(low, high): (f64, f64), of: &dyn Fn(f64) -> f64| if x < low { 0.0 } else { of(x.min(high)) };
        [(curve(exp, &f64::exp), 2.4e-7), (curve(exp2, &f64::exp2), 3.8e-6), (x.tanh(), 6e-7)]
    };
    for isa in Isa::ALL.iter().copied().filter(|isa| isa.available()) {
        for x in all.chunks_exact(WIDTH).map(|x| std::array::from_fn(|i| x[i])) {
            let mut y = [[0.0; WIDTH]; 3];
            dispatch(isa, Curves { x, y: &mut y });
            for (i, &x) in x.iter().enumerate() {
                for (curve, (exact, off)) in exact(f64::from(x), bounds).into_iter().enumerate() {
                    let y = f64::from(y[curve][i]);
                    assert!(
                        (y - exact).abs() <= off * exact.abs(),
                        "{isa}: {curve} of {x} is {y}, not {exact}"
                    );
                }
            }
        }
        let mut y = [[0.0; WIDTH]; 3];
        dispatch(isa, Curves { x: [f32::NAN; WIDTH], y: &mut y });
        assert!(y.iter().flatten().all(|y| y.is_nan()), "{isa}: {y:?}");
    }
}

/// Rounds and multiplies pairs with the lanes that products of pairs run on.
struct Pairs<'a> {
    numbers: [[f32; WIDTH]; 5],
    found: &'a mut Vec<f32>,
}

impl Kernel for Pairs<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [a, b, c, d, e] = self.numbers.map(|numbers| load(lanes, &numbers));
        let (x, w) = (lanes.round_pairs(a, b), lanes.round_pairs(c, d));
        self.found.extend(store(lanes, x));
        self.found.extend(store(lanes, lanes.dot_pairs(x, w, e)));
    }
}

#[test]
fn pairs_are_rounded_to_even_and_their_products_added() {
    for seed in 0..200_u32 {
        let mut state = seed + 1;
        let numbers = std::array::from_fn(|_| {
            std::array::from_fn(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Halves of what bf16 can tell apart are among them.
                (state >> 8 & 0x1_ffff) as f32 / 256.0 - 256.0
            })
        });
        let mut rounded = [[0.0; 2 * WIDTH]; 2];
        for (rounded, pair) in rounded.iter_mut().zip(numbers[..4].chunks(2)) {
            *rounded = std::array::from_fn(|i| half::bf16::from_f32(pair[i / WIDTH][i % WIDTH]).to_f32());
        }
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            let mut found = Vec::new();
            dispatch_any(isa, Pairs { numbers, found: &mut found });
            let (pairs, sums) = found.split_at(WIDTH);
            for (i, (pair, &sum)) in pairs.iter().zip(sums).enumerate() {
                let halves = [pair.to_bits() << 16, pair.to_bits() & 0xffff_0000].map(f32::from_bits);
                assert_eq!(
                    halves,
                    [rounded[0][2 * i], rounded[0][2 * i + 1]],
                    "{isa}, seed {seed}, pair {i}"
                );
                let product = |which: usize| {
                    f64::from(rounded[0][2 * i + which]) * f64::from(rounded[1][2 * i + which])
                };
                let exact = f64::from(numbers[4][i]) + product(0) + product(1);
                let size = f64::from(numbers[4][i]).abs() + product(0).abs() + product(1).abs();
                let error = (f64::from(sum) - exact).abs();
                assert!(
                    error <= size * 2.0_f64.powi(-23),
                    "{isa}, seed {seed}, pair {i}: {sum}, not {exact}"
                );
            }
        }
    }
}

/// Widens a line of small numbers.
struct Widen<'a> {
    line: &'a [u8; 4 * WIDTH],
    found: &'a mut Vec<f32>,
}

impl Kernel for Widen<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let line = self.line.as_ptr();
        // SAFETY: a line of sixty-four bytes.
        let [whole, e4m3] = unsafe { [lanes.load_pairs_of_i8(line), lanes.load_pairs_of_e4m3(line)] };
        // SAFETY: as above.
        let first = unsafe { [lanes.load_pair_of_nibbles::<0>(line), lanes.load_pair_of_nibbles::<1>(line)] };
        // SAFETY: as above.
        let last = unsafe { [lanes.load_pair_of_nibbles::<2>(line), lanes.load_pair_of_nibbles::<3>(line)] };
        for pairs in [whole, e4m3, first, last].as_flattened() {
            self.found.extend(store(lanes, *pairs));
        }
    }
}

#[test]
fn small_numbers_are_exact_in_pairs() {
    for first in (0..=255_u8).step_by(4 * WIDTH) {
        let line = std::array::from_fn(|i| first + u8::try_from(i).expect("sixty-four"));
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            let mut found = Vec::new();
            dispatch_any(isa, Widen { line: &line, found: &mut found });
            for (at, pair) in found.into_iter().enumerate() {
                let (vector, lane) = (at / WIDTH, at % WIDTH);
                for (second, bits) in [pair.to_bits() << 16, pair.to_bits() & 0xffff_0000].iter().enumerate()
                {
                    // Of eight bits a quarter of the lanes has sixteen bytes, of four bits a lane has four.
                    let byte = line[lane / 4 * 16 + vector % 2 * 8 + lane % 4 * 2 + second];
                    let word = line[lane * 4 + second * 2..].first_chunk().copied().map(u16::from_le_bytes);
                    let exact = match vector {
                        0 | 1 if byte == 128 => continue,
                        0 | 1 => f32::from(byte.cast_signed()),
                        2 | 3 if byte & 127 == 127 => continue,
                        2 | 3 => crate::fp8::small(byte),
                        _ => f32::from(word.expect("two bytes") >> (4 * (vector - 4)) & 15) - 8.0,
                    };
                    assert_eq!(
                        f32::from_bits(*bits),
                        exact,
                        "{isa}, from {first}: vector {vector}, lane {lane}"
                    );
                }
            }
        }
    }
}
