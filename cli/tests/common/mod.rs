//! What the program's tests share.

use std::process::Command;

/// The program with one of its commands.
pub fn program(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_layer-streamer"));
    program.arg(command);
    program
}
