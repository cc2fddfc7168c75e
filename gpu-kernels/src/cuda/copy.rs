//! Copies of whole blocks: `kernels/copy.cu`.

use std::collections::HashSet;

use super::device::Address;
use super::layout::KvStrides;
use super::memory::Memory;
use super::pool::KvPool;
use super::{Cuda, count, divide};
use crate::Error;

/// Distances in bytes, as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Strides {
    layer: u64,
    value: u64,
    page: u64,
    head: u64,
    token: u64,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CopyArgument {
    from: Address,
    to: Address,
    pairs: Address,
    from_strides: Strides,
    to_strides: Strides,
    row_bytes: u32,
    heads: u32,
    tokens: u32,
    layers: u32,
    planes: u32,
    parts: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CopySlotsArgument {
    memory: Address,
    moves: Address,
    runs: Address,
    strides: Strides,
    all_planes: u32,
    planes: u32,
    kv_heads: u32,
    block_size: u32,
    bytes: u32,
    unused: u32,
}

/// Bytes of a block's plane that one thread block copies.
const PART_BYTES: u32 = 16 << 10;
/// Bytes that go to the host or come from it in one copy; of more than that the next copy waits for the one before.
const STAGED_BYTES: usize = 16 << 20;

/// A part of a pool that all blocks have, K and V of all layers or their scales: where it starts and its strides.
#[derive(Clone, Copy)]
struct Part {
    start: Address,
    strides: Strides,
    /// Bytes of a head of a token.
    row_bytes: usize,
    heads: usize,
    tokens: usize,
    /// A block of a plane lies in one piece, in the pool as on its way.
    whole: bool,
}

impl Part {
    /// Bytes of a block of a plane.
    fn page_bytes(&self) -> usize {
        self.row_bytes * self.heads * self.tokens
    }

    fn numbers(pool: &KvPool) -> Self {
        let layout = pool.layout;
        let KvStrides { layer, value, page, head, token } = layout.strides;
        let [layer, value, page, head, token] =
            [layer, value, page, head, token].map(|elements| (elements * layout.element) as u64);
        let strides = Strides { layer, value, page, head, token };
        let (heads, tokens) = (pool.shape.kv_heads, pool.shape.block_size);
        let (row_bytes, whole) = (layout.row_bytes, layout.whole);
        Self { start: pool.plane(0, 0), strides, row_bytes, heads, tokens, whole }
    }

    /// Four bytes for each head of each token.
    fn scales(pool: &KvPool) -> Option<Self> {
        let (start, plane, page) = pool.scale_planes()?;
        let (heads, tokens) = (pool.shape.kv_heads, pool.shape.block_size);
        let [plane, page, head, token] = [plane, page, 4, 4 * heads].map(|bytes| bytes as u64);
        let layer = plane * pool.layout.planes as u64;
        let strides = Strides { layer, value: plane, page, head, token };
        Some(Self { start, strides, row_bytes: 4, heads, tokens, whole: true })
    }

    /// The same on its way to the host or from there: without gaps, in a block of all parts.
    fn staged(self, pool: &KvPool, start: Address) -> Self {
        let (token, value) = (self.row_bytes as u64, self.page_bytes() as u64);
        let (head, layer) = (token * self.tokens as u64, value * pool.layout.planes as u64);
        Self {
            start,
            strides: Strides { layer, value, page: pool.block_bytes() as u64, head, token },
            ..self
        }
    }
}

/// The parts of a pool.
fn parts(pool: &KvPool) -> impl Iterator<Item = Part> {
    [Some(Part::numbers(pool)), Part::scales(pool)].into_iter().flatten()
}

/// The same where blocks lie as the host has them: each its planes of one part after those of another.
fn staged_parts(pool: &KvPool, mut start: Address) -> impl Iterator<Item = Part> {
    parts(pool).map(move |part| {
        let staged = part.staged(pool, start);
        start += (part.page_bytes() * pool.shape.layers * pool.layout.planes) as u64;
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
        for part in parts(pool) {
            let all_planes = pool.shape.layers * pool.layout.planes;
            let argument = CopySlotsArgument {
                memory: part.start,
                moves: moves.address(),
                runs: runs_on_device.address(),
                strides: part.strides,
                all_planes: count("copy_slots", "layers", all_planes)?,
                planes: count("copy_slots", "planes", pool.layout.planes)?,
                kv_heads: count("copy_slots", "kv heads", part.heads)?,
                block_size: count("copy_slots", "block_size", part.tokens)?,
                bytes: count("copy_slots", "bytes of a head", part.row_bytes)?,
                unused: 0,
            };
            let blocks = divide("copy_slots", lists.len() * all_planes, 1)?;
            self.start("copy", "copy_slots", blocks, 128, 0, &argument)?;
        }
        Ok(())
    }

    /// Copies blocks in the order given, all checked: as few launches as keep to that order, usually one.
    pub(super) fn copy(&self, pool: &KvPool, pairs: &[(u32, u32)]) -> Result<(), Error> {
        for together in independent(pairs) {
            for part in parts(pool) {
                self.copy_part(pool, together, part, part)?;
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
                self.copy_part(pool, &pairs, part, staged)?;
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
                self.copy_part(pool, &pairs, staged, part)?;
            }
        }
        Ok(())
    }

    fn copy_part(&self, pool: &KvPool, pairs: &[(u32, u32)], from: Part, to: Part) -> Result<(), Error> {
        let flat: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
        let flat = Memory::of(&self.device, bytemuck::cast_slice(&flat))?;
        let page_bytes = from.page_bytes();
        let (row_bytes, heads, tokens) =
            if from.whole { (page_bytes, 1, 1) } else { (from.row_bytes, from.heads, from.tokens) };
        let strides =
            |of: Part| if of.whole { Strides { head: 0, token: 0, ..of.strides } } else { of.strides };
        let parts = count("copy_blocks", "bytes of a block", page_bytes)?.div_ceil(PART_BYTES);
        let argument = CopyArgument {
            from: from.start,
            to: to.start,
            pairs: flat.address(),
            from_strides: strides(from),
            to_strides: strides(to),
            row_bytes: count("copy_blocks", "bytes of a head", row_bytes)?,
            heads: count("copy_blocks", "kv heads", heads)?,
            tokens: count("copy_blocks", "block_size", tokens)?,
            layers: count("copy_blocks", "layers", pool.shape.layers)?,
            planes: count("copy_blocks", "planes", pool.layout.planes)?,
            parts,
        };
        let planes = pool.shape.layers * pool.layout.planes;
        let blocks = divide("copy_blocks", pairs.len() * planes * parts as usize, 1)?;
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
