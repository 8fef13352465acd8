//! See `Cargo.toml`. The modules are the crate's own files; `plan` stands for the two names that they take from there.
#![allow(dead_code, unused_imports)]

#[path = "../../../src/error.rs"]
mod error;
mod pipeline;
#[path = "../../../src/device/pool.rs"]
mod pool;
#[path = "../../../src/ring.rs"]
mod ring;
#[path = "../../../src/sync.rs"]
mod sync;
#[path = "../../../src/trace/mod.rs"]
mod trace;

mod plan {
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Reader;
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Tier;
}

#[cfg(all(test, loom))]
mod calls;
#[cfg(all(test, loom))]
mod protocols;
