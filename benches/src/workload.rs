//! What is asked: the requests of a run, each a function of the seed and of its own number, whoever sends it
//! and when.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::prompt::{self, Form, Part, PartName};
use crate::random::Random;
use crate::trace::{Arrival, BLOCK_TOKENS};

/// Which endpoint is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

impl Endpoint {
    /// Its path below the base address.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// A wanted length in tokens and how far a request may be from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Length {
    /// The middle.
    pub tokens: u32,
    /// Lengths are drawn evenly from `tokens * (1 - spread)` to `tokens * (1 + spread)`.
    pub spread: f64,
}

impl Length {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a length between 1 and 2 * u32::MAX, clamped"
    )]
    fn draw(self, random: &mut Random) -> u32 {
        let factor = 1.0 + self.spread.clamp(0.0, 1.0) * (2.0 * random.unit() - 1.0);
        (f64::from(self.tokens) * factor).round().clamp(1.0, f64::from(u32::MAX)) as u32
    }
}

/// Where lengths and sharing come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Drawn from the given shapes.
    Drawn {
        /// Tokens of a prompt, its shared beginning included.
        prompt: Length,
        /// Tokens of an answer.
        output: Length,
        /// Tokens at the beginning of a prompt that all requests of its group share.
        shared_prefix_tokens: u32,
        /// Number of groups; a request belongs to a random one.
        shared_groups: u64,
    },
    /// Recorded.
    Trace {
        /// The recorded requests.
        arrivals: Vec<Arrival>,
        /// Lengths are multiplied by this, so that a small model can play a large model's trace. Sharing is
        /// kept.
        scale: f64,
        /// Longest prompt, after scaling.
        prompt_tokens_max: u32,
        /// Longest answer, after scaling.
        output_tokens_max: u32,
    },
}

/// How a request ends, as far as the client has a say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fate {
    /// The client reads to the end.
    Finish,
    /// The client closes the connection after so many pieces of text.
    LeaveAfterPieces(u32),
    /// The client closes the connection after this long, most often before the first token.
    LeaveAfter(Duration),
    /// The client waits this long after each piece of the stream.
    ReadSlowly(Duration),
}

/// What the server should say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Expected {
    /// An answer.
    Answer,
    /// A 4xx status: the request is wrong on purpose.
    Refusal,
}

/// Everything about the requests of a run.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Two runs with the same seed ask the same things.
    pub seed: u64,
    /// The model's name in every request.
    pub model: String,
    /// The endpoint.
    pub endpoint: Endpoint,
    /// How prompts are written.
    pub form: Form,
    /// Where lengths come from.
    pub source: Source,
    /// Sampling temperature.
    pub temperature: f64,
    /// Asks the server to go on past the end-of-text token, so that every answer has its full length.
    pub ignore_eos: bool,
    /// Asks for server-sent events.
    pub stream: bool,
    /// Further members of every request.
    pub extra: Map<String, Value>,
    /// The share of requests whose client disconnects early.
    pub cancel_rate: f64,
    /// The share of requests whose client reads slowly.
    pub slow_rate: f64,
    /// Draws endpoint, sampling, streaming, `n` and errors at random too.
    pub mixed: bool,
}

/// One request, ready to send.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Work {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The JSON body.
    pub body: String,
    /// Whether the answer comes as events.
    pub stream: bool,
    /// How it ends.
    pub fate: Fate,
    /// What the server should say.
    pub expected: Expected,
}

impl Workload {
    /// Request number `index`.
    ///
    /// # Panics
    /// If the workload is an empty trace.
    #[must_use]
    pub fn request(&self, index: u64) -> Work {
        let mut random = Random::new(self.seed, index.wrapping_mul(2) + 1);
        let shape = Shape::draw(self, &mut random);
        let (parts, output_tokens) = self.source.request(index, &mut random);
        let fate = self.fate(&mut random, output_tokens);
        let body = self.body(&shape, &parts, output_tokens, &mut random);
        Work { endpoint: shape.endpoint, body, stream: shape.stream, fate, expected: shape.expected() }
    }

    fn fate(&self, random: &mut Random, output_tokens: u32) -> Fate {
        let luck = random.unit();
        if luck >= self.cancel_rate + self.slow_rate {
            Fate::Finish
        } else if luck >= self.cancel_rate {
            Fate::ReadSlowly(Duration::from_millis(random.below(60)))
        } else if random.chance(0.5) {
            Fate::LeaveAfter(Duration::from_micros(random.below(80_000)))
        } else {
            Fate::LeaveAfterPieces(u32::try_from(random.below(u64::from(output_tokens))).unwrap_or(0))
        }
    }

