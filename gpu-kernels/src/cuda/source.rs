//! The kernels' source, as the run-time compiler takes it.

/// One file of `kernels/`: a program of its own.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The file's name without its ending.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
}

/// What the programs include.
pub const HEADERS: [Source; 4] = [
    Source { name: "prelude.cuh", text: include_str!("../../kernels/prelude.cuh") },
    Source { name: "device.cuh", text: include_str!("../../kernels/device.cuh") },
    Source { name: "softmax.cuh", text: include_str!("../../kernels/softmax.cuh") },
    Source { name: "attention.cuh", text: include_str!("../../kernels/attention.cuh") },
];

macro_rules! sources {
    ($($name:literal),+) => {
        /// All programs.
        pub const SOURCES: &[Source] =
            &[$(Source { name: $name, text: include_str!(concat!("../../kernels/", $name, ".cu")) }),+];
    };
}

sources!(
    "activation",
    "attention_bf16",
    "attention_bf16_e4m3",
    "attention_f16",
    "attention_f16_e4m3",
    "copy",
    "gather",
    "gemm",
    "merge",
    "norm",
    "rope_append"
);

/// Options of the run-time compiler, besides the architecture. Products and sums are contracted only where the
/// source says so: the emulator and every architecture then agree on what is rounded.
pub const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];
