//! A dump goes through a file and back: `cargo test -p quayline-batching --features serde --test dump`.

#![cfg(feature = "serde")]

use quayline_batching::scenario::BlockMemory;
use quayline_batching::{
    Batcher, Config, Drafts, Dump, Finished, Plan, Policy, Request, RequestId, Sampled, StopRules, TenantId,
    Tick, TokenId,
};

#[test]
fn a_dump_goes_through_json() {
    let config = Config { drafts: Drafts::up_to(2), outputs_ahead: 1, running_max: 4, ..Config::new(256) };
    let mut batcher = Batcher::with_order(config, Policy::fair()).unwrap();
    let mut memory = BlockMemory::new(20, 8, true);
    for id in 0..9 {
        let request = Request {
            tenant: TenantId(id % 3),
            ..Request::new(
                RequestId(id),
                20,
                StopRules { stop_ids: vec![TokenId(3)], ..StopRules::after(30) },
            )
        };
        memory.open(request.id, (0..20).map(|place| id * 100 + place).collect());
        batcher.add(request).unwrap();
    }
    let mut plan = Plan::new();
    batcher.step(Tick(1), &mut memory, &mut plan);
    let text = serde_json::to_string(&batcher.dump()).unwrap();
    let dump: Dump<Policy> = serde_json::from_str(&text).unwrap();
    assert_eq!(dump, batcher.dump());

    let (mut restored, mut other, mut others) =
        (Batcher::restore(dump).unwrap(), memory.clone(), plan.clone());
    for now in 2..200 {
        let finished = advance(&mut batcher, &mut memory, &mut plan, now);
        assert_eq!(finished, advance(&mut restored, &mut other, &mut others, now));
        assert_eq!(plan, others);
    }
    assert!(!batcher.has_work());
    assert_eq!(batcher.dump(), restored.dump());
}

/// Applies the plan, and makes the next one.
fn advance(batcher: &mut Batcher, memory: &mut BlockMemory, plan: &mut Plan, now: u64) -> Vec<Finished> {
    let samples = plan.scheduled.iter().filter(|part| part.samples);
    let sampled: Vec<Sampled> = samples.map(|part| Sampled { id: part.id, token: TokenId(0) }).collect();
    let mut finished = Vec::new();
    if batcher.apply(plan.step, &sampled, memory, &mut finished).is_ok() {
        for output in sampled.iter().filter(|output| batcher.standing(output.id).is_some()) {
            memory.push(output.id, 0);
        }
    }
    finished.iter().for_each(|done| memory.close(done.id));
    batcher.step(Tick(now), memory, plan);
    finished
}

/// What nobody has dumped is refused.
#[test]
fn a_dump_that_contradicts_itself_is_refused() {
    let mut batcher = Batcher::new(Config::new(256)).unwrap();
    batcher.add(Request::new(RequestId(1), 20, StopRules::after(30))).unwrap();
    let text = serde_json::to_string(&batcher.dump()).unwrap();
    for (from, to) in [
        (r#""running":[]"#, r#""running":[{"index":7,"generation":0}]"#),
        (r#""running":[]"#, r#""running":[{"index":0,"generation":0}]"#),
        (r#""vacant":[]"#, r#""vacant":[0]"#),
        (r#""running_max":128"#, r#""running_max":0"#),
    ] {
        assert!(text.contains(from), "{text}");
        let dump: Dump<Policy> = serde_json::from_str(&text.replace(from, to)).unwrap();
        assert!(Batcher::restore(dump).is_err(), "{to}");
    }
}
