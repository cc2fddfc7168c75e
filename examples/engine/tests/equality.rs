//! A request's answer is a function of the request: whatever else runs, in whatever order, chunks, blocks and
//! threads, with prefixes found or not, preempted or not, its tokens, its log-probabilities and its text are
//! the same to the last bit.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;

use quayline_engine::{
    Constraint, Engine, Finish, Grammars, KvDtype, KvSize, Logprobs, ModelFiles, Offloading, OffloadingWrite,
    Options, Output, Policy, Preemption, Request, RequestId, Sampling, Snapshot, Speculation, Speeds,
    TenantId, Text, Tick,
};

/// Numbers from a seed: SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    fn shuffle<T>(&mut self, of: &mut [T]) {
        for i in (1..of.len()).rev() {
            of.swap(i, usize::try_from(self.below(i as u64 + 1)).unwrap());
        }
    }
}

/// All of an answer, floats as bits.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<u32>,
    prompt_logprobs: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

impl Answer {
    fn take(&mut self, output: Output) {
        for token in output.tokens {
            self.tokens.push(token.id);
            push_bits(token.logprobs.as_ref(), &mut self.logprobs);
        }
        for logprobs in output.prompt_logprobs.into_iter().flatten() {
            push_bits(logprobs.as_ref(), &mut self.prompt_logprobs);
        }
        self.text.push_str(&output.text);
        self.finish = output.finish;
    }
}

fn push_bits(logprobs: Option<&Logprobs>, bits: &mut Vec<u32>) {
    for entry in logprobs.iter().flat_map(|logprobs| logprobs.top.iter().chain([&logprobs.chosen])) {
        bits.extend([entry.id, entry.logprob.to_bits(), entry.rank]);
    }
}

/// Requests of every kind; some share long beginnings.
fn requests(text: &Arc<Text>) -> Vec<Request> {
    let play = "BENVOLIO:\nGood morrow, cousin.\n\nROMEO:\nIs the day so young?\n\nBENVOLIO:\nBut new struck nine.\n\n\
        ROMEO:\nAy me! sad hours seem long.\nWas that my father that went hence so fast?\n\nBENVOLIO:\nIt was.\n\n";
    let shared = text.encode(play, true).unwrap();
    let prompt = |begin: usize, rest: &str| {
        let mut prompt = shared[..begin].to_vec();
        prompt.extend(text.encode(rest, false).unwrap());
        prompt
    };
    let base =
        || Sampling { max_tokens: Some(12), logprobs: Some(2), ignore_eos: true, ..Sampling::default() };
    let mut kinds = vec![
        (prompt(0, "O"), Sampling { temperature: 0.0, ..base() }),
        (prompt(64, "JULIET:\n"), Sampling { temperature: 0.0, ..base() }),
        (prompt(64, "JULIET:\nWhat"), Sampling { seed: Some(1), ..base() }),
        (prompt(64, "JULIET:\nWhat"), Sampling { seed: Some(2), top_k: 20, top_p: 0.9, ..base() }),
        (prompt(48, ""), Sampling { seed: Some(3), min_p: 0.02, temperature: 0.7, ..base() }),
        (prompt(33, "Nurse:\n"), Sampling { seed: Some(4), repetition_penalty: 1.3, ..base() }),
        (
            prompt(20, "a"),
            Sampling {
                seed: Some(5),
                presence_penalty: 0.5,
                frequency_penalty: 0.5,
                prompt_logprobs: Some(1),
                ..base()
            },
        ),
        (prompt(64, "JULIET:\n"), Sampling { temperature: 0.0, prompt_logprobs: Some(0), ..base() }),
        (
            prompt(16, "ROMEO:\n"),
            Sampling { seed: Some(6), stop: vec!["e".into()], max_tokens: Some(30), ..base() },
        ),
        (prompt(64, "And"), Sampling { seed: Some(7), ignore_eos: false, max_tokens: Some(30), ..base() }),
    ];
    kinds.extend(repetitive(text));
    let request = |(id, (prompt, sampling))| Request { sampling, ..Request::new(RequestId(id), prompt) };
    let mut requests: Vec<Request> = (0..).zip(kinds).map(request).collect();
    // What some must be goes with their place: the same prompt and sampling with a grammar as without.
    let grammars = Grammars::new(Arc::clone(text), &[text.eos_token().unwrap()]);
    for (id, (like, constraint)) in (requests.len() as u64..).zip(constraints()) {
        let grammar = Some(grammars.compile(&constraint).unwrap());
        requests.push(Request { id: RequestId(id), grammar, ..requests[like].clone() });
    }
    requests
}

