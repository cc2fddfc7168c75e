//! One test per attack: wrong input is answered with its numbers, and a dump of the whole state is the same as before.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::fmt::Debug;

use quayline_kv_cache::kind::{ChunkedLocal, SlidingWindow};
use quayline_kv_cache::*;

const A: SequenceId = SequenceId(1);
const B: SequenceId = SequenceId(2);
const NOBODY: SequenceId = SequenceId(9);

/// Two sequences that share two blocks of a window and of full attention, one of them with a copy to be made.
fn busy() -> KvCache {
    busy_with(|_| ())
}

fn busy_with(change: impl FnOnce(&mut Config)) -> KvCache {
    let size = BlockSize::new(4).unwrap();
    let window = Group::new(SlidingWindow::new(TokenCount(8)).unwrap());
    let mut config = Config { sequence_tokens_max: TokenCount(30), ..Config::new(size, BlockCount(32)) };
    config.groups.push(window);
    change(&mut config);
    let mut cache = KvCache::new(config).unwrap();
    let prompt: Vec<TokenId> = (0..10).collect();
    cache.open(A, SequenceKey::default(), &prompt, Reuse::ReadWrite).unwrap();
    claim(&mut cache, A, Claim { new_tokens: TokenCount(10), ..Claim::default() });
    cache.fork(A, B).unwrap();
    cache.push(B, &[7]).unwrap();
    let next = Claim { computed: TokenCount(10), new_tokens: TokenCount(1), ..Claim::default() };
    claim(&mut cache, B, next);
    cache.check().unwrap();
    cache
}

fn claim(cache: &mut KvCache, sequence: SequenceId, claim: Claim) {
    match cache.reserve(sequence, claim).unwrap() {
        Admission::Admit(room) => drop(room.commit()),
        no => unreachable!("there is room: {no:?}"),
    }
}

/// Makes a call that must be refused with this message, and compares everything that the cache is made of.
fn refused<T: Debug>(
    cache: &mut KvCache,
    call: impl FnOnce(&mut KvCache) -> Result<T, Error>,
    message: &str,
) {
    let before = format!("{cache:?}");
    let error = call(cache).map(|answer| format!("{answer:?}")).unwrap_err();
    assert_eq!(error.to_string(), message);
    assert_eq!(format!("{cache:?}"), before, "{message}");
    cache.check().unwrap();
}

#[test]
fn blocks_of_no_tokens() {
    assert_eq!(BlockSize::new(0).unwrap_err().to_string(), "a block must hold at least one token");
}

#[test]
fn windows_and_chunks_of_no_tokens() {
    assert_eq!(SlidingWindow::new(TokenCount(0)).unwrap_err(), Error::EmptyWindow);
    assert_eq!(ChunkedLocal::new(TokenCount(0)).unwrap_err(), Error::EmptyWindow);
}

#[test]
fn pools_that_cannot_be() {
    let size = BlockSize::new(4).unwrap();
    for blocks in [0, 1, (1 << 31) + 1, u32::MAX] {
        let error = KvCache::new(Config::new(size, BlockCount(blocks))).map(drop).unwrap_err();
        assert_eq!(error, Error::PoolSize { blocks: BlockCount(blocks), max: BlockCount(1 << 31) });
    }
    let shape = |groups: Vec<Group>, unit: u32| {
        let match_unit = Some(BlockSize::new(unit).unwrap());
        KvCache::new(Config { groups, match_unit, ..Config::new(size, BlockCount(8)) }).map(drop).unwrap_err()
    };
    assert_eq!(shape(Vec::new(), 4), Error::GroupCount { groups: 0, max: 255 });
    let group = || Group::new(kind::Full);
    assert_eq!(shape((0..256).map(|_| group()).collect(), 4), Error::GroupCount { groups: 256, max: 255 });
    let unit = BlockSize::new(3).unwrap();
    assert_eq!(shape(vec![group()], 3), Error::MatchUnit { unit, block_size: size });
    let max = BlockCount(1 << 29);
    let parts =
        Config { match_unit: Some(BlockSize::new(1).unwrap()), ..Config::new(size, BlockCount(1 << 30)) };
    assert_eq!(KvCache::new(parts).map(drop), Err(Error::PoolSize { blocks: BlockCount(1 << 30), max }));
}

