//! The engine at work, for the live page: sizes, counts and reasons, never a prompt or an answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use quayline_engine::{BlockUse, ReasonCount, RequestState, Snapshot, Tick, TurnedAway, WaitReason};
use serde_json::{Value, json};
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::api::error::{ApiError, ErrorBody};
use crate::app::App;
use crate::engine::Explained;
use crate::order::Scheduling;

/// Time between two events.
const EVERY: Duration = Duration::from_millis(200);

/// A view older than this shows no speed: nothing has run since.
const STALE: Tick = Tick(1_000_000);

/// Most cells in `occupancy`.
const CELLS_MAX: usize = 4096;

/// The engine at this moment.
#[utoipa::path(get, path = "/debug/state", tag = "Monitoring", responses(
    (status = 200, description = "One JSON object; the server's README describes it", body = Object)))]
pub(crate) async fn state(State(app): State<Arc<App>>) -> Json<Value> {
    Json(shown(&app))
}

/// The engine as it goes: the object of `/debug/state`, about five times a second.
#[utoipa::path(get, path = "/debug/events", tag = "Monitoring", responses(
    (status = 200, description = "Server-sent events", body = Object, content_type = "text/event-stream")))]
pub(crate) async fn events(State(app): State<Arc<App>>) -> Response {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let draining = app.draining();
    let events = stream::unfold((app, ticks, draining), |(app, mut ticks, mut draining)| async move {
        wait(&mut ticks, &mut draining).await?;
        let event = Event::default().data(shown(&app).to_string());
        Some((Ok::<_, Infallible>(event), (app, ticks, draining)))
    });
    Sse::new(events).into_response()
}

/// How one request stands, and why it waits: by the `id` of its answer, which begins with `chatcmpl-` or `cmpl-` and
/// goes on as the request's `X-Request-Id`.
#[utoipa::path(get, path = "/debug/requests/{id}", tag = "Monitoring",
    params(("id" = String, Path, description = "The answer's id")), responses(
    (status = 200, description = "The choices that have not ended, each as in `/debug/state`", body = Object),
    (status = 404, description = "No such request is in the engine", body = ErrorBody),
    (status = "5XX", description = "There is no engine", body = ErrorBody)))]
pub(crate) async fn one_request(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let gone = |_| ApiError::unavailable("there is no engine");
    let choices = app.engine.explain(id.clone()).await.map_err(gone)?;
    if choices.is_empty() {
        return Err(ApiError::unknown_request(&id));
    }
    let now = app.engine.now();
    let choice = |choice: &Explained| {
        let mut shown = request(&choice.state, now);
        shown["index"] = json!(choice.choice);
        shown["order"] = order(app.order.scheduling(), choice);
        shown
    };
    Ok(Json(json!({ "id": id, "choices": choices.iter().map(choice).collect::<Vec<_>>() })))
}

/// Until the next event is due; `None` when the server drains, for a stream without end would hold it up.
async fn wait(ticks: &mut Interval, draining: &mut tokio::sync::watch::Receiver<bool>) -> Option<()> {
    tokio::select! {
        _ = draining.wait_for(|draining| *draining) => None,
        _ = ticks.tick() => Some(()),
    }
}

/// Drop all cached prefixes. Only with `VLLM_SERVER_DEV_MODE=1`.
#[utoipa::path(post, path = "/reset_prefix_cache", tag = "Development", responses(
    (status = 200, description = "Done"),
    (status = 409, description = "Requests still hold blocks"),
    (status = "5XX", description = "There is no engine", body = ErrorBody)))]
pub(crate) async fn reset_prefix_cache(State(app): State<Arc<App>>) -> Result<StatusCode, ApiError> {
    Ok(if app.reset_prefix_cache().await? { StatusCode::OK } else { StatusCode::CONFLICT })
}

fn shown(app: &App) -> Value {
    let view = app.engine.view().borrow().clone();
    let (now, Snapshot { blocks, prefix, last_step, totals, .. }) = (app.engine.now(), &*view.snapshot);
    let model = app.loaded_model();
    let is_fresh = now.0.saturating_sub(view.at.0) < STALE.0;
    let speed = |rate: f64| if is_fresh { (rate * 10.0).round() / 10.0 } else { 0.0 };
    let cell = view.snapshot.occupancy.len().div_ceil(CELLS_MAX).max(1);
    let requests = |all: &[RequestState]| all.iter().map(|one| request(one, now)).collect::<Vec<_>>();
    json!({
        "time_ms": now.0 / 1000,
        "phase": app.phase().as_str(),
        "model": model.map(|_| &app.names[0]),
        "context": model.map(|model| model.context),
        "running_max": app.running_max,
        "output_tokens_per_second": speed(view.output_tokens_per_second),
        "prompt_tokens_per_second": speed(view.prompt_tokens_per_second),
        "blocks": {
            "size": blocks.size, "total": blocks.total, "used": blocks.used, "free": blocks.free,
            "cached": blocks.cached, "bytes": blocks.bytes,
        },
        "occupancy": occupancy(&view.snapshot.occupancy, cell),
        "blocks_per_cell": cell,
        "prefix": {
            "queries": prefix.queries, "hits": prefix.hits,
            "hit_rate": prefix.hits as f64 / prefix.queries.max(1) as f64,
        },
        "host": view.snapshot.host.map(|host| json!({
            "blocks": host.blocks, "used": host.used, "queries": host.queries, "hits": host.hits,
            "swapped_tokens": host.swapped_tokens, "saved_bytes": host.saved_bytes,
            "loaded_bytes": host.loaded_bytes, "evictions": host.evictions,
        })),
        "disk": view.snapshot.disk.map(|disk| json!({
            "blocks": disk.blocks, "used": disk.used, "pending_blocks": disk.pending_blocks,
            "saved_bytes": disk.saved_bytes,
            "loaded_bytes": disk.loaded_bytes, "failed_blocks": disk.failed_blocks,
            "evictions": disk.evictions,
        })),
        "last_step": {
            "prefill_requests": last_step.prefill_requests, "prefill_tokens": last_step.prefill_tokens,
            "decode_requests": last_step.decode_requests, "preempted": last_step.preempted,
            "tokens_max": last_step.tokens_max,
        },
        "totals": {
            "steps": totals.steps, "prompt_tokens": totals.prompt_tokens, "output_tokens": totals.output_tokens,
            "preemptions": totals.preemptions, "accepted": totals.accepted, "finished": totals.finished,
            "cancelled": totals.cancelled,
        },
        "reasons": reasons(&view.snapshot.reasons),
        "turned_away": view.snapshot.turned_away.iter().map(|one| turned_away(one, now)).collect::<Vec<_>>(),
        "waiting_requests": view.snapshot.waiting_requests,
        "running": requests(&view.snapshot.running),
        "waiting": requests(&view.snapshot.waiting),
    })
}