/// Requests that say again what was said: some drafts of what comes next are right, whatever else is asked for.
fn repetitive(text: &Text) -> Vec<(Vec<u32>, Sampling)> {
    let list = "ROMEO:\nI will go, I will go, I will go, and I will go, and I will go, I will go, I";
    let prompt = text.encode(list, true).unwrap();
    let base = Sampling { max_tokens: Some(40), logprobs: Some(1), ignore_eos: true, ..Sampling::greedy() };
    vec![
        (prompt.clone(), base.clone()),
        (prompt.clone(), Sampling { temperature: 0.6, seed: Some(8), ..base.clone() }),
        (
            prompt.clone(),
            Sampling { temperature: 0.8, seed: Some(9), frequency_penalty: 0.1, ..base.clone() },
        ),
        (
            prompt,
            Sampling { stop: vec!["go, and".into()], min_tokens: 3, logit_bias: vec![(300, 1.0)], ..base },
        ),
    ]
}

/// What answers must be, each with the request that it is put on.
fn constraints() -> [(usize, Constraint); 4] {
    let name = serde_json::json!({ "type": "string", "maxLength": 9 });
    let list = serde_json::json!({ "type": "array", "items": name, "minItems": 1 });
    [
        (1, Constraint::Json(list)),
        (3, Constraint::JsonObject),
        (9, Constraint::Regex("[A-Z][a-z]+(, [a-z]+)*!".into())),
        (11, Constraint::Regex("( I will (go|stay),)+ I will!".into())),
    ]
}

fn options() -> Options {
    Options {
        threads: NonZeroUsize::new(1),
        prefix_caching: false,
        max_model_len: Some(128),
        max_num_seqs: 1,
        ..Options::default()
    }
}

fn alone(request: &Request) -> Answer {
    let mut engine = Engine::load(&ModelFiles::bundled(), &options()).unwrap();
    engine.add(request.clone()).unwrap();
    let (mut outputs, mut answer) = (Vec::new(), Answer::default());
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
        outputs.drain(..).for_each(|output| answer.take(output));
    }
    assert!(answer.finish.is_some());
    answer
}

/// A way to be served. None of them changes an answer.
struct Way {
    name: &'static str,
    set: fn(&mut Options),
    /// What must be seen to have happened, or the row shows nothing.
    shows: fn(&Snapshot) -> bool,
}

const ALWAYS: fn(&Snapshot) -> bool = |_| true;

