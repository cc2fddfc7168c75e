//! One step's indices, checked once and brought to the device once.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Address, Device, Memory};
use super::plan::{Cut, Item, Merge, Plan, Work, plan};
use crate::{BatchInput, Error, Span, cpu};

/// Positions, slots, spans and block tables of a step, on the host (checked) and on the device.
pub struct Batch {
    pub(crate) host: cpu::Batch,
    memory: Memory,
    /// Where positions, slots, spans and block tables start in the memory.
    starts: [usize; 4],
    /// The step's work for each way of cutting it: layers that attend alike share one.
    plans: Mutex<Vec<(Cut, Arc<DevicePlan>)>>,
}

impl Batch {
    pub(crate) fn new(device: &Arc<dyn Device>, input: BatchInput<'_>) -> Result<Self, Error> {
        let host = cpu::Batch::new(input)?;
        let slots = last_writers(&host.slots);
        let spans: Vec<[u32; 4]> =
            host.spans.iter().map(|span| [span.query_start, span.query_len, span.context_len, 0]).collect();
        let parts: [&[u8]; 4] = [
            bytemuck::cast_slice(&host.positions),
            bytemuck::cast_slice(&slots),
            bytemuck::cast_slice(&spans),
            bytemuck::cast_slice(&host.block_tables),
        ];
        let (bytes, starts) = join(parts);
        Ok(Self { memory: Memory::of(device, &bytes)?, starts, host, plans: Mutex::default() })
    }

    /// Rows of the step.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.host.tokens()
    }

    pub(crate) fn positions(&self) -> Address {
        self.memory.address() + self.starts[0] as u64
    }

    pub(crate) fn slots(&self) -> Address {
        self.memory.address() + self.starts[1] as u64
    }

    pub(crate) fn spans(&self) -> Address {
        self.memory.address() + self.starts[2] as u64
    }

    pub(crate) fn block_tables(&self) -> Address {
        self.memory.address() + self.starts[3] as u64
    }

    /// Whether some row is in no span, and so gets zeros from attention.
    pub(crate) fn has_uncovered_rows(&self) -> bool {
        let covered: usize = self.host.spans.iter().map(|span| span.query_len as usize).sum();
        covered < self.tokens()
    }

    /// The step's work, cut once for all layers that attend alike.
    pub(crate) fn plan(&self, device: &Arc<dyn Device>, cut: Cut) -> Result<Arc<DevicePlan>, Error> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, plan)) = plans.iter().find(|(known, _)| *known == cut) {
            return Ok(Arc::clone(plan));
        }
        let plan = Arc::new(DevicePlan::new(device, plan(&self.host.spans, cut))?);
        plans.push((cut, Arc::clone(&plan)));
        Ok(plan)
    }

    /// The spans of the step.
    #[must_use]
    pub fn spans_host(&self) -> &[Span] {
        &self.host.spans
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("host", &self.host).finish_non_exhaustive()
    }
}

/// A plan's items and merges on the device.
#[derive(Debug)]
pub(crate) struct DevicePlan {
    memory: Memory,
    starts: [usize; 4],
    plan: Plan,
}

/// One block shape's part of a plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceWork {
    pub(crate) items: Address,
    pub(crate) items_len: usize,
    pub(crate) merges: Address,
    pub(crate) merges_len: usize,
    pub(crate) partials: usize,
}

impl DevicePlan {
    fn new(device: &Arc<dyn Device>, plan: Plan) -> Result<Self, Error> {
        let items = |work: &Work| bytemuck::cast_slice::<Item, u8>(&work.items).to_vec();
        let merges = |work: &Work| bytemuck::cast_slice::<Merge, u8>(&work.merges).to_vec();
        let parts = [items(&plan.few), merges(&plan.few), items(&plan.many), merges(&plan.many)];
        let (bytes, starts) = join(parts.each_ref().map(Vec::as_slice));
        Ok(Self { memory: Memory::of(device, &bytes)?, starts, plan })
    }

    pub(crate) fn few(&self) -> DeviceWork {
        self.work(&self.plan.few, 0)
    }

    pub(crate) fn many(&self) -> DeviceWork {
        self.work(&self.plan.many, 2)
    }

    fn work(&self, work: &Work, start: usize) -> DeviceWork {
        let at = |part: usize| self.memory.address() + self.starts[part] as u64;
        DeviceWork {
            items: at(start),
            items_len: work.items.len(),
            merges: at(start + 1),
            merges_len: work.merges.len(),
            partials: work.partials as usize,
        }
    }
}

/// Parts one after the other, each from a multiple of 16 bytes, so that they travel in one copy.
fn join(parts: [&[u8]; 4]) -> (Vec<u8>, [usize; 4]) {
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len() + 16).sum());
    let starts = parts.map(|part| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let start = bytes.len();
        bytes.extend_from_slice(part);
        start
    });
    (bytes, starts)
}

/// Slots with those crossed out that a later token writes again: on a device all tokens write at once.
fn last_writers(slots: &[i64]) -> Vec<i64> {
    let mut slots = slots.to_vec();
    if slots.is_sorted_by(|a, b| a < b) {
        return slots;
    }
    let mut taken = HashSet::with_capacity(slots.len());
    for slot in slots.iter_mut().rev() {
        if *slot >= 0 && !taken.insert(*slot) {
            *slot = -1;
        }
    }
    slots
}
