//! What the program's tests share.

#[path = "../../../tests/common/folders.rs"]
mod folders;

use std::process::Command;

#[allow(unused_imports, reason = "each test uses a part")]
pub use folders::*;

/// The program with one of its commands.
pub fn program(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_layer-streamer"));
    program.arg(command);
    program
}
