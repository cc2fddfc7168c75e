//! Rows and weights of one byte an element as any implementation of the operators computes them, against f64.
#![allow(dead_code, reason = "each test file uses its part")]

use quayline_gpu_kernels::{Dtype, Norm, Ops, Projection, QuantSource, Quantised, RowStorage};

use crate::common::{Random, bits, close, e4m3, half_ulp, rounded, store};

fn vector<O: Ops>(ops: &O, values: &[f32]) -> O::Weight {
    ops.weight(store(Dtype::F32, &[values.len()], values, 0).source).unwrap()
}

fn tensor<O: Ops>(ops: &O, cols: usize, elements: &[f32]) -> O::Tensor {
    let mut x = ops.tensor(elements.len() / cols, cols).unwrap();
    ops.write(&mut x, elements).unwrap();
    x
}

/// Rows of `x`, `[rows, cols]`, times a weight, and a bias.
pub(crate) fn product<O: Ops>(ops: &O, x: &[f32], weight: &O::Weight, bias: &[f32], cols: usize) -> Vec<f32> {
    let (input, bias, out) = (tensor(ops, cols, x), vector(ops, bias), bias.len());
    let mut y = ops.tensor(x.len() / cols, out).unwrap();
    ops.linear(&input, &mut [Projection { weight, bias: Some(&bias), out: &mut y }]).unwrap();
    ops.read(&y).unwrap().into_owned()
}

/// Holds products of several numbers of rows to the exact ones, and rows to their bits in other company. `exact` are
/// the numbers that the weight `[rows, cols]` stands for, after `scale` of the output; `dtype` is that of activations.
pub(crate) fn products_are_right<O: Ops>(
    what: &str,
    ops: &O,
    dtype: Dtype,
    random: &mut Random,
    weight: &O::Weight,
    exact: &[f64],
    (rows, cols): (usize, usize),
) {
    let bias: Vec<f32> = (0..rows).map(|_| rounded(dtype, random.float())).collect();
    let x: Vec<f32> = (0..90 * cols).map(|_| rounded(dtype, random.float())).collect();
    let all = product(ops, &x, weight, &bias, cols);
    let rounding = if dtype == Dtype::F32 { 0.0 } else { half_ulp(dtype) };
    for (row, x) in x.chunks(cols).enumerate() {
        for (column, w) in exact.chunks(cols).enumerate() {
            let terms = || x.iter().zip(w).map(|(&x, w)| f64::from(x) * w);
            let (sum, size) =
                (terms().sum::<f64>() + f64::from(bias[column]), terms().map(f64::abs).sum::<f64>());
            close(all[row * rows + column], sum, sum.abs() * rounding * 1.01 + size * 2e-6 + 1e-6, || {
                format!("{what} {dtype}: row {row}, column {column}")
            });
        }
    }
    // Fewer rows take another way.
    for few in [1, 16, 17] {
        let found = product(ops, &x[..few * cols], weight, &bias, cols);
        assert_eq!(bits(&found), bits(&all[..few * rows]), "{what} {dtype}: {few} rows");
    }
}

