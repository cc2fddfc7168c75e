#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batch_tables;
mod blocks;
mod buckets;
mod cache;
mod check;
mod claim;
mod commit;
mod config;
mod error;
mod event;
pub mod evict;
mod forget;
mod fork;
mod group;
pub mod hash;
mod hit;
mod id;
mod kept;
mod keys;
pub mod kind;
pub mod layout;
mod load;
mod pin;
mod pool;
mod prefix;
mod publish;
mod replica;
mod reserve;
mod residency;
pub mod scenario;
mod sequence;
mod stats;
mod table;
mod tell;
pub mod tier;

pub use batch_tables::{BatchTables, NO_SLOT};
pub use cache::KvCache;
pub use check::Violation;
pub use claim::{Admission, BlockCopy, Claim, Grant, Hit, Lost, Reservation, Reuse};
pub use config::{Config, Group, Retention};
pub use error::Error;
pub use event::{BlockNames, Event, EventBatch, Location, Snapshot, Stored};
pub use evict::{Eviction, Lru, OverLimit};
pub use hash::{Adapter, BlockHash, BlockHasher, Content, Digest, EmbedsDigest, Extra, Media, Xxh3};
pub use id::{
    BlockCount, BlockId, BlockSize, GroupId, PinId, SequenceId, Slot, TenantId, Tick, TokenCount, TokenId,
    TokenIndex,
};
pub use keys::SequenceKey;
pub use pin::Pinned;
pub use replica::{Replica, ReplicaError};
pub use residency::{GAPS_MAX, Residency};
pub use stats::{HitStats, Refusal, Refusals, Stats};
pub use table::BlockTable;
