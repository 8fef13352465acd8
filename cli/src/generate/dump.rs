//! `--dump-logits`.

use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

use layer_streamer::{files::NewFile, kernels::Kernels, model::Decoder};

use crate::Failure;

/// The file for the logits, which appears when it is whole.
pub struct Dump(NewFile);

impl Dump {
    /// Makes sure, before the long work, that the file can be written.
    pub fn create(path: &Path) -> Result<Self, Failure> {
        NewFile::create(path).map(Self).map_err(|error| failed(path, &error))
    }

    /// Writes a safetensors file: the length of the header, the header, the rows.
    pub fn write<D: Kernels>(self, decoder: &mut Decoder<D>, tokens: usize) -> Result<(), Failure> {
        let vocab = decoder.model().config.vocab;
        let tensor =
            serde_json::json!({ "dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, 4 * tokens * vocab] });
        let mut header = serde_json::json!({ "logits": tensor }).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let path = self.0.path().to_owned();
        let failed = |error: io::Error| failed(&path, &error);
        let mut out = BufWriter::new(self.0.file());
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        decoder
            .all_logits(|rows| rows.iter().try_for_each(|value| out.write_all(&value.to_le_bytes())).map_err(failed))?;
        out.flush().map_err(failed)?;
        drop(out);
        self.0.keep().map_err(failed)
    }
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    format!("cannot write --dump-logits {}: {error}", path.display()).into()
}
