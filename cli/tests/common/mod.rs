//! What the program's tests share.

use std::{env, process::Command};

/// The program with one of its commands: the one that was built with the tests, or that of `LAYER_STREAMER_PROGRAM`.
pub fn program(command: &str) -> Command {
    let chosen = env::var_os("LAYER_STREAMER_PROGRAM");
    let mut program = Command::new(chosen.unwrap_or_else(|| env!("CARGO_BIN_EXE_layer-streamer").into()));
    program.arg(command);
    program
}
