//! Memory of the host that the GPU copies to and from by itself: pages that stay where they are.

use std::ptr;
use std::slice;

use cudarc::driver::sys;

use super::check;
use crate::Error;

/// One piece of such memory, made anew when more is needed. Copies through it are waited for.
pub(super) struct Staging {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: memory of the process, which any thread may use.
unsafe impl Send for Staging {}

impl Default for Staging {
    fn default() -> Self {
        Self { start: ptr::null_mut(), bytes: 0 }
    }
}

impl Staging {
    /// So many bytes of it. The context is the calling thread's.
    pub(super) fn room(&mut self, bytes: usize) -> Result<&mut [u8], Error> {
        if bytes == 0 {
            return Ok(&mut []);
        }
        if self.bytes < bytes {
            self.give_back();
            let (mut start, size) = (ptr::null_mut(), bytes.next_power_of_two());
            // SAFETY: a place for one address.
            check("cuMemAllocHost", unsafe { sys::cuMemAllocHost_v2(&raw mut start, size) })?;
            // SAFETY: as many bytes as were asked for.
            unsafe { ptr::write_bytes(start.cast::<u8>(), 0, size) };
            (self.start, self.bytes) = (start.cast(), size);
        }
        // SAFETY: at least as many bytes, which were written, and nobody else has them.
        Ok(unsafe { slice::from_raw_parts_mut(self.start, bytes) })
    }

    /// Frees it, if there is any. The context is the calling thread's.
    pub(super) fn give_back(&mut self) {
        if !self.start.is_null() {
            // SAFETY: memory of `room`, which nobody has any more.
            let _gone = unsafe { sys::cuMemFreeHost(self.start.cast()) };
            *self = Self::default();
        }
    }
}
