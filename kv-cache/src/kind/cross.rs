//! Every token attends to the output of an encoder.

use std::ops::Range;

use super::{Holds, Kind, Progress};
use crate::TokenIndex;

/// Cross-attention (Whisper, encoder-decoder models): room for the encoder's output, as long as
/// [`KvCache::encoder`](crate::KvCache::encoder) says.
///
/// What the decoder's other layers hold depends on the encoder's input as well; sequences of different input must not
/// share, so it belongs into their key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cross;

impl Kind for Cross {
    fn holds(&self) -> Holds {
        Holds::Encoder
    }

    fn skipped(&self, _: Progress) -> Range<TokenIndex> {
        TokenIndex(0)..TokenIndex(0)
    }
}
