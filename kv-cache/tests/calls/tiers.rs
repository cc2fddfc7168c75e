//! Tiers of every kind: one to three, the nearest of them one that the device reads.

use proptest::prelude::*;
use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use crate::pair::Tiered;

pub(crate) fn tiers() -> impl Strategy<Value = Tiered> {
    let farther = prop::collection::vec(tier(40), 0..3);
    (tier(16), farther, fetch()).prop_map(|(nearest, farther, fetch)| {
        let nearest = TierConfig { staged: false, ..nearest };
        (std::iter::once(nearest).chain(farther).collect(), fetch)
    })
}

fn tier(slots_max: u32) -> impl Strategy<Value = TierConfig> {
    let eviction = prop_oneof![Just(TierEviction::Lru), Just(TierEviction::Arc)];
    let write = prop_oneof![
        3 => Just(Write::THROUGH),
        1 => (2u32..4, 1u32..9).prop_map(|(offers, tracked)| Write::After { offers, tracked }),
        2 => (0u32..5).prop_map(|ahead| Write::Back { ahead }),
    ];
    let medium = prop_oneof![
        2 => Just((Medium::Host, Contents::Own)),
        4 => Just((Medium::Disk, Contents::Own)),
        1 => (0u32..6).prop_map(|remembered| (Medium::Remote, Contents::Asked { remembered })),
    ];
    (1..slots_max, eviction, write, medium, any::<bool>()).prop_map(
        |(slots, eviction, write, (medium, contents), staged)| TierConfig {
            eviction,
            write,
            contents,
            staged,
            ..TierConfig::new(medium, BlockCount(slots))
        },
    )
}

fn fetch() -> impl Strategy<Value = Fetch> {
    let patience = prop_oneof![
        3 => Just(Patience::BestEffort),
        1 => Just(Patience::WaitComplete),
        1 => (0u64..4, 0u64..2).prop_map(|(base, per_block)| Patience::Timeout { base, per_block }),
    ];
    (0u32..3, 0u32..3, patience).prop_map(|(load_min, promote_min, patience)| Fetch {
        load_min: BlockCount(load_min),
        promote_min: BlockCount(promote_min),
        patience,
    })
}
