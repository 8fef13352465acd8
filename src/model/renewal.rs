//! Sequences that are computed anew: where a model's rotary frequencies depend on how long a sequence is, keys that were rotated
//! when it was shorter are wrong for it now.

use super::{
    batch::Sequence,
    config::{ModelConfig, Rope},
    decoder::Decoder,
};
use crate::{device::TensorRef, error::Result, kernels::Kernels};

/// By row of the KV cache: the regime of the length for which its keys were rotated; `None`: nothing is there that counts.
pub(super) struct Renewal(Vec<Option<[usize; 2]>>);

impl Renewal {
    /// For a model that needs it.
    pub(super) fn of(config: &ModelConfig, rows: usize) -> Option<Self> {
        config.ropes.iter().any(Rope::grows).then(|| Self(vec![None; rows]))
    }
}

impl<D: Kernels> Decoder<D> {
    /// Runs a batch that was checked, and with each of its sequences what came before, where that must be rotated anew.
    pub(super) fn forward_renewing(
        &mut self,
        batch: &[Sequence<'_>],
        observe: impl FnMut(usize, TensorRef<'_, D>, &D::Stream) -> Result<()>,
    ) -> Result<()> {
        let whole = self.rotated_for(batch)?;
        let whole_batch: Vec<_> = (batch.iter().zip(&whole))
            .map(|(given, whole)| Sequence { row: given.row, tokens: whole.as_deref().unwrap_or(given.tokens) })
            .collect();
        // Those that come anew hold nothing meanwhile.
        let renewed = || whole_batch.iter().zip(batch).filter(|(whole, given)| whole.tokens.len() > given.tokens.len());
        for (Sequence { row, .. }, _) in renewed() {
            self.held[*row].clear();
        }
        let passed = self.forward_passes(&whole_batch, observe);
        if passed.is_err() {
            for (Sequence { row, tokens }, given) in renewed() {
                self.held[*row].extend_from_slice(&tokens[..tokens.len() - given.tokens.len()]);
            }
            return passed;
        }
        if let Some(Renewal(regimes)) = &mut self.renewal {
            batch.iter().for_each(|s| regimes[s.row] = Some(self.model.config.regime(self.held[s.row].len())));
        }
        Ok(())
    }

    /// Sends the frequencies of sequences whose new length changes them. Returns for each sequence that must be computed anew all of
    /// its tokens.
    fn rotated_for(&mut self, batch: &[Sequence<'_>]) -> Result<Vec<Option<Vec<u32>>>> {
        let Self { renewal, held, model, buffers, device, stream, .. } = self;
        let Some(Renewal(regimes)) = renewal else { return Ok(vec![None; batch.len()]) };
        let whole = batch.iter().map(|&Sequence { row, tokens: new }| {
            let (before, length) = (&held[row], held[row].len() + new.len());
            if !before.is_empty() && regimes[row] == Some(model.config.regime(length)) {
                return Ok(None);
            }
            // Until a pass has succeeded.
            regimes[row] = None;
            buffers.send_frequencies(device, stream, &model.config, (row, length))?;
            Ok((!before.is_empty()).then(|| [before, new].concat()))
        });
        whole.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{device::Cpu, error::Error, model::Model, plan::Settings};

    /// The speller with a rope that changes at 20 tokens.
    fn growing(kind: &str) -> (tempfile::TempDir, Model) {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir("examples/speller").unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let path = folder.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["rope_parameters"] = match kind {
            "dynamic" => serde_json::json!({ "rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0 }),
            _ => serde_json::json!({ "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0,
                "short_factor": vec![1.0; 32], "long_factor": vec![3.0; 32], "original_max_position_embeddings": 20 }),
        };
        config["max_position_embeddings"] = if kind == "dynamic" { 20.into() } else { 80.into() };
        fs::write(path, config.to_string()).unwrap();
        let model = Model::open(folder.path()).unwrap();
        (folder, model)
    }

    fn last(decoder: &mut Decoder<Cpu>) -> Vec<Vec<f32>> {
        let mut rows = Vec::new();
        let told = decoder.last_logits(|row| {
            rows.push(row.to_vec());
            Ok::<_, Error>(())
        });
        told.unwrap();
        rows
    }

    #[test]
    fn what_comes_of_a_sequence_is_what_one_pass_over_it_gives_however_it_grew_or_was_cut() {
        let ids: Vec<u32> = (0..60u32).map(|i| 3 + i * 7919 % 300).collect();
        for kind in ["dynamic", "longrope"] {
            let (_folder, model) = growing(kind);
            let fresh = |lengths: [usize; 2]| {
                let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 70).unwrap();
                let batch = [0, 1].map(|row| Sequence { row, tokens: &ids[row..][..lengths[row]] });
                decoder.forward(&batch).unwrap();
                last(&mut decoder)
            };
            let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 70).unwrap();
            let mut held = [0, 0];
            // Below, at and across the threshold, back below it, across it again.
            for lengths in [[5, 19], [20, 20], [21, 22], [40, 23], [41, 58]] {
                grow(&mut decoder, &ids, &mut held, lengths);
                assert_near(&last(&mut decoder), &fresh(lengths), kind);
            }
            for row in [0, 1] {
                decoder.truncate(row, 10).unwrap();
            }
            held = [10, 10];
            for lengths in [[12, 20], [30, 21]] {
                grow(&mut decoder, &ids, &mut held, lengths);
                assert_near(&last(&mut decoder), &fresh(lengths), kind);
            }
            // A pass that fails may leave keys of either kind: the next one has them right.
            let mut layers = 0;
            let failed = decoder.forward_observed(&[Sequence { row: 1, tokens: &ids[22..30] }], |_, _, _| {
                layers += 1;
                let cause = "on purpose".into();
                if layers < 4 { Ok(()) } else { Err(Error::Kernel { kernel: "test", cause }) }
            });
            assert!(failed.is_err() && decoder.length(1) == 21);
            grow(&mut decoder, &ids, &mut held, [31, 22]);
            assert_near(&last(&mut decoder), &fresh([31, 22]), kind);
        }
    }

    #[test]
    fn nothing_is_taken_over_of_keys_that_were_rotated_for_a_shorter_sequence() {
        let ids: Vec<u32> = (0..80u32).map(|i| 3 + i * 7919 % 300).collect();
        for kind in ["dynamic", "longrope"] {
            let (_folder, model) = growing(kind);
            let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 80).unwrap();
            decoder.forward(&[Sequence { row: 0, tokens: &ids[..70] }]).unwrap();
            assert_eq!((decoder.begin(1, &ids).unwrap(), decoder.length(1)), (0, 0), "{kind}");
        }
    }

    /// Gives each row the tokens that it lacks.
    fn grow(decoder: &mut Decoder<Cpu>, ids: &[u32], held: &mut [usize; 2], lengths: [usize; 2]) {
        let batch = [0, 1].map(|row| Sequence { row, tokens: &ids[row..][held[row]..lengths[row]] });
        decoder.forward(&batch).unwrap();
        *held = lengths;
        assert_eq!([decoder.length(0), decoder.length(1)], lengths);
    }

    fn assert_near(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
        for (found, expected) in found.iter().zip(expected) {
            let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-3, "{what}: {apart}");
        }
    }
}
