//! One step's indices, checked once and brought to the device once.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::Address;
use super::memory::{Keeper, Memory};
use super::plan::{Cut, Item, Merge, Plan, ROWS_FEW, Work, plan};
use crate::error::{below, same};
use crate::{BatchInput, Error, Span, cpu};

/// Positions, slots, spans and block tables of a step, on the host (checked) and on the device.
pub struct Batch {
    pub(crate) host: cpu::Batch,
    memory: Memory,
    /// Where positions, slots, spans and block tables start in the memory.
    starts: [usize; 4],
    /// The step's work for each way of cutting it: layers that attend alike share one.
    plans: Mutex<Vec<(Cut, Arc<DevicePlan>)>>,
    /// Plans have room for any contexts: see [`Batch::refill`].
    fixed: bool,
    /// What the operators that were called with this batch have room for.
    limits: Mutex<Limits>,
}

/// Indices must be below these.
#[derive(Clone, Copy, Debug)]
struct Limits {
    blocks: usize,
    slots: usize,
    positions: usize,
}

impl Batch {
    pub(crate) fn new(device: &Arc<Keeper>, input: BatchInput<'_>, fixed: bool) -> Result<Self, Error> {
        let host = cpu::Batch::new(input)?;
        let (bytes, starts) = on_device(&host);
        let limits = Limits { blocks: usize::MAX, slots: usize::MAX, positions: usize::MAX };
        Ok(Self {
            memory: Memory::of(device, &bytes)?,
            starts,
            host,
            plans: Mutex::default(),
            fixed,
            limits: Mutex::new(limits),
        })
    }

    /// Another step in the place of this one, for the same recording: contexts, positions, slots and tables may
    /// change, and a context of 0 with a slot of -1 stands for nobody.
    ///
    /// # Errors
    /// When the batch is not fixed; when the number of tokens, the spans' queries, the length of tables or the
    /// block size are others; when an index is above what the operators have room for that were called with this
    /// batch; or when the device fails. Then the step is as it was, but for the last.
    pub fn refill(&mut self, input: BatchInput<'_>) -> Result<(), Error> {
        let operator = "refill";
        same(operator, "fixed batches", usize::from(self.fixed), 1)?;
        let host = cpu::Batch::new(input)?;
        same(operator, "tokens", host.tokens(), self.host.tokens())?;
        same(operator, "spans", host.spans.len(), self.host.spans.len())?;
        same(operator, "blocks of a table", host.blocks_max, self.host.blocks_max)?;
        same(operator, "block_size", host.block_size, self.host.block_size)?;
        for (new, old) in host.spans.iter().zip(&self.host.spans) {
            same(operator, "first query of a span", new.query_start as usize, old.query_start as usize)?;
            same(operator, "queries of a span", new.query_len as usize, old.query_len as usize)?;
        }
        let limits = *self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(top) = host.block_top {
            below(operator, "block", top as usize, limits.blocks)?;
        }
        if let Some(top) = host.slot_top {
            below(operator, "slot", usize::try_from(top).unwrap_or(usize::MAX), limits.slots)?;
        }
        if let Some(top) = host.position_top {
            below(operator, "position", top as usize, limits.positions)?;
        }
        self.host = host;
        let (bytes, _) = on_device(&self.host);
        self.memory.write(&bytes)?;
        for (cut, on_device) in self.plans.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            on_device.refill(&plan(&self.host.spans, *cut))?;
        }
        Ok(())
    }

    /// Notes that blocks, slots or positions from here on are not there.
    pub(crate) fn limit(&self, blocks: usize, slots: usize, positions: usize) {
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        limits.blocks = limits.blocks.min(blocks);
        limits.slots = limits.slots.min(slots);
        limits.positions = limits.positions.min(positions);
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
    pub(crate) fn plan(&self, device: &Arc<Keeper>, cut: Cut) -> Result<Arc<DevicePlan>, Error> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, plan)) = plans.iter().find(|(known, _)| *known == cut) {
            return Ok(Arc::clone(plan));
        }
        let plan = plan(&self.host.spans, cut);
        let room = if self.fixed { Room::for_any_context(&self.host, cut) } else { Room::of(&plan) };
        let plan = Arc::new(DevicePlan::new(device, &plan, room)?);
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

/// A step as it lies on the device. After the spans there is one without queries, for items that are nobody's.
fn on_device(host: &cpu::Batch) -> (Vec<u8>, [usize; 4]) {
    let slots = last_writers(&host.slots);
    let spans = host.spans.iter().map(|span| [span.query_start, span.query_len, span.context_len, 0]);
    let spans: Vec<[u32; 4]> = spans.chain([[0; 4]]).collect();
    join([
        bytemuck::cast_slice(&host.positions),
        bytemuck::cast_slice(&slots),
        bytemuck::cast_slice(&spans),
        bytemuck::cast_slice(&host.block_tables),
    ])
}

