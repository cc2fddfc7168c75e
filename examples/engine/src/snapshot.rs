//! The engine seen from outside at one moment, for metrics and for people.

pub use quayline_batching::Reason as WaitReason;

use crate::reasons::{ReasonCount, TurnedAway};
use crate::request::{RequestId, Tick};

/// Everything `/metrics` and the live page show. Plain data; making one changes nothing and costs a few
/// microseconds plus one pass over requests and blocks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Requests that hold cache blocks and take part in steps, in scheduling order.
    pub running: Vec<RequestState>,
    /// The first [`WAITING_SHOWN_MAX`](Self::WAITING_SHOWN_MAX) requests of the waiting line, next first.
    pub waiting: Vec<RequestState>,
    /// How many are in the waiting line.
    pub waiting_requests: u32,
    /// The cache.
    pub blocks: Blocks,
    /// The prefix cache since the start.
    pub prefix: PrefixUse,
    /// Host memory behind the cache, if there is some.
    pub host: Option<HostUse>,
    /// The file behind it, if there is one.
    pub disk: Option<DiskUse>,
    /// Counters since the start.
    pub totals: Totals,
    /// The composition of the last step that ran anything.
    pub last_step: StepShape,
    /// One entry per block of the pool.
    pub occupancy: Vec<BlockUse>,
    /// How often requests got less than they wanted, and why.
    pub reasons: Vec<ReasonCount>,
    /// The last requests that were refused, or ended without a further token, oldest first.
    pub turned_away: Vec<TurnedAway>,
}

impl Snapshot {
    /// Most requests of the waiting line that a snapshot tells of: a long line must not make it slow.
    pub const WAITING_SHOWN_MAX: usize = 256;
}

/// One request's progress.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestState {
    /// Whose it is.
    pub id: RequestId,
    /// When it arrived.
    pub arrival: Tick,
    /// When it first took part in a step.
    pub started: Option<Tick>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// How many prompt tokens came from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens whose keys and values are in the cache.
    pub computed_tokens: u32,
    /// Tokens chosen so far.
    pub output_tokens: u32,
    /// At most so many will be chosen.
    pub output_tokens_max: u32,
    /// How often it had to give its blocks back.
    pub preemptions: u32,
    /// Blocks it holds, shared ones included.
    pub blocks: u32,
    /// Why it did not take part in the last step, or with less than it wanted; `None` if it did, or came after it.
    pub waits_for: Option<WaitReason>,
    /// Why it had to give its blocks back, the last time.
    pub preempted_for: Option<WaitReason>,
}

/// Use of the block pool. The null block is not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Blocks {
    /// Tokens per block.
    pub size: u32,
    /// Blocks that exist.
    pub total: u32,
    /// Blocks held by requests.
    pub used: u32,
    /// Blocks that nobody holds; cached ones among them.
    pub free: u32,
    /// Blocks that nobody holds but whose contents can still be reused.
    pub cached: u32,
    /// Bytes of keys and values in the whole pool.
    pub bytes: u64,
}

/// What the disk is still to get of host memory: lost, if the process ended now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskBacklog {
    /// Blocks that are not given to it yet.
    pub due_blocks: u32,
    /// Blocks being written.
    pub writing_blocks: u32,
}

/// How much the prefix cache saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixUse {
    /// Tokens looked up.
    pub queries: u64,
    /// Tokens found.
    pub hits: u64,
}

/// Host memory behind the cache: what lies there, and what it brought since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostUse {
    /// Blocks that it can hold.
    pub blocks: u32,
    /// Blocks that it holds.
    pub used: u32,
    /// Tokens that the cache did not have, of requests that started or resumed.
    pub queries: u64,
    /// How many of them were loaded from here.
    pub hits: u64,
    /// Tokens of preempted requests that were moved here.
    pub swapped_tokens: u64,
    /// Bytes copied here.
    pub saved_bytes: u64,
    /// Bytes copied back.
    pub loaded_bytes: u64,
    /// Blocks given up for others.
    pub evictions: u64,
}

/// A file behind host memory: what lies there, and what it did since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Blocks that it can hold.
    pub blocks: u32,
    /// Blocks that it holds.
    pub used: u32,
    /// Blocks that are being written or read.
    pub pending_blocks: u32,
    /// Blocks written to it.
    pub saved_blocks: u64,
    /// Blocks read from it.
    pub loaded_blocks: u64,
    /// Blocks that could not be written, or that were not read as they had been written.
    pub failed_blocks: u64,
    /// Bytes of the blocks written.
    pub saved_bytes: u64,
    /// Bytes of the blocks read.
    pub loaded_bytes: u64,
    /// Blocks given up for others.
    pub evictions: u64,
}

/// Counters that only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Steps that ran something.
    pub steps: u64,
    /// Of these, those that were planned while the one before them computed.
    pub steps_ahead: u64,
    /// Prompt tokens of requests that started; cached ones included.
    pub prompt_tokens: u64,
    /// Tokens chosen.
    pub output_tokens: u64,
    /// Requests that lost their blocks to another.
    pub preemptions: u64,
    /// Requests that took their prompt's keys and values over from another: further answers to one prompt.
    pub forks: u64,
    /// Blocks that were copied because one of those who shared them went its own way.
    pub copied_blocks: u64,
    /// Prompt tokens that other engines computed and delivered.
    pub delivered_tokens: u64,
    /// Requests accepted.
    pub accepted: u64,
    /// Requests that reached their end.
    pub finished: u64,
    /// Requests cancelled by the caller.
    pub cancelled: u64,
    /// Drafts.
    pub drafts: DraftTotals,
}

/// What became of drafts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DraftTotals {
    /// Times that a request had drafts verified.
    pub drafts: u64,
    /// Tokens that were drafted.
    pub draft_tokens: u64,
    /// Drafted tokens that became part of an answer.
    pub accepted_tokens: u64,
    /// Of these, the first of their draft, the second, and so on; the last entry counts all behind, too.
    pub accepted_by_place: [u64; Self::PLACES],
}

impl DraftTotals {
    /// Places in a draft that are counted apart.
    pub const PLACES: usize = 16;

    /// So many tokens were drafted for a request, and so many of them accepted.
    pub(crate) fn note(&mut self, drafted: u32, accepted: usize) {
        self.drafts += 1;
        self.draft_tokens += u64::from(drafted);
        self.accepted_tokens += accepted as u64;
        for place in 0..accepted {
            self.accepted_by_place[place.min(Self::PLACES - 1)] += 1;
        }
    }
}

/// What one step was made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepShape {
    /// Requests with prompt tokens in it.
    pub prefill_requests: u32,
    /// Their tokens.
    pub prefill_tokens: u32,
    /// Requests that fed back their last token.
    pub decode_requests: u32,
    /// Requests that had to give up their blocks for it.
    pub preempted: u32,
    /// The most tokens a step may have.
    pub tokens_max: u32,
}

/// The state of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockUse {
    /// Nobody's, contents worthless.
    Free = 0,
    /// Nobody's, but its contents can be reused.
    Cached = 1,
    /// Held by one request.
    Held = 2,
    /// Held by several.
    Shared = 3,
}