#[test]
fn unknown_sequences() {
    let cache = &mut busy();
    let message = "sequence 9 is not open";
    let some = Claim { new_tokens: TokenCount(1), ..Claim::default() };
    refused(cache, |cache| cache.push(NOBODY, &[1]), message);
    refused(cache, |cache| cache.lookup(NOBODY), message);
    refused(cache, |cache| cache.encoder(NOBODY, TokenCount(1)), message);
    refused(cache, |cache| cache.reserve(NOBODY, some).map(drop), message);
    refused(cache, |cache| cache.chunk(NOBODY, TokenCount(0), TokenCount(1)), message);
    refused(cache, |cache| cache.settle(NOBODY, TokenCount(0)).map(<[_]>::to_vec), message);
    refused(cache, |cache| cache.loaded(NOBODY, TokenCount(0)), message);
    refused(cache, |cache| cache.load_failed(NOBODY, TokenCount(0)), message);
    refused(cache, |cache| cache.fork(NOBODY, SequenceId(10)), message);
    refused(cache, |cache| cache.truncate(NOBODY, TokenCount(0)), message);
    refused(cache, |cache| cache.rollback(NOBODY, TokenCount(0)), message);
    refused(cache, |cache| cache.trim(NOBODY, TokenCount(0)), message);
    refused(cache, |cache| cache.withdraw(NOBODY), message);
    refused(cache, |cache| cache.release(NOBODY), message);
    refused(cache, |cache| cache.close(NOBODY), message);
    refused(cache, |cache| cache.known(NOBODY), message);
    refused(cache, |cache| cache.table(NOBODY).map(|table| table.blocks().to_vec()), message);
    refused(cache, |cache| cache.hashes(NOBODY).map(<[_]>::to_vec), message);
    refused(cache, |cache| cache.pin(PinId(1), NOBODY, TokenCount(4), None), message);
    refused(cache, |cache| cache.add_media(NOBODY, &[]), message);
}

#[test]
fn freeing_twice() {
    let cache = &mut busy();
    cache.close(B).unwrap();
    refused(cache, |cache| cache.close(B), "sequence 2 is not open");
    cache.release(A).unwrap();
    let before = format!("{cache:?}");
    cache.release(A).unwrap();
    assert_eq!(format!("{cache:?}"), before, "a sequence that holds nothing has nothing to give back");
}

#[test]
fn unpinning_twice() {
    let cache = &mut busy();
    assert_eq!(cache.pin(PinId(7), A, TokenCount(8), None), Ok(Pinned::Held { blocks: BlockCount(4) }));
    assert_eq!(cache.unpin(PinId(7)), Ok(BlockCount(4)));
    refused(cache, |cache| cache.unpin(PinId(7)), "there is no pin 7");
}

#[test]
fn a_pin_past_the_cap() {
    let [two, four, max] = [2, 4, 3].map(BlockCount);
    let mut cache = busy_with(|config| config.pinned_blocks_max = max);
    assert_eq!(cache.pin(PinId(7), A, TokenCount(4), None), Ok(Pinned::Held { blocks: two }));
    let before = format!("{cache:?}");
    for pin in [7, 8] {
        let refused = Pinned::OverCap { need: four, pinned: two, max };
        assert_eq!(cache.pin(PinId(pin), A, TokenCount(8), Some(Tick(9))), Ok(refused));
        assert_eq!(format!("{cache:?}"), before);
    }
    cache.check().unwrap();
}

