//! See `Cargo.toml`.
#![allow(dead_code, unused_imports)]

#[path = "../../../src/ring.rs"]
mod ring;
#[path = "../../../src/sync.rs"]
mod sync;
