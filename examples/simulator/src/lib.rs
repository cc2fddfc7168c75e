#![doc = include_str!("../README.md")]

mod adapt;
pub mod belady;
pub mod comparison;
pub mod cost;
pub mod curves;
pub mod fairness;
pub mod gpu;
pub mod latency;
pub mod measured;
pub mod model;
pub mod profile;
pub mod prompts;
pub mod replay;
pub mod scenario;
pub mod serve;
pub mod spread;
pub mod svg;
pub mod tenants;
pub mod trace;
