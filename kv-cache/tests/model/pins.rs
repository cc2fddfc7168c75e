//! Pins: prefixes that stay though nobody uses them.

use std::collections::BTreeSet;

use quayline_kv_cache::*;

use super::{Kind, Leaving, Model};

#[derive(Clone)]
pub(super) struct Pin {
    blocks: Vec<Leaving>,
    until: Option<Tick>,
}

impl<P: Eviction> Model<P> {
    pub(super) fn pins_of(&self, block: BlockId) -> u32 {
        let pinned = self.pins.values().flat_map(|pin| &pin.blocks);
        pinned.filter(|leaving| leaving.block == block).count() as u32
    }

    /// Blocks that pins hold, each once.
    pub(crate) fn pinned(&self) -> u32 {
        self.pins
            .values()
            .flat_map(|pin| &pin.blocks)
            .map(|leaving| leaving.block)
            .collect::<BTreeSet<_>>()
            .len() as u32
    }

    pub(crate) fn pin(
        &mut self,
        name: u64,
        id: u64,
        tokens: u32,
        until: Option<Tick>,
    ) -> Result<Pinned, Error> {
        self.get(id)?;
        let tables: Vec<Vec<BlockId>> = if self.sequences[&id].is_empty() {
            self.lookup(id)?;
            self.hit(id).1
        } else {
            self.sequences[&id].tables.iter().map(|table| table.blocks.clone()).collect()
        };
        let mut blocks = Vec::new();
        for (group, mut table) in tables.into_iter().enumerate() {
            table.truncate((tokens / self.groups[group].size) as usize);
            blocks.extend(self.worth_keeping(group, &table));
        }
        Ok(self.keep(name, Pin { blocks, until }))
    }

    /// Pins what is found in full under the first `count` hashes of a sequence.
    pub(crate) fn pin_hashes(&mut self, name: u64, id: u64, count: u32) -> Pinned {
        let sequence = self.sequences[&id].clone();
        let mut blocks = Vec::new();
        for group in 0..self.groups.len() {
            let super::Group { kind, size } = self.groups[group];
            let found = (1..=count * self.unit / size).map(|n| {
                let end = n * size;
                let block = self.find(group, &sequence, end)?;
                let content = self.whole_content(block)?;
                (Some(&content.text) == self.text(&sequence, end).as_ref()).then_some(block)
            });
            let table: Vec<BlockId> = match kind {
                Kind::Full => found.map_while(|block| block).collect(),
                _ => found.map(Option::unwrap_or_default).collect(),
            };
            blocks.extend(self.worth_keeping(group, &table));
        }
        self.keep(name, Pin { blocks, until: None })
    }

    pub(crate) fn unpin(&mut self, name: u64) -> Result<BlockCount, Error> {
        let pin = self.pins.remove(&name).ok_or(Error::NoSuchPin { pin: PinId(name) })?;
        let leaving: Vec<Leaving> = pin.blocks.iter().rev().copied().collect();
        self.let_go(&leaving);
        self.drop_unwanted_copies();
        Ok(BlockCount(leaving.len() as u32))
    }

    pub(crate) fn expire(&mut self, now: Tick) -> BlockCount {
        let mut due: Vec<(Tick, u64)> = self
            .pins
            .iter()
            .filter_map(|(&name, pin)| Some((pin.until.filter(|&until| until <= now)?, name)))
            .collect();
        due.sort_unstable();
        BlockCount(due.into_iter().map(|(_, name)| self.unpin(name).map_or(0, BlockCount::get)).sum())
    }

    pub(super) fn unpin_all(&mut self) {
        for name in self.pins.keys().copied().collect::<Vec<_>>() {
            let _blocks = self.unpin(name);
        }
    }

    /// The blocks of a table that can be found, each with the one that its content needs.
    fn worth_keeping(&self, group: usize, table: &[BlockId]) -> Vec<Leaving> {
        let is_kept = |block: BlockId| block != BlockId::NULL && self.is_cached(block);
        let kept = table.iter().enumerate().filter(|&(_, &block)| is_kept(block));
        kept.map(|(index, &block)| {
            let before = index.checked_sub(1).map(|before| table[before]);
            let before = before.filter(|&before| self.groups[group].kind == Kind::Full && is_kept(before));
            Leaving { block, index: index as u32, before }
        })
        .collect()
    }

    fn keep(&mut self, name: u64, pin: Pin) -> Pinned {
        let (pinned, max) = (self.pinned(), self.config.pinned_blocks_max.0);
        let unused = pin.blocks.iter().filter(|leaving| self.is_free(leaving.block)).count() as u32;
        let free = self.free() - self.set_aside();
        let old = self.pins.insert(name, pin.clone());
        let need = self.pinned();
        let count = BlockCount;
        let refusal = if need > max && need > pinned {
            Some(Pinned::OverCap { need: count(need), pinned: count(pinned), max: count(max) })
        } else {
            (unused > free).then_some(Pinned::SetAside { need: count(unused), free: count(free) })
        };
        self.pins.remove(&name);
        if let Some(refusal) = refusal {
            self.pins.extend(old.map(|old| (name, old)));
            return refusal;
        }
        // The old pin goes after the new one has come.
        let kept: Vec<Leaving> = old.iter().flat_map(|old| old.blocks.iter().rev().copied()).collect();
        self.pins.extend(old.map(|old| (u64::MAX, old)));
        for leaving in &pin.blocks {
            if self.is_free(leaving.block) {
                self.policy.revive(leaving.block);
            }
        }
        let blocks = count(pin.blocks.len() as u32);
        self.pins.remove(&u64::MAX);
        self.pins.insert(name, pin);
        self.let_go(&kept);
        self.drop_unwanted_copies();
        Pinned::Held { blocks }
    }
}
