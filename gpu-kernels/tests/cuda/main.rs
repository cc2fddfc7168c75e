//! The operators of the CUDA device: on the emulator, or on this machine's GPU ([`emulator::on_gpu`]).
#![cfg(unix)]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "tests: small numbers, a panic is the report, and the emulator is a library of C++"
)]

#[path = "../common/attending.rs"]
mod attending;
#[path = "../common/cases.rs"]
mod cases;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/emulator.rs"]
mod emulator;
#[cfg(feature = "cuda")]
#[path = "../common/fake_cublaslt.rs"]
mod fake_cublaslt;
#[path = "../common/grouped.rs"]
mod grouped;
#[path = "../common/heads.rs"]
mod heads;
#[path = "../common/latents.rs"]
mod latents;
#[path = "../common/quantised.rs"]
mod quantised;
#[path = "../common/sampling.rs"]
mod sampling;
#[path = "../common/verifying.rs"]
mod verifying;

mod attention;
mod chunks;
#[cfg(feature = "cuda")]
mod cublaslt;
mod doors;
mod elementwise;
mod latent;
mod linear;
mod model_doors;
mod moe;
mod pages;
mod quant;
mod sample;
mod states;
mod strides;
mod verify;
