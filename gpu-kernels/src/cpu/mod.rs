//! The operators on a CPU.

mod activation;
#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
mod amx;
mod append;
mod arena;
mod attention;
mod batch;
mod digits;
mod eight_bits;
mod embed;
mod exponents;
mod group_sums;
mod grouped;
mod int4_matmul;
mod integers;
mod isa;
mod lanes;
mod latent;
mod lines;
mod matmul;
mod narrow_matmul;
mod norm;
mod ops;
mod order;
mod out;
mod panels;
mod peak;
mod pool;
mod quantised;
mod rope;
mod sampling;
mod scratch;
mod tasks;
mod tensor;
mod tiles;
mod verify;
mod walk;
mod weight;
mod workers;

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

pub use attention::{Floats, TreeMask};
pub use batch::Batch;
pub use grouped::Routing;
pub use isa::Isa;
pub use pool::KvPool;
pub use quantised::QuantTensor;
pub use rope::RopeTable;
pub use sampling::Distributions;
pub use tensor::Tensor;
pub use weight::Weight;
pub use workers::Workers;

use crate::{Dtype, Error};
use arena::Arena;
use matmul::Product;
use norm::RmsNorm;
use out::SharedOut;
use scratch::Scratch;

/// The CPU, with its worker threads.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    workers: Arc<Workers>,
    /// Where packed weights lie.
    arena: Arena,
    /// Rearranged activations of a product.
    packed: Mutex<Scratch>,
    /// Rows in the order of their experts or adapters, and their sums.
    grouped: Mutex<Scratch>,
}

impl Cpu {
    /// The best that this machine has: the widest instructions, and as many threads as the process may use (its
    /// affinity and its control group's quota count).
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn detect() -> Result<Self, Error> {
        Self::new(None, None)
    }

    /// A CPU with a given number of threads (the caller's included) and instruction set; `None` detects.
    ///
    /// # Errors
    /// When the machine lacks the instruction set, or the threads cannot be started.
    pub fn new(threads: Option<NonZeroUsize>, isa: Option<Isa>) -> Result<Self, Error> {
        let isa = isa.unwrap_or_else(Isa::best);
        if !isa.available() {
            return Err(Error::IsaMissing { isa: isa.name() });
        }
        let workers = Arc::new(Workers::new(threads)?);
        Ok(Self {
            isa,
            workers,
            arena: Arena::default(),
            packed: Mutex::default(),
            grouped: Mutex::default(),
        })
    }

    /// The instruction set chosen at run time.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share the work, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// The threads themselves, for what their owner does between two operators.
    #[must_use]
    pub fn workers(&self) -> Arc<Workers> {
        Arc::clone(&self.workers)
    }

    /// Nothing but multiply-adds in registers, on all threads, with the instruction that products with such weights
    /// use; gives back how many operations it was (384 of f32 for each of `rounds` on a thread with AVX-512). Timed, it
    /// is what the machine can do at most, to put beside a figure. Matrix tiles are not among them.
    #[must_use]
    pub fn multiply_add(&self, weights: Dtype, rounds: usize) -> usize {
        peak::multiply_add(&self.workers, (self.isa, weights), rounds)
    }
}

impl Cpu {
    /// RMSNorm of every head, as long as the weight, in place.
    fn norm_heads(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let rows = x.len() / weight.len();
        let x = SharedOut::new(x);
        norm::rms_norm(
            &self.workers,
            self.isa,
            rows,
            RmsNorm { weight, offset: 0.0, eps, x, add: None, out: x },
        );
    }

    /// Products of rows of `x` with weights of floats.
    fn multiply(&self, packed: &mut Scratch, (x, rows): (&[f32], usize), products: Vec<Product<'_>>) {
        let rest = self.on_tiles(packed, (x, rows), &products);
        matmul::linear((&self.workers, self.isa), packed, x, rows, &rest);
    }

    /// Products of rows of `x` with weights of small numbers.
    fn multiply_integers(
        &self,
        packed: &mut Scratch,
        (x, rows): (&[f32], usize),
        products: &[integers::Product<'_>],
    ) {
        let with = (&*self.workers, self.isa);
        order::in_order(with.0, x, products, |x, products| {
            if products[0].weight.in_digits() {
                int4_matmul::linear(with, packed, x, rows, products);
            } else {
                let rest = self.on_tiles(packed, (x, rows), products);
                narrow_matmul::linear(with, packed, x, rows, &rest);
            }
        });
    }

    /// Computes what matrix tiles can, and gives back the other products.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn on_tiles<'a, W: amx::Columns>(
        &self,
        packed: &mut Scratch,
        (x, rows): (&[f32], usize),
        products: &[tasks::Product<'a, W>],
    ) -> Vec<tasks::Product<'a, W>> {
        let (Isa::Amx, Some(unit)) = (self.isa, amx::Hardware::get()) else { return products.to_vec() };
        let (fit, rest): (Vec<_>, Vec<_>) = products.iter().partition(|product| product.weight.fit());
        amx::linear(unit, (&self.workers, self.isa), packed, x, rows, &fit);
        rest
    }

    /// There are none here.
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    fn on_tiles<'a, W: Copy>(
        &self,
        _: &mut Scratch,
        _: (&[f32], usize),
        products: &[tasks::Product<'a, W>],
    ) -> Vec<tasks::Product<'a, W>> {
        products.to_vec()
    }
}
