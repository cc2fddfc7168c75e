//! Pools that somebody else has laid out: whatever the strides, the bits of a pool of our own, and not a byte read or
//! written between the elements.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use quayline_gpu_kernels::cuda::{Device, DeviceMemory, KvPool, KvStrides};
use quayline_gpu_kernels::{BatchInput, Cuda, Dtype, Error, KvOrder, KvShape, KvStorage, Ops, Span};

use crate::attending::{Case, Step, append, attend, step, step_in, write};
use crate::cases::{machines, sequences};
use crate::common::{Random, bits};
use crate::emulator::{self, Emulator};

/// Byte of memory that nobody has written: with others of it no number, in any type.
const NOTHING: u8 = 0xff;

/// Strides by their names: as other engines have them, and with gaps in other orders.
fn layouts(shape: &KvShape) -> Vec<(&'static str, KvStrides)> {
    let KvShape { layers, blocks, block_size, kv_heads, head_dim, .. } = *shape;
    let wide = head_dim + 16;
    // Layers innermost but for heads, and K beside V of each token.
    let (head, value) = (wide, kv_heads * wide + 32);
    let layer = 2 * value;
    let token = layers * layer + 48;
    let mixed = KvStrides { layer, value, page: block_size * token + 16, head, token };
    // Blocks innermost: of a token and head, all blocks side by side.
    let (page, token) = (wide, blocks * wide + 32);
    let head = block_size * token + 16;
    let value = kv_heads * head;
    vec![
        ("vLLM's", KvStrides::apart(shape, KvOrder::Nhd)),
        ("FlashInfer's NHD", KvStrides::together(shape, KvOrder::Nhd)),
        ("FlashInfer's HND", KvStrides::together(shape, KvOrder::Hnd)),
        ("layers in tokens", mixed),
        ("blocks in heads", KvStrides { layer: 2 * value + 64, value, page, head, token }),
    ]
}

/// Somebody else's memory, full of nothing.
struct Foreign {
    emulator: Arc<Emulator>,
    memory: DeviceMemory,
}

impl Foreign {
    fn new(emulator: &Arc<Emulator>, bytes: usize) -> Self {
        let address = emulator.allocate(bytes).unwrap();
        emulator.fill(address, NOTHING, bytes).unwrap();
        Self { emulator: Arc::clone(emulator), memory: DeviceMemory { address, bytes } }
    }

    /// As large as strides reach.
    fn of(emulator: &Arc<Emulator>, shape: &KvShape, strides: KvStrides, element: usize) -> Self {
        Self::new(emulator, places(shape, strides).last().unwrap() * element + shape.head_dim * element)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.bytes];
        self.emulator.download(self.memory.address, &mut bytes).unwrap();
        bytes
    }

    /// Fails where a byte outside of the elements has been written.
    fn check_gaps(&self, shape: &KvShape, strides: KvStrides, element: usize, what: &str) {
        let (bytes, mut next, mut gaps) = (self.bytes(), 0, 0);
        for place in places(shape, strides) {
            let start = place * element;
            assert!(start >= next, "{what}: two heads in one place");
            assert!(bytes[next..start].iter().all(|&byte| byte == NOTHING), "{what}: written before {start}");
            gaps += start - next;
            next = start + shape.head_dim * element;
        }
        assert_eq!(gaps > 0, !what.contains('\''), "{what}: {gaps} bytes between heads");
    }
}

/// Where each head of each token lies, in ascending order.
fn places(shape: &KvShape, strides: KvStrides) -> Vec<usize> {
    let KvShape { layers, blocks, block_size, kv_heads, .. } = *shape;
    let mut places = vec![0];
    for (count, stride) in [
        (layers, strides.layer),
        (2, strides.value),
        (blocks, strides.page),
        (kv_heads, strides.head),
        (block_size, strides.token),
    ] {
        places = (0..count).flat_map(|i| places.iter().map(move |place| place + i * stride)).collect();
    }
    places.sort_unstable();
    places
}

