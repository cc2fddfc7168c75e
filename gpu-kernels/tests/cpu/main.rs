//! The operators of the CPU, with all instructions that this machine has.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: small numbers, and a panic is the report"
)]

#[path = "../common/mod.rs"]
mod common;
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
mod elementwise;
mod integers;
mod latent;
mod linear;
mod moe;
mod quant;
mod rounding;
mod sample;
