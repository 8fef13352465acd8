//! Folders whose layers' matrices are quantised: for each of them the tensors that the format's library stores, and what
//! `config.json` says of it.
//!
//! Codes are random bytes, so each is as frequent as any other. Scales are such that weights have the usual standard deviation. Of
//! codes that have a mean half of the scales are negative, so that weights have none.

use std::sync::LazyLock;

use layer_streamer::DType;
use serde_json::{Value, json};

use super::{
    blocks::Moments,
    shapes::{Shape, Tensor},
    weights::{DEVIATION, Scales, Values, even},
};

/// How the matrices are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// DeepSeek's, with a scale for each block of 128 × 128.
    Fp8,
    /// compressed-tensors', with a scale for each row.
    Fp8Row,
    /// With a scale for each matrix.
    Fp8Tensor,
    /// compressed-tensors'.
    Int4,
    Gptq,
    /// Of the version called GEMM.
    Awq,
    /// bitsandbytes', with scales that are quantised too.
    Nf4,
}

/// All formats, by their names.
pub const FORMATS: [(&str, Format); 7] = [
    ("fp8", Format::Fp8),
    ("fp8-row", Format::Fp8Row),
    ("fp8-tensor", Format::Fp8Tensor),
    ("int4", Format::Int4),
    ("gptq", Format::Gptq),
    ("awq", Format::Awq),
    ("nf4", Format::Nf4),
];

/// Columns that have a scale in formats of 4 bits: the first number of which all rows are multiples.
const GROUPS: [u64; 2] = [128, 32];
/// Rows and columns of a block of FP8.
const FP8_BLOCK: u64 = 128;
/// Weights that have a scale in NF4, and scales that have one.
const NF4_BLOCK: u64 = 64;
const NF4_NESTED: u64 = 256;
/// What the 4-bit codes of NF4 stand for.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A format for the rows of a shape.
#[derive(Clone, Copy)]
pub struct Quantised {
    format: Format,
    group: u64,
}

impl Quantised {
    pub fn new(format: Format, shape: &Shape) -> Self {
        let suits = |group: &&u64| [shape.hidden, shape.ffn].iter().all(|row| row.is_multiple_of(**group));
        Self { format, group: *GROUPS.iter().find(suits).expect("rows of all shapes are multiples of the last") }
    }

    /// `quantization_config`, as published models have it.
    pub fn config(self) -> Value {
        let compressed = |format: &str, weights: Value, activations: Value| {
            let group = json!({ "targets": ["Linear"], "weights": weights, "input_activations": activations,
                "output_activations": null });
            json!({ "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
                "config_groups": { "group_0": group }, "ignore": ["lm_head"], "kv_cache_scheme": null })
        };
        let numbers = |bits: u64, kind: &str, strategy: &str, group: Option<u64>, dynamic: bool| {
            json!({ "num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": true,
                "dynamic": dynamic, "actorder": null, "block_structure": null })
        };
        match self.format {
            Format::Fp8 => json!({ "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK] }),
            Format::Fp8Row => {
                let of = |strategy: &str, dynamic| numbers(8, "float", strategy, None, dynamic);
                compressed("float-quantized", of("channel", false), of("token", true))
            }
            Format::Fp8Tensor => {
                json!({ "quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"] })
            }
            Format::Int4 => {
                compressed("pack-quantized", numbers(4, "int", "group", Some(self.group), false), Value::Null)
            }
            Format::Gptq => json!({ "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4,
                "group_size": self.group, "sym": true, "desc_act": false, "static_groups": false,
                "true_sequential": true, "damp_percent": 0.01, "lm_head": false }),
            Format::Awq => json!({ "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": self.group,
                "zero_point": true, "modules_to_not_convert": null }),
            Format::Nf4 => json!({ "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true,
                "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
                "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false,
                "llm_int8_skip_modules": null, "llm_int8_threshold": 6.0 }),
        }
    }

    /// What is stored for a tensor: of the layers' matrices what makes them, of all else itself.
    pub fn stored(self, tensor: Tensor) -> Vec<Tensor> {
        match (tensor.name.strip_suffix("weight"), &*tensor.shape) {
            (Some(module), &[rows, columns]) if module.contains(".layers.") => {
                let matrix = Matrix { module, rows, columns, group: self.group };
                match self.format {
                    Format::Fp8 | Format::Fp8Row | Format::Fp8Tensor => matrix.fp8(self.format),
                    Format::Int4 => matrix.int4(),
                    Format::Gptq => matrix.gptq(),
                    Format::Awq => matrix.awq(),
                    Format::Nf4 => matrix.nf4(),
                }
            }
            _ => vec![tensor],
        }
    }
}

/// A matrix to be made of several tensors.
struct Matrix<'a> {
    /// What their names begin with.
    module: &'a str,
    rows: u64,
    columns: u64,
    /// Columns that have a scale.
    group: u64,
}