/// One row per way. Room for one and a half of the longest makes others yield.
const WAYS: &[Way] = &[
    Way { name: "all at once", set: |all| all.max_num_batched_tokens = 512, shows: ALWAYS },
    Way { name: "chunks of five", set: |all| all.long_prefill_token_threshold = 5, shows: ALWAYS },
    Way { name: "one prompt token beside answers", set: |all| all.mixed_prefill_tokens = 1, shows: ALWAYS },
    Way { name: "whole prompts", set: |all| all.chunked_prefill = false, shows: ALWAYS },
    Way { name: "three threads", set: |all| all.threads = NonZeroUsize::new(3), shows: ALWAYS },
    Way { name: "blocks of one", set: |all| blocks(all, 1, 1000), shows: ALWAYS },
    Way { name: "blocks of seven", set: |all| blocks(all, 7, 200), shows: ALWAYS },
    Way { name: "by priority", set: |all| all.order = Policy::Priority, shows: ALWAYS },
    Way { name: "shortest answers first", set: |all| all.order = Policy::ShortestJob, shows: ALWAYS },
    Way { name: "by what is due", set: |all| all.order = Policy::Deadline, shows: ALWAYS },
    Way { name: "fair among tenants", set: |all| all.order = Policy::fair(), shows: ALWAYS },
    Way {
        name: "longest prefix first",
        set: |all| {
            all.prefix_caching = true;
            all.order = Policy::LongestPrefix { lookups_max: 4 };
        },
        shows: |seen| seen.prefix.hits > 0,
    },
    Way { name: "prefixes found", set: |all| all.prefix_caching = true, shows: |seen| seen.prefix.hits > 0 },
    Way {
        name: "preempted, computed again",
        set: |all| blocks(all, 8, 24),
        shows: |seen| seen.totals.preemptions > 0,
    },
    Way {
        name: "further answers fork the prompt",
        set: |all| all.max_num_seqs = 16,
        shows: |seen| seen.totals.forks > 0 && seen.totals.copied_blocks > 0,
    },
    Way {
        name: "preempted, and found again",
        set: |all| {
            all.prefix_caching = true;
            blocks(all, 8, 24);
        },
        shows: |seen| seen.totals.preemptions > 0 && seen.prefix.hits > 0,
    },
    Way { name: "drafts", set: |all| all.speculation = drafts(8, 1, 3), shows: some_drafts_are_right },
    Way {
        name: "drafts, preempted, and found again",
        set: |all| {
            all.speculation = drafts(3, 1, 2);
            all.prefix_caching = true;
            blocks(all, 8, 24);
        },
        shows: |seen| some_drafts_are_right(seen) && seen.totals.preemptions > 0 && seen.prefix.hits > 0,
    },
    Way {
        name: "planned ahead",
        set: |all| all.async_scheduling = true,
        shows: |seen| seen.totals.steps_ahead > seen.totals.steps / 2,
    },
    Way {
        name: "planned ahead, preempted, and found again",
        set: |all| {
            all.async_scheduling = true;
            all.prefix_caching = true;
            blocks(all, 8, 24);
        },
        shows: |seen| seen.totals.steps_ahead > 0 && seen.totals.preemptions > 0 && seen.prefix.hits > 0,
    },
    Way {
        name: "drafts, planned ahead",
        set: |all| {
            all.async_scheduling = true;
            all.speculation = drafts(8, 1, 3);
        },
        shows: |seen| some_drafts_are_right(seen) && seen.totals.steps_ahead > seen.totals.steps / 2,
    },
    Way {
        name: "drafts, planned ahead, preempted, and found again",
        set: |all| {
            all.async_scheduling = true;
            all.speculation = drafts(3, 1, 2);
            all.prefix_caching = true;
            blocks(all, 8, 24);
        },
        shows: |seen| {
            some_drafts_are_right(seen)
                && seen.totals.steps_ahead > 0
                && seen.totals.preemptions > 0
                && seen.prefix.hits > 0
        },
    },
    Way {
        name: "drafts, planned ahead, moved to host memory and back",
        set: |all| {
            all.async_scheduling = true;
            all.speculation = drafts(4, 1, 3);
            host(all, OffloadingWrite::Through, 1000);
            all.preemption = Preemption::Swap;
        },
        shows: |seen| {
            some_drafts_are_right(seen)
                && seen.totals.steps_ahead > 0
                && seen.host.is_some_and(|host| host.swapped_tokens > 0 && host.loaded_bytes > 0)
        },
    },
    Way {
        name: "planned ahead, moved to host memory that has room for few",
        set: |all| {
            all.async_scheduling = true;
            host(all, OffloadingWrite::Through, 10);
            all.preemption = Preemption::Swap;
        },
        shows: |seen| {
            seen.totals.steps_ahead > 0
                && seen.totals.preemptions > 0
                && seen.host.is_some_and(|host| host.evictions > 0)
        },
    },
    Way {
        name: "planned ahead, kept in host memory when it is overwritten",
        set: |all| {
            all.async_scheduling = true;
            host(all, OffloadingWrite::Back, 1000);
        },
        shows: |seen| seen.totals.steps_ahead > 0 && seen.host.is_some_and(|host| host.hits > 0),
    },
    Way {
        name: "preempted, moved to host memory and back",
        set: |all| {
            host(all, OffloadingWrite::Through, 1000);
            all.preemption = Preemption::Swap;
        },
        shows: |seen| seen.host.is_some_and(|host| host.swapped_tokens > 0 && host.loaded_bytes > 0),
    },
    Way {
        name: "moved to host memory that has room for few",
        set: |all| {
            host(all, OffloadingWrite::Through, 10);
            all.preemption = Preemption::Swap;
        },
        shows: |seen| seen.totals.preemptions > 0 && seen.host.is_some_and(|host| host.evictions > 0),
    },
    Way {
        name: "evicted, and back from host memory",
        set: |all| host(all, OffloadingWrite::Through, 1000),
        shows: |seen| seen.host.is_some_and(|host| host.hits > 0),
    },
    Way {
        name: "kept in host memory at the second use",
        set: |all| host(all, OffloadingWrite::AfterUses(NonZeroU32::new(2).unwrap()), 1000),
        shows: |seen| seen.host.is_some_and(|host| host.saved_bytes > 0),
    },
    Way {
        name: "kept in host memory when it is overwritten",
        set: |all| host(all, OffloadingWrite::Back, 1000),
        shows: |seen| seen.host.is_some_and(|host| host.hits > 0),
    },
];

