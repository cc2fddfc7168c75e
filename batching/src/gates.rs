//! Limits on who may run at the same time, beside room: long prompts, and adapters.

use std::collections::BTreeMap;

use crate::batcher::Batcher;
use crate::config::Config;
use crate::id::{AdapterId, RequestId, Tick};
use crate::order::Order;
use crate::queue::Class;
use crate::reason::Reason;

/// How many of each kind run, and may.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gates {
    longs: u32,
    longs_max: Option<u32>,
    adapters: BTreeMap<AdapterId, u32>,
    adapters_max: Option<u32>,
    /// The adapter whose place is wanted by a request that has waited for too long, and that request.
    yields: Option<(AdapterId, RequestId)>,
}

impl Gates {
    pub(crate) fn new(config: &Config) -> Gates {
        Gates {
            longs: 0,
            longs_max: config.long_prefills.map(|long| long.running_max.get()),
            adapters: BTreeMap::new(),
            adapters_max: config.adapters_max,
            yields: None,
        }
    }

    /// Why nobody of this class may start to run now.
    pub(crate) fn closed(&self, class: Class) -> Option<Reason> {
        let adapters = u32::try_from(self.adapters.len()).unwrap_or(u32::MAX);
        match (self.longs_max, class.adapter, self.adapters_max) {
            (Some(running_max), _, _) if class.long && self.longs >= running_max => {
                Some(Reason::LongPrefills { running_max })
            }
            (_, Some(adapter), Some(adapters_max))
                if adapters >= adapters_max && !self.adapters.contains_key(&adapter) =>
            {
                Some(Reason::AdaptersFull { adapters_max })
            }
            (_, Some(adapter), _) => {
                let (_, to) = self.yields.filter(|&(yields, _)| yields == adapter)?;
                Some(Reason::AdapterYields { to })
            }
            _ => None,
        }
    }

    /// From now on nobody starts to run with the adapter that the fewest use, so that its place is free as soon
    /// as these have ended. `None` takes that back.
    fn yield_to(&mut self, waiting: Option<RequestId>) {
        let fewest = self.adapters.iter().min_by_key(|&(_, running)| running);
        self.yields = fewest.map(|(&adapter, _)| adapter).zip(waiting);
    }

    pub(crate) fn enter(&mut self, class: Class) {
        if let Some(adapter) = class.adapter {
            *self.adapters.entry(adapter).or_default() += 1;
        }
        self.longs += u32::from(class.long);
    }

    pub(crate) fn leave(&mut self, class: Class) {
        if let Some(adapter) = class.adapter {
            let running = self.adapters.get_mut(&adapter).expect("a running adapter is counted");
            *running -= 1;
            if *running == 0 {
                self.adapters.remove(&adapter);
            }
        }
        self.longs -= u32::from(class.long);
    }

    pub(crate) fn longs(&self) -> u32 {
        self.longs
    }

    pub(crate) fn adapters(&self) -> &BTreeMap<AdapterId, u32> {
        &self.adapters
    }
}

impl<O: Order> Batcher<O> {
    /// Whoever waits for a free place for its adapter, and has waited for too long, gets one: otherwise it would wait
    /// for as long as requests with the adapters in use keep coming.
    pub(crate) fn yield_adapters(&mut self, now: Tick) {
        self.gates.yield_to(None);
        let Some(patience_ends) = self.patience_ends(now) else { return };
        let full = |class| matches!(self.gates.closed(class), Some(Reason::AdaptersFull { .. }));
        let waiting = self.queue.oldest_before(patience_ends, full);
        self.gates.yield_to(waiting.map(|slot| self.sequences.at(slot).id));
    }
}
