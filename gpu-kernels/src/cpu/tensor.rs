//! Activations and the memory under them.

use crate::Error;
use crate::door::Rows;

/// Activations `[rows, cols]` in f32, row-major without gaps.
#[derive(Debug)]
pub struct Tensor {
    storage: Vec<f32>,
    /// Where the first row lies: the first cache line of the storage.
    first: usize,
    rows: usize,
    rows_max: usize,
    cols: usize,
}

impl Tensor {
    pub(crate) fn new(rows_max: usize, cols: usize) -> Result<Self, Error> {
        let elements = rows_max.checked_mul(cols).and_then(|n| n.checked_add(LINE));
        let storage = zeroed("tensor", elements)?;
        let first = first_line(&storage);
        Ok(Self { storage, first, rows: 0, rows_max, cols })
    }

    /// Rows in use.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Its shape, for the door.
    pub(crate) fn shape(&self) -> Rows {
        Rows { rows: self.rows(), cols: self.cols(), rows_max: self.rows_max }
    }

    /// The rows are known to fit.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        debug_assert!(rows <= self.rows_max, "checked at the door");
        self.rows = rows;
    }

    pub(crate) fn data(&self) -> &[f32] {
        &self.storage[self.first..][..self.rows * self.cols]
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.storage[self.first..][..self.rows * self.cols]
    }
}

/// Elements of a cache line.
pub(crate) const LINE: usize = 16;

/// The index of the first element that starts a cache line, in storage with a line to spare.
pub(crate) fn first_line(storage: &[f32]) -> usize {
    let past = storage.as_ptr().addr() / 4 % LINE;
    (LINE - past) % LINE
}

/// Zeros that take no memory until they are written (the allocator hands out untouched pages).
pub(crate) fn zeroed(operator: &'static str, elements: Option<usize>) -> Result<Vec<f32>, Error> {
    let bytes = elements.and_then(|n| n.checked_mul(4)).filter(|&bytes| bytes <= isize::MAX as usize);
    let (Some(elements), Some(bytes)) = (elements, bytes) else {
        return Err(Error::Memory { operator, bytes: usize::MAX });
    };
    // A first, fallible reservation: `vec!` would abort the process where this answers.
    let mut probe: Vec<f32> = Vec::new();
    probe.try_reserve_exact(elements).map_err(|_| Error::Memory { operator, bytes })?;
    drop(probe);
    Ok(vec![0.0; elements])
}

/// Asks for pages of 2 MiB, so that walking over scattered blocks does not miss the table of pages at every one. The
/// answer does not matter: it is a wish. The bytes are an allocation of the caller's.
pub(crate) fn wish_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let (first, end) = (start.addr().next_multiple_of(PAGE), (start.addr() + bytes) / PAGE * PAGE);
        if first < end {
            // SAFETY: whole pages inside the allocation; the advice does not change what they hold.
            unsafe { libc::madvise(start.with_addr(first).cast(), end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}