fn some_drafts_are_right(seen: &Snapshot) -> bool {
    let drafts = seen.totals.drafts;
    drafts.accepted_tokens > 0 && drafts.accepted_tokens < drafts.draft_tokens
}

fn blocks(options: &mut Options, size: u32, number: u32) {
    options.block_size = NonZeroU32::new(size).unwrap();
    options.kv = KvSize::Blocks(number);
}

/// K and V of a token of the bundled model: 6 layers, 2 heads of 32 numbers of 2 bytes.
const BYTES_PER_TOKEN: u64 = 6 * 2 * 2 * 32 * 2;

/// Little room here, and so many blocks behind.
fn host(options: &mut Options, write: OffloadingWrite, number: u64) {
    options.prefix_caching = true;
    blocks(options, 8, 24);
    let bytes = number * 8 * BYTES_PER_TOKEN;
    options.offloading = Some(Offloading { write, ..Offloading::new(bytes) });
}

fn random_options(dice: &mut Dice) -> Options {
    let block_size = dice.pick(&[1, 3, 8, 16, 32]);
    // Room for one or two of the longest: others must yield.
    let blocks =
        128_u32.div_ceil(block_size) + u32::try_from(dice.below(128 / u64::from(block_size) + 1)).unwrap();
    let prefix_caching = dice.below(4) != 0;
    let write = dice.pick(&[OffloadingWrite::Through, OffloadingWrite::Back]);
    let offloading = Offloading { write, arc: dice.below(2) == 0, ..Offloading::new(BYTES_PER_TOKEN << 8) };
    let offloading = (prefix_caching && dice.below(2) == 0).then_some(offloading);
    let speculation = dice.pick(&[None, None, drafts(1, 1, 1), drafts(3, 2, 2), drafts(8, 1, 3)]);
    Options {
        block_size: NonZeroU32::new(block_size).unwrap(),
        offloading,
        preemption: match dice.below(3) {
            0 => Preemption::Recompute,
            1 if offloading.is_some() => Preemption::Swap,
            _ => Preemption::Cheaper(Speeds::default()),
        },
        kv: if dice.below(4) == 0 { KvSize::Auto } else { KvSize::Blocks(blocks) },
        threads: NonZeroUsize::new(dice.pick(&[1, 2, 3])),
        max_num_seqs: dice.pick(&[2, 4, 8]),
        max_num_batched_tokens: dice.pick(&[8, 17, 64, 512]),
        long_prefill_token_threshold: dice.pick(&[0, 0, 5]),
        prefix_caching,
        order: orders()[dice.pick(&[0, 1, 2, 3, 4, 5])].clone(),
        seed: dice.next(),
        mixed_prefill_tokens: dice.pick(&[0, 1, 7, 48]),
        speculation,
        async_scheduling: dice.below(3) != 0,
        ..options()
    }
}

fn orders() -> [Policy; 6] {
    [
        Policy::FirstCome,
        Policy::Priority,
        Policy::Deadline,
        Policy::ShortestJob,
        Policy::LongestPrefix { lookups_max: 3 },
        Policy::fair(),
    ]
}

fn drafts(most: u32, min: u32, max: u32) -> Option<Speculation> {
    let [most, min, max] = [most, min, max].map(|n| NonZeroU32::new(n).unwrap());
    Some(Speculation {
        num_speculative_tokens: most,
        prompt_lookup_max: max,
        prompt_lookup_min: min,
        disable_by_batch_size: None,
    })
}

/// Somebody else's request, in the way.
fn noise(id: u64, dice: &mut Dice, like: &[Request]) -> Request {
    let mut request = like[usize::try_from(dice.below(like.len() as u64)).unwrap()].clone();
    let mut prompt = request.prompt.to_vec();
    prompt.truncate(1 + usize::try_from(dice.below(prompt.len() as u64)).unwrap());
    request.prompt = prompt.into();
    let max_tokens = 1 + u32::try_from(dice.below(20)).unwrap();
    request.sampling.max_tokens = Some(max_tokens.max(request.sampling.min_tokens));
    let priority = i32::try_from(dice.below(3)).unwrap();
    Request { id: RequestId(id), priority, tenant: TenantId(dice.below(3)), ..request }
}

/// Makes each request a sample of the one with the same prompt that comes before it, if there is one. The last comes
/// first.
fn name_leaders(to_come: &mut [Request]) {
    for place in 0..to_come.len() {
        let (request, before) = to_come[place..].split_first_mut().unwrap();
        request.sample_of =
            before.iter().rev().find(|other| other.prompt == request.prompt).map(|other| other.id);
    }
}