fn over(cuda: &Cuda, shape: KvShape, storage: KvStorage, strides: KvStrides, foreign: &Foreign) -> KvPool {
    // SAFETY: the memory is the emulator's, and nobody but the pool writes it.
    unsafe { cuda.kv_pool_over(shape, storage, strides, foreign.memory) }.unwrap()
}

/// The emulator; on a GPU there is nobody else whose memory could be had.
fn emulators(dtype: Dtype) -> Vec<(Cuda, Arc<Emulator>)> {
    if emulator::on_gpu() {
        eprintln!("skipped: memory of somebody else is the emulator's");
        return Vec::new();
    }
    machines(dtype)
}

/// All blocks as they come to the host.
fn saved(cuda: &Cuda, pool: &KvPool) -> Vec<Vec<u8>> {
    let mut found = vec![vec![0; pool.block_bytes()]; pool.shape().blocks];
    let mut list: Vec<_> = (0..).zip(found.iter_mut().map(|bytes| &mut bytes[..])).collect();
    cuda.save_blocks(pool, &mut list).unwrap();
    found
}

/// Attention, and what a pool keeps, over every layout and over a pool of our own.
fn same_bits(name: &str, case: &Case, fast_prompts: bool) {
    let (sequences, _) = sequences(name, case);
    for (cuda, emulator) in emulators(case.dtype) {
        emulator.hopper.store(fast_prompts, Ordering::Relaxed);
        emulator.shared_bytes_max.store(227 << 10, Ordering::Relaxed);
        let cuda = cuda.with_fast_prompts(fast_prompts);
        let own = step(&cuda, case, &sequences, &mut Random::new(30));
        let expected = attend(&cuda, case, &own);
        let (blocks, element) =
            (saved(&cuda, &own.pool), if case.storage == KvStorage::Same { 2 } else { 1 });
        for (layout, strides) in layouts(&own.shape) {
            let name = format!("{name} in {layout} layout");
            let foreign = Foreign::of(&emulator, &own.shape, strides, element);
            let launches = || emulator.hopper_launches.load(Ordering::Relaxed);
            let before = launches();
            let theirs = step_in(&cuda, case, &sequences, &mut Random::new(30), |shape| {
                over(&cuda, shape, case.storage, strides, &foreign)
            });
            let found = attend(&cuda, case, &theirs);
            assert_eq!((bits(&found.0), bits(&found.1)), (bits(&expected.0), bits(&expected.1)), "{name}");
            assert_eq!(launches() - before, u64::from(fast_prompts), "{name}: launches for Hopper");
            // The layer that was written; the other one is zeros in a pool of our own, and there nothing yet.
            let numbers = 4 * own.shape.block_size * case.heads.kv * case.heads.dim * element;
            let written = |block: &Vec<u8>| block[numbers / 2..numbers].to_vec();
            let theirs_saved = saved(&cuda, &theirs.pool);
            assert!(theirs_saved.iter().map(written).eq(blocks.iter().map(written)), "{name}: other blocks");
            foreign.check_gaps(&own.shape, strides, element, &name);
            let memory = foreign.memory;
            drop(theirs);
            assert_eq!(foreign.bytes().len(), memory.bytes, "{name}: the memory outlives the pool");
            emulator.release(memory.address);
        }
    }
}

#[test]
fn attention_has_the_bits_of_a_pool_of_our_own() {
    let case = Case::new((4, 2, 32), 5, &[(1, 23), (9, 17)]);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        same_bits("attention", &Case { dtype, window: Some(15), ..case.clone() }, false);
    }
    for storage in
        [KvStorage::Fp8 { key_scale: 0.5, value_scale: 2.0 }, KvStorage::Fp8PerHead, KvStorage::Int8PerHead]
    {
        same_bits("attention", &Case { storage, ..case.clone() }, false);
    }
}

#[test]
fn prompts_on_hopper_have_the_bits_of_a_pool_of_our_own() {
    let case = Case::new((4, 2, 64), 16, &[(40, 70)]);
    same_bits("prompts", &case, true);
    same_bits("prompts", &Case { storage: KvStorage::Fp8PerHead, ..case }, true);
}

