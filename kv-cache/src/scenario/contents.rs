//! Contents by their names: what a sequence knows is called by that sequence, wherever it lies.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::words::number;
use super::{Cache, Named, list};
use crate::hash::AnyHasher;
use crate::tier::{BlockKey, Offload};
use crate::{BlockHasher, BlockId, GroupId};

type Digest = <AnyHasher as BlockHasher>::Digest;
pub(super) type Key = BlockKey<Digest>;

/// Tiers that are spoken to.
#[derive(Debug)]
pub(super) struct Behind {
    pub(super) offload: Offload<Digest>,
    /// What contents are called: by the first sequence and hash that named them.
    pub(super) names: BTreeMap<Key, String>,
}

/// What a content is called.
fn label(name: &str, index: usize, group: GroupId) -> String {
    if group.0 == 0 { format!("{name}.{index}") } else { format!("{name}.{index}:{group}") }
}

impl Behind {
    /// The first sequence to know a content gives it its name.
    pub(super) fn learn_names(&mut self, cache: &Cache, sequences: &Named) {
        for (name, progress) in &sequences.0 {
            for (index, &digest) in cache.hashes(progress.id).unwrap_or_default().iter().enumerate() {
                for group in
                    (0..=u8::MAX).map(GroupId).take_while(|&g| cache.table_in(progress.id, g).is_ok())
                {
                    self.names.entry(Key { digest, group }).or_insert_with(|| label(name, index, group));
                }
            }
        }
    }

    pub(super) fn name(&self, key: Key) -> String {
        self.names.get(&key).cloned().unwrap_or_else(|| "?".to_owned())
    }

    pub(super) fn named(&self, keys: impl IntoIterator<Item = Key>) -> String {
        list(keys.into_iter().map(|key| self.name(key)))
    }

    /// `A.3`, `A.0-3` or `A.3:1`: contents of a sequence, with the blocks that it has for them.
    pub(super) fn contents(
        &self,
        cache: &Cache,
        sequences: &mut Named,
        word: &str,
    ) -> Result<Vec<(Key, BlockId)>, String> {
        let (name, rest) = word.split_once('.').ok_or_else(|| format!("`{word}` is not SEQUENCE.INDEX"))?;
        let (range, group) = rest.split_once(':').unwrap_or((rest, "0"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let group = GroupId(u8::try_from(number(group)?).unwrap_or(u8::MAX));
        let id = sequences.of(name).id;
        let Ok(hashes) = cache.hashes(id) else {
            return self.remembered(name, number(first)?..=number(last)?, group);
        };
        let table = cache.table_in(id, group).map_err(|error| error.to_string())?;
        let indices = number(first)? as usize..=number(last)? as usize;
        let content = |index: usize| {
            let digest = *hashes.get(index).ok_or_else(|| format!("{name} has no hash {index}"))?;
            let block = table.blocks().get(index).copied().unwrap_or(BlockId::NULL);
            Ok((Key { digest, group }, block))
        };
        indices.map(content).collect()
    }

    /// Contents of a sequence that is closed, which has no blocks for them.
    fn remembered(
        &self,
        name: &str,
        mut indices: RangeInclusive<u32>,
        group: GroupId,
    ) -> Result<Vec<(Key, BlockId)>, String> {
        let mut contents = Vec::new();
        indices.try_for_each(|index| {
            let label = label(name, index as usize, group);
            let key = self.names.iter().find(|(_, name)| **name == label).map(|(key, _)| *key);
            contents.push((key.ok_or_else(|| format!("nothing is called {label}"))?, BlockId::NULL));
            Ok::<(), String>(())
        })?;
        Ok(contents)
    }
}