impl Matrix<'_> {
    fn part(&self, name: &str, shape: &[u64], dtype: DType, values: Values) -> Tensor {
        Tensor { name: format!("{}{name}", self.module), shape: shape.to_vec(), dtype, values }
    }

    /// Random bytes.
    fn codes(&self, name: &str, shape: &[u64], dtype: DType) -> Tensor {
        self.part(name, shape, dtype, Values::Codes(|random| random))
    }

    /// Scales of codes less 8.
    fn signed_scales(&self, name: &str, shape: [u64; 2], dtype: DType) -> Tensor {
        let usual = DEVIATION / Moments::of(-8, 7).square.sqrt();
        self.part(name, &shape, dtype, Values::Scales(Scales { usual, signed: true }))
    }

    fn fp8(&self, format: Format) -> Vec<Tensor> {
        let &Self { rows, columns, .. } = self;
        let (name, shape, dtype) = match format {
            Format::Fp8 => {
                let blocks = [rows, columns].map(|side| side.div_ceil(FP8_BLOCK));
                ("weight_scale_inv", blocks.to_vec(), DType::F32)
            }
            Format::Fp8Row => ("weight_scale", vec![rows, 1], DType::BF16),
            _ => ("weight_scale", vec![], DType::F32),
        };
        let scales = Scales { usual: DEVIATION / *E4M3, signed: false };
        vec![
            self.part("weight", &[rows, columns], DType::F8E4M3, Values::Codes(finite)),
            self.part(name, &shape, dtype, Values::Scales(scales)),
        ]
    }

    fn int4(&self) -> Vec<Tensor> {
        let &Self { rows, columns, group, .. } = self;
        let shape = [rows, columns].map(u64::to_le_bytes).as_flattened().to_vec();
        vec![
            self.codes("weight_packed", &[rows, columns / 8], DType::I32),
            self.signed_scales("weight_scale", [rows, columns / group], DType::BF16),
            self.part("weight_shape", &[2], DType::I64, Values::Bytes(shape)),
        ]
    }

    fn gptq(&self) -> Vec<Tensor> {
        let &Self { rows, columns, group, .. } = self;
        // Stored is one less than the zero.
        let zeros = Values::Codes(|_| 0x7777_7777_7777_7777);
        vec![
            self.codes("qweight", &[columns / 8, rows], DType::I32),
            self.signed_scales("scales", [columns / group, rows], DType::F16),
            self.part("qzeros", &[columns / group, rows / 8], DType::I32, zeros),
            self.part("g_idx", &[columns], DType::I32, Values::Groups(group)),
        ]
    }

    fn awq(&self) -> Vec<Tensor> {
        let &Self { rows, columns, group, .. } = self;
        // Codes and zeros have the same mean.
        let variance = Moments::of(0, 15).variance() + Moments::of(4, 11).variance();
        let scales = Scales { usual: DEVIATION / variance.sqrt(), signed: false };
        vec![
            self.codes("qweight", &[columns, rows / 8], DType::I32),
            self.part("scales", &[columns / group, rows], DType::F16, Values::Scales(scales)),
            self.part("qzeros", &[columns / group, rows / 8], DType::I32, Values::Codes(from_4_to_11)),
        ]
    }

    fn nf4(&self) -> Vec<Tensor> {
        let &Self { rows, columns, .. } = self;
        let Nested { map, scales, offset } = &*NESTED;
        let state = json!({ "quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": [rows, columns],
            "nested_blocksize": NF4_NESTED, "nested_dtype": "float32", "nested_offset": offset });
        let state = state.to_string().into_bytes();
        let (blocks, length) = (rows * columns / NF4_BLOCK, state.len() as u64);
        let floats = |all: &[f32]| Values::Bytes(all.iter().flat_map(|number| number.to_le_bytes()).collect());
        vec![
            self.codes("weight", &[rows * columns / 2, 1], DType::U8),
            self.codes("weight.absmax", &[blocks], DType::U8),
            self.part("weight.quant_map", &[16], DType::F32, floats(&NF4)),
            self.part("weight.nested_absmax", &[blocks.div_ceil(NF4_NESTED)], DType::F32, Values::Scales(*scales)),
            self.part("weight.nested_quant_map", &[256], DType::F32, floats(map)),
            self.part("weight.quant_state.bitsandbytes__nf4", &[length], DType::U8, Values::Bytes(state)),
        ]
    }
}

