//! What can be wrong with a call, with the numbers in it.

use crate::Dtype;

/// Why an operator refused its arguments. A refused call has written nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two dimensions that must be equal are not.
    #[error("{operator}: {dimension} is {found}, expected {expected}")]
    Shape {
        /// The operator that was called.
        operator: &'static str,
        /// The dimension that disagrees.
        dimension: &'static str,
        /// What the caller passed.
        found: usize,
        /// What the other arguments ask for.
        expected: usize,
    },
    /// A dimension or an index is above what its container holds.
    #[error("{operator}: {dimension} is {found}, the most allowed is {max}")]
    TooLarge {
        /// The operator that was called.
        operator: &'static str,
        /// The dimension or index that is too large.
        dimension: &'static str,
        /// What the caller passed.
        found: usize,
        /// The largest legal value.
        max: usize,
    },
    /// A dimension is below what another asks for.
    #[error("{operator}: {dimension} is {found}, the least allowed is {min}")]
    TooSmall {
        /// The operator that was called.
        operator: &'static str,
        /// The dimension that is too small.
        dimension: &'static str,
        /// What the caller passed.
        found: usize,
        /// The smallest legal value.
        min: usize,
    },
    /// A dimension must not be zero, or must divide another, and does not.
    #[error("{operator}: {dimension} is {found}, which is not a positive multiple of {of}")]
    Multiple {
        /// The operator that was called.
        operator: &'static str,
        /// The dimension that is wrong.
        dimension: &'static str,
        /// What the caller passed.
        found: usize,
        /// What it must be a multiple of.
        of: usize,
    },
    /// A weight's byte range does not hold its elements.
    #[error(
        "weight {shape:?} of {dtype} needs {needed} bytes, its range {start}..{end} of {available} does not hold them"
    )]
    WeightBytes {
        /// Dimensions of the weight, outermost first.
        shape: Vec<usize>,
        /// Its storage type.
        dtype: Dtype,
        /// Bytes that the shape takes; `usize::MAX` when the product overflows.
        needed: usize,
        /// Start of the range.
        start: usize,
        /// End of the range.
        end: usize,
        /// Length of the whole buffer.
        available: usize,
    },
    /// The memory could not be had.
    #[error("{operator}: {bytes} bytes could not be allocated")]
    Memory {
        /// The operator that was called.
        operator: &'static str,
        /// Bytes asked for; `usize::MAX` when the product overflows.
        bytes: usize,
    },
    /// The instruction set that was asked for is not on this machine.
    #[error("this machine cannot run {isa}")]
    IsaMissing {
        /// Name of the instruction set.
        isa: &'static str,
    },
    /// A type or a size that this implementation of an operator does not take.
    #[error("{operator}: {what} {found} is not supported, only {supported}")]
    Unsupported {
        /// The operator that was called.
        operator: &'static str,
        /// What is not supported.
        what: &'static str,
        /// What the caller passed.
        found: String,
        /// What would have been taken.
        supported: &'static str,
    },
    /// A device, its driver or its compiler failed or is not there.
    #[error("{call}: {reason}")]
    Device {
        /// What was asked of it.
        call: &'static str,
        /// What it said.
        reason: String,
    },
    /// The worker threads could not be started.
    #[error("worker {worker} of {workers} could not be started: {reason}")]
    Threads {
        /// The worker that failed.
        worker: usize,
        /// How many were asked for.
        workers: usize,
        /// What the operating system said.
        reason: String,
    },
}

/// `Ok` if two dimensions agree.
pub(crate) fn same(
    operator: &'static str,
    dimension: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Shape { operator, dimension, found, expected }) }
}

/// `Ok` if a dimension or index is at most `max`.
pub(crate) fn at_most(
    operator: &'static str,
    dimension: &'static str,
    found: usize,
    max: usize,
) -> Result<(), Error> {
    if found <= max { Ok(()) } else { Err(Error::TooLarge { operator, dimension, found, max }) }
}

/// `Ok` if a dimension is at least `min`.
pub(crate) fn at_least(
    operator: &'static str,
    dimension: &'static str,
    found: usize,
    min: usize,
) -> Result<(), Error> {
    if found >= min { Ok(()) } else { Err(Error::TooSmall { operator, dimension, found, min }) }
}

/// `Ok` if an index is below a bound.
pub(crate) fn below(
    operator: &'static str,
    dimension: &'static str,
    found: usize,
    bound: usize,
) -> Result<(), Error> {
    if found < bound {
        Ok(())
    } else {
        Err(Error::TooLarge { operator, dimension, found, max: bound.saturating_sub(1) })
    }
}

/// `Ok` if a dimension is a positive multiple of `of`.
pub(crate) fn multiple(
    operator: &'static str,
    dimension: &'static str,
    found: usize,
    of: usize,
) -> Result<(), Error> {
    if of > 0 && found > 0 && found.is_multiple_of(of) {
        Ok(())
    } else {
        Err(Error::Multiple { operator, dimension, found, of })
    }
}

/// What an operator says of a weight of integers that multiplies floats alone.
pub(crate) fn no_integers(operator: &'static str) -> Error {
    Error::Unsupported {
        operator,
        what: "a weight of",
        found: "integers".to_owned(),
        supported: "bf16, f16 and f32",
    }
}
