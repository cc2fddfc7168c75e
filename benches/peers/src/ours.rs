//! `quayline-kv-cache`.

use std::hint::black_box;
use std::time::Duration;

use quayline_kv_cache::{
    Admission, BlockCount, BlockSize, Claim, Config, KvCache, Reuse, SequenceId, SequenceKey, TokenCount,
};

use crate::{BLOCK, PROMPT_BLOCKS, PerBlock, Prompt, Random, median, timed};

const TOKENS: u32 = (PROMPT_BLOCKS * BLOCK) as u32;

fn cache(pool: usize, prefix_caching: bool) -> KvCache {
    let blocks = BlockCount(u32::try_from(pool).expect("a pool is counted in u32") + 1);
    let config = Config::new(BlockSize::new(BLOCK as u32).expect("not zero"), blocks);
    KvCache::new(Config { prefix_caching, ..config }).expect("the pool has a size")
}

fn open(cache: &mut KvCache, id: usize, tokens: &[u32]) -> SequenceId {
    let sequence = SequenceId(id as u64);
    cache.open(sequence, SequenceKey::default(), tokens, Reuse::ReadWrite).expect("ids are given once");
    sequence
}

/// Takes room for all that a sequence knows and says how many blocks were new.
fn claim(cache: &mut KvCache, sequence: SequenceId, computed: u32, known: u32) -> usize {
    let claim =
        Claim { computed: TokenCount(computed), new_tokens: TokenCount(known - computed), ..Claim::default() };
    match cache.reserve(sequence, claim).expect("the claim is sound") {
        Admission::Admit(reservation) => reservation.commit().new_blocks.len(),
        other => unreachable!("the pool has room: {other:?}"),
    }
}

pub fn get_and_free(pool: usize, blocks: usize) -> f64 {
    let mut cache = cache(pool, false);
    let known = (blocks * BLOCK) as u32;
    let sequence = open(&mut cache, 1, &vec![7; blocks * BLOCK]);
    let repeats = 20_000 / blocks;
    median(|| {
        let spent = timed(|| {
            for _ in 0..repeats {
                assert_eq!(black_box(claim(&mut cache, sequence, 0, known)), blocks);
                cache.release(sequence).expect("open");
            }
        });
        (spent, repeats * blocks)
    })
}

pub fn prompts(pool: usize, prompts: &[Prompt]) -> PerBlock {
    let mut random = Random(1);
    let mut cache = cache(pool, true);
    let mut turn = 0;
    let publish = median(|| {
        assert!(cache.reset());
        let mut spent = Duration::ZERO;
        for prompt in prompts {
            turn += 1;
            let sequence = open(&mut cache, turn, prompt);
            assert_eq!(cache.lookup(sequence).expect("holds nothing").tokens, TokenCount(0));
            spent += timed(|| {
                assert_eq!(black_box(claim(&mut cache, sequence, 0, TOKENS)), PROMPT_BLOCKS);
            });
            cache.close(sequence).expect("open");
        }
        (spent, prompts.len() * PROMPT_BLOCKS)
    });
    let mut find = |cache: &mut KvCache| {
        median(|| {
            let mut spent = Duration::ZERO;
            for place in random.shuffled(prompts.len()) {
                turn += 1;
                let sequence = open(cache, turn, &prompts[place]);
                cache.push(sequence, &[7]).expect("open");
                spent += timed(|| {
                    let hit = cache.lookup(sequence).expect("holds nothing");
                    assert_eq!(hit.tokens.get(), TOKENS);
                    assert_eq!(claim(cache, sequence, hit.tokens.get(), TOKENS + 1), 1);
                    cache.release(sequence).expect("open");
                });
                cache.close(sequence).expect("open");
            }
            (spent, prompts.len() * PROMPT_BLOCKS)
        })
    };
    let revived = find(&mut cache);
    for (place, prompt) in prompts.iter().enumerate() {
        let holder = open(&mut cache, usize::MAX - place - 1, prompt);
        cache.push(holder, &[7]).expect("open");
        let hit = cache.lookup(holder).expect("holds nothing").tokens.get();
        claim(&mut cache, holder, hit, TOKENS + 1);
    }
    PerBlock { publish, shared: find(&mut cache), revived }
}