/// All requests, in any order, and others in between, some of which are cancelled. Returns what was seen at the end.
fn together(options: &Options, mut dice: Dice, what: &str, asked: &Asked) -> Snapshot {
    let Asked { requests, answers: expected } = asked;
    let mut engine = Engine::load(&ModelFiles::bundled(), options).unwrap();
    let mut to_come: Vec<Request> = requests.clone();
    let others = 100..100 + dice.below(6);
    to_come.extend(others.map(|id| noise(id, &mut dice, requests)));
    dice.shuffle(&mut to_come);
    name_leaders(&mut to_come);
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    let mut outputs = Vec::new();
    for now in 0.. {
        for _ in 0..dice.below(4) {
            let Some(request) = to_come.pop() else { break };
            engine.add(Request { arrival: Tick(now), ..request }).unwrap();
        }
        if dice.below(8) == 0 {
            engine.cancel(RequestId(100 + dice.below(6)));
        }
        engine.step(Tick(now), &mut outputs);
        outputs.drain(..).for_each(|output| answers.entry(output.id).or_default().take(output));
        if to_come.is_empty() && !engine.has_work() {
            break;
        }
        assert!(now < 10_000, "{what}: no end");
    }
    for (request, expected) in requests.iter().zip(expected) {
        assert_eq!(answers.get(&request.id), Some(expected), "request {} differs: {what}", request.id.0);
    }
    let snapshot = engine.snapshot();
    assert_eq!(snapshot.blocks.used, 0, "{what}");
    engine.check().unwrap();
    snapshot
}

/// Requests, and what each is answered when it is alone.
struct Asked {
    requests: Vec<Request>,
    answers: Vec<Answer>,
}

impl Asked {
    fn new() -> Self {
        let text = Arc::new(Text::load(&ModelFiles::bundled()).unwrap());
        let requests = requests(&text);
        let answers: Vec<Answer> = requests.iter().map(alone).collect();
        assert!(
            answers[6].prompt_logprobs.len() >= 20 * 3,
            "prompt log-probabilities are part of the answer"
        );
        Self { requests, answers }
    }
}

#[test]
fn no_way_to_be_served_changes_an_answer() {
    let asked = Asked::new();
    for way in WAYS {
        let mut options = Options { max_num_seqs: 8, max_num_batched_tokens: 64, ..options() };
        (way.set)(&mut options);
        let shows = |seed| {
            let what = format!("{}, seed {seed}, {options:?}", way.name);
            (way.shows)(&together(&options, Dice(seed), &what, &asked))
        };
        assert!((0..2).any(shows), "{}: the row shows less than it says", way.name);
    }
}

#[test]
fn nor_does_any_mix_of_them() {
    let asked = Asked::new();
    let rounds: u64 = std::env::var("QUAYLINE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let (mut preemptions, mut hits) = (0, 0);
    for seed in 0..rounds {
        let mut dice = Dice(seed);
        let options = random_options(&mut dice);
        let what = format!("seed {seed}, {options:?}");
        let seen = together(&options, dice, &what, &asked);
        preemptions += seen.totals.preemptions;
        hits += seen.prefix.hits;
    }
    assert!(preemptions > 0, "no round preempted anybody: the test shows less than it says");
    assert!(hits > 0, "no round found a prefix: the test shows less than it says");
}

#[test]
fn the_format_of_the_cache_changes_numbers_but_not_the_rule() {
    let text = Arc::new(Text::load(&ModelFiles::bundled()).unwrap());
    let request = &requests(&text)[1];
    let answer = |kv_dtype, block_size| {
        let block_size = NonZeroU32::new(block_size).unwrap();
        let options = Options { kv_dtype, block_size, ..options() };
        let mut engine = Engine::load(&ModelFiles::bundled(), &options).unwrap();
        engine.add(request.clone()).unwrap();
        let (mut outputs, mut answer) = (Vec::new(), Answer::default());
        while engine.has_work() {
            engine.step(Tick(0), &mut outputs);
            outputs.drain(..).for_each(|output| answer.take(output));
        }
        answer
    };
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        assert_eq!(answer(dtype, 16), answer(dtype, 5), "{dtype:?}");
    }
    assert_ne!(answer(KvDtype::F32, 16).logprobs, answer(KvDtype::Bf16, 16).logprobs);
}
