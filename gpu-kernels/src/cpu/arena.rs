//! Memory for packed weights: chunks on large pages, cut one after the other.
//!
//! A matrix of a small model is smaller than a large page (2 MiB), so giving each its own memory would leave nearly
//! all of them on small pages, where walking eight panels at once misses the table of pages again and again: from
//! eight rows on that costs a tenth of the speed.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::tensor::wish_huge_pages;
use crate::Error;

/// A large page, and the alignment of a chunk.
const PAGE: usize = 2 << 20;
/// Room for several weights. What is not written takes no memory.
const CHUNK: usize = 32 << 20;
/// A cache line: where every room starts.
const LINE: usize = 64;

/// Where rooms come from.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    /// The chunk that still has room, and how much of it is taken.
    open: Mutex<Option<(Arc<Chunk>, usize)>>,
}

/// A chunk of memory, freed when the last of its rooms is.
#[derive(Debug)]
struct Chunk {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a chunk is memory and nothing else; rooms do not overlap, and each is written before it is shared.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no room is left.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

impl Chunk {
    fn new(bytes: usize) -> Option<Arc<Self>> {
        let layout = Layout::from_size_align(bytes.max(LINE), PAGE).ok()?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        wish_huge_pages(start.as_ptr(), layout.size());
        Some(Arc::new(Self { start, layout }))
    }
}

/// Bytes that start on a cache line, not yet written.
#[derive(Debug)]
pub(crate) struct Room {
    chunk: Arc<Chunk>,
    start: usize,
}

impl Room {
    /// The first byte. Whoever reads has to know what was written.
    pub(crate) fn start(&self) -> *mut u8 {
        self.chunk.start.as_ptr().wrapping_add(self.start)
    }

    /// The same room from so many bytes on.
    pub(crate) fn behind(&self, bytes: usize) -> Self {
        Self { chunk: Arc::clone(&self.chunk), start: self.start + bytes }
    }
}

impl Arena {
    /// Room for this many bytes.
    pub(crate) fn room(&self, bytes: usize) -> Result<Room, Error> {
        let memory = Error::Memory { operator: "weight", bytes };
        if bytes > CHUNK / 2 {
            let chunk = Chunk::new(bytes).ok_or(memory)?;
            return Ok(Room { chunk, start: 0 });
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunk, start) = match open.take() {
            Some((chunk, taken)) if taken + bytes <= CHUNK => (chunk, taken),
            _ => (Chunk::new(CHUNK).ok_or(memory)?, 0),
        };
        *open = Some((Arc::clone(&chunk), (start + bytes).next_multiple_of(LINE)));
        Ok(Room { chunk, start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_are_apart_and_aligned_and_outlive_the_arena() {
        let arena = Arena::default();
        let rooms: Vec<(Room, usize)> = [1, 64, 100, CHUNK / 2, CHUNK / 2, CHUNK, 0, 7]
            .into_iter()
            .map(|bytes| (arena.room(bytes).unwrap(), bytes))
            .collect();
        drop(arena);
        let mut ranges: Vec<_> =
            rooms.iter().map(|(room, bytes)| (room.start().addr(), room.start().addr() + bytes)).collect();
        assert!(ranges.iter().all(|range| range.0.is_multiple_of(LINE)));
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        for (room, bytes) in rooms.iter().filter(|(_, bytes)| *bytes > 0) {
            // SAFETY: the last byte of the room.
            unsafe { room.start().wrapping_add(bytes - 1).write(1) };
        }
    }
}
