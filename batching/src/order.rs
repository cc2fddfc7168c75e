//! Who goes first among those who wait, and who yields first among those who run.

mod fair;

use crate::error::WeightError;
use crate::id::TenantId;
use crate::request::Request;

pub use fair::Fair;

/// An order of requests. [`Policy`] has the usual ones; write your own for any other.
///
/// Requests wait in lanes. Within a lane the lowest [`rank`](Order::rank) is first; of the lanes, the one
/// with the lowest [`level`](Order::level), then the one whose first request has the lowest rank. A rank is
/// asked for when a request joins the queue and stays; a level is asked for whenever the first of all is
/// looked for. So one lane is enough for every order that is known when a request comes, and lanes with
/// levels let an order move a thousand requests at once.
///
/// The same answers must follow from the same calls, on every machine.
pub trait Order {
    /// The lane of a request that was just added. Asked once in its life.
    fn lane(&mut self, request: &Request) -> Lane {
        let _ = request;
        Lane(0)
    }

    /// The place of a request in its lane: lowest first, ties by id.
    fn rank(&self, waiting: &Candidate<'_>) -> Rank;

    /// The place of a lane among the lanes: lowest first. It must not fall while somebody waits in the
    /// lane, but for [`wakes`](Order::wakes).
    fn level(&self, lane: Lane) -> u128 {
        let _ = lane;
        0
    }

    /// Somebody waits in a lane in which nobody did. `lowest` is the lowest level of the lanes in which
    /// others wait.
    fn wakes(&mut self, lane: Lane, lowest: Option<u128>) {
        let _ = (lane, lowest);
    }

    /// A request of the lane was served.
    fn charge(&mut self, lane: Lane, service: Service) {
        let _ = (lane, service);
    }

    /// A request of the lane left for good.
    fn leaves(&mut self, lane: Lane) {
        let _ = lane;
    }

    /// The running request with the highest rank yields first when memory runs out; ties by the order of
    /// admission, the last first. By default all are equal, so the one admitted last yields.
    fn yields(&self, running: &Candidate<'_>, lane: Lane) -> Rank {
        let _ = (running, lane);
        Rank(0, 0)
    }

    /// How many of the waiting are looked up in the memory in each step, in turn, for
    /// [`Candidate::cached_tokens`].
    fn lookups_max(&self) -> u32 {
        0
    }
}

/// A group of waiting requests that an [`Order`] moves together. Small numbers: they index lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Lane(pub u32);

/// A place in a lane; the lowest is first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rank(pub i128, pub u64);

/// What an order may look at.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// As it was added.
    pub request: &'a Request,
    /// Counts up in the order of [`add`](crate::Batcher::add). Who is preempted gets a turn before all
    /// others.
    pub turn: i64,
    /// Tokens generated so far.
    pub new_tokens: u32,
    /// How many of its tokens the memory had when it was last looked up; see
    /// [`lookups_max`](Order::lookups_max).
    pub cached_tokens: u32,
}

/// What a request got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// It was admitted for the first time, and so many tokens of its prompt must be computed.
    Prompt {
        /// Those that are not cached.
        tokens: u32,
    },
    /// It generated tokens.
    Output {
        /// How many.
        tokens: u32,
    },
}

/// The orders that come with this crate.
///
/// First come, deadline (if all have targets) and fair (if the tenants are always the same) let everybody come
/// to its end by themselves. By the others whoever is last may wait for ever, unless
/// [`Config::patience_ticks`](crate::Config::patience_ticks) is set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Policy {
    /// In the order of `add`. The one admitted last yields first; a preempted request goes to the front.
    #[default]
    FirstCome,
    /// Lowest [`priority`](Request::priority) first, ties by arrival, then by id. The last in this order
    /// yields first. A preempted request waits at its place in this order.
    Priority,
    /// Earliest due date of the next token first, by [`targets`](Request::targets); who has none comes
    /// after all who have. The one that is due last yields first.
    Deadline,
    /// Fewest tokens still to generate first, by [`expected_new_tokens`](Request::expected_new_tokens). The
    /// one with the most yields first.
    ShortestJob,
    /// Most cached tokens first, ties by arrival. Cached tokens are looked up for a few of the waiting in
    /// each step, the new ones first and then all in turn, so that a long queue costs no more than a short one.
    LongestPrefix {
        /// How many are looked up in a step.
        lookups_max: u32,
    },
    /// Each tenant gets the same number of tokens, in proportion to its weight.
    Fair(Fair),
}

