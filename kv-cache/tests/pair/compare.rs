//! What must be the same in both after every call.

use std::collections::{BTreeMap, BTreeSet};

use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use super::Pair;
use crate::model::Text;
use crate::seen::saw;

impl<E: Eviction + Clone, P: Eviction + Clone> Pair<E, P> {
    pub(super) fn compare(&mut self) {
        let Pair { cache, model, .. } = self;
        cache.check().unwrap();
        let free: Vec<BlockId> = cache.free_blocks().collect();
        assert_eq!(
            free,
            model.worthless.iter().copied().chain(model.policy.order()).collect::<Vec<_>>(),
            "order of the free list"
        );
        let stats = cache.stats();
        let all = stats.free.0 + stats.used.0 + stats.pinned.0 + 1;
        assert_eq!(all, cache.config().block_count.0, "free + used + pinned + null = all");
        assert_eq!((stats.free.0, stats.pinned.0), (model.free(), model.pinned()));
        assert_eq!((stats.first, stats.again, stats.evictions), (model.first, model.again, model.evictions));
        assert_eq!((stats.cached.0, stats.reserved.0), (model.cached(), model.set_aside()));
        assert_eq!(stats.sequences as usize, model.sequences.len());
        assert_eq!(cache.copies(), model.copies);
        for (&id, sequence) in &model.sequences {
            for (group, table) in (0..).map(GroupId).zip(&sequence.tables) {
                let blocks = cache.table_in(SequenceId(id), group).unwrap().blocks();
                assert_eq!(blocks, table.blocks, "table of {id} in {group}");
            }
            assert_eq!(cache.known(SequenceId(id)).unwrap().0 as usize, sequence.tokens.len());
        }
        self.compare_content();
        self.calls += 1;
        if self.calls.is_multiple_of(8) {
            self.hear();
        }
    }

    /// What the events come to is what the model has. Who hears too late begins anew with a snapshot.
    fn hear(&mut self) {
        let Pair { cache, model, replica, offload, names, .. } = self;
        let mut hole = None;
        let config = cache.config().clone();
        let hear = |number, event: Event<'_, BlockHash>| {
            if let Event::Stored(stored) = &event {
                tells_its_names(&config, stored);
            }
            match replica.apply(number, &event) {
                Ok(()) => {}
                Err(ReplicaError::Hole { expected, got }) => hole = Some(got - expected),
                Err(error) => unreachable!("{error}: {event:?}"),
            }
        };
        match offload {
            Some(offload) => offload.drain_events(cache, hear),
            None => cache.drain_events(hear),
        }
        let snapshot = match offload {
            Some(offload) => offload.snapshot(cache).unwrap(),
            None => cache.snapshot().unwrap(),
        };
        if hole.is_some() {
            saw("a listener begins anew");
            *replica = Replica::of(&snapshot);
        }
        assert_eq!(*replica, Replica::of(&snapshot));
        let there = model.content.iter().flatten().flatten();
        let there: BTreeSet<_> = there.map(|content| (content.group, &content.text)).collect();
        let in_device = |group, name| replica.locations(group, name).any(|place| place == Location::Device);
        let told = replica.blocks().filter(|&(group, name)| in_device(group, name)).count();
        assert_eq!(told, there.len(), "one name for each content, however many copies");
        let blocks = (1..model.content.len() as u32).map(BlockId);
        for (block, content) in blocks.filter_map(|block| Some((block, model.whole_content(block)?))) {
            let (group, name) = (GroupId(content.group as u8), cache.hash_of(block).unwrap());
            assert!(in_device(group, name), "{block} is found and was not told");
        }
        if let Some(behind) = &model.behind {
            let mut in_tiers = BTreeSet::new();
            for (group, digest) in replica.blocks() {
                for location in replica.locations(group, digest) {
                    if let Location::Tier { tier, .. } = location {
                        in_tiers.insert((tier, names[&BlockKey { digest, group }]));
                    }
                }
            }
            assert_eq!(in_tiers, behind.shelves.readable(), "what a listener knows of the tiers");
        }
        if hole.is_some() || self.calls.is_multiple_of(64) {
            snapshot.stored().for_each(|stored| tells_its_names(&config, &stored));
        }
        for stored in snapshot.stored().filter(|stored| stored.location != Location::Device) {
            let key = BlockKey { digest: stored.blocks[0], group: stored.group };
            let mut texts = model.names.iter().filter(|(_, name)| **name == names[&key]);
            let (first, end) = (stored.first.0 as usize, stored.first.0 as usize + stored.tokens.len());
            let is_it = |text: &Text| text.tokens.get(first..end) == Some(stored.tokens);
            assert!(texts.any(|((_, text), _)| is_it(text)), "{stored:?} is about something else");
            saw(if stored.tokens.is_empty() { "a tier tells a name" } else { "a tier tells of tokens" });
        }
        for stored in snapshot.stored().filter(|stored| stored.location == Location::Device) {
            let group = usize::from(stored.group.0);
            let (first, end) = (stored.first.0 as usize, stored.first.0 as usize + stored.tokens.len());
            let is_it = |(of, text): &(usize, &Text)| {
                *of == group && text.tokens.len() >= end && text.tokens[first..end] == *stored.tokens
            };
            assert!(there.iter().any(is_it), "{stored:?} is nobody's");
        }
    }

    /// Hashes are equal where whole token lists are, and only there.
    fn compare_content(&self) {
        let Pair { cache, model, .. } = self;
        let mut hashes = BTreeMap::new();
        let mut contents = BTreeMap::new();
        for block in (1..model.content.len() as u32).map(BlockId) {
            assert_eq!(cache.references(block), model.users(block), "users of {block}");
            assert_eq!(cache.is_cached(block), model.is_cached(block), "whether {block} is published");
            let (hash, content) = (cache.hash_of(block), model.whole_content(block));
            assert_eq!(hash.is_some(), content.is_some(), "whether {block} is published in full");
            if let (Some(hash), Some(content)) = (hash, content) {
                assert_eq!(*hashes.entry(hash).or_insert(&content.text), &content.text, "two under one hash");
                assert_eq!(*contents.entry(&content.text).or_insert(hash), hash, "one under two hashes");
            }
        }
    }
}

/// The names of blocks follow from what is told of them: adapter, salt, items, tokens, and those ahead.
fn tells_its_names(config: &Config, stored: &Stored<'_, BlockHash>) {
    let names = stored.names(&mut Xxh3::new(config.hash_seed), stored.parent, config.hash_unit());
    if !stored.tokens.is_empty() {
        let last_of_each = names.chunks(names.len() / stored.blocks.len()).map(|of_block| of_block.last());
        assert!(
            last_of_each.eq(stored.blocks.iter().map(Some)),
            "{stored:?} does not tell what it is named after"
        );
    }
}
