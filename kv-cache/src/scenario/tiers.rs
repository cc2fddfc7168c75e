//! The commands about tiers, and about what sequences find and leave there.

use std::fmt::Write as _;

use super::contents::{Behind, Key};
use super::tier::patience;
use super::words::{Words, number};
use super::{Cache, Named, list};
use crate::tier::{
    Advice, Finished, JobId, LoadStart, Lookup, Occasion, Origin, Outcome, Patience, Store, TierId, Verdict,
    agreed,
};
use crate::{BlockCount, SequenceId, Tick, TokenCount};

/// Whether a command is for this file.
pub(super) fn understands(verb: &str) -> bool {
    const VERBS: [&str; 25] = [
        "agree",
        "answer",
        "backlog",
        "computed",
        "done",
        "dump",
        "elsewhere",
        "flush",
        "forget_answers",
        "judge",
        "load",
        "made",
        "offer",
        "keep",
        "promote",
        "questions",
        "reach",
        "rescue",
        "restore",
        "settle_order",
        "store",
        "swap_out",
        "tier_stats",
        "touch",
        "where",
    ];
    VERBS.contains(&verb)
}

/// Carries out a command.
pub(super) fn run(
    cache: &mut Cache,
    behind: &mut Behind,
    sequences: &mut Named,
    verb: &str,
    mut words: Words<'_>,
) -> Result<String, String> {
    behind.learn_names(cache, sequences);
    match verb {
        "elsewhere" | "load" | "computed" | "swap_out" => {
            let name = words.next("a sequence")?;
            let id = sequences.of(name).id;
            return behind.about_sequence(cache, id, verb, words).map(|answer| format!("{name} {answer}"));
        }
        "agree" => {
            let ranks = words.tokens()?.into_iter().map(BlockCount);
            return Ok(format!("agreed={}", agreed(ranks)));
        }
        "judge" => return behind.judge(words),
        "rescue" => {
            words.end()?;
            let store = behind.offload.rescue(cache).map_err(|error| error.to_string())?;
            return Ok(behind.begun(store));
        }
        "done" | "made" => return behind.job(cache, sequences, verb, words),
        "tier_stats" | "questions" => {
            words.end()?;
            return Ok(behind.told(verb));
        }
        _ => {}
    }
    let tier = match verb {
        "store" | "promote" | "flush" | "backlog" | "dump" | "restore" | "answer" | "forget_answers" => {
            let tier = words.plain_number("a tier")?;
            TierId(u8::try_from(tier).unwrap_or(u8::MAX))
        }
        _ => TierId(0),
    };
    behind.about_content(cache, sequences, verb, tier, words)
}

impl Behind {
    /// `release`, `close` and `reset`, where tiers hear of them.
    pub(super) fn part(
        &mut self,
        cache: &mut Cache,
        sequences: &mut Named,
        verb: &str,
        mut words: Words<'_>,
    ) -> Result<String, String> {
        self.learn_names(cache, sequences);
        if verb == "reset" {
            words.end()?;
            let answer = if self.offload.reset(cache) { "reset" } else { "not reset, blocks are in use" };
            return Ok(answer.to_owned());
        }
        let name = words.next("a sequence")?;
        words.end()?;
        let progress = sequences.of(name);
        let done = match verb {
            "close" => self.offload.close(cache, progress.id),
            _ => self.offload.release(cache, progress.id),
        };
        done.map_err(|error| error.to_string())?;
        (progress.computed, progress.computed_before) = (0, 0);
        Ok(format!("{name} {verb}d free={}", cache.stats().free))
    }

    fn about_sequence(
        &mut self,
        cache: &mut Cache,
        id: SequenceId,
        verb: &str,
        mut words: Words<'_>,
    ) -> Result<String, String> {
        let said = |error: crate::tier::OffloadError| error.to_string();
        match verb {
            "elsewhere" => {
                let now = Tick(words.number("now")?.unwrap_or(0).into());
                words.end()?;
                let external = self.offload.external(cache, id, now).map_err(said)?;
                let begun =
                    external.begun.map_or(String::new(), |job| format!(" promotes {}", self.copies(job)));
                let until =
                    |until: Option<Tick>| until.map_or(String::new(), |tick| format!(" until={}", tick.0));
                Ok(match external.advice {
                    Advice::Compute => format!("computes{begun}"),
                    Advice::Load(tokens) => format!("loads={tokens}{begun}"),
                    Advice::Wait { loadable, coming, until: end } => {
                        format!("waits: loadable={loadable} coming={coming}{}{begun}", until(end))
                    }
                })
            }
            "load" => {
                words.end()?;
                Ok(match self.offload.load(cache, id).map_err(said)? {
                    LoadStart::Begun(job) => self.copies(job),
                    LoadStart::Later(block) => format!("later: block {block} is still copied from"),
                    LoadStart::Gone(tokens) => format!("gone: computed={tokens}"),
                })
            }
            _ => {
                let tokens = TokenCount(words.plain_number("a number of tokens")?);
                words.end()?;
                let store = match verb {
                    "computed" => self.offload.computed(cache, id, tokens),
                    _ => self.offload.swap_out(cache, id, tokens),
                };
                Ok(self.begun(store.map_err(said)?))
            }
        }
    }