/// How many items, merges and partial results a block shape has, or has room for.
#[derive(Clone, Copy, Debug, Default)]
struct Lengths {
    items: usize,
    merges: usize,
    partials: usize,
    /// Items of more than one chunk: those that come first.
    items_long: usize,
}

/// Of both block shapes.
#[derive(Clone, Copy, Debug)]
struct Room {
    few: Lengths,
    many: Lengths,
    /// The span without queries.
    nobody: u32,
}

impl Room {
    /// Just what a plan needs.
    fn of(plan: &Plan) -> Self {
        let of = |work: &Work| Lengths {
            items: work.items.len(),
            merges: work.merges.len(),
            partials: work.partials as usize,
            items_long: work.items.partition_point(|item| item.chunk_last - item.chunk_first > 1),
        };
        Self { few: of(&plan.few), many: of(&plan.many), nobody: 0 }
    }

    /// What the spans need whatever their contexts: all tiles together into no more pieces than there are tiles and
    /// slots, and no more of them cut than have more than an even share.
    fn for_any_context(host: &cpu::Batch, cut: Cut) -> Self {
        let chunks = (host.blocks_max * host.block_size).div_ceil(cut.chunk as usize);
        let mut room = Self { few: Lengths::default(), many: Lengths::default(), nobody: 0 };
        for span in &host.spans {
            let rows = span.query_len as usize * cut.group as usize;
            let few = rows <= ROWS_FEW as usize;
            let tiles = rows.div_ceil(if few { ROWS_FEW } else { cut.rows_many } as usize);
            let lengths = if few { &mut room.few } else { &mut room.many };
            lengths.items += tiles;
        }
        let cut_tiles = (cut.slots / cut.kv_heads.max(1)) as usize;
        for lengths in [&mut room.few, &mut room.many].into_iter().filter(|lengths| lengths.items > 0) {
            lengths.merges = lengths.items.min(cut_tiles);
            lengths.partials = lengths.merges * chunks;
            lengths.items += cut.slots as usize;
            lengths.items_long = if chunks > 1 { lengths.items } else { 0 };
        }
        room.nobody = u32::try_from(host.spans.len()).unwrap_or(u32::MAX);
        room
    }
}

/// A plan's items and merges on the device, filled up with nobody's to the room that there is.
#[derive(Debug)]
pub(crate) struct DevicePlan {
    memory: Memory,
    starts: [usize; 4],
    room: Room,
}

/// One block shape's part of a plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceWork {
    pub(crate) items: Address,
    pub(crate) items_len: usize,
    pub(crate) merges: Address,
    pub(crate) merges_len: usize,
    pub(crate) partials: usize,
    /// No item from here on has more than one chunk.
    pub(crate) items_long: usize,
}

impl DevicePlan {
    fn new(device: &Arc<Keeper>, plan: &Plan, room: Room) -> Result<Self, Error> {
        let (bytes, starts) = filled(plan, room);
        Ok(Self { memory: Memory::of(device, &bytes)?, starts, room })
    }

    /// Another plan in the place of this one.
    fn refill(&self, plan: &Plan) -> Result<(), Error> {
        self.memory.write(&filled(plan, self.room).0)
    }

    pub(crate) fn few(&self) -> DeviceWork {
        self.work(self.room.few, 0)
    }

    pub(crate) fn many(&self) -> DeviceWork {
        self.work(self.room.many, 2)
    }

    fn work(&self, lengths: Lengths, start: usize) -> DeviceWork {
        let at = |part: usize| self.memory.address() + self.starts[part] as u64;
        DeviceWork {
            items: at(start),
            items_len: lengths.items,
            merges: at(start + 1),
            merges_len: lengths.merges,
            partials: lengths.partials,
            items_long: lengths.items_long,
        }
    }
}

/// The bytes of a plan with nobody's items and merges up to the room.
fn filled(plan: &Plan, room: Room) -> (Vec<u8>, [usize; 4]) {
    let item = Item { span: room.nobody, row: 0, chunk_first: 0, chunk_last: 0, partial: Item::WHOLE };
    let merge = Merge { partial: 0, count: 0, query_start: 0, row: 0, rows: 0 };
    let parts = [(&plan.few, room.few), (&plan.many, room.many)].map(|(work, lengths)| {
        let (mut items, mut merges) = (work.items.clone(), work.merges.clone());
        assert!(
            items.len() <= lengths.items && merges.len() <= lengths.merges,
            "{lengths:?} has room for any plan"
        );
        items.resize(lengths.items, item);
        merges.resize(lengths.merges, merge);
        (items, merges)
    });
    let [(few_items, few_merges), (many_items, many_merges)] = &parts;
    join([
        bytemuck::cast_slice(few_items),
        bytemuck::cast_slice(few_merges),
        bytemuck::cast_slice(many_items),
        bytemuck::cast_slice(many_merges),
    ])
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
