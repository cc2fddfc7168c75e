#![doc = include_str!("../README.md")]

pub mod bandwidth;
pub mod beside;
pub mod client;
pub mod machine;
pub mod prompt;
pub mod random;
pub mod report;
pub mod run;
pub mod soak;
pub mod sse;
pub mod statistics;
pub mod workload;

pub use quayline_simulator::trace;