    fn about_content(
        &mut self,
        cache: &mut Cache,
        sequences: &mut Named,
        verb: &str,
        tier: TierId,
        mut words: Words<'_>,
    ) -> Result<String, String> {
        let said = |error: crate::tier::TierError| error.to_string();
        let most = BlockCount(words.number("most")?.unwrap_or(u32::MAX));
        let leaving = words.flag("leaving");
        let [yes, no] = ["yes", "no"].map(|word| words.flag(word));
        let origin = [words.number("identity")?, words.number("generation")?];
        let (mut items, mut slots) = (Vec::new(), Vec::new());
        while let Ok(word) = words.next("content") {
            let (word, slot) = word.split_once('@').unwrap_or((word, "0"));
            let contents = self.contents(cache, sequences, word)?;
            slots.extend(contents.iter().map(|_| number(slot)));
            items.extend(contents);
        }
        words.end()?;
        let keys: Vec<Key> = items.iter().map(|item| item.0).collect();
        let tiers = self.offload.tiers_mut();
        let store = match verb {
            "store" => tiers.store(tier, &items),
            "offer" if leaving => tiers.offer(Occasion::Leaving, &items),
            "offer" => tiers.offer(Occasion::Use, &items),
            "promote" => tiers.promote(tier, &keys),
            "flush" => tiers.flush(tier, most),
            _ => return self.look(verb, tier, &keys, &slots, origin, yes && !no).map_err(said),
        };
        Ok(self.begun(store.map_err(said)?))
    }

    /// The commands that copy nothing.
    fn look(
        &mut self,
        verb: &str,
        tier: TierId,
        keys: &[Key],
        slots: &[Result<u32, String>],
        [identity, generation]: [Option<u32>; 2],
        present: bool,
    ) -> Result<String, crate::tier::TierError> {
        let tiers = self.offload.tiers_mut();
        Ok(match verb {
            "where" => {
                let found: Vec<Lookup> = keys.iter().map(|key| tiers.lookup(key)).collect();
                let found = found.into_iter().map(|found| match found {
                    Lookup::Hit(tier) => format!("hit:{tier}"),
                    Lookup::Pending(job) => format!("pending:{job}"),
                    Lookup::Retry => "retry".to_owned(),
                    Lookup::Miss => "miss".to_owned(),
                });
                list(keys.iter().zip(found).map(|(key, found)| format!("{} {found}", self.name(*key))))
            }
            "reach" => {
                let reach = tiers.reach(keys);
                let asked = if reach.asked { " asked" } else { "" };
                format!(
                    "loadable={} present={} coming={}{asked}",
                    reach.loadable, reach.present, reach.coming
                )
            }
            "touch" | "settle_order" => {
                if verb == "touch" {
                    tiers.touch(keys)
                } else {
                    tiers.settle(keys)
                }
                "noted".to_owned()
            }
            "keep" => format!("job {} keeps {}", tiers.pin(keys)?, self.named(keys.iter().copied())),
            "answer" => {
                keys.iter().try_for_each(|&key| tiers.answer(tier, key, present))?;
                "noted".to_owned()
            }
            "backlog" => format!("backlog={}", tiers.backlog(tier)?),
            "forget_answers" => {
                tiers.forget_answers(tier)?;
                "forgotten".to_owned()
            }
            "restore" => {
                let own = tiers.origin(tier)?;
                let origin = Origin {
                    identity: identity.map_or(own.identity, u64::from),
                    generation: generation.unwrap_or(own.generation),
                };
                let slots = slots.iter().map(|slot| slot.clone().unwrap_or(u32::MAX));
                let restored = tiers.restore(tier, origin, keys.iter().copied().zip(slots))?;
                format!("restored={restored}")
            }
            _ => {
                let content: Vec<(Key, u32)> = tiers.dump(tier)?.collect();
                list(content.into_iter().map(|(key, slot)| format!("{}@{slot}", self.name(key))))
            }
        })
    }

