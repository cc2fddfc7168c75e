//! A small command language for the cache, so that a rule, a question or a bug report is a text file.
//!
//! A scenario is a list of stanzas, apart by blank lines. A stanza is a list of commands, a line `----`, and
//! the answers. Lines that begin with `#` say why.
//!
//! ```text
//! # The same prompt twice: the second one shares the first block.
//! cache block_size=4 blocks=6
//! open A 1 2 3 4 5 6
//! claim A
//! open B 1 2 3 4 5 6
//! claim B
//! ----
//! cache free=5
//! A known=6
//! A cached=0 new=[1 2] free=3
//! B known=6
//! B cached=4 new=[3] free=2
//! ```
//!
//! | command | what it does |
//! |---|---|
//! | `cache block_size=N blocks=N ...` | begins anew with an empty cache |
//! | ` groups=KIND,KIND` | one of `full`, `window:N`, `window:N+sinks:N`, `window:N+prompt`, `local:N`, `state`, `cross` per group, each with `/N` for a block size of its own |
//! | ` [caching=off] [match_unit=N] [retention=prompt\|dense\|every:N] [draft_head] [report_lost]` | [`Config`](crate::Config) |
//! | ` [hash=xxh3\|blake3\|sha256\|vllm-sha256\|vllm-sha256-cbor\|vllm-xxhash\|vllm-xxhash-cbor\|dynamo]` | how blocks are named ([`hash`](crate::hash)) |
//! | ` [events=N] [residency=N]` | [`Config::events_max`](crate::Config::events_max), [`Config::residency_every`](crate::Config::residency_every) |
//! | ` [seed=N] [hash_lookahead=N] [tokens_max=N] [step_max=N]` | the same |
//! | ` [policy=NAME] [pinned_max=N]` | `lru`, `leaf-first`, `slru`, `slru:PERCENT`, `arc`, `cost` or `cost:TOKENS`, see [`evict`](crate::evict); [`Config::pinned_blocks_max`](crate::Config::pinned_blocks_max) |
//! | `open NAME TOKENS [tenant=N] [adapter=TEXT] [salt=TEXT] [media=ID@FIRST+TOKENS,...] [embeds=BYTE,...] [write_only]` | [`KvCache::open`](crate::KvCache::open); an adapter may be `NAME@PATH`, the embeddings of block `n` have the digest of 32 times the `n`-th byte |
//! | `encoder NAME N` | [`KvCache::encoder`](crate::KvCache::encoder) |
//! | `media NAME ID@FIRST+TOKENS,...` | [`KvCache::add_media`](crate::KvCache::add_media) |
//! | `push NAME TOKENS` | [`KvCache::push`](crate::KvCache::push) |
//! | `fork NAME CHILD` | [`KvCache::fork`](crate::KvCache::fork) |
//! | `lookup NAME` | [`KvCache::lookup`](crate::KvCache::lookup) |
//! | `chunk NAME [computed=N] [new=N]` | [`KvCache::chunk`](crate::KvCache::chunk) |
//! | `claim NAME [computed=N] [external=N] [new=N] [lookahead=N] [watermark=N] [whole]` | [`KvCache::reserve`](crate::KvCache::reserve), and commit if there is room; `copies=[3>7:2]`: of block 3 the first two tokens to block 7 |
//! | `reserve NAME ...` | the same without the commit: nothing changes |
//! | `loaded NAME N`, `load_failed NAME N` | of the external tokens of a claim, those up to `N` are there (and no more) |
//! | `settle NAME N` | [`KvCache::settle`](crate::KvCache::settle): the blocks given back, in this order |
//! | `truncate NAME N`, `rollback NAME N`, `trim NAME N` | keep `N` known tokens, take away `N`, keep room for `N` |
//! | `withdraw NAME`, `release NAME`, `close NAME` | the calls of these names |
//! | `copies`, `end_step` | what the step copies first; the step has begun |
//! | `evict BLOCKS`, `evict_hash NAME INDEX` | [`KvCache::evict`](crate::KvCache::evict); [`KvCache::evict_hash`](crate::KvCache::evict_hash) of a hash of the sequence |
//! | `pin NAME TOKENS as=N [until=N]`, `pin_hashes NAME COUNT as=N [until=N]` | [`KvCache::pin`](crate::KvCache::pin); [`KvCache::pin_hashes`](crate::KvCache::pin_hashes) of the sequence's first `COUNT` hashes |
//! | `unpin N`, `expire NOW`, `pins` | [`KvCache::unpin`](crate::KvCache::unpin), [`KvCache::expire`](crate::KvCache::expire), [`KvCache::pins`](crate::KvCache::pins) |
//! | `quota TENANT [share=N] [limit=N]`, `tenant TENANT` | [`KvCache::set_quota`](crate::KvCache::set_quota), [`KvCache::tenant`](crate::KvCache::tenant) |
//! | `lost` | [`KvCache::drain_lost`](crate::KvCache::drain_lost), as `block:group` |
//! | `hashes NAME` | [`KvCache::hashes`](crate::KvCache::hashes) |
//! | `events` | [`KvCache::drain_events`](crate::KvCache::drain_events), each as `number:stored:parent>block>block@group+tokens`, with `+ahead` where names cover tokens behind them and `{adapter=..,salt=..,item@first:tokens,embeds=blocks}` where they cover such, `number:removed:block@group` or `number:cleared`; names by their first four digits. With tiers: [`Offload::drain_events`](crate::tier::Offload::drain_events), names as below, and of tiers `number:stored:parent>block@tier:medium+tokens`, `removed` and `cleared` alike, `number:moved:block@tier:medium>tier:medium` |
//! | `snapshot` | [`KvCache::snapshot`](crate::KvCache::snapshot), or [`Offload::snapshot`](crate::tier::Offload::snapshot) with tiers, one block after the other as if stored now |
//! | `now N`, `residency` | [`KvCache::set_now`](crate::KvCache::set_now); [`KvCache::drain_residency`](crate::KvCache::drain_residency), as `lifetime:idle:gap,gap` |
//! | `refusals` | [`Stats::refusals`](crate::Stats::refusals) |
//! | `reset` | [`KvCache::reset`](crate::KvCache::reset) |
//! | `table NAME` | the blocks held, per group; 0 where none is needed, `*` marks those that others can find |
//! | `slots NAME FROM TO [group=N]` | where the tokens from `FROM` up to, not including, `TO` live |
//! | `compare NAME NAME` | how many leading block hashes are equal |
//! | `free` | the free blocks, next to be handed out first |
//! | `references BLOCKS` | how many sequences hold each block |
//! | `stats` | [`KvCache::stats`](crate::KvCache::stats) |
//!
//! Commands about tiers name content by the sequence that knows it: `A.0` is the first hash of `A`, `A.0-3` the first
//! four, `A.0:1` the first in group 1.
//!
//! | command | what it does |
//! |---|---|
//! | `tiers MEDIUM:SLOTS[+OPTION...] ... [load_min=N] [promote_min=N] [patience=best_effort\|wait_complete\|timeout:N+N] [generation=N]` | puts empty tiers behind the cache, nearest first; a medium is `host`, `disk` or `remote` |
//! | ` OPTION` | `arc`, `staged`, `direct`, `after:OFFERS/TRACKED`, `back:AHEAD`, `asked:REMEMBERED`, `identity:N`: [`TierConfig`](crate::tier::TierConfig) |
//! | `elsewhere NAME [now=N]`, `load NAME` | [`Offload::external`](crate::tier::Offload::external), [`Offload::load`](crate::tier::Offload::load) |
//! | `computed NAME N`, `swap_out NAME N`, `rescue` | the calls of these names; `release`, `close` and `reset` are those of [`Offload`](crate::tier::Offload) as well |
//! | `done JOB [first=N \| bad=N,N]`, `made JOB N` | [`Offload::complete`](crate::tier::Offload::complete), all well if not told otherwise; [`Offload::progress`](crate::tier::Offload::progress) |
//! | `where CONTENT`, `reach CONTENT` | [`Tiers::lookup`](crate::tier::Tiers::lookup) of each; [`Tiers::reach`](crate::tier::Tiers::reach) |
//! | `store TIER CONTENT`, `offer CONTENT [leaving]`, `promote TIER CONTENT`, `flush TIER [most=N]`, `backlog TIER` | the calls of [`Tiers`](crate::tier::Tiers) of these names |
//! | `touch CONTENT`, `settle_order CONTENT`, `keep CONTENT` | a use; the order at the end of a sequence; kept until `done` |
//! | `questions`, `answer TIER CONTENT yes\|no`, `forget_answers TIER` | what a shared store is asked, and says |
//! | `dump TIER`, `restore TIER CONTENT@SLOT ... [identity=N] [generation=N]` | what it holds, next to go first |
//! | `tier_events`, `tier_stats` | of the `events` those of tiers alone; numbers |
//! | `judge [patience=...] wanted=N arrived=N began=N now=N`, `agree N ...` | [`Patience::judge`](crate::tier::Patience::judge), [`agreed`](crate::tier::agreed) |
//!
//! Tokens are numbers: `7` is one token, `7*16` sixteen of them, `0-15` the sixteen from 0 to 15. A claim says
//! only what differs from the usual: by default `computed` is what was claimed before (or the hit, for a
//! sequence that holds nothing) and `new` is all other known tokens. The cache is audited after every command.

mod begin;
mod contents;
mod interpreter;
mod keep;
mod sequence;
mod tell;
mod tier;
mod tiers;
mod words;

use std::fmt::Write as _;

pub use self::interpreter::Interpreter;
use self::interpreter::{Cache, Named, Progress, list, said};

/// Runs a scenario and returns it with the answers written under the commands. Answers that the text already
/// has are replaced, so a scenario is right when its transcript is the scenario itself.
pub fn transcript(scenario: &str) -> String {
    let mut interpreter = Interpreter::new();
    let mut stanzas = Vec::new();
    let lines: Vec<&str> = scenario.lines().map(str::trim_end).collect();
    for stanza in lines.split(|line| line.is_empty()).filter(|stanza| !stanza.is_empty()) {
        let mut text = String::new();
        let mut answers = String::new();
        for line in stanza.iter().take_while(|&&line| line != "----") {
            let _ = writeln!(text, "{line}");
            if !line.starts_with('#') {
                let _ = writeln!(answers, "{}", interpreter.execute(line));
            }
        }
        if !answers.is_empty() {
            let _ = write!(text, "----\n{answers}");
        }
        stanzas.push(text);
    }
    stanzas.join("\n")
}
