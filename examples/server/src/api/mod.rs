//! The OpenAI API on the wire. The types in here are used nowhere else.

pub(crate) mod body;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
pub(crate) mod fields;
mod generation;
mod idle;
mod logprobs;
mod message;
pub(crate) mod models;
mod prompt;
pub(crate) mod stream;
mod structured;
pub(crate) mod tokenize;
mod usage;
