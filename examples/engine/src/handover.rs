//! Prefill in one engine, decode in another: a request ends here and its keys and values are fetched, or it waits here
//! for those that another engine has.
//!
//! ```text
//!   prefill                                   decode
//!   add(hands_over)                           add(remote_tokens)
//!   step ... the last output                  step
//!                                             loads(): a Load{ id, start, tokens }
//!   fetch(id, start, tokens) --- Parcel --->  deliver(id, parcel)    or  not_delivered(id)
//!   handed_over(id)                           step ... outputs
//! ```
//!
//! How a parcel travels is the caller's.

use std::collections::BTreeMap;

use quayline_batching::{self as batching, Reason};
use quayline_gpu_kernels as kernels;
use quayline_kv_cache::{SequenceId, TokenCount};

use crate::adapt::Cache;
use crate::adapt::sequence;
use crate::engine::Engine;
use crate::failure::expected;
use crate::output::Output;
use crate::request::RequestId;

/// Keys and values that a request waits for. Whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Whose.
    pub id: RequestId,
    /// The first token that is to come; those before are here.
    pub start: u32,
    /// How many.
    pub tokens: u32,
}

/// Keys and values of consecutive tokens of a sequence, in whole blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    /// The first token.
    pub start: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// The blocks, as [`save_blocks`](quayline_gpu_kernels::Ops::save_blocks) gives them: of the same model and number
    /// format on the same kind of device, they mean the same in every engine.
    pub blocks: Vec<Box<[u8]>>,
}

/// Why a parcel was not taken. The request waits on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeliveryError {
    /// Nothing is on its way for it.
    #[error("request {0} waits for nothing")]
    NotAwaited(u64),
    /// Blocks of another engine's making.
    #[error("blocks of {found_tokens} tokens and {found_bytes} bytes; here they have {tokens} and {bytes}")]
    OtherBlocks {
        /// Tokens in its blocks.
        found_tokens: u32,
        /// Bytes in one of them.
        found_bytes: usize,
        /// Tokens in ours.
        tokens: u32,
        /// Bytes in ours.
        bytes: usize,
    },
    /// The machine could not take it.
    #[error(transparent)]
    Machine(#[from] kernels::Error),
    /// Not the tokens that are awaited.
    #[error("{found_blocks} blocks from token {found_start} on; {blocks} from {start} on are awaited")]
    OtherTokens {
        /// Where it begins.
        found_start: u32,
        /// What it holds.
        found_blocks: usize,
        /// Where it should begin.
        start: u32,
        /// What it should hold.
        blocks: usize,
    },
}

/// What other engines have to do with the sequences of this one.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    /// How many tokens another engine has of sequences that wait for room.
    pub(crate) wanted: BTreeMap<SequenceId, u32>,
    /// What is on its way to sequences that have room for it.
    pub(crate) arriving: BTreeMap<SequenceId, Arriving>,
    /// Sequences that have ended and are to be fetched, and how many of their tokens were computed.
    pub(crate) handing_over: BTreeMap<SequenceId, u32>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Arriving {
    start: u32,
    tokens: u32,
}

impl Elsewhere {
    /// Room was granted for what a sequence wanted. False if it wanted nothing.
    pub(crate) fn begin(&mut self, sequence: SequenceId, start: TokenCount, tokens: TokenCount) -> bool {
        let wanted = tokens > TokenCount(0) && self.wanted.remove(&sequence).is_some();
        if wanted {
            self.arriving.insert(sequence, Arriving { start: start.get(), tokens: tokens.get() });
        }
        wanted
    }

    /// All that was on its way has come.
    pub(crate) fn arrived(&mut self, cache: &mut Cache, sequence: SequenceId, tokens: u32) {
        if self.arriving.remove(&sequence).is_some() {
            cache.loaded(sequence, TokenCount(tokens)).expect("it was on its way");
        }
    }

    /// Only the first `tokens` tokens of a sequence are here, and nothing more is on its way.
    pub(crate) fn cut(&mut self, cache: &mut Cache, sequence: SequenceId, tokens: u32) {
        if let Some(Arriving { start, .. }) = self.arriving.remove(&sequence) {
            cache.load_failed(sequence, TokenCount(tokens.max(start))).expect("it was on its way");
        }
    }
}

impl Engine {
    /// What has been given room since this was last asked, and is to be fetched and [delivered](Engine::deliver).
    pub fn loads(&mut self) -> Vec<Load> {
        std::mem::take(&mut self.loads)
    }

    /// The keys and values of a request that ended here and [hands over](crate::Request::hands_over), from token
    /// `start` on, `tokens` of them: whole blocks. `None` if it does not have them, or the machine fails.
    ///
    /// # Panics
    /// When the cache names a block that the pool does not have: a bug of ours.
    #[must_use]
    pub fn fetch(&self, id: RequestId, start: u32, tokens: u32) -> Option<Parcel> {
        let sequence = SequenceId(id.0);
        let has = *self.memory.elsewhere.handing_over.get(&sequence)?;
        let size = self.memory.cache.config().block_size.get();
        let whole = start.is_multiple_of(size) && tokens.is_multiple_of(size);
        if !whole || start.checked_add(tokens)? > has {
            return None;
        }
        let bytes = self.machine.block_bytes();
        let table = self.memory.cache.table(sequence).ok()?;
        let blocks = &table.blocks()[(start / size) as usize..((start + tokens) / size) as usize];
        let mut saved = vec![vec![0; bytes].into_boxed_slice(); blocks.len()];
        let bytes_of = saved.iter_mut().map(|bytes| &mut **bytes);
        let mut list: Vec<_> = blocks.iter().map(|block| block.get()).zip(bytes_of).collect();
        expected(self.machine.save_blocks(&mut list)).ok()?;
        Some(Parcel { start, block_size: size, blocks: saved })
    }

