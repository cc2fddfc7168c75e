//! An algorithm that is chosen at run time, for programs that take its name from a user.

use std::fmt;
use std::str::FromStr;

#[cfg(feature = "blake3")]
use super::Blake3;
#[cfg(feature = "sha2")]
use super::Sha256;
use super::{BlockHash, BlockHasher, Content, Digest, Dynamo, Encoding, Vllm, Xxh3};

/// The name of an algorithm, as it is written in commands and reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// `xxh3`
    #[default]
    Xxh3,
    /// `blake3`
    #[cfg(feature = "blake3")]
    Blake3,
    /// `sha256`
    #[cfg(feature = "sha2")]
    Sha256,
    /// `vllm-sha256`
    #[cfg(feature = "sha2")]
    VllmSha256,
    /// `vllm-sha256-cbor`
    #[cfg(feature = "sha2")]
    VllmSha256Cbor,
    /// `vllm-xxhash`
    VllmXxhash,
    /// `vllm-xxhash-cbor`
    VllmXxhashCbor,
    /// `dynamo`
    Dynamo,
}

impl Algorithm {
    /// All that were compiled in, the default first.
    pub const ALL: &[Algorithm] = &[
        Algorithm::Xxh3,
        #[cfg(feature = "blake3")]
        Algorithm::Blake3,
        #[cfg(feature = "sha2")]
        Algorithm::Sha256,
        #[cfg(feature = "sha2")]
        Algorithm::VllmSha256,
        #[cfg(feature = "sha2")]
        Algorithm::VllmSha256Cbor,
        Algorithm::VllmXxhash,
        Algorithm::VllmXxhashCbor,
        Algorithm::Dynamo,
    ];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::Xxh3 => "xxh3",
            #[cfg(feature = "blake3")]
            Algorithm::Blake3 => "blake3",
            #[cfg(feature = "sha2")]
            Algorithm::Sha256 => "sha256",
            #[cfg(feature = "sha2")]
            Algorithm::VllmSha256 => "vllm-sha256",
            #[cfg(feature = "sha2")]
            Algorithm::VllmSha256Cbor => "vllm-sha256-cbor",
            Algorithm::VllmXxhash => "vllm-xxhash",
            Algorithm::VllmXxhashCbor => "vllm-xxhash-cbor",
            Algorithm::Dynamo => "dynamo",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No algorithm has this name, or it was not compiled in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no hash: there are {known}", known = Algorithm::ALL.iter().map(|known| known.as_str()).collect::<Vec<_>>().join(", "))]
pub struct UnknownAlgorithm(String);

impl FromStr for Algorithm {
    type Err = UnknownAlgorithm;

    fn from_str(name: &str) -> Result<Self, UnknownAlgorithm> {
        let found = Algorithm::ALL.iter().find(|known| known.as_str() == name);
        found.copied().ok_or_else(|| UnknownAlgorithm(name.to_owned()))
    }
}

/// Any of the hashers of this crate. Costs a branch per block and a digest of the greatest width; who knows the
/// algorithm when he writes his program names its type instead.
#[derive(Clone, Debug)]
pub enum AnyHasher {
    /// [`Xxh3`].
    Xxh3(Xxh3),
    /// [`Blake3`].
    #[cfg(feature = "blake3")]
    Blake3(Blake3),
    /// [`Sha256`].
    #[cfg(feature = "sha2")]
    Sha256(Sha256),
    /// [`Vllm`] with digests of 32 bytes.
    Vllm(Vllm<32>),
    /// [`Vllm`] with digests of 16 bytes.
    VllmXxhash(Vllm<16>),
    /// [`Dynamo`].
    Dynamo(Dynamo),
}

impl AnyHasher {
    /// The hasher of this name, under a key made of `seed`. vLLM's names get it as `PYTHONHASHSEED` where they would be
    /// random without; its `sha256` and Dynamo's have seeds of their own.
    pub fn new(algorithm: Algorithm, seed: u64) -> Self {
        #[cfg(any(feature = "blake3", feature = "sha2"))]
        let key = {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&seed.to_le_bytes());
            key
        };
        match algorithm {
            Algorithm::Xxh3 => AnyHasher::Xxh3(Xxh3::new(seed)),
            #[cfg(feature = "blake3")]
            Algorithm::Blake3 => AnyHasher::Blake3(Blake3::new(key)),
            #[cfg(feature = "sha2")]
            Algorithm::Sha256 => AnyHasher::Sha256(Sha256::new(key)),
            #[cfg(feature = "sha2")]
            Algorithm::VllmSha256 => AnyHasher::Vllm(Vllm::sha256(Encoding::Pickle)),
            #[cfg(feature = "sha2")]
            Algorithm::VllmSha256Cbor => AnyHasher::Vllm(Vllm::sha256(Encoding::Cbor)),
            Algorithm::VllmXxhash => AnyHasher::VllmXxhash(Vllm::xxhash(Encoding::Pickle, &seed.to_string())),
            Algorithm::VllmXxhashCbor => {
                AnyHasher::VllmXxhash(Vllm::xxhash(Encoding::Cbor, &seed.to_string()))
            }
            Algorithm::Dynamo => AnyHasher::Dynamo(Dynamo::new()),
        }
    }
}

