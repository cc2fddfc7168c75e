//! Cosines and sines of rotary position embedding (arXiv 2104.09864), with every scaling of the supported models.
//!
//! Frequencies are rounded to f32 and angles are f32 products, as in the reference implementation: models were
//! trained and are evaluated with those very angles, and at position 100,000 the difference is visible. The
//! transcendental functions themselves are computed in f64.

use std::f64::consts::PI;
use std::ops::Range;

use crate::config::{RopeConfig, RopeScaling};

/// Frequencies of one model, from which rows of the table are made.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    frequencies: Vec<f32>,
    /// Factor on every cosine and sine (`YaRN`); 1 otherwise.
    amplitude: f32,
}

/// Cosines and sines of some positions, both `[positions, head_dim / 2]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct CosSin {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl Rope {
    /// The scaled frequencies for heads of width `head_dim`.
    #[must_use]
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let base: Vec<f32> = (0..head_dim / 2).map(|pair| frequency(config.theta, pair, head_dim)).collect();
        let scaled = |scale: &dyn Fn(usize, f32) -> f32| {
            base.iter().enumerate().map(|(pair, &frequency)| scale(pair, frequency)).collect()
        };
        let (frequencies, amplitude) = match config.scaling {
            // Within the trained length, which is all that is served, dynamic scaling changes nothing.
            RopeScaling::None | RopeScaling::Dynamic { .. } => (base, 1.0),
            RopeScaling::Linear { factor } => (scaled(&|_, frequency| frequency / narrow(factor)), 1.0),
            RopeScaling::Llama3 { .. } => (scaled(&|_, frequency| llama3(frequency, &config.scaling)), 1.0),
            RopeScaling::Yarn { attention_factor, .. } => {
                let kept = yarn_kept_share(config, head_dim);
                (scaled(&|pair, _| yarn(config, pair, head_dim, kept(pair))), narrow(attention_factor))
            }
        };
        Self { frequencies, amplitude }
    }

    /// The rows of the table for `positions`. A row does not depend on which others are asked for.
    #[must_use]
    pub fn table(&self, positions: Range<usize>) -> CosSin {
        let size = positions.len() * self.frequencies.len();
        let mut table = CosSin { cos: Vec::with_capacity(size), sin: Vec::with_capacity(size) };
        for position in positions {
            for &frequency in &self.frequencies {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "positions are below 2^26 and rounded as the reference rounds"
                )]
                let angle = f64::from(position as f32 * frequency);
                let (sin, cos) = angle.sin_cos();
                table.cos.push(narrow(cos) * self.amplitude);
                table.sin.push(narrow(sin) * self.amplitude);
            }
        }
        table
    }
}

/// `1 / theta^(2 pair / dim)`.
fn frequency(theta: f64, pair: usize, dim: usize) -> f32 {
    1.0 / wavelength(theta, pair, dim)
}

/// `theta^(2 pair / dim)`, without the 2π.
#[expect(clippy::cast_precision_loss, reason = "head widths are below 2^10")]
fn wavelength(theta: f64, pair: usize, dim: usize) -> f32 {
    let exponent = (2 * pair) as f32 / dim as f32;
    narrow(f64::from(narrow(theta)).powf(f64::from(exponent)))
}

/// High frequencies are kept, low ones divided by `factor`, those between blended by where they lie.
fn llama3(frequency: f32, scaling: &RopeScaling) -> f32 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } = *scaling
    else {
        return frequency;
    };
    let original = f64::from(original_positions);
    let wavelength = 2.0 * PI / f64::from(frequency);
    if wavelength < original / high_freq_factor {
        return frequency;
    }
    if wavelength > original / low_freq_factor {
        return frequency / narrow(factor);
    }
    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
    narrow((1.0 - smooth) * f64::from(frequency) / factor + smooth * f64::from(frequency))
}

/// `kept` of the frequency as trained, the rest divided by `factor` (`YaRN`, arXiv 2309.00071, section 3.2).
fn yarn(config: &RopeConfig, pair: usize, dim: usize, kept: f32) -> f32 {
    let RopeScaling::Yarn { factor, .. } = config.scaling else { return frequency(config.theta, pair, dim) };
    let wavelength = wavelength(config.theta, pair, dim);
    1.0 / (narrow(factor) * wavelength) * (1.0 - kept) + 1.0 / wavelength * kept
}

/// For each pair, how much of its frequency is kept: 1 where it turns more than `beta_fast` times over the
/// original context, 0 where fewer than `beta_slow` times, a ramp between.
#[expect(clippy::cast_precision_loss, reason = "head widths are below 2^10")]
fn yarn_kept_share(config: &RopeConfig, dim: usize) -> impl Fn(usize) -> f32 + use<> {
    let (mut low, mut high) = (0.0, 0.0);
    if let RopeScaling::Yarn { original_positions, beta_fast, beta_slow, truncate, .. } = config.scaling {
        let pair_with = |rotations: f64| {
            let wavelength = f64::from(original_positions) / (rotations * 2.0 * PI);
            dim as f64 * wavelength.ln() / (2.0 * config.theta.ln())
        };
        (low, high) = (pair_with(beta_fast), pair_with(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
    }
    move |pair| 1.0 - narrow(((pair as f64 - low) / (high - low)).clamp(0.0, 1.0))
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
fn narrow(number: f64) -> f32 {
    number as f32
}
