//! Weights of four and eight bits on their way to the device.
//!
//! A weight is read in the form of its checkpoint (GPTQ, AWQ, or one byte per element), or rounded, and packed once for
//! the kernels of `kernels/quant_gemm.cu`.

use std::sync::Arc;

use half::f16;

use super::Cuda;
use super::memory::Memory;
use super::quant::{Format, PART, QuantWeight, TILE};
use super::tensor::{Weight, weight_bytes, widen_row};
use crate::error::multiple;
use crate::fp8;
use crate::rounding::{GROUP, round_eight, round_four, round_fp8};
use crate::stored::Stored;
use crate::{Dtype, Error, Fp8Source, Int4Source, Ops, Rounding, WeightSource};

/// The places that lane 0 to 3 has in sixteen numbers.
fn places(lane: usize) -> [usize; 4] {
    [2 * lane, 2 * lane + 1, 2 * lane + 8, 2 * lane + 9]
}

/// Packs rows for the kernel, `width` bits each; `number(row, column)` within the matrix.
fn pack(rows: usize, cols: usize, width: usize, number: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let (blocks, padded) = (cols.div_ceil(PART), rows.next_multiple_of(TILE));
    // Steps of sixteen numbers that fill 16 bytes of a lane.
    let steps = 16 * 8 / (4 * width);
    let mut packed = Vec::with_capacity(padded * blocks * PART * width / 8);
    for row in 0..padded {
        for piece in 0..blocks * PART / (16 * steps) {
            for lane in 0..4 {
                let columns = (0..steps)
                    .flat_map(|step| places(lane).map(|place| (piece * steps + step) * 16 + place))
                    .map(|column| if row < rows && column < cols { number(row, column) } else { 0 });
                let numbers: Vec<u8> = columns.collect();
                match width {
                    4 => packed.extend(numbers.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4)),
                    _ => packed.extend(numbers),
                }
            }
        }
    }
    packed
}

impl Cuda {
    /// A matrix of one byte for an element, checked; one scale, or one of each output.
    pub(super) fn bytes(
        &self,
        shape: (usize, usize),
        e4m3: bool,
        elements: &[u8],
        scales: &[f32],
    ) -> Result<Weight, Error> {
        let format = if e4m3 { Format::Fp8 } else { Format::Int8 };
        self.eight(format, shape, elements, scales).map(Weight::of_integers)
    }

    /// A matrix of four bits of a checkpoint.
    pub(super) fn stored(&self, source: &Int4Source) -> Result<QuantWeight, Error> {
        let stored = Stored::new(source, 16)?;
        let order = stored.order()?;
        let input = |column: usize| order.as_ref().map_or(column, |order| order[column] as usize);
        self.four(
            (source.rows, source.cols, source.group),
            |row, column| stored.value(row, input(column)),
            |row, group| (stored.scale(row, group), stored.zero(row, group)),
            order.as_deref(),
        )
    }

    /// A matrix of E4M3 of a checkpoint. The kernels know one scale for an output, or one for a block whose inputs are
    /// a multiple of 16; of other blocks the worth is kept in the activations' type. The bits are the same.
    pub(super) fn fp8(&self, source: &Fp8Source) -> Result<Weight, Error> {
        let elements = fp8::checked(source)?;
        let &Fp8Source { rows, cols, block, .. } = source;
        let groups = cols.div_ceil(block.1);
        let scale = |row: usize, col: usize| source.scales[row / block.0 * groups + col / block.1];
        if groups == 1 {
            let outputs = if block.0 < rows { rows } else { 1 };
            let scales: Vec<f32> = (0..outputs).map(|row| scale(row, 0)).collect();
            return self.eight(Format::Fp8, (rows, cols), elements, &scales).map(Weight::of_integers);
        }
        if block.1.is_multiple_of(16) {
            // The kernels look for scales of the rows that fill a tile too.
            let mut scales = source.scales.clone();
            scales.resize(rows.next_multiple_of(TILE).div_ceil(block.0) * groups, 0.0);
            let blocks = self.eight(Format::Fp8Blocks, (rows, cols), elements, &scales)?;
            return Ok(Weight::of_integers(QuantWeight { group: block.1, block_rows: block.0, ..blocks }));
        }
        let worth = |(at, &code): (usize, &u8)| fp8::small(code) * (scale(at / cols, at % cols) * fp8::SCALE);
        let floats: Vec<u8> = elements.iter().enumerate().flat_map(|at| worth(at).to_le_bytes()).collect();
        self.weight(WeightSource {
            range: 0..floats.len(),
            bytes: Arc::new(floats),
            dtype: Dtype::F32,
            shape: vec![rows, cols],
        })
    }