#[test]
fn strides_beyond_hoppers_memory_unit_take_the_other_kernel() {
    let case = Case::new((2, 1, 64), 64, &[(40, 40)]);
    let (sequences, _) = sequences("far", &case);
    for (_, emulator) in emulators(case.dtype) {
        emulator.hopper.store(true, Ordering::Relaxed);
        let shape =
            KvShape { layers: 2, blocks: 2, block_size: 64, kv_heads: 1, head_dim: 64, dtype: case.dtype };
        // Of two blocks 2^40 bytes apart the first alone is used, and alone there.
        let near = KvStrides::together(&shape, KvOrder::Hnd);
        let far = KvStrides { page: 1 << 39, layer: near.page, ..near };
        let foreign = Foreign::of(&emulator, &KvShape { blocks: 1, ..shape }, far, 2);
        let memory = DeviceMemory { bytes: 1 << 42, ..foreign.memory };
        let mut found = Vec::new();
        for (fast_prompts, launches) in [(false, 0), (true, 0)] {
            let cuda =
                Cuda::on(Arc::clone(&emulator) as _, case.dtype).unwrap().with_fast_prompts(fast_prompts);
            // SAFETY: no call names the second block.
            let mut pool = unsafe { cuda.kv_pool_over(shape, KvStorage::Same, far, memory) }.unwrap();
            let slots: Vec<i64> = (0..40).collect();
            append(&cuda, &mut pool, shape, &slots, &sequences[0].k, &sequences[0].v);
            let spans = &[Span { query_start: 0, query_len: 40, context_len: 40 }];
            let input = BatchInput {
                positions: &[0; 40],
                slots: &[-1; 40],
                spans,
                block_tables: &[0],
                block_size: 64,
            };
            let (batch, q) = (cuda.batch(input).unwrap(), write(&cuda, 40, 128, &sequences[0].q));
            let step = Step { shape, pool, batch, q, rows: 40 };
            found.push(bits(&attend(&cuda, &case, &step).0));
            assert_eq!(emulator.hopper_launches.load(Ordering::Relaxed), launches);
        }
        assert_eq!(found[0], found[1]);
    }
}

#[test]
fn blocks_and_tokens_are_copied_between_the_gaps() {
    for (cuda, emulator) in emulators(Dtype::Bf16) {
        let shape =
            KvShape { layers: 2, blocks: 4, block_size: 3, kv_heads: 2, head_dim: 16, dtype: Dtype::Bf16 };
        for storage in [KvStorage::Same, KvStorage::Fp8PerHead] {
            let element = if storage == KvStorage::Same { 2 } else { 1 };
            let mut own = cuda.kv_pool_stored(shape, storage).unwrap();
            let mut random = Random::new(31);
            let contents: Vec<Vec<u8>> =
                (0..4).map(|_| (0..own.block_bytes()).map(|_| random.below(100) as u8).collect()).collect();
            let lists: [&[(u64, u64)]; 2] = [&[(6, 5), (8, 6)], &[(10, 0)]];
            let change = |pool: &mut KvPool| {
                let list: Vec<_> = (0..).zip(contents.iter().map(|bytes| &bytes[..])).collect();
                cuda.load_blocks(pool, &list).unwrap();
                cuda.copy_blocks(pool, &[(0, 2), (2, 1), (3, 0)]).unwrap();
                cuda.copy_slots(pool, &lists).unwrap();
                saved(&cuda, pool)
            };
            let expected = change(&mut own);
            for (layout, strides) in layouts(&shape) {
                let foreign = Foreign::of(&emulator, &shape, strides, element);
                let mut pool = over(&cuda, shape, storage, strides, &foreign);
                assert!(change(&mut pool) == expected, "{storage:?} in {layout} layout");
                foreign.check_gaps(&shape, strides, element, layout);
                // In memory of its own it starts with zeros.
                let pool = cuda.kv_pool_strided(shape, storage, strides).unwrap();
                assert!(saved(&cuda, &pool).concat().iter().all(|&byte| byte == 0), "{layout}");
            }
        }
    }
}

