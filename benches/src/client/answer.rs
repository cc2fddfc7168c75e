//! An answer on its way in: what the API promises of it, and when each piece came.

use std::fmt;
use std::pin::Pin;
use std::time::{Duration, Instant};

use hyper::body::{Body, Bytes, Incoming};
use serde::de::{Deserialize, Deserializer, IgnoredAny, Visitor};

use super::{Failure, Outcome};
use crate::sse::Events;
use crate::workload::Fate;

/// A measured answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// From sending to the first piece of text.
    pub first: Duration,
    /// From sending to the last piece of text.
    pub last: Duration,
    /// From sending to the end of the answer.
    pub end: Duration,
    /// Pieces of text.
    pub pieces: u32,
    /// What the server counted.
    pub usage: Usage,
}

/// Token counts of an answer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize)]
#[serde(from = "WireUsage")]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// Tokens of the prompt that the server had computed before.
    pub cached_tokens: u64,
}

#[derive(serde::Deserialize)]
struct WireUsage {
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<WireDetails>,
}

#[derive(serde::Deserialize)]
struct WireDetails {
    cached_tokens: Option<u64>,
}

impl From<WireUsage> for Usage {
    fn from(wire: WireUsage) -> Self {
        Self {
            prompt_tokens: wire.prompt_tokens,
            completion_tokens: wire.completion_tokens,
            cached_tokens: wire.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0),
        }
    }
}

#[derive(serde::Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<IgnoredAny>,
}

#[derive(serde::Deserialize)]
struct Choice {
    text: Option<HasText>,
    delta: Option<Message>,
    message: Option<Message>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(serde::Deserialize)]
struct Message {
    content: Option<HasText>,
    reasoning_content: Option<HasText>,
}

impl Choice {
    fn has_text(&self) -> bool {
        let message = |message: &Message| {
            [&message.content, &message.reasoning_content].into_iter().flatten().any(|text| text.0)
        };
        self.text.as_ref().is_some_and(|text| text.0)
            || self.delta.as_ref().is_some_and(message)
            || self.message.as_ref().is_some_and(message)
    }
}

/// Whether a JSON string is not empty, without a copy of it.
struct HasText(bool);

impl<'de> Deserialize<'de> for HasText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = HasText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E>(self, text: &str) -> Result<HasText, E> {
                Ok(HasText(!text.is_empty()))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

async fn next_frame(body: &mut Incoming) -> Option<Result<Bytes, Failure>> {
    loop {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await?;
        match frame {
            Ok(frame) => {
                if let Ok(bytes) = frame.into_data() {
                    return Some(Ok(bytes));
                }
            }
            Err(_) => return Some(Err(Failure::EndedEarly)),
        }
    }
}

/// All of a body.
pub(super) async fn collect(mut body: Incoming) -> Result<Vec<u8>, Failure> {
    let mut all = Vec::new();
    while let Some(bytes) = next_frame(&mut body).await {
        all.extend_from_slice(&bytes?);
    }
    Ok(all)
}

/// An answer that came in one piece: its first and its last text are its end.
pub(super) fn whole(start: Instant, body: &[u8]) -> Result<Outcome, Failure> {
    let end = start.elapsed();
    let chunk: Chunk = serde_json::from_slice(body).map_err(|_| Failure::Malformed)?;
    if chunk.error.is_some() {
        return Err(Failure::ErrorEvent);
    }
    let usage = chunk.usage.ok_or(Failure::NoUsage)?;
    Ok(Outcome::Answered(Answer { first: end, last: end, end, pieces: 1, usage }))
}

/// A stream while it is read.
pub(super) struct Stream<'a> {
    start: Instant,
    gaps: &'a mut Vec<u32>,
    first: Option<Duration>,
    last: Duration,
    pieces: u32,
    usage: Option<Usage>,
    finished: bool,
    done: bool,
    failure: Option<Failure>,
}

impl<'a> Stream<'a> {
    /// Reads nothing yet; microseconds between pieces of text will be appended to `gaps`.
    pub(super) const fn new(start: Instant, gaps: &'a mut Vec<u32>) -> Self {
        Self {
            start,
            gaps,
            first: None,
            last: Duration::ZERO,
            pieces: 0,
            usage: None,
            finished: false,
            done: false,
            failure: None,
        }
    }