#[test]
fn an_event_replay_with_holes() {
    let mut cache = busy_with(|config| config.events_max = 100);
    cache.close(A).unwrap();
    cache.close(B).unwrap();
    assert!(cache.reset());
    let mut replica = Replica::new();
    let mut refusals = Vec::new();
    cache.drain_events(|number, event| {
        let before = replica.clone();
        if number != 1
            && let Err(error) = replica.apply(number, &event)
        {
            refusals.push(error.to_string());
            assert_eq!(replica, before, "{error}");
        }
        let before = replica.clone();
        if number == 0 {
            let again = replica.apply(0, &event).unwrap_err();
            assert_eq!(again.to_string(), "event 0 was applied already, 1 comes next");
            assert_eq!(replica, before);
        }
    });
    assert_eq!(refusals, ["event 2 comes where 1 should: 1 are missing"]);
    let mut anew = Replica::of(&cache.snapshot().unwrap());
    assert_eq!((anew.next_event(), anew.blocks().count()), (3, 0));
    cache.open(A, SequenceKey::default(), &[1; 9], Reuse::ReadWrite).unwrap();
    claim(&mut cache, A, Claim { new_tokens: TokenCount(9), ..Claim::default() });
    cache.drain_events(|number, event| anew.apply(number, &event).unwrap());
    assert_eq!(anew.blocks().count(), 4, "two full blocks in each group");
}

#[test]
fn opening_twice() {
    let cache = &mut busy();
    let message = "sequence 1 is already open";
    refused(cache, |cache| cache.open(A, SequenceKey::default(), &[1], Reuse::ReadWrite), message);
    refused(cache, |cache| cache.fork(B, A), message);
    refused(cache, |cache| cache.fork(A, A), message);
}

#[test]
fn tokens_beyond_the_maximum() {
    let cache = &mut busy();
    let message = "sequence 1 would know 31 tokens, 30 is the most";
    refused(cache, |cache| cache.push(A, &[0; 21]), message);
    let message = "sequence 3 would know 31 tokens, 30 is the most";
    let open =
        |cache: &mut KvCache| cache.open(SequenceId(3), SequenceKey::default(), &[0; 31], Reuse::ReadWrite);
    refused(cache, open, message);
    // A claim may reach past the end, as drafts do, and gets room up to it.
    let all = Claim { computed: TokenCount(10), new_tokens: TokenCount(u32::MAX), ..Claim::default() };
    claim(cache, A, all);
    assert_eq!(cache.table(A).unwrap().blocks().len(), 8);
}

#[test]
fn going_back_past_the_start() {
    let cache = &mut busy();
    let message = "sequence 1 knows 10 tokens, 11 cannot be kept or taken from it";
    refused(cache, |cache| cache.truncate(A, TokenCount(11)), message);
    refused(cache, |cache| cache.rollback(A, TokenCount(11)), message);
    let message = format!("sequence 1 knows 10 tokens, {} cannot be kept or taken from it", u32::MAX);
    refused(cache, |cache| cache.rollback(A, TokenCount(u32::MAX)), &message);
}

#[test]
fn going_back_behind_a_window() {
    let cache = &mut busy();
    cache.push(A, &[0; 10]).unwrap();
    claim(cache, A, Claim { computed: TokenCount(10), new_tokens: TokenCount(10), ..Claim::default() });
    cache.settle(A, TokenCount(20)).unwrap();
    let message = "sequence 1 cannot go back to 9 tokens of 20: blocks of group 1 are gone";
    refused(cache, |cache| cache.truncate(A, TokenCount(9)), message);
    refused(cache, |cache| cache.rollback(A, TokenCount(11)), message);
    refused(cache, |cache| cache.trim(A, TokenCount(9)), message);
}

