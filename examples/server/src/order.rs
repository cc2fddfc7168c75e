//! Who goes first: the order on the command line, and what it needs to know of a request.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use quayline_engine::{Options, Policy, Targets, TenantId};

use crate::api::error::ApiError;
use crate::caller::{Caller, target_ms};
use crate::tenants::{self, Tenants};

/// How many of the waiting are looked up in the cache in each step, longest prefix first: as many as cost a step
/// next to nothing.
const LOOKUPS_MAX: u32 = 64;

/// Who goes first.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Order")]
pub(crate) struct OrderFlags {
    /// Who runs first, and who yields last when the cache is full
    #[arg(long, value_enum, default_value_t = Scheduling::Fcfs)]
    scheduling_policy: Scheduling,
    /// With `deadline`: milliseconds to the first token, where no header x-llm-d-slo-ttft-ms says otherwise
    #[arg(long, default_value_t = 2000.0, value_parser = target_ms)]
    slo_ttft_ms: f64,
    /// With `deadline`: milliseconds from token to token, where no header x-llm-d-slo-tpot-ms says otherwise
    #[arg(long, default_value_t = 100.0, value_parser = target_ms)]
    slo_tpot_ms: f64,
    /// With `fair`: the tenants that have weights or keys of their own, as a JSON object or a file with one:
    /// {"acme": {"weight": 3, "api_keys": ["sk-..."]}}
    #[arg(long, value_parser = tenants::read, default_value = "{}", hide_default_value = true)]
    tenants: Tenants,
    /// Seconds after which whoever waits goes first, whatever the order; 0 is never
    #[arg(long, default_value_t = 0)]
    scheduling_patience: u64,
}

/// The orders under vLLM's names, where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scheduling {
    /// First come, first served
    Fcfs,
    /// Lowest `priority` of the request first
    Priority,
    /// Whoever's next token is due first: --slo-ttft-ms, --slo-tpot-ms and the headers of these names
    Deadline,
    /// Whoever has the fewest tokens still to come: `expected_output_tokens` of the request, else `max_tokens`
    #[value(alias = "sjf")]
    Shortest,
    /// Whoever finds most of its prompt in the cache
    #[value(alias = "lpm")]
    LongestPrefix,
    /// The same number of tokens for each tenant, in proportion to its weight
    Fair,
}

/// What decides when a request runs.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    pub(crate) priority: i32,
    /// In words; [`tenant_id`](Turn::tenant_id) is the engine's name.
    pub(crate) tenant: Arc<str>,
    pub(crate) targets: Option<Targets>,
    pub(crate) expected_new_tokens: Option<u32>,
}

/// What the body of a request says of its turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wishes<'a> {
    pub(crate) priority: Option<i32>,
    pub(crate) expected_output_tokens: Option<u32>,
    pub(crate) user: Option<&'a str>,
}

impl Turn {
    /// The engine's name of the tenant.
    pub(crate) fn tenant_id(&self) -> TenantId {
        tenants::id(&self.tenant)
    }
}

impl OrderFlags {
    /// The order.
    pub(crate) fn scheduling(&self) -> Scheduling {
        self.scheduling_policy
    }

    /// Tenants with weights or keys of their own.
    pub(crate) fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    /// Adds what these flags say.
    pub(crate) fn add_to(&self, options: Options) -> Options {
        let order = match self.scheduling_policy {
            Scheduling::Fcfs => Policy::FirstCome,
            Scheduling::Priority => Policy::Priority,
            Scheduling::Deadline => Policy::Deadline,
            Scheduling::Shortest => Policy::ShortestJob,
            Scheduling::LongestPrefix => Policy::LongestPrefix { lookups_max: LOOKUPS_MAX },
            Scheduling::Fair => Policy::Fair(self.tenants.order()),
        };
        let patience = self.scheduling_patience.saturating_mul(1_000_000);
        Options { order, patience_ticks: (patience > 0).then_some(patience), ..options }
    }

    /// The turn of a request: what it says for itself, what its caller says, and for the rest the server's defaults.
    ///
    /// # Errors
    /// A wish that this order does not grant, or nobody can.
    pub(crate) fn turn(&self, wishes: Wishes<'_>, caller: &Caller) -> Result<Turn, ApiError> {
        let order = self.scheduling_policy;
        let priority = wishes.priority.unwrap_or(0);
        if priority != 0 && order != Scheduling::Priority {
            return Err(needs("priority", "priority"));
        }
        let expected_new_tokens = wishes.expected_output_tokens;
        match expected_new_tokens {
            Some(_) if order != Scheduling::Shortest => {
                return Err(needs("expected_output_tokens", "shortest"));
            }
            Some(0) => return Err(ApiError::field("expected_output_tokens", "must be at least 1, not 0")),
            _ => {}
        }
        let targets = Targets {
            first_token_ticks: ticks(caller.first_token_ms.unwrap_or(self.slo_ttft_ms)),
            token_ticks: ticks(caller.token_ms.unwrap_or(self.slo_tpot_ms)),
        };
        Ok(Turn {
            priority,
            tenant: caller.tenant(wishes.user),
            targets: (order == Scheduling::Deadline).then_some(targets),
            expected_new_tokens,
        })
    }
}

fn needs(field: &'static str, order: &str) -> ApiError {
    ApiError::field(field, format!("needs a server started with --scheduling-policy {order}"))
}

/// Milliseconds in the engine's ticks.
fn ticks(milliseconds: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "up to a day")]
    let ticks = (milliseconds * 1000.0).ceil() as u64;
    ticks
}
