//! What the tests of the library and of the program share and that knows neither: folders, limits, mounts, processes, calls that
//! fail, random things.

mod folders;
pub mod fuzz;
pub mod gguf;
pub mod limits;
pub mod marked;
pub mod mounts;
mod process;
#[cfg(target_arch = "x86_64")]
pub mod trap;

pub use folders::*;
pub use process::*;

/// How many random cases to try where `usual` are tried in everyday runs: `LAYER_STREAMER_EFFORT` times as many.
pub fn cases(usual: u32) -> u32 {
    let effort = std::env::var("LAYER_STREAMER_EFFORT").map_or(1, |effort| effort.parse().expect("a whole number"));
    usual * effort
}
