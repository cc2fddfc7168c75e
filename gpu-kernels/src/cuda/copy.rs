//! Copies of whole blocks: `kernels/copy.cu`.

use std::collections::HashSet;

use super::device::Address;
use super::memory::Memory;
use super::pool::KvPool;
use super::{Cuda, count, divide};
use crate::Error;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CopyArgument {
    from: Address,
    to: Address,
    pairs: Address,
    from_plane: u64,
    to_plane: u64,
    from_block: u64,
    to_block: u64,
    block_bytes: u64,
    count: u32,
    planes: u32,
    parts: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CopySlotsArgument {
    memory: Address,
    moves: Address,
    runs: Address,
    plane_stride: u64,
    page_stride: u64,
    token_stride: u64,
    head_stride: u64,
    planes: u32,
    kv_heads: u32,
    block_size: u32,
    bytes: u32,
}

/// Bytes of a block's plane that one thread block copies.
const PART_BYTES: usize = 16 << 10;
/// Bytes that go to the host or come from it in one copy; of more than that the next copy waits for the one before.
const STAGED_BYTES: usize = 16 << 20;

/// A part of a pool that all blocks have: K and V of all layers, or their scales.
#[derive(Clone, Copy)]
struct Planes {
    start: Address,
    /// Bytes from one plane to the next, from one block to the next in it, and of a block in it.
    plane: usize,
    block: usize,
    bytes: usize,
}

/// The parts of a pool.
fn parts(pool: &KvPool) -> impl Iterator<Item = Planes> {
    let numbers = (pool.plane(0, 0), pool.layout.plane_bytes, pool.layout.page_bytes);
    let parts = [Some(numbers), pool.scale_planes()];
    parts.into_iter().flatten().map(|(start, plane, bytes)| Planes { start, plane, block: bytes, bytes })
}

/// The same where blocks lie as the host has them: each its planes of one part after those of another.
fn staged_parts(pool: &KvPool, mut start: Address) -> impl Iterator<Item = Planes> {
    parts(pool).map(move |part| {
        let staged = Planes { start, plane: part.bytes, block: pool.block_bytes(), bytes: part.bytes };
        start += (part.bytes * pool.shape.layers * pool.layout.planes) as u64;
        staged
    })
}

impl Cuda {
    /// Copies between slots, all checked, of all layers in one launch.
    pub(super) fn move_tokens(&self, pool: &KvPool, lists: &[&[(u64, u64)]]) -> Result<(), Error> {
        let (mut moves, mut runs) = (Vec::<u64>::new(), vec![0_u32]);
        for list in lists {
            moves.extend(list.iter().flat_map(|&(from, to)| [from, to]));
            runs.push(count("copy_slots", "moves", moves.len() / 2)?);
        }
        let moves = Memory::of(&self.device, bytemuck::cast_slice(&moves))?;
        let runs_on_device = Memory::of(&self.device, bytemuck::cast_slice(&runs))?;
        let layout = pool.layout;
        let element = layout.page_bytes / layout.page;
        let kv_heads = pool.shape.kv_heads;
        let numbers =
            (pool.plane(0, 0), layout.plane_bytes, layout.page_bytes, layout.token, layout.head, element);
        let scales = pool.scale_planes().map(|(start, plane, page)| (start, plane, page, kv_heads, 1, 4));
        for (start, plane, page, token, head, element) in [Some(numbers), scales].into_iter().flatten() {
            let bytes = if head == 1 { element } else { layout.wide * element };
            let planes = pool.shape.layers * pool.layout.planes;
            let argument = CopySlotsArgument {
                memory: start,
                moves: moves.address(),
                runs: runs_on_device.address(),
                plane_stride: plane as u64,
                page_stride: page as u64,
                token_stride: (token * element) as u64,
                head_stride: (head * element) as u64,
                planes: count("copy_slots", "layers", planes)?,
                kv_heads: count("copy_slots", "kv heads", kv_heads)?,
                block_size: count("copy_slots", "block_size", pool.shape.block_size)?,
                bytes: count("copy_slots", "bytes of a head", bytes)?,
            };
            let blocks = divide("copy_slots", lists.len() * planes, 1)?;
            self.start("copy", "copy_slots", blocks, 128, 0, &argument)?;
        }
        Ok(())
    }

    /// Copies blocks in the order given, all checked: as few launches as keep to that order, usually one.
    pub(super) fn copy(&self, pool: &KvPool, pairs: &[(u32, u32)]) -> Result<(), Error> {
        for together in independent(pairs) {
            for part in parts(pool) {
                self.copy_planes(pool, together, part, part)?;
            }
        }
        Ok(())
    }

    /// Blocks to the host, all checked: gathered on the device, then one copy.
    pub(super) fn save(&self, pool: &KvPool, blocks: &mut [(u32, &mut [u8])]) -> Result<(), Error> {
        for together in blocks.chunks_mut((STAGED_BYTES / pool.block_bytes()).max(1)) {
            let staging = self.workspace(together.len() * pool.block_bytes())?;
            let pairs: Vec<_> = (0..).zip(&*together).map(|(index, (block, _))| (*block, index)).collect();
            for (part, staged) in parts(pool).zip(staged_parts(pool, staging.address())) {
                self.copy_planes(pool, &pairs, part, staged)?;
            }
            let mut to: Vec<&mut [u8]> = together.iter_mut().map(|(_, bytes)| &mut **bytes).collect();
            self.device.download_to(staging.address(), &mut to)?;
        }
        Ok(())
    }

    /// Blocks from the host, all checked and each once: the way of [`Cuda::save`] back.
    pub(super) fn load(&self, pool: &KvPool, blocks: &[(u32, &[u8])]) -> Result<(), Error> {
        for together in blocks.chunks((STAGED_BYTES / pool.block_bytes()).max(1)) {
            let staging = self.workspace(together.len() * pool.block_bytes())?;
            let from: Vec<&[u8]> = together.iter().map(|(_, bytes)| *bytes).collect();
            self.device.upload_from(staging.address(), &from)?;
            let pairs: Vec<_> = (0..).zip(together).map(|(index, (block, _))| (index, *block)).collect();
            for (part, staged) in parts(pool).zip(staged_parts(pool, staging.address())) {
                self.copy_planes(pool, &pairs, staged, part)?;
            }
        }
        Ok(())
    }

    fn copy_planes(
        &self,
        pool: &KvPool,
        pairs: &[(u32, u32)],
        from: Planes,
        to: Planes,
    ) -> Result<(), Error> {
        let flat: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
        let flat = Memory::of(&self.device, bytemuck::cast_slice(&flat))?;
        let (planes, parts) = (pool.shape.layers * pool.layout.planes, from.bytes.div_ceil(PART_BYTES));
        let argument = CopyArgument {
            from: from.start,
            to: to.start,
            pairs: flat.address(),
            from_plane: from.plane as u64,
            to_plane: to.plane as u64,
            from_block: from.block as u64,
            to_block: to.block as u64,
            block_bytes: from.bytes as u64,
            count: count("copy_blocks", "pairs", pairs.len())?,
            planes: count("copy_blocks", "layers", planes)?,
            parts: count("copy_blocks", "bytes of a block", parts)?,
            unused: 0,
        };
        let blocks = divide("copy_blocks", pairs.len() * planes * parts, 1)?;
        self.start("copy", "copy_blocks", blocks, 256, 0, &argument)
    }
}

/// Cuts a list of copies into runs of which none reads or writes what another writes.
fn independent(pairs: &[(u32, u32)]) -> Vec<&[(u32, u32)]> {
    let (mut runs, mut start) = (Vec::new(), 0);
    let (mut read, mut written) = (HashSet::new(), HashSet::new());
    for (index, &(from, to)) in pairs.iter().enumerate() {
        if written.contains(&from) || written.contains(&to) || read.contains(&to) || from == to {
            runs.push(&pairs[start..index]);
            (start, read, written) = (index, HashSet::new(), HashSet::new());
        }
        read.insert(from);
        written.insert(to);
    }
    runs.push(&pairs[start..]);
    runs.retain(|run| !run.is_empty());
    runs
}

#[cfg(test)]
mod tests {
    use super::independent;

    #[test]
    fn copies_that_do_not_meet_go_together() {
        assert_eq!(independent(&[]), [].as_slice() as &[&[_]]);
        assert_eq!(independent(&[(1, 2), (3, 4), (1, 5)]), [[(1, 2), (3, 4), (1, 5)].as_slice()]);
    }

    #[test]
    fn a_copy_waits_for_what_it_reads_and_for_who_reads_what_it_writes() {
        assert_eq!(independent(&[(2, 1), (1, 3)]), [[(2, 1)], [(1, 3)]]);
        assert_eq!(independent(&[(1, 2), (3, 1)]), [[(1, 2)], [(3, 1)]]);
        assert_eq!(independent(&[(1, 2), (3, 2)]), [[(1, 2)], [(3, 2)]]);
    }
}
