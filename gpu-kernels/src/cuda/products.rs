//! Products by a library, in the place of our kernels: [`CublasLt`] at work on a device.
//!
//! Its matrices lie in columns and ours in rows, so it computes `outᵀ = (weightᵀ)ᵀ · xᵀ`: what we store as `[rows,
//! cols]` with a stride is to it `[cols, rows]` with that leading dimension.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::sys;

use super::Cuda;
use super::cublaslt::{Calls, Choice, CublasLt, NOT_SUPPORTED, Opaque, SUCCESS, Status};
use super::device::{Address, Stream};
use super::memory::{Keeper, Memory};
use crate::{Dtype, Error};

/// Memory that it may use on the side: what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Shapes whose algorithm is remembered.
const SHAPES_MAX: usize = 4096;
/// `CUBLAS_OP_T` of the header `cublas_api.h`.
const TRANSPOSED: u32 = 1;

/// `out = x · weightᵀ + bias`: where it lies and how large it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) x: Address,
    pub(super) weight: Address,
    /// 0 is none.
    pub(super) bias: Address,
    pub(super) out: Address,
    pub(super) shape: ProductShape,
}

/// All that the choice of an algorithm depends on. Addresses are multiples of 256, as memory begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProductShape {
    pub(super) rows: u64,
    pub(super) in_cols: u64,
    pub(super) out_cols: u64,
    pub(super) x_stride: u64,
    pub(super) weight_stride: u64,
    pub(super) out_stride: u64,
    pub(super) has_bias: bool,
}

impl Cuda {
    /// Lets a cuBLASLt compute `linear` of more than 16 rows with matrices of the activations' type, or of four bits
    /// that were written out as such (above 64 rows). Fewer rows, eight bits and what the library has no algorithm for
    /// stay with our own kernels.
    ///
    /// **Batch invariance ends with it.** The library chooses an algorithm for each number of rows, and algorithms
    /// add up in different orders: a token's bits then depend on how many others are in its step. The same step
    /// gives the same bits.
    ///
    /// # Errors
    /// When the library cannot work on this device, or there is no memory for its workspace (32 MiB).
    pub fn with_cublaslt(self, library: CublasLt) -> Result<Self, Error> {
        let products = Products::new(&self.device, library, self.dtype)?;
        Ok(Self { products: Some(Arc::new(products)), ..self })
    }
}

/// A library at work on a device.
pub(super) struct Products {
    library: CublasLt,
    handle: Handle,
    element: sys::cudaDataType,
    workspace: Memory,
    device: Arc<Keeper>,
    /// What the library chose; nothing where it has no algorithm.
    algorithms: Mutex<HashMap<ProductShape, Option<sys::cublasLtMatmulAlgo_t>>>,
}

/// The library's state for a device, which threads may share.
struct Handle(Opaque);

