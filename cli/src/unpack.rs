//! Writes a packed model as it was before `pack`, or checks that it could.

use std::path::PathBuf;

use clap::Args;

use crate::{
    Failure,
    hub::{self, ModelFolder},
    pack::{self, Shown},
};

const EXAMPLES: &str = "\
Each tensor is compared with the checksum that was taken when it was packed. Types, shapes and bytes are those it had then.

Examples:
  A model that `layer-streamer pack` wrote, for programs that do not read it packed:
    layer-streamer unpack /mnt/nvme/7b-packed /mnt/nvme/7b
  Whether it is whole, without writing anything:
    layer-streamer unpack --check /mnt/nvme/7b-packed";

/// Unpack a model that `pack` wrote, bit for bit
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Folder of a packed model, or its name on the hub
    #[arg(value_name = "MODEL", value_parser = hub::parser())]
    model: ModelFolder,
    /// Folder to write to; made if missing, refused if it holds anything but what this command began
    #[arg(value_name = "FOLDER", required_unless_present = "check")]
    folder: Option<PathBuf>,
    /// Read all tensors and compare them with their checksums; write nothing
    #[arg(long, conflicts_with = "folder")]
    check: bool,
    #[command(flatten)]
    shown: Shown,
}

pub fn run(Options { model, folder, check: _, shown }: &Options) -> Result<(), Failure> {
    match folder {
        Some(folder) => pack::convert(model, folder, shown, false),
        None => pack::check(model, shown),
    }
}