pub(crate) fn norms_to_one_byte<O: Quantised>(dtype: Dtype, ops: &O, random: &mut Random) {
    for (cols, gemma) in [(1, false), (7, true), (64, true), (1000, false), (1032, true), (2050, false)] {
        let rows = 3;
        // Their sums are exact in all types.
        let mut sixty_fourths =
            |n: usize| -> Vec<f32> { (0..n).map(|_| random.below(129) as f32 / 64.0 - 1.0).collect() };
        let (mut x, delta) = (sixty_fourths(rows * cols), sixty_fourths(rows * cols));
        // A row of nothing.
        x[..cols].fill(0.0);
        let weight: Vec<f32> = (0..cols).map(|_| rounded(dtype, random.float())).collect();
        let w = vector(ops, &weight);
        let norm = Norm::<O> { weight: &w, eps: 1e-6, gemma };
        let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        let exact = |x: &[f32]| -> Vec<f64> {
            let row = |row: &[f32]| {
                let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
                let factor = 1.0 / (squares / cols as f64 + 1e-6).sqrt();
                let offset = if gemma { 1.0 } else { 0.0 };
                let times = |(&x, &w): (&f32, &f32)| f64::from(x) * factor * (f64::from(w) + offset);
                row.iter().zip(&weight).map(times).collect::<Vec<_>>()
            };
            x.chunks(cols).flat_map(row).collect()
        };
        for storage in
            [RowStorage::Int8, RowStorage::Fp8, RowStorage::Int8Scaled(0.02), RowStorage::Fp8Scaled(0.01)]
        {
            let what = format!("{cols} {dtype} gemma {gemma} {storage:?}");
            let mut bytes = ops.quant_tensor(rows, cols, storage).unwrap();
            let mut residual = tensor(ops, cols, &x);
            ops.rms_norm_quant(&residual, norm, &mut bytes).unwrap();
            let alone = ops.read_quant(&bytes).unwrap();
            ops.add_rms_norm_quant(&mut residual, &tensor(ops, cols, &delta), norm, &mut bytes).unwrap();
            assert_eq!(*ops.read(&residual).unwrap(), sum, "{what}");
            bytes_are_near(storage, &alone, &exact(&x), cols, &what);
            bytes_are_near(storage, &ops.read_quant(&bytes).unwrap(), &exact(&sum), cols, &what);
        }
    }
}

/// Holds bytes and their scales to rows of exact numbers.
fn bytes_are_near(
    storage: RowStorage,
    (found, scales): &(Vec<u8>, Vec<f32>),
    exact: &[f64],
    cols: usize,
    what: &str,
) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (row, exact) in exact.chunks(cols).enumerate() {
        let (top, int, given) = match storage {
            RowStorage::Int8 => (127.0, true, None),
            RowStorage::Int8Scaled(scale) => (127.0, true, Some(scale)),
            RowStorage::Fp8 => (448.0, false, None),
            RowStorage::Fp8Scaled(scale) => (448.0, false, Some(scale)),
        };
        let scale = scales[if scales.len() == 1 { 0 } else { row }];
        let largest = exact.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        match given {
            Some(given) => assert_eq!(scale, given, "{what}"),
            None if largest == 0.0 => assert_eq!(scale, 1.0, "{what}"),
            None => close(scale, largest / top, largest / top * 1e-5, || format!("{what} scale")),
        }
        for (i, &exact) in exact.iter().enumerate() {
            let byte = found[row * cols + i];
            let stored = if int { f64::from(byte as i8) } else { e4m3(byte) };
            let wanted = (exact / f64::from(scale)).clamp(-top, top);
            // Half a step: of whole numbers, or of three bits of fraction.
            let half = if int { 0.5 } else { (wanted.abs() / 16.0).max(1.0 / 1024.0) };
            let error = half + wanted.abs() * 1e-5 + 1e-6;
            assert!((stored - wanted).abs() <= error, "{what} row {row}, {i}: {stored}, wanted {wanted}");
        }
    }
}

pub(crate) fn bytes_with_one_scale_and_with_one_per_output<O: Quantised>(
    dtype: Dtype,
    ops: &O,
    random: &mut Random,
) {
    for (rows, cols) in [(1, 1), (16, 128), (33, 77), (20, 1100)] {
        for scales_len in [1, rows] {
            let scales: Vec<f32> = (0..scales_len).map(|_| 0.01 + random.float().abs()).collect();
            let scale = |row: usize| f64::from(scales[if scales_len == 1 { 0 } else { row }]);
            let elements: Vec<u8> = (0..rows * cols)
                .map(|_| random.next() as u8)
                .map(|bits| if bits & 0x7f == 0x7f { bits ^ 1 } else { bits })
                .collect();
            let exact: Vec<f64> =
                elements.iter().enumerate().map(|(i, &bits)| e4m3(bits) * scale(i / cols)).collect();
            let source = QuantSource::Fp8 { elements: &elements, scales: &scales };
            let weight = ops.weight_bytes(rows, cols, source).unwrap();
            let what = format!("fp8 {rows} x {cols}");
            products_are_right(&what, ops, dtype, random, &weight, &exact, (rows, cols));

            let elements: Vec<i8> = elements.iter().map(|&bits| (bits as i8).max(-127)).collect();
            let exact: Vec<f64> =
                elements.iter().enumerate().map(|(i, &q)| f64::from(q) * scale(i / cols)).collect();
            let source = QuantSource::Int8 { elements: &elements, scales: &scales };
            let weight = ops.weight_bytes(rows, cols, source).unwrap();
            let what = format!("int8 {rows} x {cols}");
            products_are_right(&what, ops, dtype, random, &weight, &exact, (rows, cols));
        }
    }
}

