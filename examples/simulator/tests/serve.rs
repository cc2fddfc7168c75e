//! Served traces: nothing is lost on the way, and a replay of a real run takes as long as the run took.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test may fail where it stands, and says what it skips"
)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use quayline_batching::{Config, Policy, Targets};
use quayline_simulator::comparison::{self, Comparison, Times};
use quayline_simulator::cost::Cost;
use quayline_simulator::gpu::{Gpu, Host};
use quayline_simulator::measured::{self, Meta};
use quayline_simulator::model::Model;
use quayline_simulator::profile::Profile;
use quayline_simulator::serve::{Engine, Report, serve};
use quayline_simulator::trace::Arrival;
use quayline_simulator::{spread, tenants};

const BLOCK_TOKENS: u32 = 16;

fn engine(blocks: u32) -> Engine {
    Engine {
        batching: Config { step_tokens_max: 512, running_max: 16, outputs_ahead: 1, ..Config::new(2) },
        block_tokens: BLOCK_TOKENS,
        blocks,
        prefix_caching: true,
        targets: Targets { first_token_ticks: 2_000_000_000, token_ticks: 50_000_000 },
        cost: Cost { model: Model::LLAMA_3_1_8B, gpu: Gpu::RTX_4090, ranks: 1, host: Host::VLLM },
    }
}

/// Requests of mixed lengths, ten in a second.
fn arrivals(count: u32) -> Vec<Arrival> {
    let arrival = |n: u32| Arrival {
        at: Duration::from_millis(u64::from(n) * 100),
        prompt_tokens: 1 + n * 7919 % 900,
        output_tokens: 1 + n * 104_729 % 200,
        blocks: Vec::new(),
    };
    (0..count).map(arrival).collect()
}

fn orders() -> Vec<Policy> {
    let prefix = Policy::LongestPrefix { lookups_max: 4 };
    vec![Policy::FirstCome, Policy::Priority, Policy::Deadline, Policy::ShortestJob, prefix, Policy::fair()]
}

fn served(engine: &Engine, order: Policy, arrivals: &[Arrival]) -> Report {
    serve(engine, order, arrivals, &tenants::draw(arrivals.len(), 4, 1)).unwrap()
}