    /// A matrix of floats, rounded. Cost: one pass over the bytes.
    pub(super) fn rounded(&self, source: &WeightSource, rounding: Rounding) -> Result<QuantWeight, Error> {
        let bytes = weight_bytes(source)?;
        let [rows, cols] = source.shape[..] else { unreachable!("a matrix") };
        multiple("weight_rounded", "out", rows, 1)?;
        multiple("weight_rounded", "in", cols, 1)?;
        let group = if rounding == Rounding::Int4 { GROUP } else { cols };
        let groups = cols.div_ceil(group);
        let (mut values, mut eight, mut four) = (vec![0_i8; rows * cols], Vec::new(), Vec::new());
        for (row, to) in bytes.chunks(cols * source.dtype.bytes()).zip(values.chunks_mut(cols)) {
            let row = widen_row(source.dtype, row);
            for (from, to) in row.chunks(group).zip(to.chunks_mut(group)) {
                match rounding {
                    Rounding::Int8 => eight.push(round_eight(from, to)),
                    Rounding::Int4 => four.push(round_four(from, to)),
                    Rounding::Fp8 => eight.push(round_fp8(from, to)),
                }
            }
        }
        match rounding {
            Rounding::Int8 => self.eight(Format::Int8, (rows, cols), bytemuck::cast_slice(&values), &eight),
            Rounding::Fp8 => self.eight(Format::Fp8, (rows, cols), bytemuck::cast_slice(&values), &eight),
            Rounding::Int4 => self.four(
                (rows, cols, group),
                |row, column| (values[row * cols + column] + 8).cast_unsigned(),
                |row, index| (four[row * groups + index], 8),
                None,
            ),
        }
    }

    /// Packs numbers of four bits by what they, and the scale and zero of a row and group, are.
    fn four(
        &self,
        (rows, cols, group): (usize, usize, usize),
        number: impl Fn(usize, usize) -> u8,
        scale_and_zero: impl Fn(usize, usize) -> (f16, u8),
        order: Option<&[u32]>,
    ) -> Result<QuantWeight, Error> {
        let packed = pack(rows, cols, 4, number);
        let padded = rows.next_multiple_of(TILE);
        let places = (0..cols.div_ceil(group)).flat_map(|group| (0..padded).map(move |row| (group, row)));
        let of = |(group, row)| if row < rows { scale_and_zero(row, group) } else { (f16::ZERO, 0) };
        let (scales, zeros): (Vec<f16>, Vec<u8>) = places.map(of).unzip();
        let device = &self.device;
        let order = order.map(|order| Memory::of(device, bytemuck::cast_slice(order))).transpose()?;
        Ok(QuantWeight {
            rows,
            cols,
            format: Format::Four,
            packed: Memory::of(device, &packed)?,
            scales: Memory::of(device, bytemuck::cast_slice(&scales))?,
            zeros: Memory::of(device, &zeros)?,
            scale_each: false,
            group,
            block_rows: 1,
            order,
        })
    }

    fn eight(
        &self,
        format: Format,
        (rows, cols): (usize, usize),
        elements: &[u8],
        scales: &[f32],
    ) -> Result<QuantWeight, Error> {
        let packed = pack(rows, cols, 8, |row, column| elements[row * cols + column]);
        let device = &self.device;
        Ok(QuantWeight {
            rows,
            cols,
            format,
            packed: Memory::of(device, &packed)?,
            scales: Memory::of(device, bytemuck::cast_slice(scales))?,
            zeros: Memory::new(device, 0)?,
            scale_each: scales.len() > 1,
            group: cols,
            block_rows: rows,
            order: None,
        })
    }
}
