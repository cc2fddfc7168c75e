//! The next token of each row of logits, or what it would be drawn from: `kernels/sample.cu`.

use super::device::Address;
use super::memory::Memory;
use super::tensor::Tensor;
use super::{Cuda, count};
use crate::door;
use crate::error::at_most;
use crate::sampling::fraction;
use crate::{Drafts, Draw, Error, Sampled, Sampling, Seen, Verified};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct SampleRow {
    random: u64,
    top_p: u64,
    temperature: f32,
    min_p_log: f32,
    top_k: u32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    seen_start: u32,
    seen_count: u32,
    mask_row: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct LogitsArgument {
    logits: Address,
    work: Address,
    rows: Address,
    seen: Address,
    mask: Address,
    stride: u64,
    vocabulary: u32,
    mask_words: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct SampleArgument {
    logits: LogitsArgument,
    out: Address,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct DistributionsArgument {
    logits: LogitsArgument,
    weights: Address,
    totals: Address,
}

/// Threads of a block, which draws one row.
pub(super) const BLOCK: usize = 512;
/// `Shared` of the kernels.
pub(super) const SHARED_BYTES: usize = (256 + BLOCK) * 8 + BLOCK / 32 * 4 + 16;

/// What rows of logits may draw, `[rows, vocabulary]`, on the device: after penalties, mask, temperature and cuts.
#[derive(Debug)]
pub struct Distributions {
    /// f32, the largest of a row 1.
    pub(super) weights: Memory,
    /// The sum of a row's weights in units of 2^-40, each cut to a whole one.
    pub(super) totals: Memory,
    pub(super) rows: usize,
    pub(super) vocabulary: usize,
}

impl Distributions {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows and vocabulary.
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.vocabulary)
    }
}

/// Rows of logits with all that a kernel needs to know of their draws, on the device.
struct Prepared {
    argument: LogitsArgument,
    _memory: [Memory; 4],
}

impl Sampling for Cuda {
    type Distributions = Distributions;

    fn sample(&self, logits: &Tensor, draws: &[Draw<'_>], mask: &[u32]) -> Result<Vec<Sampled>, Error> {
        let Some(prepared) = self.prepare(logits, draws, mask)? else { return Ok(Vec::new()) };
        let mut sampled = vec![Sampled { token: 0, logprob: 0.0 }; draws.len()];
        let out = Memory::new(&self.device, size_of_val(&sampled[..]))?;
        let argument = SampleArgument { logits: prepared.argument, out: out.address() };
        let blocks = count("sample", "rows", draws.len())?;
        self.launch("sample", "sample", blocks, BLOCK, SHARED_BYTES, &argument)?;
        self.device.download(out.address(), bytemuck::cast_slice_mut(&mut sampled))?;
        Ok(sampled)
    }

    fn distributions(
        &self,
        logits: &Tensor,
        draws: &[Draw<'_>],
        mask: &[u32],
    ) -> Result<Distributions, Error> {
        let (rows, vocabulary) = (draws.len(), logits.cols());
        let prepared = self.prepare(logits, draws, mask)?;
        let weights = Memory::new(&self.device, rows * vocabulary * 4)?;
        let totals = Memory::new(&self.device, rows * 8)?;
        if let Some(prepared) = prepared {
            let (weights, totals) = (weights.address(), totals.address());
            let argument = DistributionsArgument { logits: prepared.argument, weights, totals };
            let blocks = count("sample", "rows", rows)?;
            self.launch("sample", "distributions", blocks, BLOCK, SHARED_BYTES, &argument)?;
        }
        Ok(Distributions { weights, totals, rows, vocabulary })
    }

    fn read_distributions(&self, distributions: &Distributions) -> Result<(Vec<f32>, Vec<u64>), Error> {
        let mut weights = vec![0.0_f32; distributions.rows * distributions.vocabulary];
        let mut totals = vec![0_u64; distributions.rows];
        if distributions.rows > 0 {
            let device = &self.device;
            device.download(distributions.weights.address(), bytemuck::cast_slice_mut(&mut weights))?;
            device.download(distributions.totals.address(), bytemuck::cast_slice_mut(&mut totals))?;
        }
        Ok((weights, totals))
    }

    fn verify(
        &self,
        target: &Distributions,
        drafted: Option<&Distributions>,
        requests: &[Drafts<'_>],
    ) -> Result<Vec<Verified>, Error> {
        door::verify(target.shape(), drafted.map(Distributions::shape), requests)?;
        if requests.is_empty() { Ok(Vec::new()) } else { self.walk(target, drafted, requests) }
    }
}

impl Cuda {
    /// Draws and mask, checked and on the device; nothing for no rows.
    fn prepare(&self, logits: &Tensor, draws: &[Draw<'_>], mask: &[u32]) -> Result<Option<Prepared>, Error> {
        door::sample(logits.shape(), draws, mask)?;
        if draws.is_empty() {
            return Ok(None);
        }
        let (vocabulary, words) = (logits.cols(), logits.cols().div_ceil(32));
        let mut rows = Vec::with_capacity(draws.len());
        let mut seen: Vec<Seen> = Vec::new();
        for draw in draws {
            rows.push(row(draw, seen.len())?);
            seen.extend_from_slice(draw.seen);
        }
        at_most("sample", "tokens that occurred", seen.len(), u32::MAX as usize)?;
        let device = &self.device;
        let work = Memory::new(device, draws.len() * vocabulary * 4)?;
        let rows = Memory::of(device, bytemuck::cast_slice(&rows))?;
        let seen = Memory::of(device, bytemuck::cast_slice(&seen))?;
        let mask = Memory::of(device, bytemuck::cast_slice(mask))?;
        let argument = LogitsArgument {
            logits: logits.address(),
            work: work.address(),
            rows: rows.address(),
            seen: seen.address(),
            mask: mask.address(),
            stride: logits.stride() as u64,
            vocabulary: count("sample", "vocabulary", vocabulary)?,
            mask_words: count("sample", "words of the mask", words)?,
        };
        Ok(Some(Prepared { argument, _memory: [work, rows, seen, mask] }))
    }
}

/// A draw as the kernel takes it.
fn row(draw: &Draw<'_>, seen_start: usize) -> Result<SampleRow, Error> {
    Ok(SampleRow {
        random: draw.random,
        top_p: fraction(draw.top_p),
        temperature: draw.divisor(),
        min_p_log: draw.min_p.ln(),
        top_k: draw.top_k,
        repetition: draw.repetition,
        presence: draw.presence,
        frequency: draw.frequency,
        seen_start: count("sample", "tokens that occurred", seen_start)?,
        seen_count: count("sample", "tokens that occurred", draw.seen.len())?,
        mask_row: draw.mask_row.map_or(Ok(u32::MAX), |row| count("sample", "row of the mask", row))?,
        unused: 0,
    })
}
