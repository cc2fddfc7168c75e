//! Grammars of a tokenizer, and the masks of tokens with which they guide an answer. The parser is `llguidance`'s; here
//! it meets the vocabulary and the engine's rules.

use std::fmt;
use std::sync::{Arc, OnceLock};

use llguidance::api::StopReason;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory};
use quayline_gpu_kernels::cpu::Workers;

use crate::constraint::{Constraint, ConstraintError};
use crate::recent::Recent;
use crate::text::Text;

/// Makes grammars for one tokenizer. Share it in an [`Arc`], and compile on a thread that may take its time.
pub struct Grammars {
    text: Arc<Text>,
    eos: Vec<u32>,
    /// The vocabulary as a tree, made when it is first needed.
    factory: OnceLock<Result<ParserFactory, ConstraintError>>,
    recent: Recent<Result<Grammar, ConstraintError>>,
}

/// Grammars that are kept: compiled once, they are there at once when the same constraint comes again.
const RECENT_MAX: usize = 128;

/// A longer constraint is compiled each time, so that those that are kept stay small.
const RECENT_BYTES_MAX: usize = 1 << 16;

/// A compiled constraint: which tokens may begin an answer, and which may follow which. Cheap to clone.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    start: Matcher,
    first: SimpleVob,
    vocab_size: u32,
}

impl Grammars {
    /// Grammars over a tokenizer's vocabulary, whose answers end with one of the tokens `eos`. Cost: none yet.
    #[must_use]
    pub fn new(text: Arc<Text>, eos: &[u32]) -> Self {
        Self { text, eos: eos.to_vec(), factory: OnceLock::new(), recent: Recent::new(RECENT_MAX) }
    }

    /// The grammar of a constraint that was compiled lately. Cost: microseconds.
    #[must_use]
    pub fn recent(&self, constraint: &Constraint) -> Option<Grammar> {
        self.recent.get(&constraint.text())?.ok()
    }

    /// Compiles a constraint, unless that was done lately. Cost: milliseconds, for large schemas tens of them; the
    /// first call also makes a tree of the vocabulary, which takes most of a second for 150,000 tokens.
    ///
    /// # Errors
    /// What is wrong with the constraint, or which limit it exceeds.
    pub fn compile(&self, constraint: &Constraint) -> Result<Grammar, ConstraintError> {
        let text = constraint.text();
        if text.len() > RECENT_BYTES_MAX {
            return self.compile_anew(constraint);
        }
        self.recent.get_or_make(text, || self.compile_anew(constraint))
    }

    fn compile_anew(&self, constraint: &Constraint) -> Result<Grammar, ConstraintError> {
        let source = constraint.source()?;
        let factory = self.factory.get_or_init(|| self.factory()).as_ref().map_err(Clone::clone)?;
        let mut start = Matcher::new(factory.create_parser(source));
        let first = start.compute_mask();
        let failed = |error: &dyn fmt::Display| ConstraintError::from_report(&error.to_string());
        match (start.get_error(), first) {
            (Some(error), _) => Err(failed(&error)),
            (None, Err(error)) => Err(failed(&format!("no answer can begin: {error}"))),
            (None, Ok(first)) => {
                let vocab_size = self.text.vocab_size();
                Ok(Grammar(Arc::new(Compiled { start, first, vocab_size })))
            }
        }
    }

    fn factory(&self) -> Result<ParserFactory, ConstraintError> {
        let vocab_size = self.text.vocab_size();
        let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| self.word(id)).collect();
        let eos: Vec<u32> = self.eos.iter().copied().filter(|&id| id < vocab_size).collect();
        let info = TokRxInfo::new(vocab_size, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if eos.len() > 1 {
            trie = trie.with_eos_tokens(&eos);
        }
        let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| ConstraintError::from_report(&error.to_string()))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(factory)
    }

    /// The bytes of a token as `llguidance` wants them: special tokens are marked, and no text contains them. A token
    /// with a byte that no text has is not to be chosen.
    fn word(&self, id: u32) -> Vec<u8> {
        const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
        let mut word = Vec::new();
        let tokenizer = self.text.tokenizer();
        if tokenizer.is_special(id) || self.eos.contains(&id) {
            word.push(MARK);
            tokenizer.append(id, &mut word);
            return word;
        }
        tokenizer.append(id, &mut word);
        if word.contains(&MARK) {
            word.clear();
        }
        word
    }
}

impl Grammar {
    /// One more than the largest token id that it knows.
    pub(crate) fn vocab_size(&self) -> u32 {
        self.0.vocab_size
    }

    /// Follows one answer. Nothing is shared with other answers: what one computes is no matter of another.
    pub fn guide(&self) -> Guide {
        Guide { matcher: self.0.start.deep_clone(), mask: self.0.first.clone(), state: GuideState::Open }
    }
}

/// Follows an answer through its grammar.
pub struct Guide {
    matcher: Matcher,
    /// What may come next.
    mask: SimpleVob,
    state: GuideState,
}

/// How far an answer is in its grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuideState {
    /// More may come.
    Open,
    /// It is complete: nothing can follow.
    Complete,
    /// It is complete, and the token that says so is its last.
    Ended,
    /// What may follow could not be computed within the limits.
    Failed,
}

impl Guide {
    /// Forbids what may not come next.
    pub fn apply(&self, logits: &mut [f32]) {
        let words = self.mask.as_slice();
        for (at, logits) in logits.chunks_mut(32).enumerate() {
            match words.get(at).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                    }
                }
            }
        }
    }

    /// Bits of the tokens that may come next, from the lowest; what is behind them may not.
    pub(crate) fn mask(&self) -> &[u32] {
        self.mask.as_slice()
    }

    /// Whether a token may come next.
    pub fn allows(&self, token: u32) -> bool {
        self.mask.as_slice().get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The first token that may come next; there is one as long as the answer is open.
    pub fn first(&self) -> u32 {
        self.mask.first_bit_set().and_then(|id| u32::try_from(id).ok()).unwrap_or(0)
    }

    /// A token was chosen. Cost: microseconds.
    pub fn push(&mut self, token: u32) -> GuideState {
        self.state = match self.matcher.consume_token(token) {
            Err(_) => GuideState::Failed,
            Ok(()) if !self.matcher.is_stopped() => GuideState::Open,
            Ok(()) if self.matcher.stop_reason() == StopReason::EndOfSentence => GuideState::Ended,
            Ok(()) => GuideState::Complete,
        };
        self.state
    }

    /// How far the answer is.
    pub fn state(&self) -> GuideState {
        self.state
    }

    /// Makes the mask for the next token of an open answer. Cost: the README has figures.
    pub fn look_ahead(&mut self) -> GuideState {
        match self.matcher.compute_mask() {
            Ok(mask) => self.mask = mask,
            Err(_) => self.state = GuideState::Failed,
        }
        self.state
    }
}

/// Lets guides of open answers look ahead, all of them on the host's threads.
pub fn look_ahead(guides: &mut [Guide], workers: &Workers) {
    workers.each(guides, &mut Vec::new(), |guide, _: &mut ()| {
        guide.look_ahead();
    });
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("text", &self.text).finish_non_exhaustive()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Grammar {{ {} ids, {} may be first }}", self.0.vocab_size, self.0.first.num_set())
    }
}

impl fmt::Debug for Guide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guide {{ {:?}, {} may follow }}", self.state, self.mask.num_set())
    }
}