/// A hash of up to 32 bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AnyHash {
    bytes: BlockHash<32>,
    width: u8,
}

impl AnyHash {
    /// A hash that was stored as its bytes; `None` for more than 32.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut hash = Self { bytes: BlockHash([0; 32]), width: u8::try_from(bytes.len()).ok()? };
        hash.bytes.0.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(hash)
    }

    fn narrow<const BYTES: usize>(self) -> BlockHash<BYTES> {
        BlockHash(*self.bytes.0.first_chunk().expect("no digest is wider than 32 bytes"))
    }
}

impl<const BYTES: usize> From<BlockHash<BYTES>> for AnyHash {
    fn from(hash: BlockHash<BYTES>) -> Self {
        const { assert!(BYTES <= 32, "no digest is wider than 32 bytes") };
        let mut bytes = [0; 32];
        bytes[..BYTES].copy_from_slice(hash.bytes());
        AnyHash { bytes: BlockHash(bytes), width: u8::try_from(BYTES).expect("at most 32") }
    }
}

impl Digest for AnyHash {
    fn tag(&self) -> u32 {
        self.bytes.tag()
    }

    fn low64(&self) -> u64 {
        self.bytes().last_chunk().map_or(0, |last| u64::from_be_bytes(*last))
    }

    /// As many as the algorithm computes.
    fn bytes(&self) -> &[u8] {
        &self.bytes.bytes()[..usize::from(self.width)]
    }
}

impl fmt::Display for AnyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AnyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl BlockHasher for AnyHasher {
    type Digest = AnyHash;

    fn block(&mut self, parent: Option<AnyHash>, content: &Content<'_>) -> AnyHash {
        match self {
            AnyHasher::Xxh3(hasher) => hasher.block(parent.map(AnyHash::narrow), content).into(),
            #[cfg(feature = "blake3")]
            AnyHasher::Blake3(hasher) => hasher.block(parent.map(AnyHash::narrow), content).into(),
            #[cfg(feature = "sha2")]
            AnyHasher::Sha256(hasher) => hasher.block(parent.map(AnyHash::narrow), content).into(),
            AnyHasher::Vllm(hasher) => hasher.block(parent.map(AnyHash::narrow), content).into(),
            AnyHasher::VllmXxhash(hasher) => hasher.block(parent.map(AnyHash::narrow), content).into(),
            AnyHasher::Dynamo(hasher) => hasher.block(parent.map(AnyHash::narrow), content).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_to_the_hasher_of_that_name() {
        let chain = |hasher: &mut AnyHasher| {
            let first = hasher.block(None, &Content::plain(&[1, 2, 3, 4]));
            hasher.block(Some(first), &Content::plain(&[5, 6, 7, 8]))
        };
        let mut hashes = Vec::new();
        for &algorithm in Algorithm::ALL {
            assert_eq!(algorithm.as_str().parse(), Ok(algorithm));
            hashes.push(chain(&mut AnyHasher::new(algorithm, 1)));
        }
        let mut dynamo = Dynamo::new();
        let first = dynamo.block(None, &Content::plain(&[1, 2, 3, 4]));
        let second = dynamo.block(Some(first), &Content::plain(&[5, 6, 7, 8]));
        let last = hashes.last().unwrap();
        assert_eq!((last.bytes(), last.low64()), (&second.bytes()[..], 4_945_711_292_740_353_085));
        assert_eq!(hashes[0].to_string().len(), 32);
        assert!(hashes.iter().all(|hash| AnyHash::new(hash.bytes()) == Some(*hash)));
        assert_eq!(AnyHash::new(&[0; 33]), None);
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), Algorithm::ALL.len());
        assert!("md5".parse::<Algorithm>().unwrap_err().to_string().contains("xxh3, "));
    }
}
