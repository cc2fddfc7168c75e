//! Copies of whole blocks: `kernels/copy.cu`.

use std::collections::HashSet;

use super::device::{Address, Memory};
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
    block_bytes: u64,
    count: u32,
    planes: u32,
    parts: u32,
    unused: u32,
}

/// Bytes of a block's plane that one thread block copies.
const PART_BYTES: usize = 16 << 10;

impl Cuda {
    /// Copies blocks in the order given, all checked: as few launches as keep to that order, usually one.
    pub(super) fn copy(&self, pool: &KvPool, pairs: &[(u32, u32)]) -> Result<(), Error> {
        for together in independent(pairs) {
            let layout = pool.layout;
            self.copy_planes(pool, together, (pool.plane(0, 0), layout.plane_bytes, layout.page_bytes))?;
            if let Some(scales) = pool.scale_planes() {
                self.copy_planes(pool, together, scales)?;
            }
        }
        Ok(())
    }

    fn copy_planes(
        &self,
        pool: &KvPool,
        pairs: &[(u32, u32)],
        (start, plane, block): (Address, usize, usize),
    ) -> Result<(), Error> {
        let flat: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
        let flat = Memory::of(&self.device, bytemuck::cast_slice(&flat))?;
        let (planes, parts) = (pool.shape.layers * 2, block.div_ceil(PART_BYTES));
        let argument = CopyArgument {
            from: start,
            to: start,
            pairs: flat.address(),
            from_plane: plane as u64,
            to_plane: plane as u64,
            block_bytes: block as u64,
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
