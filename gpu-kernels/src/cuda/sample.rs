//! The next token of each row of logits, or what it would be drawn from: `kernels/sample.cu`.

use super::device::Address;
use super::memory::Memory;
use super::tensor::Tensor;
use super::{Cuda, count};
use crate::Error;
use crate::error::{at_most, below, multiple, same};

/// How a row's next token is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// Divides the logits; 0 takes the largest, the first of equals.
    pub temperature: f32,
    /// Only the `top_k` largest stay, and what is equal to the last of them; 0 keeps all.
    pub top_k: u32,
    /// Only the largest stay that have this much of the probability together; 1 keeps all.
    pub top_p: f32,
    /// Only those stay that have this share of the largest probability; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens that occurred are divided by it where positive, else multiplied; 1 is none.
    pub repetition: f32,
    /// Subtracted from logits of tokens that were given out.
    pub presence: f32,
    /// Subtracted for each time that a token was given out.
    pub frequency: f32,
    /// The tokens that occurred, each once.
    pub seen: &'a [Seen],
    /// Row of the mask, or `None`: all are allowed.
    pub mask_row: Option<usize>,
    /// Where in the distribution the draw falls, as a fraction of 2^64: the caller's generator gives it, so that a
    /// request's seed alone decides.
    pub random: u64,
}

impl Default for Draw<'_> {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            seen: &[],
            mask_row: None,
            random: 0,
        }
    }
}

/// A token that occurred.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Seen {
    /// Its number.
    pub token: u32,
    /// How often it was given out; 0 when it is in the prompt alone.
    pub count: u32,
}

/// What a row got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Sampled {
    /// The token; `u32::MAX` when all were masked.
    pub token: u32,
    /// Natural logarithm of its probability by the logits as they came.
    pub logprob: f32,
}

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
}

/// Rows of logits with all that a kernel needs to know of their draws, on the device.
struct Prepared {
    argument: LogitsArgument,
    _memory: [Memory; 4],
}

impl Cuda {
    /// Draws the next token of each row of logits `[rows, vocabulary]`. `mask` holds rows of bits, a bit for each
    /// token that is allowed, in words of 32 from the lowest. The same logits and `Draw` give the same token,
    /// whatever the other rows.
    ///
    /// # Errors
    /// When lengths disagree, a token is not in the vocabulary, a number is not what it may be, or the device fails.
    pub fn sample(&self, logits: &Tensor, draws: &[Draw<'_>], mask: &[u32]) -> Result<Vec<Sampled>, Error> {
        let Some(prepared) = self.prepare(logits, draws, mask)? else { return Ok(Vec::new()) };
        let mut sampled = vec![Sampled { token: 0, logprob: 0.0 }; draws.len()];
        let out = Memory::new(&self.device, size_of_val(&sampled[..]))?;
        let argument = SampleArgument { logits: prepared.argument, out: out.address() };
        let blocks = count("sample", "rows", draws.len())?;
        self.launch("sample", "sample", blocks, BLOCK, SHARED_BYTES, &argument)?;
        self.device.download(out.address(), bytemuck::cast_slice_mut(&mut sampled))?;
        Ok(sampled)
    }

    /// The distributions that [`Cuda::sample`] draws from, for [`Cuda::verify`]; their `random` is not used. At
    /// temperature 0 the first of the largest has all of it.
    ///
    /// # Errors
    /// As [`Cuda::sample`].
    pub fn distributions(
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

    /// Weights `[rows, vocabulary]`, the largest of a row 1, and each row's sum of weights in units of 2^-40.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_distributions(&self, distributions: &Distributions) -> Result<(Vec<f32>, Vec<u64>), Error> {
        let mut weights = vec![0.0_f32; distributions.rows * distributions.vocabulary];
        let mut totals = vec![0_u64; distributions.rows];
        if distributions.rows > 0 {
            let device = &self.device;
            device.download(distributions.weights.address(), bytemuck::cast_slice_mut(&mut weights))?;
            device.download(distributions.totals.address(), bytemuck::cast_slice_mut(&mut totals))?;
        }
        Ok((weights, totals))
    }

    /// Draws and mask, checked and on the device; nothing for no rows.
    fn prepare(&self, logits: &Tensor, draws: &[Draw<'_>], mask: &[u32]) -> Result<Option<Prepared>, Error> {
        same("sample", "number of draws", draws.len(), logits.rows())?;
        let (vocabulary, words) = (logits.cols(), logits.cols().div_ceil(32));
        if draws.is_empty() {
            return Ok(None);
        }
        multiple("sample", "vocabulary", vocabulary, 1)?;
        same("sample", "words of the mask beyond whole rows", mask.len() % words, 0)?;
        let mut rows = Vec::with_capacity(draws.len());
        let mut seen: Vec<Seen> = Vec::new();
        for draw in draws {
            rows.push(row(draw, seen.len(), mask.len() / words)?);
            for occurred in draw.seen {
                below("sample", "a token that occurred", occurred.token as usize, vocabulary)?;
            }
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

/// A draw as the kernel takes it, checked.
fn row(draw: &Draw<'_>, seen_start: usize, mask_rows: usize) -> Result<SampleRow, Error> {
    let legal = [
        ("temperature", draw.temperature, (0.0..=f32::MAX).contains(&draw.temperature), "finite, at least 0"),
        ("top_p", draw.top_p, (0.0..=1.0).contains(&draw.top_p), "0 to 1"),
        ("min_p", draw.min_p, (0.0..=1.0).contains(&draw.min_p), "0 to 1"),
        (
            "repetition",
            draw.repetition,
            draw.repetition > 0.0 && draw.repetition.is_finite(),
            "finite, above 0",
        ),
        ("presence", draw.presence, draw.presence.is_finite(), "finite"),
        ("frequency", draw.frequency, draw.frequency.is_finite(), "finite"),
    ];
    for (what, found, legal, supported) in legal {
        if !legal {
            let found = found.to_string();
            return Err(Error::Unsupported { operator: "sample", what, found, supported });
        }
    }
    if let Some(mask_row) = draw.mask_row {
        below("sample", "row of the mask", mask_row, mask_rows)?;
    }
    Ok(SampleRow {
        random: draw.random,
        top_p: fraction(draw.top_p),
        temperature: draw.temperature,
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

/// A number of 0 to 1 as a fraction of 2^64; 1 is all ones.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "of 0 to 1, and the cast saturates"
)]
fn fraction(x: f32) -> u64 {
    (f64::from(x) * 2_f64.powi(64)) as u64
}