#[test]
fn an_item_among_tokens_that_have_a_name() {
    let cache = &mut busy_with(|config| config.hash_lookahead = TokenCount(2));
    // Of the ten tokens of A the first eight are named, by all ten.
    let item = |first: u32| [Media { id: "a".into(), first: TokenIndex(first), tokens: TokenCount(2) }];
    for first in [7, 8, 9] {
        let message = format!(
            "sequence 1 has an item of 2 tokens at {first}: items follow one another, the next from 10 on"
        );
        refused(cache, |cache| cache.add_media(A, &item(first)), &message);
    }
    assert_eq!(cache.add_media(A, &item(10)), Ok(()));
}

/// A sequence of 24 tokens in blocks of 4 of one group, of which the first 20 are computed and settled.
fn settled(group: Group) -> KvCache {
    let config = Config {
        groups: vec![Group::new(kind::Full), group],
        ..Config::new(BlockSize::new(4).unwrap(), BlockCount(32))
    };
    let mut cache = KvCache::new(config).unwrap();
    cache.open(A, SequenceKey::default(), &[7; 24], Reuse::ReadWrite).unwrap();
    claim(&mut cache, A, Claim { new_tokens: TokenCount(20), ..Claim::default() });
    cache.settle(A, TokenCount(20)).unwrap();
    cache
}

fn again(computed: u32, new_tokens: u32) -> impl Fn(&mut KvCache) -> Result<(), Error> {
    let [computed, new_tokens] = [computed, new_tokens].map(TokenCount);
    move |cache| cache.reserve(A, Claim { computed, new_tokens, ..Claim::default() }).map(drop)
}

#[test]
fn computing_again_what_a_window_has_given_back() {
    let window = |tokens| SlidingWindow::new(TokenCount(tokens)).unwrap();
    let gone = |tokens: u32| {
        format!("sequence 1 cannot go back to {tokens} tokens of 20: blocks of group 1 are gone")
    };
    // The token behind 20 sees three before it, from 17 on: blocks 0 to 3 are gone. Behind 19 it would see 16.
    let cache = &mut settled(Group::new(window(4)));
    assert!(again(19, 1)(cache).is_ok(), "drafts that were wrong, all in the window");
    for computed in [18, 12, 0] {
        refused(cache, again(computed, 1), &gone(computed));
    }
    // A window of the token alone reads nothing, but would write into a block that is gone.
    let cache = &mut settled(Group::new(window(1)));
    for computed in [19, 16, 12] {
        refused(cache, again(computed, 1), &gone(computed));
    }
    // Sinks stay, and help only where all between them and the window is there as well.
    let cache = &mut settled(Group::new(window(4).with_sinks(TokenCount(5))));
    refused(cache, again(18, 2), &gone(18));
    assert!(again(19, 5)(cache).is_ok());
    refused(cache, again(0, 20), &gone(0));
}

#[test]
fn computing_again_what_a_chunk_has_given_back() {
    let cache = &mut settled(Group::new(ChunkedLocal::new(TokenCount(8)).unwrap()));
    assert!(again(16, 4)(cache).is_ok(), "the chunk from 16 on is there");
    for computed in [15, 8, 0] {
        let message =
            format!("sequence 1 cannot go back to {computed} tokens of 20: blocks of group 1 are gone");
        refused(cache, again(computed, 9), &message);
    }
}

#[test]
fn going_on_from_a_state_that_nobody_left() {
    let cache = &mut settled(Group::new(kind::Recurrent));
    assert!(again(20, 4)(cache).is_ok());
    for (computed, new_tokens) in [(16, 4), (12, 8), (0, 4)] {
        let message =
            format!("sequence 1 cannot go back to {computed} tokens of 20: blocks of group 1 are gone");
        refused(cache, again(computed, new_tokens), &message);
    }
}

#[test]
fn computing_what_is_on_its_way() {
    let cache = &mut busy();
    claim(cache, A, Claim { computed: TokenCount(10), external: TokenCount(8), ..Claim::default() });
    for computed in [0, 9, 10, 17] {
        refused(cache, again(computed, 1), "sequence 1 waits for its tokens 10 to 18");
    }
    assert!(again(18, 1)(cache).is_ok(), "behind it");
}

