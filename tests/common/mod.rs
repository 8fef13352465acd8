//! What several integration tests share, beside what knows nothing of the crate (the package `support`).
#![allow(dead_code, reason = "each test uses a part")]

mod blocks;
#[path = "../../src/fixtures.rs"]
mod fixtures;
mod formats;
mod matrices;
#[cfg(feature = "model")]
mod model;

use std::{ptr::NonNull, sync::Arc};

#[allow(unused_imports, reason = "each test uses a part")]
pub use blocks::*;
#[allow(unused_imports, reason = "each test uses a part")]
pub use fixtures::*;
#[allow(unused_imports, reason = "each test uses a part")]
pub use formats::*;
#[allow(unused_imports, reason = "each test uses a part")]
pub use matrices::*;
#[cfg(feature = "model")]
#[allow(unused_imports, reason = "each test uses a part")]
pub use model::*;

use layer_streamer::{
    Checkpoint, Error, LayerStreamer, LentMemory, Plan, Settings, Unit,
    device::Cpu,
    plan::{Sharing, Tier},
    trace::Observer,
};

/// Memory to lend a streamer on the CPU device: its slots on the device, or its pinned ones. So units are copied from slot to slot, as
/// where a device has memory of its own.
pub struct LentSlots {
    lent: LentMemory,
    _pages: Vec<[u8; 4096]>,
}

impl LentSlots {
    pub fn new(checkpoint: &Checkpoint, units: &[Unit], settings: &Settings, tier: Tier) -> Self {
        let plan = Plan::new(checkpoint, units, settings, Sharing::Own).unwrap();
        let [_, pinned, gpu] = plan.slot_memory();
        let bytes = if tier == Tier::Gpu { gpu } else { pinned };
        let mut pages = vec![[0; 4096]; bytes.div_ceil(4096) + 1];
        let start = pages.as_mut_ptr().cast::<u8>();
        let slots = NonNull::new(start.wrapping_add(start.align_offset(4096))).map(|start| (start, bytes));
        let lent = match tier {
            Tier::Gpu => LentMemory { gpu: slots, ..LentMemory::default() },
            _ => LentMemory { pinned: slots, ..LentMemory::default() },
        };
        Self { lent, _pages: pages }
    }

    /// A streamer that is dropped before these.
    pub fn streamer(
        &self,
        checkpoint: &Checkpoint,
        units: &[Unit],
        settings: &Settings,
        observers: &[Arc<dyn Observer>],
    ) -> Result<LayerStreamer<Cpu>, Error> {
        // SAFETY: the pages outlive the streamer, as is asked for, and nothing else looks into them meanwhile.
        unsafe { LayerStreamer::with_lent_memory(&Cpu, checkpoint, units, settings, observers, &self.lent) }
    }
}

/// A built example. `cargo test` builds them beside the test executables; `cargo test --test NAME` takes those built before.
pub fn example(name: &str) -> std::process::Command {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().unwrap().with_file_name("examples").join(name);
    assert!(path.exists(), "the example is not built: cargo build --example {name}");
    std::process::Command::new(path)
}

/// The GPU, if there is one to test. `LAYER_STREAMER_TEST_DEVICE=cuda` makes a missing one a failure.
#[cfg(feature = "cuda")]
pub fn gpu() -> Option<layer_streamer::device::Cuda> {
    let error = match layer_streamer::device::Cuda::new(0) {
        Ok(cuda) => return Some(cuda),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var("LAYER_STREAMER_TEST_DEVICE").as_deref() != Ok("cuda"), "{error}");
    assert!(error.contains("cuda:0") && (error.contains("no usable GPU") || error.contains("driver")), "{error}");
    println!("not tested: {error}");
    None
}
