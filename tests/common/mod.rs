//! What several integration tests share, beside what knows nothing of the crate (the package `support`).
#![allow(dead_code, reason = "each test uses a part")]

#[path = "../../src/fixtures.rs"]
mod fixtures;
#[cfg(feature = "model")]
mod model;

#[allow(unused_imports, reason = "each test uses a part")]
pub use fixtures::*;
#[cfg(feature = "model")]
#[allow(unused_imports, reason = "each test uses a part")]
pub use model::*;

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
