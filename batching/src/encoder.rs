//! Items that an encoder must see before the tokens that stand for them can be computed: what it may do in
//! a step, and what of it is kept.

use std::collections::BTreeMap;

use crate::config::EncoderLimits;
use crate::error::RefusalReason;
use crate::id::RequestId;
use crate::plan::{Encode, Plan};
use crate::reason::Reason;
use crate::request::{EncoderItem, Request};

/// The encoder's step, and the cache of what it has encoded. Items are encoded whole or not at all. An item
/// stays while a request that it was encoded for has not computed all its tokens, and then until the room
/// is needed, the one unused for longest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Encoder {
    limits: Option<EncoderLimits>,
    step_tokens_left: u32,
    cached: BTreeMap<u64, Cached>,
    cached_tokens: u32,
    unused_tokens: u32,
    /// Cached contents that nobody uses, by when that began.
    unused: BTreeMap<u64, u64>,
    /// The contents that each request uses.
    uses: BTreeMap<RequestId, Vec<EncoderItem>>,
    clock: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Cached {
    tokens: u32,
    users: u32,
    /// When it was last let go, if nobody uses it.
    unused_since: u64,
}

impl Encoder {
    pub(crate) fn new(limits: Option<EncoderLimits>) -> Encoder {
        Encoder { limits, ..Encoder::default() }
    }

    pub(crate) fn examine(&self, request: &Request) -> Result<(), RefusalReason> {
        let mut from = 0;
        for item in &request.encoder_items {
            let beyond = u64::from(item.start) + u64::from(item.tokens) > u64::from(request.prompt_tokens);
            if item.tokens == 0 || item.start < from || beyond {
                return Err(RefusalReason::EncoderItems { start: item.start });
            }
            from = item.end();
            let tokens_max =
                self.limits.map_or(0, |limits| limits.step_tokens_max.min(limits.cache_tokens_max));
            if item.tokens > tokens_max {
                return Err(RefusalReason::EncoderItemTooLarge { item_tokens: item.tokens, tokens_max });
            }
        }
        Ok(())
    }

    pub(crate) fn begin_step(&mut self) {
        self.step_tokens_left = self.limits.map_or(0, |limits| limits.step_tokens_max);
    }

    /// Where a chunk of a request must end because an item in it cannot be encoded now, and why.
    pub(crate) fn end_of_chunk(&self, request: &Request, start: u32, end: u32) -> (u32, Option<Reason>) {
        let (mut left, mut free) = (self.step_tokens_left, self.free_tokens());
        for item in self.missing(request, start, end) {
            if let Some(cached) = self.cached.get(&item.content) {
                free -= if cached.users == 0 { cached.tokens } else { 0 };
            } else if item.tokens > left {
                let reason = Reason::EncoderSpent { item_tokens: item.tokens, left_tokens: left };
                return (item.start.max(start), Some(reason));
            } else if item.tokens > free {
                let reason = Reason::EncoderFull { item_tokens: item.tokens, free_tokens: free };
                return (item.start.max(start), Some(reason));
            } else {
                (left, free) = (left - item.tokens, free - item.tokens);
            }
        }
        (end, None)
    }

    /// A chunk is scheduled that [`end_of_chunk`](Encoder::end_of_chunk) let pass.
    pub(crate) fn schedule(&mut self, request: &Request, start: u32, end: u32, plan: &mut Plan) {
        let items: Vec<EncoderItem> = self.missing(request, start, end).collect();
        for item in items {
            if self.cached.contains_key(&item.content) {
                self.hold(item.content);
            } else {
                self.make_room(item.tokens, plan);
                self.step_tokens_left -= item.tokens;
                self.cached_tokens += item.tokens;
                let cached = Cached { tokens: item.tokens, users: 1, unused_since: 0 };
                self.cached.insert(item.content, cached);
                plan.encode.push(Encode { id: request.id, item });
            }
            self.uses.entry(request.id).or_default().push(item);
        }
    }