#[test]
fn every_request_ends_with_its_tokens_and_time_runs_forward_in_every_order() {
    let arrivals = arrivals(300);
    for (blocks, ahead) in [(10_000, 1), (200, 1), (200, 0)] {
        for order in orders() {
            let mut engine = engine(blocks);
            engine.batching.outputs_ahead = ahead;
            let name = format!("{order:?}, {blocks} blocks, {ahead} ahead");
            let report = served(&engine, order, &arrivals);
            for (served, arrival) in report.requests.iter().zip(&arrivals) {
                assert_eq!(served.tokens, arrival.output_tokens, "{name}: {served:?}");
                let times = [served.arrived, served.queued, served.first, served.last];
                assert!(times.is_sorted() && served.queued < served.first, "{name}: {served:?}");
            }
            assert!(report.gaps.iter().all(|&gap| gap > 0.0), "{name}: a token before the one before");
            let outputs: u32 = arrivals.iter().map(|arrival| arrival.output_tokens).sum();
            assert_eq!(report.gaps.len() + arrivals.len(), outputs as usize, "{name}");
            // The last token of an answer is not computed.
            let prompts: u32 = arrivals.iter().map(|arrival| arrival.prompt_tokens).sum();
            let once = u64::from(prompts + outputs) - arrivals.len() as u64;
            if blocks == 200 {
                assert!(report.preemptions > 0 && report.computed_tokens > once, "{name}");
            } else {
                assert_eq!((report.preemptions, report.computed_tokens), (0, once), "{name}");
            }
            let preempted: u64 = report.requests.iter().map(|served| u64::from(served.preemptions)).sum();
            assert_eq!(preempted, report.preemptions, "{name}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_report() {
    let (engine, arrivals) = (engine(200), arrivals(200));
    let report = |seed| {
        let owners = tenants::draw(arrivals.len(), 4, seed);
        serve(&engine, Policy::fair(), &arrivals, &owners).unwrap()
    };
    assert_eq!(report(5), report(5));
    assert_ne!(report(5), report(6));
}

#[test]
fn first_come_is_first_served() {
    let report = served(&engine(10_000), Policy::FirstCome, &arrivals(300));
    assert!(report.requests.is_sorted_by(|a, b| a.first <= b.first));
    let report = served(&engine(10_000), Policy::ShortestJob, &arrivals(300));
    assert!(!report.requests.is_sorted_by(|a, b| a.first <= b.first), "the load is too light to tell");
}

#[test]
fn fair_shares_are_fairer_than_first_come() {
    let arrivals = arrivals(600);
    let jain = |order| served(&engine(10_000), order, &arrivals).fairness.jain.unwrap();
    let (first_come, fair) = (jain(Policy::FirstCome), jain(Policy::fair()));
    assert!(fair > 0.95 && fair > first_come + 0.1, "fair {fair:.3}, first come {first_come:.3}");
}

#[test]
fn a_shared_prompt_is_computed_once() {
    let prompt = |seconds| Arrival {
        at: Duration::from_secs(seconds),
        prompt_tokens: 1000,
        output_tokens: 10,
        blocks: vec![7, 9],
    };
    let report = served(&engine(1000), Policy::FirstCome, &[prompt(0), prompt(10)]);
    // Whole blocks of it, but for the last token.
    assert_eq!((report.prompt_tokens, report.hit_tokens), (2000, 992));
    let [first, second] = &*report.requests else { unreachable!() };
    assert!(second.first - second.queued < (first.first - first.queued) / 2.0);
}

#[test]
fn a_request_larger_than_the_cache_is_refused_and_hurts_nobody() {
    let mut arrivals = arrivals(20);
    arrivals[3].prompt_tokens = 200 * BLOCK_TOKENS;
    let report = served(&engine(100), Policy::FirstCome, &arrivals);
    let refused: Vec<_> = (0..20).filter(|&index| report.requests[index].tokens == 0).collect();
    assert_eq!(refused, [3]);
}

#[test]
fn a_comparison_is_two_tables_and_a_picture() {
    let arrivals = arrivals(100);
    let mut comparison = Comparison::default();
    comparison.add("fcfs", served(&engine(10_000), Policy::FirstCome, &arrivals));
    comparison.add("fair", served(&engine(10_000), Policy::fair(), &arrivals));
    let svg = spread::draw(&comparison, "a < b");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("a &lt; b"), "{svg}");
    assert_eq!(svg.matches("<polyline").count(), 4, "two orders in two panels");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    let tables = comparison.to_string();
    assert!(tables.contains("fair") && tables.contains("Jain") && !tables.contains("NaN"), "{tables}");
    assert!(spread::draw(&Comparison::default(), "nothing").ends_with("</svg>\n"));
}

/// The folder of a recorded run and its profile, if it is beside the repository.
fn recorded(gpu: &str) -> Option<PathBuf> {
    let folder = "../../../shared/data/perf/llmservingsim";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(gpu).join("Llama-3.1-8B");
    if folder.exists() {
        return Some(folder);
    }
    eprintln!("skipped: the recorded run on {gpu} is not beside the repository");
    None
}

/// The host's constants were chosen by the run on the RTX PRO 6000; that on the RTX 4090, where memory is
/// short, tells whether they mean anything elsewhere.
#[test]
fn replays_of_recorded_runs_are_within_five_percent() {
    for (name, gpu) in [("RTXPRO6000", Gpu::RTX_PRO_6000), ("RTX4090", Gpu::RTX_4090)] {
        let Some(folder) = recorded(name) else { continue };
        let measured = measured::read(&folder.join("vllm/requests.jsonl"), usize::MAX).unwrap().unwrap();
        let meta = Meta::read(&folder.join("vllm/meta.json")).unwrap();
        let mut engine = Engine { cost: Cost { gpu, ..engine(1).cost }, ..engine(1) };
        engine.batching.step_tokens_max = meta.engine_kwargs.max_num_batched_tokens.unwrap();
        engine.batching.running_max = meta.engine_kwargs.max_num_seqs.unwrap();
        // Where the run does not say, memory was ample.
        engine.blocks = meta.kv_cache.num_gpu_blocks.map_or(30_000, |blocks| blocks - 1);
        let report = served(&engine, Policy::FirstCome, &measured.arrivals);
        let times = Times::of(&report);
        for (simulated, real) in [
            (times.queued_first_token.mean, measured.first_token.mean),
            (times.per_token.mean, measured.per_token.mean),
        ] {
            let off = simulated / real - 1.0;
            assert!(off.abs() < 0.05, "{name}:\n{}", comparison::beside(&measured, &report));
        }
    }
}

#[test]
fn the_constants_are_what_the_profiles_say() {
    for (name, gpu) in [("RTXPRO6000", Gpu::RTX_PRO_6000), ("RTX4090", Gpu::RTX_4090)] {
        let Some(folder) = recorded(name) else { continue };
        let profile = Profile::read(&folder.join("profile/tp1"), &Model::LLAMA_3_1_8B, 1).unwrap();
        let found = profile.gpu(&gpu).unwrap();
        let constants = |gpu: &Gpu| {
            let Gpu { matmul, decode, mixed, .. } = gpu;
            [
                matmul.bytes_per_second,
                matmul.flops_per_second,
                decode.call_seconds,
                decode.request_seconds,
                decode.bytes_per_second,
                mixed.call_seconds,
                mixed.request_seconds,
                mixed.bytes_per_second,
                mixed.flops_per_second,
                mixed.key_seconds,
            ]
        };
        for (found, written) in constants(&found).into_iter().zip(constants(&gpu)) {
            assert!((found / written - 1.0).abs() < 2e-3, "{name}: {found:e} found, {written:e} written");
        }
    }
}
