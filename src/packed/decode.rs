//! A block → its weights.

#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{BLOCK, Escapes, FIXED, Table, weight};

/// A way of decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoding {
    /// With AVX-512, its byte permutations (VBMI) and expansions (VBMI2).
    Avx512,
    /// With AVX2 and BMI2.
    Avx2,
    /// Weight by weight.
    Plain,
}

impl Decoding {
    /// All of them, the fastest first.
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Plain];

    /// Whether this processor can.
    pub fn is_supported(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::has_avx512(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::has_avx2(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Plain => true,
        }
    }

    /// The fastest on this processor.
    pub fn fastest() -> Self {
        Self::ALL.into_iter().find(|decoding| decoding.is_supported()).unwrap_or(Self::Plain)
    }

    /// The weights of a block, which has the planes that its escapes say; `None` if its codes say otherwise. Where the processor
    /// cannot decode this way, in plain code.
    pub(super) fn decode(self, table: Table, block: &[u8], escapes: Escapes, out: &mut [u16; BLOCK]) -> Option<()> {
        let planes = Planes::new(block, escapes)?;
        let found = match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has AVX-512 with the extensions that the function is compiled for.
            Self::Avx512 if x86::has_avx512() => unsafe { x86::avx512(table, planes, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has AVX2, BMI2 and POPCNT, for which the function is compiled.
            Self::Avx2 if x86::has_avx2() => unsafe { x86::avx2(table, planes, out) },
            _ => plain(table, planes, out),
        };
        (found? == escapes).then_some(())
    }
}

/// The planes of a block.
#[derive(Clone, Copy)]
pub(super) struct Planes<'a> {
    /// Sign and mantissa of each weight.
    pub(super) rest: &'a [u8; BLOCK],
    /// Its first code, of two bits.
    pub(super) first: &'a [u8; BLOCK / 4],
    /// Second codes, of two bits.
    pub(super) second: Codes<'a>,
    /// Third codes, of three bits.
    pub(super) third: Codes<'a>,
    /// Exponents that have no code.
    pub(super) plain: &'a [u8],
}

impl<'a> Planes<'a> {
    fn new(block: &'a [u8], escapes: Escapes) -> Option<Self> {
        let [third, plain] = escapes.planes();
        Some(Self {
            rest: block.first_chunk()?,
            first: block.get(BLOCK..)?.first_chunk()?,
            second: Codes { bytes: block.get(FIXED..third)?, bit: 0 },
            third: Codes { bytes: block.get(third..plain)?, bit: 0 },
            plain: block.get(plain..)?,
        })
    }
}

/// Codes of a plane that were not taken yet.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) bit: usize,
}

impl Codes<'_> {
    /// The next 57 bits or more, the first in the lowest; zeros after the end.
    #[inline(always)]
    pub(super) fn window(&self) -> u64 {
        let at = self.bit / 8;
        let bytes = match self.bytes.get(at..at + 8) {
            Some(bytes) => bytes.try_into().expect("eight of them"),
            None => {
                let mut bytes = [0; 8];
                let there = self.bytes.get(at..).unwrap_or_default();
                bytes[..there.len()].copy_from_slice(there);
                bytes
            }
        };
        u64::from_le_bytes(bytes) >> (self.bit % 8)
    }
}

/// Weight by weight. Returns the escapes that were met; `None` if an exponent is missing.
fn plain(table: Table, mut planes: Planes<'_>, out: &mut [u16; BLOCK]) -> Option<Escapes> {
    let (mut escapes, mut plain) = (Escapes::default(), planes.plain.iter());
    for (at, out) in out.iter_mut().enumerate() {
        let mut rank = usize::from(planes.first[at / 4] >> (2 * (at % 4)) & 3);
        if rank == 3 {
            rank += (planes.second.window() & 3) as usize;
            planes.second.bit += 2;
            escapes.first += 1;
        }
        if rank == 6 {
            rank += (planes.third.window() & 7) as usize;
            planes.third.bit += 3;
            escapes.second += 1;
        }
        let exponent = match table.0.get(rank) {
            Some(exponent) => *exponent,
            None => *plain.next()?,
        };
        *out = weight(exponent, planes.rest[at]);
    }
    Some(escapes)
}
