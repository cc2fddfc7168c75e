//! Limits on who may run at the same time, beside room: long prompts, and adapters.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::id::AdapterId;
use crate::queue::Class;
use crate::reason::Reason;

/// How many of each kind run, and may.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gates {
    longs: u32,
    longs_max: Option<u32>,
    adapters: BTreeMap<AdapterId, u32>,
    adapters_max: Option<u32>,
}

impl Gates {
    pub(crate) fn new(config: &Config) -> Gates {
        Gates {
            longs: 0,
            longs_max: config.long_prefills.map(|long| long.running_max.get()),
            adapters: BTreeMap::new(),
            adapters_max: config.adapters_max,
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
            _ => None,
        }
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
