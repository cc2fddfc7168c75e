//! What a `batcher` and an `add` command say, in the crate's words.

use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;

use super::words::Words;
use crate::{
    Config, Costs, DraftLimit, Drafts, EncoderLimits, FailedLoads, Fair, Grammar, LongPrefills, Policy,
    Preemption, Prefill, Remote, Targets,
};

/// The limits and the order that a `batcher` command names.
pub(super) fn config(words: &Words<'_>) -> Result<(Config, Policy), String> {
    words.only(&[
        "step_tokens_max",
        "running_max",
        "model_tokens_max",
        "prefill",
        "mixed_prefill_tokens_max",
        "order",
        "chunk_multiple",
        "long_prefills",
        "admission_interval",
        "whole_sequence_check",
        "watermark_tokens",
        "preemption",
        "drafts",
        "draft_limits",
        "draft_adaptive",
        "draft_padding",
        "draft_slots",
        "outputs_ahead",
        "micro_batches",
        "fenced_frees",
        "adapters_max",
        "encoder",
        "failed_loads",
        "queued_requests_max",
        "queued_tokens_max",
        "waiting_ticks_max",
        "running_ticks_max",
        "handover_ticks_max",
        "patience_ticks",
    ])?;
    let usual = Config::new(words.number("model_tokens_max", 4096)?);
    let config = Config {
        step_tokens_max: words.number("step_tokens_max", usual.step_tokens_max)?,
        running_max: words.number("running_max", usual.running_max)?,
        model_tokens_max: usual.model_tokens_max,
        prefill: prefill(words.option("prefill").unwrap_or("chunked"))?,
        mixed_prefill_tokens_max: words.parsed("mixed_prefill_tokens_max")?,
        chunk_multiple: words.number("chunk_multiple", usual.chunk_multiple)?,
        long_prefills: words.option("long_prefills").map(long_prefills).transpose()?,
        admission_interval: words.number("admission_interval", usual.admission_interval)?,
        whole_sequence_check: words.switch("whole_sequence_check", usual.whole_sequence_check)?,
        watermark_tokens: words.number("watermark_tokens", usual.watermark_tokens)?,
        preemption: preemption(words.option("preemption").unwrap_or("recompute"))?,
        drafts: drafts(words)?,
        outputs_ahead: words.number("outputs_ahead", usual.outputs_ahead)?,
        micro_batches: words.number("micro_batches", usual.micro_batches)?,
        fenced_frees: words.switch("fenced_frees", usual.fenced_frees)?,
        adapters_max: words.parsed("adapters_max")?,
        encoder: words.option("encoder").map(encoder).transpose()?,
        failed_loads: failed_loads(words.option("failed_loads").unwrap_or("recompute"))?,
        queued_requests_max: words.parsed("queued_requests_max")?,
        queued_tokens_max: words.parsed("queued_tokens_max")?,
        waiting_ticks_max: words.parsed("waiting_ticks_max")?,
        running_ticks_max: words.parsed("running_ticks_max")?,
        handover_ticks_max: words.parsed("handover_ticks_max")?,
        patience_ticks: words.parsed("patience_ticks")?,
    };
    Ok((config, order(words.option("order").unwrap_or("first_come"))?))
}

fn prefill(word: &str) -> Result<Prefill, String> {
    let capped = |tokens: &str, adaptive| {
        let tokens_max: NonZeroU32 = tokens.parse().map_err(|_| format!("{tokens} is not a cap"))?;
        Ok(Prefill::Capped { tokens_max, adaptive })
    };
    match word.split_once(':') {
        None if word == "whole" => Ok(Prefill::Whole),
        None if word == "chunked" => Ok(Prefill::Chunked),
        Some(("capped", tokens)) => capped(tokens, false),
        Some(("adaptive", tokens)) => capped(tokens, true),
        _ => Err(format!("no prefill is called {word}")),
    }
}

fn long_prefills(word: &str) -> Result<LongPrefills, String> {
    let [above_tokens, running_max] = parts(word)?;
    Ok(LongPrefills { above_tokens: number(above_tokens)?, running_max: number(running_max)? })
}

