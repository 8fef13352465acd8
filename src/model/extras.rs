//! Tensors that a checkpoint has besides those that are computed with: which of them are left alone, and which show that the
//! model is another one than its configuration says, or that its weights are quantised.

use std::path::Path;

use crate::{
    checkpoint::{Checkpoint, not_read},
    error::{Error, Result},
};

/// What stands in the place of `weight` in the names of tensors of quantised weights, and the methods that store them so.
const PACKED: [(&str, &str); 11] = [
    ("qweight", "GPTQ or AWQ"),
    ("weight_packed", "compressed-tensors"),
    ("weight.absmax", "bitsandbytes"),
    ("SCB", "bitsandbytes"),
    ("weight_scale_inv", "FP8 with a scale for each block"),
    ("weight_scale", "FP8 or INT8 with scales"),
    ("weight_scales", "INT8 with scales"),
    ("weight._data", "quanto"),
    ("W_q", "HQQ"),
    ("codebooks", "AQLM"),
    // Last, since others have scales too.
    ("scales", "MLX, or another method with scales"),
];

/// The refusal of the weights of this name in `path`, if what is stored beside them or in their place shows that they are quantised.
pub(super) fn refuse_quantised(path: &Path, checkpoint: &Checkpoint, name: &str) -> Result<()> {
    let module = name.strip_suffix("weight");
    let beside = |stored: &str| module.is_some_and(|module| checkpoint.stores(&format!("{module}{stored}")));
    match PACKED.iter().find(|(stored, _)| beside(stored)) {
        Some((_, method)) => Err(not_read(format!("{}: tensor {name}", path.display()), method)),
        None => Ok(()),
    }
}

/// Refuses biases and norms in the first `layers` layers that are not among `known`: they show that the configuration is another
/// model's. What else is there (frequencies of the rotation, masks, scales of a KV cache, layers that predict more tokens)
/// changes nothing in the computation that the configuration describes.
pub(super) fn refuse_left_out(
    path: &Path,
    described_by: &str,
    checkpoint: &Checkpoint,
    prefix: &str,
    layers: usize,
    known: &[&str],
) -> Result<()> {
    let counts = |local: &str| {
        let (module, parameter) = local.rsplit_once('.').unwrap_or(("", local));
        let of_module = known.iter().any(|known| known.rsplit_once('.').is_some_and(|(known, _)| known == module));
        match parameter {
            "weight" => module.contains("norm"),
            "bias" => of_module || module.contains("norm") || module.ends_with("_proj"),
            _ => false,
        }
    };
    let left_out = checkpoint.stored_names().filter(|name| {
        let in_layer = name.strip_prefix(prefix).and_then(|rest| rest.split_once('.'));
        in_layer.is_some_and(|(layer, local)| {
            layer.parse::<usize>().is_ok_and(|layer| layer < layers) && !known.contains(&local) && counts(local)
        })
    });
    match left_out.min() {
        Some(name) => {
            let cause = format!(
                "{described_by} knows no such tensor; the model would compute without it: take the {described_by} that \
                 belongs to these weights"
            );
            Err(Error::tensor(path, name, cause))
        }
        None => Ok(()),
    }
}