#[test]
fn what_is_in_the_memory_is_read_where_the_strides_say() {
    for (cuda, emulator) in emulators(Dtype::Bf16) {
        let shape =
            KvShape { layers: 2, blocks: 3, block_size: 2, kv_heads: 2, head_dim: 8, dtype: Dtype::Bf16 };
        for (layout, strides) in layouts(&shape) {
            let foreign = Foreign::of(&emulator, &shape, strides, 2);
            let mut bytes = foreign.bytes();
            // Each element is the number of its place in [layer][K, V][head][token][dim] of its block.
            let at = |layer, which, block, head, token| {
                layer * strides.layer
                    + which * strides.value
                    + block * strides.page
                    + head * strides.head
                    + token * strides.token
            };
            let mut expected = vec![Vec::new(); 3];
            for i in 0..3 * 16 * 8_u16 {
                let n = usize::from(i);
                let (block, layer, which, head, token) =
                    (n / 128, n / 64 % 2, n / 32 % 2, n / 16 % 2, n / 8 % 2);
                let place = 2 * (at(layer, which, block, head, token) + n % 8);
                bytes[place..][..2].copy_from_slice(&i.to_le_bytes());
                expected[block].extend(i.to_le_bytes());
            }
            emulator.upload(foreign.memory.address, &bytes).unwrap();
            let pool = over(&cuda, shape, KvStorage::Same, strides, &foreign);
            assert!(saved(&cuda, &pool) == expected, "{layout}");
        }
    }
}

#[test]
fn what_the_door_refuses() {
    for (cuda, emulator) in emulators(Dtype::Bf16) {
        let shape =
            KvShape { layers: 1, blocks: 3, block_size: 4, kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 };
        let apart = KvStrides::apart(&shape, KvOrder::Nhd);
        let foreign = Foreign::of(&emulator, &shape, apart, 2);
        let DeviceMemory { address, bytes } = foreign.memory;
        let refused = |shape, strides, address, bytes| {
            // SAFETY: nothing is asked of the pool.
            let made = unsafe {
                cuda.kv_pool_over(shape, KvStorage::Same, strides, DeviceMemory { address, bytes })
            };
            made.unwrap_err().to_string()
        };
        assert_eq!(bytes, 2 * 3 * 4 * 2 * 64 * 2);
        for (strides, said) in [
            (KvStrides { token: 64, ..apart }, "token stride is 64, the least allowed is 128"),
            (KvStrides { head: 60, ..apart }, "head stride is 60, which is not a positive multiple of 8"),
            (KvStrides { page: 504, ..apart }, "page stride is 504, the least allowed is 512"),
            (KvStrides { value: 1024, ..apart }, "distance from K to V is 1024, the least allowed is 1536"),
            (
                KvStrides { page: 1 << 61, value: 512, ..apart },
                "page stride is 2305843009213693952, the most allowed is 2305843009213693439",
            ),
        ] {
            assert_eq!(refused(shape, strides, address, bytes), format!("kv_pool: {said}"));
        }
        assert!(refused(shape, apart, address + 8, bytes).contains("address of the memory"));
        let short =
            format!("kv_pool: bytes that the strides reach is {bytes}, the most allowed is {}", bytes - 1);
        assert_eq!(refused(shape, apart, address, bytes - 1), short);
        let odd = KvShape { head_dim: 60, ..shape };
        assert!(refused(odd, apart, address, bytes).contains("head_dim of strided memory is 60"));
        let other = KvShape { dtype: Dtype::F16, ..shape };
        assert!(matches!(
            cuda.kv_pool_strided(other, KvStorage::Same, apart),
            Err(Error::Unsupported { what: "a cache of", .. })
        ));
        assert!(cuda.kv_pool_strided(KvShape { blocks: 0, ..shape }, KvStorage::Same, apart).is_err());
    }
}
