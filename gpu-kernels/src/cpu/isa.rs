//! What the machine can do, found at run time.

use std::fmt;

/// Which instructions the arithmetic runs on. Later ones include earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every machine of the target has.
    Portable,
    /// 64-bit Arm with NEON, which is all of them.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with VNNI and VBMI, and dot products of bf16 pairs for products with weights of bf16, eight bits and
    /// four.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// All that, and matrix tiles for products with those weights and for attention over what is exact in bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// All of them, the plainest first.
    pub const ALL: &'static [Self] = &[
        Self::Portable,
        #[cfg(target_arch = "aarch64")]
        Self::Neon,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512Bf16,
        #[cfg(target_arch = "x86_64")]
        Self::Amx,
    ];

    /// A short name for logs and flags.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
        }
    }

    /// Whether this machine, and this operating system, can run it.
    #[must_use]
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.available()
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => Self::Avx512Bf16.available() && super::amx::available(),
            #[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
            Self::Amx => false,
        }
    }

    /// The best that this machine can run.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.iter().rev().copied().find(|isa| isa.available() && isa.pays()).unwrap_or(Self::Portable)
    }

    /// The best that this machine can run of those that compute in f32 throughout: AVX2, AVX-512 and NEON, whose bits
    /// agree, or else the portable one.
    #[must_use]
    pub fn best_in_f32() -> Self {
        let found = Self::ALL.iter().rev().copied().find(|isa| isa.available() && !isa.rounds_activations());
        found.unwrap_or(Self::Portable)
    }

    /// Whether products with weights of bf16, eight bits and four round activations to bf16, as GPUs do: machines that
    /// multiply bf16 by bf16.
    #[must_use]
    pub const fn rounds_activations(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::Amx => true,
            _ => false,
        }
    }

    /// Whether those products multiply pairs in vectors.
    pub(crate) const fn multiplies_pairs(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// Those that tests multiply pairs with: the portable lanes, which spell it out, and what has the instruction.
    #[cfg(test)]
    pub(crate) fn in_pairs() -> impl Iterator<Item = Self> {
        let has = |isa: &Self| isa.multiplies_pairs() && isa.available();
        std::iter::once(Self::Portable).chain(Self::ALL.iter().copied().filter(has))
    }

    /// Whether it is faster here than the one before it.
    ///
    /// A Zen 5 begins two `vdpbf16ps` in a cycle, as many as multiply-adds of f32, and each does twice as much. A
    /// Sapphire Rapids begins one in two cycles: half of what its multiply-adds do. (Both measured; other processors of
    /// AMD count as the one, others as the other.)
    fn pays(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512Bf16 {
            let vendor = std::arch::x86_64::__cpuid(0);
            let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            return matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine");
        }
        true
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
