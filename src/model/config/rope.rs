//! How fast each pair of a head's elements rotates.

use super::raw::{ConfigFault, RawRope, within};

/// Radians per position, for heads of so many elements; `theta` where the rope's own keys do not say.
pub(super) fn frequencies(rope: &RawRope, theta: Option<f64>, head_dim: usize) -> Result<Vec<f32>, ConfigFault> {
    let theta = rope.rope_theta.or(theta).unwrap_or(10_000.0);
    within("rope_theta", theta, theta > 0.0)?;
    let mut inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    match rope.rope_type.as_deref().or(rope.kind.as_deref()).unwrap_or("default") {
        "default" => {}
        "llama3" => llama3(rope, &mut inv_freq)?,
        other => return Err(ConfigFault::Unsupported(format!("rope scaling {other:?}"))),
    }
    Ok(inv_freq.into_iter().map(|f| f as f32).collect())
}

/// The scaling of Llama 3.1 (`_compute_llama3_parameters` in transformers): long wavelengths are stretched by `factor`, short
/// ones stay, those between are blended.
fn llama3(rope: &RawRope, inv_freq: &mut [f64]) -> Result<(), ConfigFault> {
    let number = |key: &str, value: Option<f64>| match value {
        Some(value) if value > 0.0 && value.is_finite() => Ok(value),
        Some(value) => Err(ConfigFault::Wrong(format!("{key} of the llama3 rope scaling is {value}"))),
        None => Err(ConfigFault::Wrong(format!("the llama3 rope scaling lacks {key}"))),
    };
    let factor = number("factor", rope.factor)?;
    let (low, high) =
        (number("low_freq_factor", rope.low_freq_factor)?, number("high_freq_factor", rope.high_freq_factor)?);
    let original = number("original_max_position_embeddings", rope.original_max_position_embeddings)?;
    if low >= high {
        return Err(ConfigFault::Wrong(format!(
            "low_freq_factor {low} of the llama3 rope scaling is not below high_freq_factor {high}"
        )));
    }
    for frequency in inv_freq {
        let wavelengths = original * *frequency / std::f64::consts::TAU;
        let blend = ((wavelengths - low) / (high - low)).clamp(0.0, 1.0);
        *frequency *= blend + (1.0 - blend) / factor;
    }
    Ok(())
}