#[test]
fn settling_what_nobody_computes() {
    let cache = &mut busy();
    let settle = |cache: &mut KvCache| cache.settle(A, TokenCount(11)).map(<[_]>::to_vec);
    refused(cache, settle, "sequence 1 has 10 tokens computed or under way, not 11");
}

#[test]
fn claims_that_make_no_sense() {
    let cache = &mut busy();
    let ask = |claim: Claim| move |cache: &mut KvCache| cache.reserve(A, claim).map(drop);
    refused(cache, ask(Claim::default()), "sequence 1 claims room for no new token");
    let past = Claim { computed: TokenCount(13), new_tokens: TokenCount(1), ..Claim::default() };
    let message = "sequence 1 counts 13 tokens as computed, its blocks have room for 12";
    refused(cache, ask(past), message);
    cache.release(A).unwrap();
    let hit = cache.lookup(A).unwrap().tokens;
    let message = format!(
        "sequence 1 counts 12 tokens as computed: a first claim may count whole blocks, up to {hit} tokens"
    );
    let uncached = Claim { computed: TokenCount(12), new_tokens: TokenCount(1), ..Claim::default() };
    refused(cache, ask(uncached), &message);
    refused(
        cache,
        |cache| cache.settle(A, TokenCount(1)).map(<[_]>::to_vec),
        "sequence 1 has 0 tokens computed or under way, not 1",
    );
}

#[test]
fn loads_that_were_not_asked_for() {
    let cache = &mut busy();
    let message = "sequence 1 reports 4 tokens as loaded, 0 to 0 are on their way";
    refused(cache, |cache| cache.loaded(A, TokenCount(4)), message);
    refused(cache, |cache| cache.load_failed(A, TokenCount(4)), message);
    claim(cache, A, Claim { computed: TokenCount(10), external: TokenCount(4), ..Claim::default() });
    let message = "sequence 1 reports 15 tokens as loaded, 10 to 14 are on their way";
    refused(cache, |cache| cache.loaded(A, TokenCount(15)), message);
    let message = "sequence 1 waits for its tokens 10 to 14";
    let more = Claim { computed: TokenCount(14), external: TokenCount(4), ..Claim::default() };
    refused(cache, |cache| cache.reserve(A, more).map(drop), message);
    refused(cache, |cache| cache.fork(A, SequenceId(3)), message);
    refused(cache, |cache| cache.truncate(A, TokenCount(4)), message);
    refused(cache, |cache| cache.trim(A, TokenCount(4)), message);
}

#[test]
fn blocks_and_groups_that_are_not_there() {
    let cache = &mut busy();
    for block in [0, 32, u32::MAX] {
        let message = format!("there is no block {block}: they are 1 to 31");
        refused(cache, |cache| cache.evict(&[BlockId(1), BlockId(block)]), &message);
        assert_eq!((cache.references(BlockId(block)), cache.hash_of(BlockId(block))), (0, None));
    }
    let message = "there is no group 2: they are 2, from 0";
    refused(cache, |cache| cache.table_in(A, GroupId(2)).map(|table| table.blocks().to_vec()), message);
}

#[test]
fn a_reservation_that_is_dropped_changes_nothing() {
    let cache = &mut busy();
    let before = format!("{cache:?}");
    let some = Claim { computed: TokenCount(10), new_tokens: TokenCount(20), ..Claim::default() };
    assert!(matches!(cache.reserve(A, some), Ok(Admission::Admit(_))));
    assert_eq!(format!("{cache:?}"), before);
    let too_many = Claim { watermark: BlockCount(u32::MAX), ..some };
    assert!(matches!(cache.reserve(A, too_many), Ok(Admission::Wait { .. })));
    // A refusal is counted, and nothing else has changed.
    let counted = format!("{:?}", cache.stats().refusals);
    assert_eq!(format!("{cache:?}").replace(&counted, &format!("{:?}", Refusals::default())), before);
}
