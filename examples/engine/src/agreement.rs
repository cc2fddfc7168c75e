//! What options say of a checkpoint, held against what it is.

use quayline_gpu_kernels::{Dtype, Rounding};

use crate::config::{ModelConfig, Quantization, QuantizationMethod};
use crate::error::LoadError;
use crate::options::Options;

/// What matrices of floats are rounded to.
pub(crate) fn rounding(options: &Options, config: &ModelConfig) -> Result<Option<Rounding>, LoadError> {
    let found = config.quantization.map(|how| how.method());
    let refuse = |option, asked: &str| {
        let found = found.map_or("not quantised", QuantizationMethod::name);
        Err(LoadError::Options {
            option,
            problem: format!("{asked} is asked for, the checkpoint is {found}"),
        })
    };
    if let Some(asked) = options.quantization_method
        && found != Some(asked)
    {
        return refuse("quantization", asked.name());
    }
    match (options.quantization, config.quantization) {
        (Some(Rounding::Fp8), Some(Quantization::Fp8 { .. })) => Ok(None),
        (Some(Rounding::Fp8), Some(_)) => refuse("quantization", "fp8"),
        (rounding, _) => Ok(rounding),
    }
}

/// Whether the arithmetic has the number format that is asked for, where weights of `weights` are computed with in
/// `computed`.
pub(crate) fn dtype(asked: Option<Dtype>, weights: Dtype, computed: Dtype) -> Result<(), LoadError> {
    match asked {
        // Weights that are not widened are worth the same as those that are.
        Some(asked) if asked != weights && asked != computed => {
            let problem =
                format!("{asked} is asked for, the weights are {weights} and computed with in {computed}");
            Err(LoadError::Options { option: "dtype", problem })
        }
        _ => Ok(()),
    }
}