    fn job(
        &mut self,
        cache: &mut Cache,
        sequences: &mut Named,
        verb: &str,
        mut words: Words<'_>,
    ) -> Result<String, String> {
        let said = |error: crate::tier::OffloadError| error.to_string();
        let job = JobId(words.plain_number("a job")?.into());
        if verb == "made" {
            let made = words.plain_number("a number of copies")?;
            words.end()?;
            self.offload.progress(cache, job, made).map_err(said)?;
            return Ok("noted".to_owned());
        }
        let first = words.number("first")?;
        let bad = words.option("bad").map(|bad| bad.split(',').map(number).collect::<Result<Vec<_>, _>>());
        let bad = bad.transpose()?;
        words.end()?;
        let outcome = match (&bad, first) {
            (Some(bad), _) => Outcome::AllBut(bad),
            (None, Some(first)) => Outcome::First(first),
            (None, None) => Outcome::All,
        };
        Ok(match self.offload.complete(cache, job, outcome).map_err(said)? {
            Finished::Moved(copies) => format!("moved={copies}"),
            Finished::LoadedForNobody => "loaded for nobody".to_owned(),
            Finished::Late => "late".to_owned(),
            Finished::Loaded { sequence, computed } => {
                let entry = sequences.0.iter_mut().find(|(_, progress)| progress.id == sequence);
                let name = entry.map_or_else(String::new, |(name, progress)| {
                    (progress.computed, progress.computed_before) = (computed.0, computed.0);
                    name.clone()
                });
                format!("{name} computed={computed} free={}", cache.stats().free)
            }
        })
    }

    fn told(&mut self, verb: &str) -> String {
        let tiers = self.offload.tiers_mut();
        match verb {
            "questions" => {
                let questions: Vec<_> = tiers.questions().collect();
                list(questions.into_iter().map(|(tier, key)| format!("{}@{tier}", self.name(key))))
            }
            _ => {
                let mut text = String::new();
                for tier in (0..).map(TierId) {
                    let Ok(stats) = tiers.stats(tier) else { break };
                    let _ = write!(
                        text,
                        "{}tier {tier} free={} ready={} writing={} gone={} held={} reads={} writes={} evictions={}",
                        if tier.0 == 0 { "" } else { ", " },
                        stats.free,
                        stats.ready,
                        stats.writing,
                        stats.gone,
                        stats.held,
                        stats.reads,
                        stats.writes,
                        stats.evictions
                    );
                }
                text
            }
        }
    }

    fn judge(&self, mut words: Words<'_>) -> Result<String, String> {
        let patience = words.option("patience").map_or(Ok(Patience::default()), patience)?;
        let mut numbers = [0; 4];
        for (number, name) in numbers.iter_mut().zip(["wanted", "arrived", "began", "now"]) {
            *number = words.number(name)?.unwrap_or(0);
        }
        words.end()?;
        let [wanted, arrived, began, now] = numbers;
        let [began, now] = [began, now].map(|tick| Tick(tick.into()));
        Ok(match patience.judge(BlockCount(wanted), BlockCount(arrived), began, now) {
            Verdict::Begin(blocks) => format!("begins with {blocks}"),
            Verdict::Wait(None) => "waits".to_owned(),
            Verdict::Wait(Some(tick)) => format!("waits until={}", tick.0),
        })
    }

    fn begun(&self, store: Store) -> String {
        match store {
            Store::Begun { job, evicted, .. } => {
                let evicted = if evicted.0 > 0 { format!(" evicted={evicted}") } else { String::new() };
                format!("{}{evicted}", self.copies(job))
            }
            Store::Nothing => "nothing".to_owned(),
            Store::NoRoom { need, free, evictable } => {
                format!("no room: need={need} free={free} evictable={evictable}")
            }
        }
    }

    /// `job 1: [A.0 d1>0:0]`: of each copy the content, where it is and where it goes.
    fn copies(&self, job: JobId) -> String {
        let copies = self.offload.tiers().transfers(job).unwrap_or_default();
        let copies = copies.iter().map(|copy| format!("{} {}>{}", self.name(copy.key), copy.from, copy.to));
        format!("job {job}: [{}]", copies.collect::<Vec<_>>().join(", "))
    }
}
