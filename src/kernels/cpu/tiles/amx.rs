//! The tiles of AMX: whether this process may use them, and the instructions (Intel's "Architecture Instruction Set Extensions
//! Programming Reference", chapter 3). The compiler knows nothing of tiles, so that a block is one piece of assembly, which
//! leaves none behind.
//!
//! An [`Amx`] proves that the machine has them, and AVX-512 beside them.

use std::{
    arch::{asm, x86_64::*},
    sync::OnceLock,
};

use super::{super::x86::has_avx512, Block, PARTS, SIDE, Tile, Tiles};
use crate::error::{Error, Result};

/// The machine was found to have them: only [`of_this_machine`](Self::of_this_machine) makes it.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Amx(());

impl Amx {
    /// The tiles, if LAYER_STREAMER_AMX is 1.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is neither 0 nor 1, or if the machine has no tiles or Linux does not let this process use them.
    pub(in super::super) fn wanted() -> Result<Option<Self>> {
        const NAME: &str = "LAYER_STREAMER_AMX";
        static ANSWER: OnceLock<Option<Amx>> = OnceLock::new();
        if let Some(answer) = ANSWER.get() {
            return Ok(*answer);
        }
        let answer = match std::env::var_os(NAME) {
            None => None,
            Some(set) if set == "0" => None,
            Some(set) if set == "1" => Some(Self::of_this_machine().ok_or_else(|| {
                let cause = "is 1, but this machine has no AMX for BF16, or Linux does not let this process use it";
                Error::setting(NAME, cause)
            })?),
            Some(set) => return Err(Error::setting(NAME, format!("is {}, expected 0 or 1", set.display()))),
        };
        Ok(*ANSWER.get_or_init(|| answer))
    }

    /// The tiles, if the machine has them and Linux lets this process use them, which it is asked for.
    pub(in super::super) fn of_this_machine() -> Option<Self> {
        (has_avx512().is_some() && has_tiles() && may_use_tiles()).then_some(Self(()))
    }
}

/// Leaf 7: tiles, and products of BF16 in them.
fn has_tiles() -> bool {
    const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILES_AND_BF16 == TILES_AND_BF16
}

/// See `Documentation/arch/x86/xstate.rst` of Linux: a process asks before its threads use tiles, whose content is large.
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes numbers alone.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// What `ldtilecfg` takes: how many bytes each tile's rows have, and how many rows it has.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Four tiles of sums, two of weights, two of activations.
    fn of(block: &Block) -> Self {
        let (columns, whole) = (4 * block.width as u16, 4 * SIDE as u16);
        let upper = block.rows.min(SIDE) as u8;
        let lower = block.rows.saturating_sub(SIDE).max(1) as u8;
        let mut shapes = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].copy_from_slice(&[columns, columns, columns, columns, whole, whole, columns, columns]);
        shapes.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, SIDE as u8, SIDE as u8]);
        shapes
    }
}

/// Fetches as many lines as a step has of weights, in the order of their addresses.
macro_rules! fetch {
    ($($line:literal)*) => { concat!($("prefetcht1 [{ahead} + 64 * ", $line, "]\n"),*) };
}

/// The sums of a block. `also` is what a second tile of tokens needs in each part, and `store` what becomes of its sums.
macro_rules! multiply {
    ($block:expr, $sums:expr, [$($also:literal),*], [$($store:literal),*]) => {{
        let (block, shapes, sums) = ($block, Shapes::of($block), $sums);
        // Without rows of its own the lower tile has the upper one's first.
        let lower = if block.rows > SIDE { SIDE * block.stride } else { 0 };
        // SAFETY: the caller promises that weights and activations lie there; tiles are the machine's, which `self` proves, and
        // none is left; four tiles of sums have room for what is stored. What is fetched ahead need not be there.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{weights} + {stride}*1]",
                "tileloadd tmm5, [{lower} + {stride}*1]",
                "mov {shapes}, {PARTS}",
                "3:",
                "tileloadd tmm6, [{x} + {columns}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "add {x}, {tile}",
                $($also,)*
                "add {other}, {tile}",
                "dec {shapes}",
                "jnz 3b",
                "add {weights}, 64",
                "add {lower}, 64",
                "test {ahead}, {ahead}",
                "jz 4f",
                fetch!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
                "add {ahead}, 2048",
                "4:",
                "dec {steps}",
                "jnz 2b",
                "mov {columns}, 64",
                "tilestored [{sums} + {columns}*1], tmm0",
                "tilestored [{sums} + {columns}*1 + 2048], tmm2",
                $($store,)*
                "tilerelease",
                shapes = inout(reg) &raw const shapes => _,
                weights = inout(reg) block.weights => _,
                lower = inout(reg) block.weights.wrapping_byte_add(lower) => _,
                stride = in(reg) block.stride,
                x = inout(reg) block.x => _,
                other = inout(reg) block.x.wrapping_add(block.group) => _,
                columns = inout(reg) 4 * block.width => _,
                tile = in(reg) 4 * block.width * SIDE,
                steps = inout(reg) block.steps => _,
                ahead = inout(reg) block.ahead => _,
                sums = in(reg) sums.as_mut_ptr(),
                PARTS = const PARTS,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }};
}

// SAFETY: `of_this_machine` asks for AVX-512 too.
unsafe impl Tiles for Amx {
    unsafe fn multiply(self, block: &Block, sums: &mut [Tile; 4]) {
        if block.group == 0 {
            multiply!(block, sums, [], []);
        } else {
            multiply!(
                block,
                sums,
                ["tileloadd tmm7, [{other} + {columns}*1]", "tdpbf16ps tmm1, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7"],
                ["tilestored [{sums} + {columns}*1 + 1024], tmm1", "tilestored [{sums} + {columns}*1 + 3072], tmm3"]
            );
        }
    }
}
