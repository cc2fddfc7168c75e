//! One call: what shapes its scores is checked, and its memory taken.

use std::sync::PoisonError;

use super::{Floats, Queries, Shaping, SharedOut, Step, attention};
use crate::cpu::{Batch, Cpu, KvPool, Tensor};
use crate::{Attention, Error, Scores, door};

impl Cpu {
    /// Attention whose pool, layer, queries and output are checked.
    pub(crate) fn attend_rows(
        &self,
        (pool, layer, batch): (&KvPool, usize, &Batch),
        q: Queries<'_>,
        attention: Attention,
        scores: Scores<'_, Self>,
        out: &mut Tensor,
        lse: Option<&mut Floats>,
    ) -> Result<(), Error> {
        let Scores { causal, softcap, slopes, sinks, mask } = scores;
        let shaping = door::Shaping {
            softcap,
            slopes: slopes.map(|slopes| slopes.numbers.len()),
            sinks: sinks.map(|sinks| sinks.numbers.len()),
            mask: mask.map(|mask| (mask.tokens, mask.words)),
            lse: lse.as_ref().map(|lse| lse.numbers.len()),
        };
        door::scores(batch, attention, &shaping)?;
        out.set_rows(batch.tokens());
        let shaping = Shaping {
            causal: causal && mask.is_none(),
            softcap,
            slopes: slopes.map(|slopes| &*slopes.numbers),
            sinks: sinks.map(|sinks| &*sinks.numbers),
            mask,
        };
        let lse = lse.map(|lse| {
            lse.numbers.fill(f32::NEG_INFINITY);
            SharedOut::new(&mut lse.numbers)
        });
        let step = Step { pool, layer, batch, q, attention, shaping, lse };
        let mut memory = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        self::attention((&self.workers, self.isa), &mut memory, step, out.data_mut());
        Ok(())
    }
}
