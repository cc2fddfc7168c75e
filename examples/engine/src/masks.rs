//! The masks of a step, made by several threads where that saves time.

use std::num::NonZeroUsize;
use std::thread;

use crate::grammar::Guide;

/// With so many entries in all masks together, threads save more time than they take to start. Eight masks of 128,000
/// take 0.64 ms on one thread and 0.42 ms on two.
const PARALLEL_FROM: usize = 1 << 17;

/// Lets guides of open answers look ahead, each over `vocab` tokens: on up to `threads` threads, if that saves time.
pub fn look_ahead(guides: &mut [Guide], vocab: usize, threads: NonZeroUsize) {
    let parallel = guides.len().saturating_mul(vocab) >= PARALLEL_FROM;
    look_ahead_with(guides, if parallel { threads } else { NonZeroUsize::MIN });
}

fn look_ahead_with(guides: &mut [Guide], threads: NonZeroUsize) {
    let all = |guides: &mut [Guide]| {
        guides.iter_mut().for_each(|guide| {
            guide.look_ahead();
        });
    };
    let (own, others) = guides.split_at_mut(guides.len().div_ceil(threads.get()));
    let part = own.len().max(1);
    thread::scope(|scope| {
        for part in others.chunks_mut(part) {
            scope.spawn(move || all(part));
        }
        all(own);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Constraint, Grammars, ModelFiles, Text};

    #[test]
    fn threads_change_no_mask() {
        let text = Arc::new(Text::load(&ModelFiles::bundled()).unwrap());
        let grammars = Grammars::new(Arc::clone(&text), &[]);
        let grammar = grammars.compile(&Constraint::Regex("[a-z]+( [A-Z]+)*".into())).unwrap();
        for count in [0, 1, 2, 5] {
            let begun = |at| {
                let mut guide = grammar.guide();
                let first = (0..text.vocab_size()).filter(|&id| guide.allows(id)).nth(at).unwrap();
                guide.push(first);
                guide
            };
            let masks = |threads| {
                let mut guides: Vec<Guide> = (0..count).map(begun).collect();
                look_ahead_with(&mut guides, NonZeroUsize::new(threads).unwrap());
                let allowed = |guide: &Guide| (0..text.vocab_size()).filter(|&id| guide.allows(id)).count();
                guides.iter().map(allowed).collect::<Vec<_>>()
            };
            assert_eq!(masks(3), masks(1), "{count} guides");
        }
    }
}
