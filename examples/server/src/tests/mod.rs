//! The server driven in-process and over loopback, against the model that is part of the program.

mod kv_events;
mod lifecycle;
mod metrics;
mod monitoring;
mod orders;
mod refusals;
mod shapes;
mod streams;
mod structured;
mod support;
mod transfer;
