//! The kernels' source, as the run-time compiler takes it.

/// One file of `kernels/`: a program of its own.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The file's name without its ending.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
}

macro_rules! headers {
    ($($name:literal),+) => {
        /// What the programs include.
        pub const HEADERS: &[Source] =
            &[$(Source { name: $name, text: include_str!(concat!("../../kernels/", $name)) }),+];
    };
}

headers!(
    "attention.cuh",
    "device.cuh",
    "gemm.cuh",
    "hopper.cuh",
    "hopper_attention.cuh",
    "hopper_device.cuh",
    "prelude.cuh",
    "sampling.cuh",
    "slabs.cuh",
    "softmax.cuh"
);

/// Gives the names of all programs to a macro.
macro_rules! programs {
    ($to:ident) => {
        $to!(
            "activation",
            "attention_bf16",
            "attention_bf16_e4m3",
            "attention_bf16_i8",
            "attention_f16",
            "attention_f16_e4m3",
            "attention_f16_i8",
            "attention_latent_bf16",
            "attention_latent_f16",
            "copy",
            "gather",
            "gemm",
            "grouped",
            "hopper_attention_bf16",
            "hopper_attention_bf16_e4m3",
            "hopper_attention_bf16_i8",
            "hopper_attention_f16",
            "hopper_attention_f16_e4m3",
            "hopper_attention_f16_i8",
            "hopper_gemm",
            "latent_append",
            "merge",
            "moe",
            "norm",
            "quant_gemm",
            "rope_append",
            "sample",
            "verify"
        );
    };
}
macro_rules! sources {
    ($($name:literal),+) => {
        /// All programs.
        pub const SOURCES: &[Source] =
            &[$(Source { name: $name, text: include_str!(concat!("../../kernels/", $name, ".cu")) }),+];
    };
}

programs!(sources);

/// Options of the run-time compiler, besides the architecture. Products and sums are contracted only where the
/// source says so: the emulator and every architecture then agree on what is rounded.
pub const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

impl Source {
    /// A number that changes with anything that changes the compiled program: text, headers and options.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut texts = vec![self.text];
        let mut next = 0;
        while let Some(&text) = texts.get(next) {
            // The emulator's header is no part of a program for a GPU, and not in the list.
            let included =
                HEADERS.iter().filter(|header| text.contains(&format!("#include \"{}\"", header.name)));
            for header in included {
                if !texts.contains(&header.text) {
                    texts.push(header.text);
                }
            }
            next += 1;
        }
        let parts: Vec<_> = texts.iter().chain(&OPTIONS).map(|text| text.as_bytes()).collect();
        hash(&parts)
    }

    /// The name of its code for an architecture, made from exactly this text.
    #[cfg(feature = "cuda")]
    pub(crate) fn code_name(&self, architecture: &str) -> String {
        format!("{}-{architecture}-{:016x}", self.name, self.hash())
    }
}

/// FNV-1a of parts, each followed by its length.
pub(crate) fn hash(parts: &[&[u8]]) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    parts.iter().fold(0xcbf2_9ce4_8422_2325, |start, part| {
        let whole = part.iter().fold(start, |hash, &byte| step(hash, byte));
        (part.len() as u64).to_le_bytes().into_iter().fold(whole, step)
    })
}
