//! Which layers are of which kind.

use serde_json::Value;

use super::{
    families::{Family, WindowRule},
    keys::{ConfigFault, Keys},
};

/// Some of a model's layers. No longer than what says so, however many layers there are said to be.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum LayerSet {
    None,
    All,
    /// From this one on.
    From(usize),
    /// The n-th, the 2n-th and so on, counted from 1.
    Every(usize),
    /// All but those.
    AllBut(usize),
    Each(Vec<bool>),
}

impl LayerSet {
    pub(super) fn has(&self, layer: usize) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::From(first) => layer >= *first,
            Self::Every(n) => (layer + 1).is_multiple_of(*n),
            Self::AllBut(n) => !(layer + 1).is_multiple_of(*n),
            Self::Each(each) => each.get(layer).copied().unwrap_or(false),
        }
    }
}

/// The layers that see a window of tokens, and how many that is; `None`: all.
pub(super) fn windows(
    family: &Family,
    keys: &Keys<'_>,
    unrotated: &LayerSet,
) -> Result<(LayerSet, Option<usize>), ConfigFault> {
    let enabled = match family.windows {
        WindowRule::Never => return Ok((LayerSet::None, None)),
        WindowRule::IfEnabled => keys.flag("use_sliding_window")?,
        _ => true,
    };
    let window = keys.count("sliding_window")?.filter(|&window| enabled && window > 0);
    let by_type = match family.windows {
        WindowRule::Always => None,
        _ => types(keys)?,
    };
    let layers = match (by_type, family.windows) {
        (Some(each), _) => LayerSet::Each(each),
        (None, WindowRule::Never) => LayerSet::None,
        (None, WindowRule::Always | WindowRule::ByType) => LayerSet::All,
        (None, WindowRule::IfEnabled) => keys.count("max_window_layers")?.map_or(LayerSet::None, LayerSet::From),
        (None, WindowRule::Alternate) => LayerSet::AllBut(2),
        (None, WindowRule::Pattern) => LayerSet::AllBut(keys.size("sliding_window_pattern")?),
        (None, WindowRule::WithoutRope) if keys.flag("use_sliding_window")? => unrotated.clone(),
        (None, WindowRule::WithoutRope) => LayerSet::None,
    };
    Ok((layers, window))
}

/// Which layers are of type `sliding_attention`, where `layer_types` says.
fn types(keys: &Keys<'_>) -> Result<Option<Vec<bool>>, ConfigFault> {
    let layers = keys.size("num_hidden_layers")?;
    let Some(types) = keys.by_layer("layer_types", (layers, false), Value::as_str)? else { return Ok(None) };
    let of_type = |kind: &str| match kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(ConfigFault::Unsupported(format!("layer type {other:?} in layer_types"))),
    };
    types.into_iter().map(of_type).collect::<Result<_, _>>().map(Some)
}

/// The layers whose queries and keys are not rotated, of a family where some are not: `no_rope_layers` has 0 for them.
pub(super) fn unrotated(keys: &Keys<'_>) -> Result<LayerSet, ConfigFault> {
    let layers = keys.size("num_hidden_layers")?;
    match keys.by_layer("no_rope_layers", (layers, true), Value::as_u64)? {
        Some(each) => Ok(LayerSet::Each(each.into_iter().map(|rotates| rotates == 0).collect())),
        None => Ok(LayerSet::Every(keys.size("no_rope_layer_interval")?)),
    }
}
