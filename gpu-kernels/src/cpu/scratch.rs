//! Working memory of one thread, kept from task to task.

/// Floats on a cache line's boundary. What they hold is left over from the last task.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read as floats, all lines at once")] [f32; 16]);

impl Scratch {
    /// Several slices of these lengths, each starting on a cache line.
    pub(crate) fn take<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let lines = lengths.map(|length| length.div_ceil(16));
        let needed: usize = lines.iter().sum();
        if self.lines.len() < needed {
            self.lines.resize(needed, Line([0.0; 16]));
        }
        let mut rest = self.lines.as_mut_slice();
        let mut index = 0;
        lines.map(|lines| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(lines);
            rest = tail;
            let length = lengths[index];
            index += 1;
            &mut floats(head)[..length]
        })
    }
}

fn floats(lines: &mut [Line]) -> &mut [f32] {
    let length = lines.len() * 16;
    // SAFETY: a line is sixteen floats without padding (16 * 4 = its alignment of 64).
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_apart_and_aligned() {
        let mut scratch = Scratch::default();
        let [a, b, c] = scratch.take([1, 17, 0]);
        (a[0], b[16]) = (1.0, 2.0);
        assert_eq!((a.len(), b.len(), c.len()), (1, 17, 0));
        assert!(a.as_ptr().addr().is_multiple_of(64) && b.as_ptr().addr().is_multiple_of(64));
        assert_eq!((a[0], b[16]), (1.0, 2.0));
    }
}
