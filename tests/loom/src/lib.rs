//! See `Cargo.toml`. The modules are the crate's own files; `plan` stands for the one name that they take from there.
#![allow(dead_code, unused_imports)]

#[path = "../../../src/error.rs"]
mod error;
mod pipeline;
#[path = "../../../src/ring.rs"]
mod ring;
#[path = "../../../src/sync.rs"]
mod sync;
#[path = "../../../src/trace.rs"]
mod trace;

mod plan {
    #[derive(Clone, Debug, Default)]
    pub struct Reader;
}

#[cfg(all(test, loom))]
mod protocols;
