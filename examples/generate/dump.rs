//! `--dump-logits`.

use std::{
    fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use layer_streamer::{kernels::Kernels, model::Decoder};

use crate::Failure;

/// The file for the logits, under another name until it is whole.
pub struct Dump<'a> {
    path: &'a Path,
    partial: PathBuf,
    file: fs::File,
}

impl<'a> Dump<'a> {
    /// Makes sure, before the long work, that the file can be written.
    pub fn create(path: &'a Path) -> Result<Self, Failure> {
        if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(path, &io::Error::other("there is something that is no regular file")));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        let partial = PathBuf::from(partial);
        let file =
            fs::File::options().write(true).create_new(true).open(&partial).map_err(|error| failed(path, &error))?;
        Ok(Self { path, partial, file })
    }

    /// Writes a safetensors file: the length of the header, the header, the rows.
    pub fn write<D: Kernels>(self, decoder: &mut Decoder<D>, tokens: usize) -> Result<(), Failure> {
        let vocab = decoder.model().config.vocab;
        let tensor =
            serde_json::json!({ "dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, 4 * tokens * vocab] });
        let mut header = serde_json::json!({ "logits": tensor }).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut out = BufWriter::new(&self.file);
        let failed = |error: io::Error| failed(self.path, &error);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        decoder
            .all_logits(|rows| rows.iter().try_for_each(|value| out.write_all(&value.to_le_bytes())).map_err(failed))?;
        out.flush().map_err(failed)?;
        drop(out);
        fs::rename(&self.partial, self.path).map_err(failed)
    }
}

impl Drop for Dump<'_> {
    fn drop(&mut self) {
        // Gone already if all went well.
        let _ = fs::remove_file(&self.partial);
    }
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    format!("cannot write --dump-logits {}: {error}", path.display()).into()
}