pub(crate) fn what_does_not_fit_is_refused<O: Quantised>(ops: &O) {
    let says = |result: Result<O::Weight, _>| {
        result.map(drop).map_err(|error: quayline_gpu_kernels::Error| error.to_string())
    };
    let fp8 = |elements: &[u8], scales: &[f32]| {
        says(ops.weight_bytes(2, 3, QuantSource::Fp8 { elements, scales })).unwrap_err()
    };
    assert_eq!(fp8(&[0; 6], &[1.0; 3]), "weight_bytes: scales is 3, expected 2");
    assert_eq!(fp8(&[0; 5], &[1.0]), "weight_bytes: elements is 5, expected 6");
    assert_eq!(
        fp8(&[0, 0, 0, 0, 0xff, 0], &[1.0]),
        "weight_bytes: the element that is no number at [1, 1] is not supported, only finite numbers"
    );
    assert_eq!(
        fp8(&[0; 6], &[1.0, f32::INFINITY]),
        "weight_bytes: a scale of inf is not supported, only finite numbers"
    );
    let int8 = QuantSource::Int8 { elements: &[0, 0, -128, 0, 0, 0], scales: &[1.0] };
    assert_eq!(
        says(ops.weight_bytes(2, 3, int8)).unwrap_err(),
        "weight_bytes: the element that is no number at [0, 2] is not supported, only -127 to 127"
    );
    let weight = ops.weight_bytes(2, 3, QuantSource::Fp8 { elements: &[0; 6], scales: &[1.0] }).unwrap();
    let (x, mut out) = (ops.tensor(1, 4).unwrap(), ops.tensor(1, 2).unwrap());
    let error = ops.linear(&x, &mut [Projection { weight: &weight, bias: None, out: &mut out }]).unwrap_err();
    assert_eq!(error.to_string(), "linear: in of the weight is 3, expected 4");

    let refused = |storage| ops.quant_tensor(1, 8, storage).map(drop).unwrap_err().to_string();
    assert_eq!(
        refused(RowStorage::Fp8Scaled(0.0)),
        "quant_tensor: a scale of 0 is not supported, only finite, above 0"
    );
    assert_eq!(
        refused(RowStorage::Int8Scaled(f32::NAN)),
        "quant_tensor: a scale of NaN is not supported, only finite, above 0"
    );
    let (mut x, w) = (tensor(ops, 4, &[1.0; 8]), vector(ops, &[1.0; 4]));
    let norm = Norm::<O> { weight: &w, eps: 0.0, gemma: false };
    let mut narrow = ops.quant_tensor(2, 3, RowStorage::Fp8).unwrap();
    let error = ops.rms_norm_quant(&x, norm, &mut narrow).unwrap_err();
    assert_eq!(error.to_string(), "rms_norm: width of the output is 3, expected 4");
    let mut short = ops.quant_tensor(1, 4, RowStorage::Int8).unwrap();
    let delta = tensor(ops, 4, &[1.0; 8]);
    let error = ops.add_rms_norm_quant(&mut x, &delta, norm, &mut short).unwrap_err();
    assert_eq!(error.to_string(), "add_rms_norm: rows of the output is 2, the most allowed is 1");
    assert_eq!(*ops.read(&x).unwrap(), [1.0; 8], "a call that is refused has written nothing");
}