    fn body(&self, shape: &Shape, parts: &[Part], output_tokens: u32, random: &mut Random) -> String {
        let tokens: u32 = parts.iter().map(|part| part.tokens).sum();
        let mut body = String::with_capacity(256 + tokens as usize * 7);
        body.push_str("{\"model\":");
        let model = if shape.wrong == Some(Wrong::Model) { "no-such-model" } else { &self.model };
        body.push_str(&Value::from(model).to_string());
        match shape.endpoint {
            Endpoint::Completions => {
                body.push_str(",\"prompt\":");
                prompt::write(&mut body, self.seed, self.form, parts);
            }
            Endpoint::Chat => {
                body.push_str(",\"messages\":[{\"role\":\"user\",\"content\":");
                prompt::write(&mut body, self.seed, Form::Text, parts);
                body.push_str("}]");
            }
        }
        let temperature = if shape.wrong == Some(Wrong::Temperature) { -1.0 } else { shape.temperature };
        push(&mut body, format_args!(",\"max_tokens\":{output_tokens},\"temperature\":{temperature}"));
        if shape.stream {
            body.push_str(",\"stream\":true,\"stream_options\":{\"include_usage\":true}");
        }
        if self.ignore_eos {
            body.push_str(",\"ignore_eos\":true");
        }
        if shape.choices > 1 {
            push(&mut body, format_args!(",\"n\":{}", shape.choices));
        }
        if shape.seeded {
            push(&mut body, format_args!(",\"seed\":{}", random.below(1 << 31)));
        }
        for (name, value) in &self.extra {
            push(&mut body, format_args!(",{}:{value}", Value::from(name.as_str())));
        }
        if shape.wrong != Some(Wrong::Syntax) {
            body.push('}');
        }
        body
    }
}

fn push(body: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing into a String cannot fail.
    let _ = body.write_fmt(text);
}

/// The ways in which a request of a mixed run is wrong on purpose.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wrong {
    Syntax,
    Model,
    Temperature,
}

struct Shape {
    endpoint: Endpoint,
    stream: bool,
    temperature: f64,
    seeded: bool,
    choices: u32,
    wrong: Option<Wrong>,
}

impl Shape {
    fn draw(workload: &Workload, random: &mut Random) -> Self {
        let plain = Self {
            endpoint: workload.endpoint,
            stream: workload.stream,
            temperature: workload.temperature,
            seeded: false,
            choices: 1,
            wrong: None,
        };
        if !workload.mixed {
            return plain;
        }
        let wrong = random.chance(0.03).then(|| match random.below(3) {
            0 => Wrong::Syntax,
            1 => Wrong::Model,
            _ => Wrong::Temperature,
        });
        Self {
            endpoint: if random.chance(0.4) { Endpoint::Chat } else { Endpoint::Completions },
            stream: random.chance(0.8),
            temperature: if random.chance(0.5) { 0.0 } else { 0.8 },
            seeded: random.chance(0.3),
            choices: if random.chance(0.1) { 2 } else { 1 },
            wrong,
        }
    }

    const fn expected(&self) -> Expected {
        if self.wrong.is_some() { Expected::Refusal } else { Expected::Answer }
    }
}

impl Source {
    /// The parts of the prompt of request `index`, and the length of its answer.
    fn request(&self, index: u64, random: &mut Random) -> (Vec<Part>, u32) {
        match self {
            Self::Drawn { prompt, output, shared_prefix_tokens, shared_groups } => {
                let total = prompt.draw(random);
                let shared = (*shared_prefix_tokens).min(total);
                let group = PartName::Group(random.below(*shared_groups));
                let parts = [(group, shared), (PartName::Request(index), total - shared)];
                (non_empty(&parts), output.draw(random))
            }
            Self::Trace { arrivals, scale, prompt_tokens_max, output_tokens_max } => {
                let arrival = &arrivals[usize::try_from(index).unwrap_or(usize::MAX) % arrivals.len()];
                let total = scaled(arrival.prompt_tokens, *scale).min(*prompt_tokens_max);
                let output = scaled(arrival.output_tokens, *scale).min(*output_tokens_max);
                (recorded_parts(arrival, index, *scale, total), output)
            }
        }
    }
}

fn non_empty(parts: &[(PartName, u32)]) -> Vec<Part> {
    parts.iter().filter(|part| part.1 > 0).map(|&(name, tokens)| Part { name, tokens }).collect()
}