fn preemption(word: &str) -> Result<Preemption, String> {
    match word.split_once(':') {
        None if word == "recompute" => Ok(Preemption::Recompute),
        None if word == "swap" => Ok(Preemption::Swap),
        Some(("cheaper", costs)) => {
            let [bytes, bandwidth, transfer, prefill] = parts(costs)?;
            Ok(Preemption::Cheaper(Costs {
                bytes_per_token: number(bytes)?,
                bytes_per_second: number::<NonZeroU64>(bandwidth)?,
                transfer_nanoseconds: number(transfer)?,
                prefill_tokens_per_second: number::<NonZeroU64>(prefill)?,
            }))
        }
        _ => Err(format!("no preemption is called {word}")),
    }
}

fn drafts(words: &Words<'_>) -> Result<Drafts, String> {
    let limit = |limit: &str| {
        let [above_running, tokens_max] = parts(limit)?;
        Ok(DraftLimit { above_running: number(above_running)?, tokens_max: number(tokens_max)? })
    };
    let limits = words
        .option("draft_limits")
        .map_or(Ok(Vec::new()), |limits| limits.split(',').map(limit).collect::<Result<_, String>>())?;
    Ok(Drafts {
        tokens_max: words.number("drafts", 0)?,
        limits,
        adaptive: words.switch("draft_adaptive", false)?,
        padding: words.switch("draft_padding", false)?,
        slots: words.number("draft_slots", 0)?,
    })
}

fn encoder(word: &str) -> Result<EncoderLimits, String> {
    let [step_tokens_max, cache_tokens_max] = parts(word)?;
    Ok(EncoderLimits {
        step_tokens_max: number(step_tokens_max)?,
        cache_tokens_max: number(cache_tokens_max)?,
    })
}

fn failed_loads(word: &str) -> Result<FailedLoads, String> {
    match word {
        "recompute" => Ok(FailedLoads::Recompute),
        "end" => Ok(FailedLoads::End),
        other => Err(format!("failed loads neither recompute nor end, but {other}")),
    }
}

fn order(word: &str) -> Result<Policy, String> {
    match word.split_once(':') {
        None => match word {
            "first_come" => Ok(Policy::FirstCome),
            "priority" => Ok(Policy::Priority),
            "deadline" => Ok(Policy::Deadline),
            "shortest_job" => Ok(Policy::ShortestJob),
            "fair" => Ok(Policy::fair()),
            other => Err(format!("no order is called {other}")),
        },
        Some(("longest_prefix", lookups)) => Ok(Policy::LongestPrefix { lookups_max: number(lookups)? }),
        Some(("fair", costs)) => {
            let [input, output] = parts(costs)?;
            Ok(Policy::Fair(Fair::with_costs(number(input)?, number(output)?)))
        }
        Some(_) => Err(format!("no order is called {word}")),
    }
}

pub(super) fn grammar(word: &str) -> Result<Grammar, String> {
    match word {
        "none" => Ok(Grammar::None),
        "compiling" => Ok(Grammar::Compiling),
        "ready" => Ok(Grammar::Ready),
        other => Err(format!("no grammar is {other}")),
    }
}

pub(super) fn targets(word: &str) -> Result<Targets, String> {
    let [first, token] = parts(word)?;
    Ok(Targets { first_token_ticks: number(first)?, token_ticks: number(token)? })
}

pub(super) fn remote(word: &str) -> Result<Remote, String> {
    match word.split_once(':') {
        None if word == "unknown" => Ok(Remote::Unknown),
        None if word == "nothing" => Ok(Remote::Nothing),
        Some(("now", tokens)) => Ok(Remote::Now { tokens: number(tokens)? }),
        Some(("later", tokens)) => Ok(Remote::Later { tokens: number(tokens)? }),
        _ => Err(format!("another machine has {word}, which is nothing we know")),
    }
}

/// The parts of `a:b:c`.
fn parts<const N: usize>(word: &str) -> Result<[&str; N], String> {
    let parts: Vec<&str> = word.split(':').collect();
    parts.try_into().map_err(|_| format!("{word} has not {N} parts"))
}

pub(super) fn number<T: FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("{word} is not a number"))
}
