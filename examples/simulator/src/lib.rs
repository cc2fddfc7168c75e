#![doc = include_str!("../README.md")]

pub mod belady;
pub mod curves;
pub mod prompts;
pub mod replay;
pub mod scenario;
pub mod svg;
pub mod trace;
