//! What a GPU can do, in the few numbers that the cost model asks for.

use std::str::FromStr;

/// A GPU. Times and rates are those that kernels reach, not those on its box.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Products of weights and tokens.
    pub matmul: Matmul,
    /// Attention of a step in which every request has one token.
    pub decode: DecodeAttention,
    /// Attention of a step with a chunk of a prompt in it.
    pub mixed: MixedAttention,
    /// Between two of them.
    pub link: Link,
    /// Its memory.
    pub memory_bytes: f64,
}

/// How fast weights are read and multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matmul {
    /// Reading, of few tokens.
    pub bytes_per_second: f64,
    /// Computing, of many tokens.
    pub flops_per_second: f64,
}

/// Attention of a step in which every request has one token, in one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeAttention {
    /// However little there is to do.
    pub call_seconds: f64,
    /// For each request.
    pub request_seconds: f64,
    /// Reading keys and values.
    pub bytes_per_second: f64,
}

/// Attention of a step with a chunk of a prompt in it, in one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixedAttention {
    /// However little there is to do.
    pub call_seconds: f64,
    /// For each request that has one token.
    pub request_seconds: f64,
    /// Reading the keys and values of these.
    pub bytes_per_second: f64,
    /// Computing the chunks.
    pub flops_per_second: f64,
    /// For each token that the last token of the longest chunk attends to: they are gone through one after the
    /// other.
    pub key_seconds: f64,
}

/// The way between two GPUs of a model that is split over several.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Each way.
    pub bytes_per_second: f64,
    /// For each all-reduce, besides.
    pub seconds: f64,
}

/// What the engine around the kernels takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Host {
    /// Of each step, beside its kernels.
    pub step_seconds: f64,
    /// Of each request in a step.
    pub request_seconds: f64,
    /// Memory that is neither weights nor cache, on each GPU.
    pub reserved_bytes: f64,
}

impl Gpu {
    /// NVIDIA RTX PRO 6000 Blackwell Server Edition, as [`Profile`](crate::profile::Profile) finds it in
    /// LLMServingSim's profile of vLLM 0.19's kernels for Llama 3.1 8B. Memory and link are of the
    /// configuration beside it.
    pub const RTX_PRO_6000: Gpu = Gpu {
        matmul: Matmul { bytes_per_second: 1.343e12, flops_per_second: 361.8e12 },
        decode: DecodeAttention {
            call_seconds: 12.12e-6,
            request_seconds: 67.8e-9,
            bytes_per_second: 1.397e12,
        },
        mixed: MixedAttention {
            call_seconds: 3.94e-6,
            request_seconds: 779e-9,
            bytes_per_second: 944e9,
            flops_per_second: 311.8e12,
            key_seconds: 16.03e-9,
        },
        link: PCI_EXPRESS,
        memory_bytes: 96.0 * GIB,
    };

    /// NVIDIA GeForce RTX 4090, found in the same way. Memory is what the driver shows.
    pub const RTX_4090: Gpu = Gpu {
        matmul: Matmul { bytes_per_second: 884e9, flops_per_second: 153.4e12 },
        decode: DecodeAttention {
            call_seconds: 12.10e-6,
            request_seconds: 107.3e-9,
            bytes_per_second: 869e9,
        },
        mixed: MixedAttention {
            call_seconds: 10.64e-6,
            request_seconds: 1502e-9,
            bytes_per_second: 458e9,
            flops_per_second: 149.9e12,
            key_seconds: 20.76e-9,
        },
        link: PCI_EXPRESS,
        memory_bytes: 25_250_627_584.0,
    };

    /// A GPU that nobody has profiled, from its data sheet: bandwidth of its memory, dense 16-bit arithmetic
    /// with 32-bit sums, bytes of memory. What kernels reach of these, and what they take besides, is the mean
    /// of the two that were profiled (RTX PRO 6000: 1,597 GB/s and 503.8 Tflop/s; RTX 4090: 1,008 GB/s and
    /// 165.2 Tflop/s). Expect errors of tens of percent.
    pub fn from_data_sheet(bytes_per_second: f64, flops_per_second: f64, memory_bytes: f64) -> Gpu {
        let (bytes, flops) = (bytes_per_second, flops_per_second);
        Gpu {
            matmul: Matmul { bytes_per_second: 0.86 * bytes, flops_per_second: 0.82 * flops },
            decode: DecodeAttention {
                call_seconds: 12.1e-6,
                request_seconds: 87e-9,
                bytes_per_second: 0.87 * bytes,
            },
            mixed: MixedAttention {
                call_seconds: 7.3e-6,
                request_seconds: 1140e-9,
                bytes_per_second: 0.52 * bytes,
                flops_per_second: 0.76 * flops,
                key_seconds: 18.4e-9,
            },
            link: PCI_EXPRESS,
            memory_bytes,
        }
    }
}

const GIB: f64 = 1_073_741_824.0;

/// What LLMServingSim's configuration of the RTX PRO 6000 says of its link.
const PCI_EXPRESS: Link = Link { bytes_per_second: 16e9, seconds: 20e-6 };

/// NVLink of the fourth generation, one way.
const NVLINK_4: Link = Link { bytes_per_second: 450e9, seconds: 10e-6 };

impl Host {
    /// vLLM 0.19 with asynchronous scheduling. The two times are the only constants that are fitted to a run,
    /// the one on the RTX PRO 6000. The memory is what vLLM left on the RTX 4090: 90 % of 25,250,627,584 bytes,
    /// less 16.06 GB of weights and 2,588 blocks of 2 MiB.
    pub const VLLM: Host = Host { step_seconds: 0.5e-3, request_seconds: 10e-6, reserved_bytes: 1.24e9 };
}

/// The name of a GPU: `rtx-pro-6000` and `rtx-4090` as profiled, `a100`, `h100` and `h200` by their data sheets.
impl FromStr for Gpu {
    type Err = String;

    fn from_str(name: &str) -> Result<Gpu, String> {
        let nvlink = |gpu: Gpu| Gpu { link: NVLINK_4, ..gpu };
        match name {
            "rtx-pro-6000" => Ok(Gpu::RTX_PRO_6000),
            "rtx-4090" => Ok(Gpu::RTX_4090),
            "a100" => Ok(nvlink(Gpu::from_data_sheet(2.039e12, 312e12, 80.0 * GIB))),
            "h100" => Ok(nvlink(Gpu::from_data_sheet(3.35e12, 989e12, 80.0 * GIB))),
            "h200" => Ok(nvlink(Gpu::from_data_sheet(4.8e12, 989e12, 141e9))),
            _ => Err("known are rtx-pro-6000, rtx-4090, a100, h100 and h200".to_owned()),
        }
    }
}
