//! An output that several threads write, each its own part.

/// The start of an output's elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut(*mut f32);

// SAFETY: a pointer is only as dangerous as its use; `slice` asks for disjoint elements.
unsafe impl Send for SharedOut {}
// SAFETY: as above.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    /// The elements stay borrowed by whoever opened the parallel region.
    pub(crate) fn new(elements: &mut [f32]) -> Self {
        Self(elements.as_mut_ptr())
    }

    /// For an operator that reads rows here and writes others elsewhere: nothing may be written through this one.
    pub(crate) fn new_read(elements: &[f32]) -> Self {
        Self(elements.as_ptr().cast_mut())
    }

    /// Where row `row` of rows of `cols` elements starts. Using it is the caller's risk.
    #[inline(always)]
    pub(crate) fn row(self, row: usize, cols: usize) -> *mut f32 {
        self.0.wrapping_add(row * cols)
    }

    /// # Safety
    /// `start..start + len` is inside the output, and no other thread touches it in this region; nor does this one
    /// through another slice.
    #[inline(always)]
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.wrapping_add(start), len) }
    }
}