/// Cuts `total` tokens into the blocks that the trace names; what the names do not cover is the request's
/// own.
fn recorded_parts(arrival: &Arrival, index: u64, scale: f64, total: u32) -> Vec<Part> {
    let block_tokens = scaled(BLOCK_TOKENS, scale);
    let mut left = total;
    let mut parts = Vec::with_capacity(arrival.blocks.len() + 1);
    for &block in &arrival.blocks {
        let tokens = block_tokens.min(left);
        parts.push((PartName::Block(block), tokens));
        left -= tokens;
    }
    parts.push((PartName::Request(index), left));
    non_empty(&parts)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the range of u32")]
fn scaled(tokens: u32, scale: f64) -> u32 {
    (f64::from(tokens) * scale).round().clamp(1.0, f64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(source: Source) -> Workload {
        Workload {
            seed: 5,
            model: "a \"quoted\" name".to_owned(),
            endpoint: Endpoint::Completions,
            form: Form::Ids { first: 10, end: 200 },
            source,
            temperature: 0.0,
            ignore_eos: true,
            stream: true,
            extra: Map::from_iter([("min_p".to_owned(), Value::from(0.5))]),
            cancel_rate: 0.0,
            slow_rate: 0.0,
            mixed: false,
        }
    }

    fn drawn(shared: u32, groups: u64) -> Source {
        Source::Drawn {
            prompt: Length { tokens: 64, spread: 0.5 },
            output: Length { tokens: 16, spread: 0.25 },
            shared_prefix_tokens: shared,
            shared_groups: groups,
        }
    }

    fn prompt_of(work: &Work) -> Vec<u32> {
        let body: Value = serde_json::from_str(&work.body).unwrap();
        serde_json::from_value(body["prompt"].clone()).unwrap()
    }

    #[test]
    fn a_body_is_json_and_says_what_was_asked() {
        let body: Value = serde_json::from_str(&workload(drawn(0, 1)).request(0).body).unwrap();
        assert_eq!(body["model"], "a \"quoted\" name");
        assert_eq!(body["stream_options"]["include_usage"], true);
        assert_eq!(body["ignore_eos"], true);
        assert_eq!(body["min_p"], 0.5);
        assert!((12..=20).contains(&body["max_tokens"].as_u64().unwrap()), "{body}");
        assert!((32..=96).contains(&body["prompt"].as_array().unwrap().len()), "{body}");
    }

    #[test]
    fn a_request_depends_on_its_number_and_seed_only() {
        let one = workload(drawn(8, 3));
        assert_eq!(one.request(17), one.clone().request(17));
        assert_ne!(one.request(17).body, one.request(18).body);
        assert_ne!(one.request(17).body, Workload { seed: 6, ..one.clone() }.request(17).body);
    }

    #[test]
    fn requests_of_a_group_share_its_prefix() {
        let one = workload(drawn(24, 2));
        let mut prefixes: Vec<Vec<u32>> =
            (0..40).map(|index| prompt_of(&one.request(index))[..24].to_vec()).collect();
        prefixes.sort();
        prefixes.dedup();
        assert_eq!(prefixes.len(), 2);
    }

    #[test]
    fn a_scaled_trace_keeps_lengths_and_sharing() {
        let arrival = |prompt_tokens, blocks: &[u64]| Arrival {
            at: Duration::ZERO,
            prompt_tokens,
            output_tokens: 320,
            blocks: blocks.to_vec(),
        };
        let arrivals =
            vec![arrival(1100, &[0, 1, 2]), arrival(1600, &[0, 1, 9, 10]), arrival(90_000, &[0; 176])];
        let source =
            Source::Trace { arrivals, scale: 1.0 / 32.0, prompt_tokens_max: 200, output_tokens_max: 8 };
        let one = workload(source);
        let prompts: Vec<Vec<u32>> = (0..3).map(|index| prompt_of(&one.request(index))).collect();
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [34, 50, 200]);
        assert_eq!(prompts[0][..32], prompts[1][..32]);
        assert_ne!(prompts[0][32..34], prompts[1][32..34]);
        assert!(one.request(0).body.contains("\"max_tokens\":8,"));
    }

    #[test]
    fn a_mixed_run_has_every_shape() {
        let one = Workload { mixed: true, cancel_rate: 0.2, slow_rate: 0.1, ..workload(drawn(8, 2)) };
        let all: Vec<Work> = (0..400).map(|index| one.request(index)).collect();
        let share = |wanted: &dyn Fn(&Work) -> bool| all.iter().filter(|work| wanted(work)).count();
        assert!((4..30).contains(&share(&|work| work.expected == Expected::Refusal)));
        assert!(
            (50..130).contains(&share(&|work| matches!(
                work.fate,
                Fate::LeaveAfter(_) | Fate::LeaveAfterPieces(_)
            )))
        );
        assert!((15..80).contains(&share(&|work| matches!(work.fate, Fate::ReadSlowly(_)))));
        assert!((100..220).contains(&share(&|work| work.endpoint == Endpoint::Chat)));
        assert!((40..120).contains(&share(&|work| !work.stream)));
        assert!(share(&|work| work.body.contains("\"n\":2")) > 10);
    }
}