impl Policy {
    /// Fair among tenants; see [`Fair::new`].
    pub fn fair() -> Policy {
        Policy::Fair(Fair::new())
    }

    pub(crate) fn set_weight(&mut self, tenant: TenantId, weight: f64) -> Result<(), WeightError> {
        match self {
            Policy::Fair(fair) => fair.set_weight(tenant, weight),
            _ => Err(WeightError::NotFair),
        }
    }
}

impl Order for Policy {
    fn lane(&mut self, request: &Request) -> Lane {
        match self {
            Policy::Fair(fair) => fair.lane(request),
            _ => Lane(0),
        }
    }

    fn rank(&self, waiting: &Candidate<'_>) -> Rank {
        let Candidate { request, turn, cached_tokens, .. } = *waiting;
        match self {
            Policy::FirstCome | Policy::Fair(_) => Rank(i128::from(turn), 0),
            Policy::Priority => by_priority(request),
            Policy::Deadline => by_due_date(waiting),
            Policy::ShortestJob => Rank(left_to_generate(waiting), request.arrival.0),
            Policy::LongestPrefix { .. } => Rank(-i128::from(cached_tokens), request.arrival.0),
        }
    }

    fn level(&self, lane: Lane) -> u128 {
        match self {
            Policy::Fair(fair) => fair.level(lane),
            _ => 0,
        }
    }

    fn wakes(&mut self, lane: Lane, lowest: Option<u128>) {
        if let Policy::Fair(fair) = self {
            fair.wakes(lane, lowest);
        }
    }

    fn charge(&mut self, lane: Lane, service: Service) {
        if let Policy::Fair(fair) = self {
            fair.charge(lane, service);
        }
    }

    fn leaves(&mut self, lane: Lane) {
        if let Policy::Fair(fair) = self {
            fair.leaves(lane);
        }
    }

    fn yields(&self, running: &Candidate<'_>, lane: Lane) -> Rank {
        match self {
            Policy::FirstCome | Policy::LongestPrefix { .. } => Rank::default(),
            Policy::Priority => by_priority(running.request),
            Policy::Deadline => by_due_date(running),
            Policy::ShortestJob => Rank(left_to_generate(running), 0),
            Policy::Fair(fair) => fair.yields(running, lane),
        }
    }

    fn lookups_max(&self) -> u32 {
        match *self {
            Policy::LongestPrefix { lookups_max } => lookups_max,
            _ => 0,
        }
    }
}

fn by_priority(request: &Request) -> Rank {
    Rank(i128::from(request.priority), request.arrival.0)
}

/// When the next token is due. Who has no targets is behind all who have.
fn by_due_date(candidate: &Candidate<'_>) -> Rank {
    let Request { arrival, targets, .. } = candidate.request;
    let due = targets.as_ref().map_or(i128::from(u64::MAX) << 40, |targets| {
        let tokens = i128::from(targets.token_ticks) * i128::from(candidate.new_tokens);
        i128::from(arrival.0) + i128::from(targets.first_token_ticks) + tokens
    });
    Rank(due, arrival.0)
}

fn left_to_generate(candidate: &Candidate<'_>) -> i128 {
    let Request { expected_new_tokens, stop, .. } = candidate.request;
    let expected = expected_new_tokens.unwrap_or(stop.new_tokens_max).min(stop.new_tokens_max);
    i128::from(expected.saturating_sub(candidate.new_tokens))
}
