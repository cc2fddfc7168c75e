//! `add`: a request, from words.

use super::settings::{self, number};
use super::words::Words;
use super::{Answer, Interpreter};
use crate::{AdapterId, EncoderItem, Request, StopRules, TenantId, Tick, TokenId};

impl Interpreter {
    pub(super) fn add(&mut self, words: &mut Words<'_>) -> Answer {
        words.only(&[
            "priority",
            "arrival",
            "new_tokens_max",
            "new_tokens_min",
            "eos",
            "stop_ids",
            "tenant",
            "targets",
            "expected",
            "adapter",
            "grammar",
            "sample_of",
            "hands_over",
            "items",
            "remote",
        ])?;
        let name = words.next("a name")?;
        let prompt = self.prompt(name, words.next("a prompt")?)?;
        let remote = words.option("remote").map(settings::remote).transpose()?;
        let prompt_tokens = u32::try_from(prompt.len()).map_err(|_| "a prompt that long")?;
        let request = self.request(name, prompt_tokens, words)?;
        let id = request.id;
        match self.batcher.add(request) {
            Ok(()) => {
                self.memory.open(id, prompt);
                remote.into_iter().for_each(|remote| self.memory.set_remote(id, remote));
                Ok(format!("{name} waits"))
            }
            Err(refusal) => Ok(format!("{name} refused: {}", self.refusal(refusal.reason))),
        }
    }

    fn request(&mut self, name: &str, prompt_tokens: u32, words: &Words<'_>) -> Result<Request, String> {
        let stop = StopRules {
            new_tokens_max: words.number("new_tokens_max", 16)?,
            new_tokens_min: words.number("new_tokens_min", 0)?,
            eos: words.numbers("eos")?.first().copied().map(TokenId),
            stop_ids: words.numbers("stop_ids")?.into_iter().map(TokenId).collect(),
        };
        let tenant = words.option("tenant").map(|tenant| TenantId(self.number_of(tenant)));
        let adapter = words.option("adapter").map(|adapter| AdapterId(self.number_of(adapter)));
        Ok(Request {
            arrival: Tick(words.number("arrival", self.now.0)?),
            priority: words.number("priority", 0)?,
            tenant: tenant.unwrap_or(TenantId(0)),
            targets: words.option("targets").map(settings::targets).transpose()?,
            expected_new_tokens: words.parsed("expected")?,
            adapter,
            grammar: settings::grammar(words.option("grammar").unwrap_or("none"))?,
            sample_of: words.option("sample_of").map(|leader| self.id_of(leader)),
            hands_over: words.switch("hands_over", false)?,
            encoder_items: self.items(words)?,
            ..Request::new(self.id_of(name), prompt_tokens, stop)
        })
    }

    fn items(&mut self, words: &Words<'_>) -> Result<Vec<EncoderItem>, String> {
        let Some(items) = words.option("items") else { return Ok(Vec::new()) };
        let item = |item: &str| {
            let wrong = || format!("{item} is not NAME@START+TOKENS");
            let (content, place) = item.split_once('@').ok_or_else(wrong)?;
            let (start, tokens) = place.split_once('+').ok_or_else(wrong)?;
            let content = self.number_of(content);
            Ok(EncoderItem { content, start: number(start)?, tokens: number(tokens)? })
        };
        items.split(',').map(item).collect()
    }

    /// The tokens of `48@system+7`: each is its piece's number and its place in it.
    fn prompt(&mut self, name: &str, pieces: &str) -> Result<Vec<u64>, String> {
        let mut tokens = Vec::new();
        for piece in pieces.split('+') {
            let (length, piece) = piece.split_once('@').unwrap_or((piece, name));
            let length: u32 = length.parse().map_err(|_| format!("{length} is not a number of tokens"))?;
            if length > 1 << 20 {
                return Err(format!("{length} tokens are more than a scenario needs"));
            }
            let number = self.number_of(piece);
            tokens.extend((0..u64::from(length)).map(|place| number << 32 | place));
        }
        Ok(tokens)
    }
}