    /// A request loses its part of the step in the making: what was to be encoded for it is not, unless
    /// somebody else in this step counts on it.
    pub(crate) fn withdraw(&mut self, id: RequestId, plan: &mut Plan) {
        let Some(mut uses) = self.uses.remove(&id) else { return };
        plan.encode.retain_mut(|encode| {
            if encode.id != id {
                return true;
            }
            let content = encode.item.content;
            uses.retain(|item| item.content != content);
            let cached = self.cached.get_mut(&content).expect("what is encoded is cached");
            cached.users -= 1;
            if let Some((&other, _)) =
                self.uses.iter().find(|(_, uses)| uses.iter().any(|item| item.content == content))
            {
                encode.id = other;
                return true;
            }
            self.cached.remove(&content);
            self.step_tokens_left += encode.item.tokens;
            self.cached_tokens -= encode.item.tokens;
            false
        });
        self.uses.insert(id, uses);
    }

    /// The first `settled` tokens of a request are computed: what stands for them is not needed any more.
    pub(crate) fn settle(&mut self, id: RequestId, settled: u32) {
        let Some(uses) = self.uses.get_mut(&id) else { return };
        let done: Vec<EncoderItem> = uses.extract_if(.., |item| item.end() <= settled).collect();
        if uses.is_empty() {
            self.uses.remove(&id);
        }
        done.iter().for_each(|item| self.let_go(item.content));
    }

    /// A request leaves, or loses what it computed.
    pub(crate) fn leave(&mut self, id: RequestId) {
        for item in self.uses.remove(&id).unwrap_or_default() {
            self.let_go(item.content);
        }
    }

    /// Items of a request with tokens in `start..end` that it does not hold.
    fn missing<'a>(
        &'a self,
        request: &'a Request,
        start: u32,
        end: u32,
    ) -> impl Iterator<Item = EncoderItem> + 'a {
        let holds = |item: &EncoderItem| self.uses.get(&request.id).is_some_and(|uses| uses.contains(item));
        let inside = move |item: &&EncoderItem| item.start < end && item.end() > start;
        request.encoder_items.iter().filter(inside).filter(move |item| !holds(item)).copied()
    }

    fn free_tokens(&self) -> u32 {
        let cache_tokens_max = self.limits.map_or(0, |limits| limits.cache_tokens_max);
        cache_tokens_max - (self.cached_tokens - self.unused_tokens)
    }

    fn hold(&mut self, content: u64) {
        let cached = self.cached.get_mut(&content).expect("what is held is cached");
        if cached.users == 0 {
            self.unused.remove(&cached.unused_since);
            self.unused_tokens -= cached.tokens;
        }
        cached.users += 1;
    }

    fn let_go(&mut self, content: u64) {
        self.clock += 1;
        let cached = self.cached.get_mut(&content).expect("what is in use is cached");
        cached.users -= 1;
        if cached.users == 0 {
            cached.unused_since = self.clock;
            self.unused.insert(self.clock, content);
            self.unused_tokens += cached.tokens;
        }
    }

    fn make_room(&mut self, tokens: u32, plan: &mut Plan) {
        let cache_tokens_max = self.limits.map_or(0, |limits| limits.cache_tokens_max);
        while self.cached_tokens + tokens > cache_tokens_max {
            let (_, content) = self.unused.pop_first().expect("free tokens were counted before");
            let cached = self.cached.remove(&content).expect("what is unused is cached");
            self.cached_tokens -= cached.tokens;
            self.unused_tokens -= cached.tokens;
            plan.encoded_gone.push(content);
        }
    }

    /// True if the sums are right, and what is in use is counted as often as it is used.
    pub(crate) fn is_consistent(&self) -> bool {
        let tokens: u32 = self.cached.values().map(|cached| cached.tokens).sum();
        let unused = self.cached.values().filter(|cached| cached.users == 0);
        let users: u32 = self.cached.values().map(|cached| cached.users).sum();
        let uses: usize = self.uses.values().map(Vec::len).sum();
        tokens == self.cached_tokens
            && unused.map(|cached| cached.tokens).sum::<u32>() == self.unused_tokens
            && users as usize == uses
            && self.limits.is_none_or(|limits| tokens <= limits.cache_tokens_max)
    }
}