/// Random codes of FP8 that stand for numbers: the greatest in the place of NaN.
fn finite(random: u64) -> u64 {
    const BYTES: u64 = 0x0101_0101_0101_0101;
    let all_ones = ((random & (0x7f * BYTES)) + BYTES) >> 7 & BYTES;
    random ^ all_ones
}

/// Random zeros that are about half of the greatest code, as those of real weights.
fn from_4_to_11(random: u64) -> u64 {
    (random & 0x7777_7777_7777_7777) + 0x4444_4444_4444_4444
}

/// The standard deviation of what random codes of FP8 stand for.
static E4M3: LazyLock<f64> = LazyLock::new(|| {
    let value = |code: i32| match (code >> 3, f64::from(code & 7)) {
        (0, fraction) => fraction * 2f64.powi(-9),
        (exponent, fraction) => (8.0 + fraction) * 2f64.powi(exponent - 10),
    };
    ((0..128).map(|code| value(code.min(126)).powi(2)).sum::<f64>() / 128.0).sqrt()
});

/// Quantised scales of NF4.
struct Nested {
    /// What their codes stand for.
    map: Vec<f32>,
    /// Their own scales, and what is added.
    scales: Scales,
    offset: f64,
}

/// The numbers are those of bitsandbytes' `create_dynamic_map`: seven powers of ten, each with twice as many steps as the one before.
static NESTED: LazyLock<Nested> = LazyLock::new(|| {
    let positive = (0..7).flat_map(|power| {
        let steps = 1 << power;
        let middle = move |step: i32| 0.1 + 0.9 * (f64::from(step) + 0.5) / f64::from(steps);
        (0..steps).map(move |step| 10f64.powi(power - 6) * middle(step))
    });
    let mut map: Vec<_> = positive.flat_map(|number| [-number, number]).chain([0.0, 1.0]).collect();
    map.sort_by(f64::total_cmp);
    let mean_of = |power| map.iter().map(|number| number.powi(power)).sum::<f64>() / map.len() as f64;
    let codes = NF4.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>() / 16.0;
    // Scales of scales are half of what is added, on average, so that no scale is negative. `even` with a step of 0.5 is their mean.
    let nested = 0.5;
    let square = 1.0 + 2.0 * nested * even(1.0, 0.5) * mean_of(1) + nested * nested * mean_of(2);
    let offset = f64::from((DEVIATION / (codes * square).sqrt()) as f32);
    let scales = Scales { usual: nested * offset, signed: false };
    Nested { map: map.into_iter().map(|number| number as f32).collect(), scales, offset }
});

#[cfg(test)]
mod tests {
    use super::{super::shapes::SHAPES, *};

    #[test]
    fn rows_of_every_shape_are_whole_groups() {
        for shape in &SHAPES {
            let group = Quantised::new(Format::Gptq, shape).group;
            assert_eq!(group, if shape.name == "tiny" { 32 } else { 128 }, "{}", shape.name);
        }
    }

    #[test]
    fn no_code_of_fp8_is_nan_and_all_others_stay() {
        for code in 0..=255u8 {
            let made = finite(u64::from_le_bytes([code, 0x7f, 0xff, 0, 0x7e, 0x80, code, 0xff])).to_le_bytes();
            let number = if code & 0x7f == 0x7f { code - 1 } else { code };
            assert_eq!(made, [number, 0x7e, 0xfe, 0, 0x7e, 0x80, number, 0xfe]);
        }
    }
}
