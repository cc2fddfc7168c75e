//! Memory of a device: given back when nobody has it any more, and no recording uses it.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Address, Device, Recording};
use crate::Error;

/// Memory of a device, given back when dropped.
pub(crate) struct Memory {
    device: Arc<Keeper>,
    address: Address,
    bytes: usize,
}

impl Memory {
    /// At least `bytes`, not set to anything. Nothing is a legal size.
    pub(crate) fn new(device: &Arc<Keeper>, bytes: usize) -> Result<Self, Error> {
        let address = if bytes == 0 { 0 } else { device.allocate(bytes)? };
        Ok(Self { device: Arc::clone(device), address, bytes })
    }

    /// All bytes 0.
    pub(crate) fn zeroed(device: &Arc<Keeper>, bytes: usize) -> Result<Self, Error> {
        let memory = Self::new(device, bytes)?;
        if bytes > 0 {
            device.fill(memory.address, 0, bytes)?;
        }
        Ok(memory)
    }

    /// A copy of bytes of the host.
    pub(crate) fn of(device: &Arc<Keeper>, bytes: &[u8]) -> Result<Self, Error> {
        let memory = Self::new(device, bytes.len())?;
        if !bytes.is_empty() {
            device.upload(memory.address, bytes)?;
        }
        Ok(memory)
    }

    /// Other bytes, as many as before.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        assert!(bytes.len() == self.bytes, "{} bytes in the place of {}", bytes.len(), self.bytes);
        if bytes.is_empty() { Ok(()) } else { self.device.upload(self.address, bytes) }
    }

    pub(crate) fn address(&self) -> Address {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 {
            self.device.release(self.address);
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({:#x}, {} bytes)", self.address, self.bytes)
    }
}

/// A device whose memory outlives the recordings that were made while somebody had it. So replaying is safe whatever
/// has been dropped since; what it computes into memory that nobody has is lost.
pub(crate) struct Keeper {
    device: Arc<dyn Device>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// Memory that somebody has.
    owned: BTreeSet<Address>,
    /// What somebody had when a recording began.
    recorded: BTreeSet<Address>,
    /// Of that, what nobody has any more.
    left: Vec<Address>,
    /// Recordings that are under way or can be replayed.
    recordings: usize,
}

impl Keeper {
    pub(crate) fn new(device: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { device, kept: Mutex::default() })
    }

    /// As [`Device::allocate`].
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Address, Error> {
        let address = self.device.allocate(bytes)?;
        self.kept().owned.insert(address);
        Ok(address)
    }

    /// As [`Device::release`], now or when no recording can use the memory.
    pub(crate) fn release(&self, address: Address) {
        let mut kept = self.kept();
        kept.owned.remove(&address);
        if kept.recorded.contains(&address) {
            kept.left.push(address);
        } else {
            drop(kept);
            self.device.release(address);
        }
    }

    /// As [`Device::capture`]. What it gives is to be [forgotten](Keeper::forget).
    pub(crate) fn capture(&self, step: &mut dyn FnMut() -> Result<(), Error>) -> Result<Recording, Error> {
        {
            let kept = &mut *self.kept();
            kept.recordings += 1;
            kept.recorded.extend(&kept.owned);
        }
        self.device.capture(step).inspect_err(|_| self.one_less())
    }

    /// As [`Device::replay`], of a recording that is not forgotten.
    pub(crate) fn replay(&self, recording: Recording) -> Result<(), Error> {
        // SAFETY: the operators checked what they launched against memory that was theirs, and `release` keeps it.
        unsafe { self.device.replay(recording) }
    }

    /// As [`Device::forget`].
    pub(crate) fn forget(&self, recording: Recording) {
        self.device.forget(recording);
        self.one_less();
    }

    fn one_less(&self) {
        let mut kept = self.kept();
        kept.recordings -= 1;
        if kept.recordings == 0 {
            kept.recorded.clear();
            let left = std::mem::take(&mut kept.left);
            drop(kept);
            left.into_iter().for_each(|address| self.device.release(address));
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deref for Keeper {
    type Target = dyn Device;

    fn deref(&self) -> &Self::Target {
        &*self.device
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.device.fmt(f)
    }
}