// SAFETY: NVIDIA allows calls with one handle from several threads.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Products {
    fn new(device: &Arc<Keeper>, library: CublasLt, dtype: Dtype) -> Result<Self, Error> {
        let workspace = Memory::new(device, WORKSPACE_BYTES)?;
        device.current()?;
        let mut handle = ptr::null_mut();
        // SAFETY: a place for one handle; the device is the calling thread's.
        let made = unsafe { (library.calls.create)(&raw mut handle) };
        library.calls.check("cublasLtCreate", made)?;
        let element = match dtype {
            Dtype::F16 => sys::cudaDataType::CUDA_R_16F,
            Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
        };
        let (handle, device, algorithms) = (Handle(handle), Arc::clone(device), Mutex::default());
        Ok(Self { library, handle, element, workspace, device, algorithms })
    }

    /// Computes a product, or says that the library has no algorithm for it.
    pub(super) fn multiply(self: &Arc<Self>, product: Product) -> Result<bool, Error> {
        let Some(algorithm) = self.algorithm(&product)? else { return Ok(false) };
        let products = Arc::clone(self);
        self.device.enqueue(Arc::new(move |stream| products.run(&product, &algorithm, stream)))?;
        Ok(true)
    }

    fn algorithm(&self, product: &Product) -> Result<Option<sys::cublasLtMatmulAlgo_t>, Error> {
        let mut known = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&known) = known.get(&product.shape) {
            return Ok(known);
        }
        let chosen = self.choose(product)?;
        if known.len() == SHAPES_MAX {
            known.clear();
        }
        known.insert(product.shape, chosen);
        Ok(chosen)
    }

    /// Asks the library for what it thinks best.
    fn choose(&self, product: &Product) -> Result<Option<sys::cublasLtMatmulAlgo_t>, Error> {
        self.device.current()?;
        let calls = &self.library.calls;
        let described = Described::new(calls, product, self.element)?;
        let wish = Owned::make(calls.wish_destroy, |to| {
            // SAFETY: a place for one handle.
            calls.check("cublasLtMatmulPreferenceCreate", unsafe { (calls.wish_create)(to) })
        })?;
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES as u64;
        // SAFETY: a wish that was just made, and a number of the attribute's size.
        let set = unsafe { (calls.wish_set)(wish.0, most, (&raw const bytes).cast(), size_of_val(&bytes)) };
        calls.check("cublasLtMatmulPreferenceSetAttribute", set)?;
        let mut choice = MaybeUninit::<Choice>::zeroed();
        let mut found = 0;
        let Described { product, weight, x, out } = &described;
        // SAFETY: live descriptions, and room for the one choice that is asked for.
        let asked = unsafe {
            (calls.choose)(
                self.handle.0,
                product.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                wish.0,
                1,
                choice.as_mut_ptr(),
                &raw mut found,
            )
        };
        if asked == NOT_SUPPORTED || (asked == SUCCESS && found == 0) {
            return Ok(None);
        }
        calls.check("cublasLtMatmulAlgoGetHeuristic", asked)?;
        // SAFETY: numbers alone, which were zeros before the library wrote them.
        let choice = unsafe { choice.assume_init() };
        Ok((choice.state == SUCCESS).then_some(choice.algorithm))
    }

    fn run(
        &self,
        product: &Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        stream: Stream,
    ) -> Result<(), Error> {
        let calls = &self.library.calls;
        let described = Described::new(calls, product, self.element)?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let place = |address: Address| address as *mut c_void;
        let out = place(product.out);
        // SAFETY: live descriptions; addresses of memory that the operators checked against them; two numbers of the
        // type that the product is described with.
        let done = unsafe {
            (calls.multiply)(
                self.handle.0,
                described.product.0,
                (&raw const one).cast(),
                place(product.weight),
                described.weight.0,
                place(product.x),
                described.x.0,
                (&raw const zero).cast(),
                out,
                described.out.0,
                out,
                described.out.0,
                algorithm,
                place(self.workspace.address()),
                WORKSPACE_BYTES,
                stream as *mut c_void,
            )
        };
        calls.check("cublasLtMatmul", done)
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        if self.device.current().is_ok() {
            // SAFETY: made in `new`, and nobody has it any more.
            let _gone = unsafe { (self.library.calls.destroy)(self.handle.0) };
        }
    }
}

impl fmt::Debug for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.library.fmt(f)
    }
}

/// Something of the library's, given back when dropped.
struct Owned(Opaque, unsafe extern "C" fn(Opaque) -> Status);

impl Owned {
    fn make(
        destroy: unsafe extern "C" fn(Opaque) -> Status,
        make: impl FnOnce(*mut Opaque) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let mut made = ptr::null_mut();
        make(&raw mut made)?;
        Ok(Self(made, destroy))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by the library, and nobody has it any more.
        let _gone = unsafe { (self.1)(self.0) };
    }
}

/// A product in the library's words: `out = product(weight, x)`.
struct Described {
    product: Owned,
    weight: Owned,
    x: Owned,
    out: Owned,
}

impl Described {
    fn new(calls: &Calls, product: &Product, element: sys::cudaDataType) -> Result<Self, Error> {
        let ProductShape { rows, in_cols, out_cols, x_stride, weight_stride, out_stride, has_bias } =
            product.shape;
        let layout = |length: u64, count: u64, stride: u64| {
            let stride = i64::try_from(stride).unwrap_or(i64::MAX);
            Owned::make(calls.layout_destroy, |to| {
                // SAFETY: a place for one handle.
                let made = unsafe { (calls.layout_create)(to, element, length, count, stride) };
                calls.check("cublasLtMatrixLayoutCreate", made)
            })
        };
        let sum = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let made = Owned::make(calls.product_destroy, |to| {
            // SAFETY: as above.
            let made = unsafe { (calls.product_create)(to, sum, sys::cudaDataType::CUDA_R_32F) };
            calls.check("cublasLtMatmulDescCreate", made)
        })?;
        let set = |attribute, value: &[u8]| {
            // SAFETY: a description that was just made, and a value of the attribute's size.
            let set = unsafe { (calls.product_set)(made.0, attribute, value.as_ptr().cast(), value.len()) };
            calls.check("cublasLtMatmulDescSetAttribute", set)
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED.to_ne_bytes())?;
        if has_bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue.to_ne_bytes())?;
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias.to_ne_bytes())?;
        }
        Ok(Self {
            weight: layout(in_cols, out_cols, weight_stride)?,
            x: layout(in_cols, rows, x_stride)?,
            out: layout(out_cols, rows, out_stride)?,
            product: made,
        })
    }
}