    /// To its end, or as far as `fate` lets it.
    pub(super) async fn read(mut self, mut body: Incoming, fate: Fate) -> Result<Outcome, Failure> {
        let mut events = Events::default();
        while let Some(bytes) = next_frame(&mut body).await {
            let now = self.start.elapsed();
            events.push(&bytes?, |data| self.event(now, data));
            if let Some(failure) = self.failure {
                return Err(failure);
            }
            match fate {
                Fate::LeaveAfterPieces(limit) if self.pieces >= limit && !self.done => {
                    return Ok(Outcome::Left);
                }
                Fate::ReadSlowly(pause) => tokio::time::sleep(pause).await,
                _ => {}
            }
        }
        self.answer()
    }

    fn event(&mut self, now: Duration, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        match serde_json::from_slice::<Chunk>(data) {
            Ok(chunk) => self.chunk(now, &chunk),
            Err(_) => self.failure = Some(Failure::Malformed),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "microseconds between two tokens fit in 71 minutes")]
    fn chunk(&mut self, now: Duration, chunk: &Chunk) {
        if chunk.error.is_some() {
            self.failure = Some(Failure::ErrorEvent);
        }
        self.usage = chunk.usage.or(self.usage);
        self.finished |= chunk.choices.iter().any(|choice| choice.finish_reason.is_some());
        if !chunk.choices.iter().any(Choice::has_text) {
            return;
        }
        self.pieces += 1;
        if self.first.is_none() {
            self.first = Some(now);
        } else {
            self.gaps.push(now.saturating_sub(self.last).as_micros() as u32);
        }
        self.last = now;
    }

    fn answer(self) -> Result<Outcome, Failure> {
        let end = self.start.elapsed();
        if !(self.done && self.finished) {
            return Err(Failure::EndedEarly);
        }
        let usage = self.usage.ok_or(Failure::NoUsage)?;
        let first = self.first.unwrap_or(end);
        let last = if self.pieces == 0 { end } else { self.last };
        Ok(Outcome::Answered(Answer { first, last, end, pieces: self.pieces, usage }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(events: &[&str]) -> (Result<Outcome, Failure>, usize) {
        let mut gaps = Vec::new();
        let mut stream = Stream::new(Instant::now(), &mut gaps);
        for (index, event) in events.iter().enumerate() {
            stream.event(Duration::from_millis(index as u64 + 1), event.as_bytes());
        }
        let result = stream.failure.map_or_else(|| stream.answer(), Err);
        (result, gaps.len())
    }

    #[test]
    fn tokens_come_from_usage_and_not_from_pieces() {
        let (result, gaps) = read(&[
            r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":"two tokens"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":"x"},"finish_reason":"length"}]}"#,
            concat!(
                r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"#,
                r#""prompt_tokens_details":{"cached_tokens":8}}}"#
            ),
            "[DONE]",
        ]);
        let Ok(Outcome::Answered(answer)) = result else { panic!("{result:?}") };
        assert_eq!(answer.usage, Usage { prompt_tokens: 9, completion_tokens: 3, cached_tokens: 8 });
        assert_eq!((answer.pieces, gaps), (2, 1));
        assert_eq!((answer.first.as_millis(), answer.last.as_millis()), (2, 3));
    }

    #[test]
    fn an_answer_that_is_not_whole_is_a_failure_with_a_name() {
        let text = r#"{"choices":[{"text":"a","finish_reason":"stop"}]}"#;
        let cases: [(&[&str], Failure); 5] = [
            (&[text], Failure::EndedEarly),
            (&["[DONE]"], Failure::EndedEarly),
            (&[text, "[DONE]"], Failure::NoUsage),
            (&[r#"{"error":{"message":"no"}}"#, "[DONE]"], Failure::ErrorEvent),
            (&["{"], Failure::Malformed),
        ];
        for (events, expected) in cases {
            let (result, _) = read(events);
            assert_eq!(result.err(), Some(expected), "{events:?}");
        }
    }
}