/// The order, and what of the request it goes by.
fn order(scheduling: Scheduling, choice: &Explained) -> Value {
    let Explained { turn, served, .. } = choice;
    match scheduling {
        Scheduling::Fcfs => json!({ "policy": "fcfs" }),
        Scheduling::Priority => json!({ "policy": "priority", "priority": turn.priority }),
        Scheduling::Deadline => json!({
            "policy": "deadline",
            "ttft_target_ms": turn.targets.map(|targets| targets.first_token_ticks as f64 / 1000.0),
            "tpot_target_ms": turn.targets.map(|targets| targets.token_ticks as f64 / 1000.0),
        }),
        Scheduling::Shortest => {
            let expected = turn.expected_new_tokens.unwrap_or(choice.state.output_tokens_max);
            json!({ "policy": "shortest", "expected_output_tokens": expected })
        }
        Scheduling::LongestPrefix => json!({ "policy": "longest-prefix" }),
        Scheduling::Fair => json!({ "policy": "fair", "tenant": *turn.tenant, "served": served }),
    }
}

fn request(state: &RequestState, now: Tick) -> Value {
    json!({
        "id": state.id.0,
        "age_ms": now.0.saturating_sub(state.arrival.0) / 1000,
        "prompt_tokens": state.prompt_tokens,
        "cached_tokens": state.cached_tokens,
        "computed_tokens": state.computed_tokens,
        "output_tokens": state.output_tokens,
        "output_tokens_max": state.output_tokens_max,
        "preemptions": state.preemptions,
        "blocks": state.blocks,
        "waits_for": state.waits_for.map(|reason| reason.to_string()),
        "reason": state.waits_for.as_ref().map(reason),
        "preempted_for": state.preempted_for.as_ref().map(reason),
    })
}

/// A reason with its code and its numbers, each by name.
fn reason(reason: &WaitReason) -> Value {
    let numbers = match serde_json::to_value(reason) {
        Ok(Value::Object(variant)) => variant.into_iter().next().map(|(_, numbers)| numbers),
        _ => None,
    };
    let mut shown = json!({ "code": reason.code(), "text": reason.to_string() });
    if let (Some(Value::Object(numbers)), Some(shown)) = (numbers, shown.as_object_mut()) {
        shown.extend(numbers);
    }
    shown
}

/// `{"skipped": {"no_room": 3}}`.
fn reasons(counts: &[ReasonCount]) -> Value {
    let mut shown = json!({});
    for ReasonCount { outcome, code, count } in counts {
        shown[outcome.as_str()][*code] = json!(count);
    }
    shown
}

fn turned_away(one: &TurnedAway, now: Tick) -> Value {
    json!({
        "id": one.id.0,
        "age_ms": now.0.saturating_sub(one.at.0) / 1000,
        "outcome": one.outcome.as_str(),
        "code": one.code,
        "text": one.text,
    })
}

/// One digit per cell: the busiest block in it.
fn occupancy(blocks: &[BlockUse], cell: usize) -> String {
    let digit =
        |cell: &[BlockUse]| char::from(b'0' + cell.iter().map(|block| *block as u8).max().unwrap_or(0));
    blocks.chunks(cell).map(digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_its_busiest_block() {
        let blocks = [BlockUse::Free, BlockUse::Cached, BlockUse::Held, BlockUse::Shared, BlockUse::Free];
        assert_eq!(occupancy(&blocks, 1), "01230");
        assert_eq!(occupancy(&blocks, 2), "130");
        assert_eq!(occupancy(&[], 1), "");
    }

    #[test]
    fn a_reason_is_its_code_its_sentence_and_its_numbers() {
        let shown = reason(&WaitReason::NoRoom { need: 9, free: 4 });
        assert_eq!(
            (&shown["code"], &shown["need"], &shown["free"]),
            (&json!("no_room"), &json!(9), &json!(4))
        );
        assert_eq!(reason(&WaitReason::Paused)["code"], "paused");
    }

    #[test]
    fn counts_lie_under_what_happened() {
        let count = |outcome, code, count| ReasonCount { outcome, code, count };
        use quayline_engine::Outcome::{Cut, Skipped};
        let shown =
            reasons(&[count(Skipped, "behind", 2), count(Skipped, "no_room", 1), count(Cut, "step_left", 3)]);
        assert_eq!(shown, json!({ "skipped": { "behind": 2, "no_room": 1 }, "cut": { "step_left": 3 } }));
    }
}