    /// Whether what a request computed is kept for another engine.
    #[must_use]
    pub fn is_handing_over(&self, id: RequestId) -> bool {
        self.memory.elsewhere.handing_over.contains_key(&SequenceId(id.0))
    }

    /// The numbers of the blocks that are kept of a request for another engine; `None` if none are.
    #[must_use]
    pub fn handed_blocks(&self, id: RequestId) -> Option<Vec<u32>> {
        let sequence = SequenceId(id.0);
        let kept = self.is_handing_over(id).then(|| self.memory.cache.table(sequence).ok());
        Some(kept??.blocks().iter().map(|block| block.get()).collect())
    }

    /// What a request handed over has been fetched, or nobody wants it: its blocks are free. False if nothing of this
    /// id is handed over.
    pub fn handed_over(&mut self, id: RequestId) -> bool {
        self.batcher.handed_over(batching::RequestId(id.0), &mut self.memory)
    }

    /// What a request waits for has come: all of it. It runs as soon as a step has room.
    ///
    /// # Errors
    /// [`DeliveryError`]: it is not what the request waits for. Nothing changes.
    ///
    /// # Panics
    /// When the cache names a block that the pool does not have: a bug of ours.
    pub fn deliver(&mut self, id: RequestId, parcel: &Parcel) -> Result<(), DeliveryError> {
        let Arriving { start, tokens } = self.awaited(id)?;
        let tokens_per_block = self.memory.cache.config().block_size.get();
        let bytes = self.machine.block_bytes();
        let other = parcel.blocks.iter().map(|block| block.len()).find(|&found| found != bytes);
        if parcel.block_size != tokens_per_block || other.is_some() {
            let (found_tokens, found_bytes) = (parcel.block_size, other.unwrap_or(bytes));
            return Err(DeliveryError::OtherBlocks {
                found_tokens,
                found_bytes,
                tokens: tokens_per_block,
                bytes,
            });
        }
        let blocks = (tokens / tokens_per_block) as usize;
        if parcel.start != start || parcel.blocks.len() != blocks {
            let (found_start, found_blocks) = (parcel.start, parcel.blocks.len());
            return Err(DeliveryError::OtherTokens { found_start, found_blocks, start, blocks });
        }
        // What the blocks held before may still be on its way to host memory.
        if let Some(host) = &mut self.memory.host {
            host.carry_out(&mut *self.machine)?;
        }
        let table = self.memory.cache.table(SequenceId(id.0)).expect("who waits is open");
        let targets = table.blocks()[(start / tokens_per_block) as usize..].iter().map(|block| block.get());
        let list: Vec<_> = targets.zip(parcel.blocks.iter().map(|bytes| &**bytes)).collect();
        expected(self.machine.load_blocks(&list))?;
        self.batcher.loaded(batching::RequestId(id.0), &mut self.memory);
        self.totals.delivered_tokens += u64::from(tokens);
        if let Some(active) = self.active.get_mut(&id) {
            active.delivered = true;
        }
        Ok(())
    }

    /// What a request waits for will not come. It computes the rest itself, or ends with an error, which is added to
    /// `outputs`: [`Options::failed_loads`](crate::Options::failed_loads).
    ///
    /// # Errors
    /// [`DeliveryError::NotAwaited`].
    pub fn not_delivered(&mut self, id: RequestId, outputs: &mut Vec<Output>) -> Result<(), DeliveryError> {
        let Arriving { start, tokens } = self.awaited(id)?;
        let planned = batching::RequestId(id.0);
        self.batcher.load_failed(planned, start, &mut self.memory);
        if self.batcher.standing(planned).is_none()
            && let Some(mut active) = self.forget(id)
        {
            self.totals.finished += 1;
            outputs.push(active.give_up(Reason::LoadFailed { tokens, loaded_tokens: 0 }));
        }
        Ok(())
    }

    /// A request ended of which another engine fetches what was computed.
    pub(crate) fn keep_for_handover(&mut self, id: RequestId) {
        let sequence = sequence(batching::RequestId(id.0));
        let known = self.memory.cache.known(sequence).expect("it was running a moment ago");
        self.memory.elsewhere.handing_over.insert(sequence, known.get().saturating_sub(1));
        self.active.remove(&id);
    }

    fn awaited(&self, id: RequestId) -> Result<Arriving, DeliveryError> {
        let awaited = self.memory.elsewhere.arriving.get(&SequenceId(id.0)).copied();
        awaited.ok_or(DeliveryError::NotAwaited(id.0))
    }
}
