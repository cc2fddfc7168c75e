//! The figures that a trace must give: through the real cache, to four digits.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::path::Path;

use quayline_kv_cache::evict::PolicyName;
use quayline_simulator::prompts::Prompts;
use quayline_simulator::replay::replay;
use quayline_simulator::{belady, svg, trace};

/// Requests, blocks, distinct blocks of the excerpt.
const EXCERPT: (usize, u64, u32) = (1000, 27305, 21514);

fn prompts(path: &Path) -> Prompts {
    Prompts::of(&trace::read(path, usize::MAX).unwrap()).unwrap()
}

fn excerpt() -> Prompts {
    prompts(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/mooncake-conversation-1000.jsonl.gz"))
}

/// The textbook's LRU over plain lists: look up the leading run, touch from the last block to the first, evict down.
fn plain_lru(prompts: &Prompts, capacity: usize) -> u64 {
    // Oldest first.
    let mut kept: Vec<u32> = Vec::new();
    let mut hits = 0;
    for prompt in prompts.iter() {
        hits += prompt.blocks.iter().take_while(|block| kept.contains(block)).count() as u64;
        kept.retain(|block| !prompt.blocks.contains(block));
        kept.extend(prompt.blocks.iter().rev());
        kept.drain(..kept.len().saturating_sub(capacity));
    }
    hits
}

#[test]
fn the_real_cache_finds_what_the_textbook_finds() {
    let prompts = excerpt();
    assert_eq!((prompts.iter().len(), prompts.blocks(), prompts.distinct_blocks()), EXCERPT);
    for capacity in [300, 1_000, 4_000] {
        let share = replay(&prompts, capacity, PolicyName::Lru).unwrap();
        assert_eq!(share.hit_blocks, plain_lru(&prompts, capacity as usize), "{capacity} blocks");
        assert_eq!((share.blocks, share.refused), (prompts.blocks(), 0));
    }
}

#[test]
fn no_policy_beats_the_optimum_and_all_agree_where_nothing_is_evicted() {
    let prompts = excerpt();
    for policy in PolicyName::ALL {
        for capacity in [300, 1_000, 4_000] {
            let found = replay(&prompts, capacity, policy).unwrap().hit_blocks;
            let most = belady::optimum(&prompts, capacity).hit_blocks;
            assert!(found <= most, "{policy} finds {found} of {most} blocks in {capacity}");
        }
        let all = prompts.distinct_blocks();
        let infinite = belady::optimum(&prompts, all).hit_blocks;
        assert_eq!(replay(&prompts, all, policy).unwrap().hit_blocks, infinite, "{policy}");
    }
}

#[test]
fn a_prompt_larger_than_the_cache_is_refused_and_hurts_nobody() {
    let prompts = excerpt();
    let share = replay(&prompts, 20, PolicyName::Lru).unwrap();
    assert!(share.refused > 0 && share.hit_blocks > 0, "{share:?}");
}

#[test]
fn the_published_shares_come_out_to_four_digits() {
    let published = [
        (1_000, "0.0445"),
        (5_000, "0.1118"),
        (10_000, "0.2116"),
        (20_000, "0.2878"),
        (50_000, "0.3546"),
        (100_000, "0.3637"),
        (182_790, "0.3664"),
    ];
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/data/llm-requests/mooncake/conversation_trace.jsonl.gz");
    if !path.exists() {
        eprintln!("skipped: the Mooncake trace is not beside the repository");
        return;
    }
    let prompts = prompts(&path);
    for (capacity, expected) in published {
        let share = replay(&prompts, capacity, PolicyName::Lru).unwrap().of_blocks();
        assert_eq!(format!("{share:.4}"), expected, "LRU, {capacity} blocks");
    }
}

#[test]
fn the_curves_are_a_picture() {
    let curves = quayline_simulator::curves::Curves::of(
        &excerpt(),
        &[500, 2_000],
        &[PolicyName::Lru, PolicyName::Arc],
    )
    .unwrap();
    let svg = svg::draw(&curves, "a < b");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("a &lt; b"), "{svg}");
    assert_eq!(svg.matches("<polyline").count(), 3, "two policies and the optimum");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    let tables = curves.tables();
    assert!(tables.contains("arc") && tables.contains("optimum") && tables.contains("2000"), "{tables}");
}
