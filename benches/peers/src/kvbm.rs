//! `kvbm-logical`, with its LRU backend.

use std::hint::black_box;
use std::time::Duration;

use dynamo_tokens::{TokenBlock, TokenBlockSequence};
use kvbm_logical::manager::FrequencyTrackingCapacity;
use kvbm_logical::{BlockManager, BlockRegistry, KvbmSequenceHashProvider, SequenceHash};

use crate::{BLOCK, PROMPT_BLOCKS, PerBlock, Prompt, Random, median, timed};

fn manager(pool: usize) -> BlockManager<()> {
    let registry = BlockRegistry::builder()
        .frequency_tracker(FrequencyTrackingCapacity::default().create_tracker())
        .build();
    BlockManager::builder()
        .block_count(pool)
        .block_size(BLOCK)
        .registry(registry)
        .with_lru_backend()
        .build()
        .expect("the pool has a size")
}

fn named(prompt: &Prompt) -> Vec<TokenBlock> {
    TokenBlockSequence::from_slice(prompt, BLOCK as u32, Some(1337)).blocks().to_vec()
}

pub fn get_and_free(pool: usize, blocks: usize) -> f64 {
    let manager = manager(pool);
    let repeats = 20_000 / blocks;
    median(|| {
        let spent = timed(|| {
            for _ in 0..repeats {
                let held = manager.allocate_blocks(blocks).expect("the pool has room");
                assert_eq!(black_box(held).len(), blocks);
            }
        });
        (spent, repeats * blocks)
    })
}

pub fn prompts(pool: usize, prompts: &[Prompt]) -> PerBlock {
    let mut random = Random(1);
    let manager = manager(pool);
    let publish = median(|| {
        manager.reset_inactive_pool().expect("nobody holds a block");
        let mut spent = Duration::ZERO;
        for prompt in prompts {
            let blocks = named(prompt);
            let mut held = Vec::new();
            spent += timed(|| {
                let room = manager.allocate_blocks(PROMPT_BLOCKS).expect("the pool has room");
                let full = room.into_iter().zip(&blocks);
                let full = full.map(|(room, block)| room.complete(block).expect("sizes agree")).collect();
                held = manager.register_blocks(full);
            });
            assert_eq!(held.len(), PROMPT_BLOCKS);
        }
        (spent, prompts.len() * PROMPT_BLOCKS)
    });
    let hashes: Vec<Vec<SequenceHash>> = prompts
        .iter()
        .map(|prompt| named(prompt).iter().map(KvbmSequenceHashProvider::kvbm_sequence_hash).collect())
        .collect();
    let mut find = || {
        median(|| {
            let mut spent = Duration::ZERO;
            for place in random.shuffled(prompts.len()) {
                spent += timed(|| {
                    let held = manager.match_blocks(&hashes[place]);
                    assert_eq!(black_box(held).len(), PROMPT_BLOCKS);
                });
            }
            (spent, prompts.len() * PROMPT_BLOCKS)
        })
    };
    let revived = find();
    let held: Vec<_> = hashes.iter().map(|names| manager.match_blocks(names)).collect();
    let shared = find();
    assert_eq!(held.len(), prompts.len());
    PerBlock { publish, shared, revived }
}
