//! Weights of a folder that several stored tensors make: what `quantization_config` says, and which tensors those are.

use std::{fs::File, iter, os::unix::fs::FileExt, path::Path, sync::Arc};

use serde_json::Value;

use super::Checkpoint;
use crate::{
    dtype::{DType, NF4},
    error::{Error, Result},
    files,
    quantised::{Recipe, Scheme},
    unit::{Arrival, ArrivalOp},
};

/// How a folder's matrices are quantised, by its `config.json`. Some of them may have been left alone.
///
/// ```
/// # use layer_streamer::{Checkpoint, Quantisation, Unit};
/// # fn unit(folder: &str) -> layer_streamer::Result<Unit> {
/// let checkpoint = Checkpoint::open(folder)?;
/// let quantisation = Quantisation::of(folder)?;
/// let mut unit = Unit::new("MLP 0");
/// for (output, shape) in [("up_proj", [11008, 4096]), ("down_proj", [4096, 11008])] {
///     let name = format!("model.layers.0.mlp.{output}.weight");
///     match quantisation.map(|how| how.arrival(&checkpoint, output, &name, shape)).transpose()?.flatten() {
///         Some(arrival) => unit.add(arrival),
///         None => unit.keep(output, name),
///     };
/// }
/// # Ok(unit)
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantisation {
    /// FP8 with scales.
    Fp8 {
        /// Rows and columns that have one scale, if that is stated.
        block: Option<[usize; 2]>,
    },
    /// compressed-tensors' int4.
    Rows {
        /// There must be zeros.
        zeros: bool,
        /// Columns that have one scale, if that is stated and alike for all matrices: `usize::MAX` for all of a row.
        group: Option<usize>,
    },
    /// GPTQ's 4 bits.
    Gptq {
        /// What is added to stored zeros.
        zero: u8,
        /// There must be an order.
        order: bool,
        /// As for [`Rows`](Self::Rows).
        group: Option<usize>,
    },
    /// AWQ's 4 bits.
    Awq {
        /// As for [`Rows`](Self::Rows).
        group: Option<usize>,
    },
    /// bitsandbytes' NF4.
    Nf4,
}

impl Quantisation {
    /// What the folder's `quantization_config` says; `None` if it says nothing, or if this is no folder.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a method that is not read.
    pub fn of(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        if !folder.is_dir() {
            return Ok(None);
        }
        let path = folder.join("config.json");
        let text = files::read_small(&path, files::LONGEST_CONFIG)?.unwrap_or_default();
        let config = serde_json::from_slice::<Value>(&text).unwrap_or_default();
        let said = config.get("quantization_config").or_else(|| config.get("compression_config"));
        let Some(said) = said.filter(|value| !value.is_null()) else { return Ok(None) };
        Self::parse(said).map_err(|method| not_read(format!("{}: quantization_config", path.display()), &method))
    }

    /// What the object says, or the name of a method that is not read.
    fn parse(said: &Value) -> Result<Option<Self>, String> {
        let word = |key: &str| said.get(key).and_then(Value::as_str).unwrap_or_default().to_lowercase();
        let on = |key: &str| said.get(key).and_then(Value::as_bool).unwrap_or(false);
        let bits = said.get("bits").or_else(|| said.get("w_bit")).and_then(Value::as_u64);
        let method = word("quant_method");
        let with = |what: String| Err(format!("{method} {what}"));
        match method.as_str() {
            "fp8" | "fbgemm_fp8" => {
                let block = said.get("weight_block_size").filter(|size| !size.is_null());
                if let Some(size) = block.filter(|size| **size != serde_json::json!([128, 128])) {
                    return with(format!("with blocks of {size}"));
                }
                match word("fmt").as_str() {
                    "" | "e4m3" => Ok(Some(Self::Fp8 { block: block.map(|_| FP8_BLOCK) })),
                    other => with(format!("of the form {other}")),
                }
            }
            "modelopt" if ["fp8", "fp8_per_channel_per_token"].contains(&word("quant_algo").as_str()) => {
                Ok(Some(Self::Fp8 { block: None }))
            }
            "compressed-tensors" | "compressed_tensors" => compressed(said).map(Some),
            "gptq" | "awq" if bits != Some(4) => {
                with(format!("of {} bits", bits.map_or("unknown".into(), |bits| bits.to_string())))
            }
            "gptq" => {
                let (order, group) = (on("desc_act"), stated_group(said));
                match [word("checkpoint_format"), word("format")]
                    .iter()
                    .find(|said| !said.is_empty())
                    .map(String::as_str)
                {
                    None | Some("gptq") => Ok(Some(Self::Gptq { zero: 1, order, group })),
                    Some("gptq_v2") => Ok(Some(Self::Gptq { zero: 0, order, group })),
                    Some(other) => with(format!("in the format {other}")),
                }
            }
            "awq" => match word("version").as_str() {
                "" | "gemm" => Ok(Some(Self::Awq { group: stated_group(said) })),
                other => with(format!("of the version {other}")),
            },
            // It is written also by those who had it turned off.
            "bitsandbytes" if !on("load_in_4bit") && !on("load_in_8bit") => Ok(None),
            "bitsandbytes" | "" if on("load_in_4bit") => match word("bnb_4bit_quant_type").as_str() {
                "nf4" => Ok(Some(Self::Nf4)),
                "" | "fp4" => Err("bitsandbytes in FP4".into()),
                other => Err(format!("bitsandbytes in {other}")),
            },
            "bitsandbytes" | "" if on("load_in_8bit") => Err("bitsandbytes in 8 bits".into()),
            "" => Err("a method without a name".into()),
            _ => Err(method),
        }
    }

    /// How the matrix `name`, such as `model.layers.0.mlp.up_proj.weight`, of these rows and columns becomes the tensor `output`; `None`
    /// if it is stored by itself.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a tensor that it is made of is not there, or cannot be, or its scales are for other groups of weights
    /// than the configuration states.
    pub fn arrival(
        self,
        checkpoint: &Checkpoint,
        output: &str,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Option<Arrival>> {
        let made = self.scheme(checkpoint, name, shape).and_then(|found| {
            let Some((scheme, inputs)) = found else { return Ok(None) };
            inputs.iter().try_for_each(|input| checkpoint.entry(input).map(|_| ()))?;
            self.check_scales(checkpoint, scheme, shape, &inputs)?;
            let op = ArrivalOp::Dequantise { scheme, shape, to: None };
            Ok(Some(Arrival { output: output.to_owned(), inputs, op }))
        });
        made.map_err(|error| self.called_for(checkpoint, error))
    }

    /// How a matrix is stored, and in which tensors, of which some may be missing.
    fn scheme(self, checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Option<(Scheme, Vec<String>)>> {
        let Some(module) = name.strip_suffix("weight") else { return Ok(None) };
        let beside = |tensor: &str| format!("{module}{tensor}");
        let stores = |tensor: &str| checkpoint.stores(&beside(tensor));
        let dtype = checkpoint.describe(name).map(|(dtype, _)| dtype);
        let (scheme, inputs) = match self {
            Self::Fp8 { .. } if dtype == Some(DType::F8E4M3) => {
                let scale = if stores("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
                (Scheme::Fp8, vec!["weight", scale])
            }
            Self::Rows { zeros, .. } if stores("weight_packed") => {
                let zeros = zeros || stores("weight_zero_point");
                let groups = checkpoint.entry(&beside("weight_scale"))?.shape.last().copied().unwrap_or(1);
                let order = beside("weight_g_idx");
                let order = checkpoint.stores(&order) && is_mixed(checkpoint, &order, shape[1], groups, true)?;
                let inputs = ["weight_packed", "weight_scale"]
                    .into_iter()
                    .chain(zeros.then_some("weight_zero_point"))
                    .chain(order.then_some("weight_g_idx"));
                (Scheme::Rows { zeros, order }, inputs.collect())
            }
            Self::Gptq { zero, order, .. } if stores("qweight") => {
                let groups = checkpoint.entry(&beside("scales"))?.shape.first().copied().unwrap_or(1);
                let order =
                    (order || stores("g_idx")) && is_mixed(checkpoint, &beside("g_idx"), shape[1], groups, false)?;
                let inputs = ["qweight", "scales", "qzeros"].into_iter().chain(order.then_some("g_idx"));
                (Scheme::Gptq { zero, order }, inputs.collect())
            }
            Self::Awq { .. } if stores("qweight") => (Scheme::Awq, vec!["qweight", "scales", "qzeros"]),
            Self::Nf4 if dtype == Some(DType::U8) => {
                let (block, offset) = nf4_state(checkpoint, name, shape)?;
                let nested = ["weight.nested_absmax", "weight.nested_quant_map"];
                let nested = nested.into_iter().filter(|_| offset.is_some());
                (Scheme::Nf4 { block, offset }, ["weight", "weight.absmax"].into_iter().chain(nested).collect())
            }
            _ => {
                // Scales without codes or plain weights show what is missing.
                let (codes, scales): (_, &[&str]) = match self {
                    Self::Fp8 { .. } => ("weight", &["weight_scale_inv", "weight_scale"]),
                    Self::Rows { .. } => ("weight_packed", &["weight_scale"]),
                    Self::Gptq { .. } | Self::Awq { .. } => ("qweight", &["scales"]),
                    Self::Nf4 => ("weight", &["weight.absmax"]),
                };
                if !stores("weight") && scales.iter().any(|scales| stores(scales)) {
                    checkpoint.entry(&beside(codes))?;
                }
                return Ok(None);
            }
        };
        Ok(Some((scheme, inputs.into_iter().map(beside).collect())))
    }

    /// Refuses scales for other weights than the configuration states.
    fn check_scales(self, checkpoint: &Checkpoint, scheme: Scheme, shape: [usize; 2], inputs: &[String]) -> Result<()> {
        let (block, stated) = match self {
            Self::Fp8 { block: Some([rows, columns]) } => ([rows, columns], format!("blocks of {rows} × {columns}")),
            Self::Rows { group: Some(usize::MAX), .. } => ([1, usize::MAX], "a scale for each row".into()),
            Self::Rows { group: Some(group), .. } => ([1, group], format!("a group_size of {group}")),
            Self::Gptq { group: Some(group), .. } | Self::Awq { group: Some(group) } => {
                let size = if group == usize::MAX { "-1, a scale for each row".into() } else { group.to_string() };
                ([1, group], format!("a group_size of {size}"))
            }
            _ => return Ok(()),
        };
        let entries = inputs.iter().map(|input| checkpoint.entry(input)).collect::<Result<Vec<_>>>()?;
        let tensors: Vec<_> = entries.iter().map(|entry| (entry.dtype, entry.shape.as_slice())).collect();
        // Tensors that do not fit together are refused where the matrix is planned.
        let Ok(recipe) = Recipe::new(scheme, shape, &tensors) else { return Ok(()) };
        let is_ordered = matches!(scheme, Scheme::Rows { order: true, .. } | Scheme::Gptq { order: true, .. });
        let is_stated =
            iter::zip(shape, iter::zip(recipe.block, block)).all(|(size, (own, stated))| match is_ordered {
                // The order says which column has which scale.
                true => size.div_ceil(own) == size.div_ceil(stated),
                // Of few rows or columns a smaller block is all.
                false => own.min(size) == stated.min(size),
            });
        if is_stated {
            return Ok(());
        }
        let found = match recipe.block {
            [rows, columns] if rows >= shape[0] && columns >= shape[1] => "one for all weights".into(),
            [1, columns] if columns >= shape[1] => "one for each row".into(),
            [1, columns] => format!("one for each {columns} columns of a row"),
            [rows, columns] => format!("one for each {rows} × {columns} weights"),
        };
        let cause = format!(
            "has the scales {:?} of a matrix {shape:?}, {found}, but quantization_config of config.json ({}) states \
             {stated}; download both anew, or correct config.json if the weights are right",
            entries[1].shape,
            self.method(),
        );
        Err(refused(checkpoint, &inputs[1], cause))
    }

    /// The same error, which says of a tensor that is missing why it was looked for.
    fn called_for(self, checkpoint: &Checkpoint, error: Error) -> Error {
        match error {
            Error::Checkpoint { path, tensor: Some(tensor), cause } if checkpoint.describe(&tensor).is_none() => {
                let remedy =
                    if checkpoint.why_unreadable(&tensor).is_none() { ": download the folder anew" } else { "" };
                let method = self.method();
                let cause = format!("{cause}; quantization_config of config.json ({method}) calls for it{remedy}");
                Error::Checkpoint { path, tensor: Some(tensor), cause }
            }
            other => other,
        }
    }

    /// For messages.
    fn method(self) -> &'static str {
        match self {
            Self::Fp8 { .. } => "FP8",
            Self::Rows { .. } => "compressed-tensors",
            Self::Gptq { .. } => "GPTQ",
            Self::Awq { .. } => "AWQ",
            Self::Nf4 => "bitsandbytes",
        }
    }
}

/// Rows and columns of FP8 that have one scale, where a configuration states such blocks.
const FP8_BLOCK: [usize; 2] = [128; 2];

/// Columns that have one scale by what is said of `group_size` (of `q_group_size` in older files of AWQ), here and for parts of the
/// model: where that differs, or is none, nothing is stated. -1 is a whole row.
fn stated_group(said: &Value) -> Option<usize> {
    fn find(said: &Value, found: &mut Vec<i64>) {
        let entries = said.as_object().into_iter().flatten();
        for (key, value) in entries {
            match (key.as_str(), value.as_i64()) {
                ("group_size" | "q_group_size", Some(size)) => found.push(size),
                _ => find(value, found),
            }
        }
    }
    let mut found = Vec::new();
    find(said, &mut found);
    found.dedup();
    let [size] = found[..] else { return None };
    if size == -1 { Some(usize::MAX) } else { usize::try_from(size).ok().filter(|size| *size > 0) }
}

/// What compressed-tensors says: all of `config_groups` must be quantised alike, and nothing else be done to the weights.
fn compressed(said: &Value) -> Result<Quantisation, String> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_lowercase();
    let format = text(said.get("format"));
    let groups = said.get("config_groups").and_then(Value::as_object);
    let weights: Vec<_> =
        groups.into_iter().flat_map(|groups| groups.values()).filter_map(|group| group.get("weights")).collect();
    let all = |bits: u64, kind: &str| {
        let is = |weights: &&Value| {
            let block = weights.get("block_structure").filter(|block| !block.is_null());
            let of_128 = |block: &Value| [serde_json::json!([128, 128]), serde_json::json!("128x128")].contains(block);
            weights.get("num_bits").and_then(Value::as_u64) == Some(bits)
                && text(weights.get("type")) == kind
                && block.is_none_or(of_128)
        };
        !weights.is_empty() && weights.iter().all(is)
    };
    // Weights may be rotated, with the inverse rotation in the computation, or stored without those that are 0.
    let transforms =
        said.get("transform_config").is_some_and(|value| !value.is_null() && *value != serde_json::json!({}));
    let sparse = text(said.get("sparsity_config").and_then(|sparsity| sparsity.get("format")));
    if transforms {
        return Err("compressed-tensors with a transform_config".into());
    }
    if !["", "dense"].contains(&sparse.as_str()) {
        return Err(format!("compressed-tensors with a sparsity_config in the format {sparse}"));
    }
    match format.as_str() {
        "float-quantized" | "naive-quantized" if all(8, "float") => {
            let is_block = |weights: &Value| weights.get("block_structure").is_some_and(|block| !block.is_null());
            let block = weights.iter().all(|weights| text(weights.get("strategy")) == "block" && is_block(weights));
            Ok(Quantisation::Fp8 { block: block.then_some(FP8_BLOCK) })
        }
        "pack-quantized" if all(4, "int") => {
            let symmetric = |weights: &&Value| weights.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
            let groups: Vec<_> = weights.iter().map(|weights| group_of_strategy(weights)).collect();
            let group = groups[0].filter(|_| groups.iter().all(|group| *group == groups[0]));
            Ok(Quantisation::Rows { zeros: !weights.iter().all(symmetric), group })
        }
        "" => Err("compressed-tensors in no format".into()),
        "float-quantized" | "naive-quantized" | "pack-quantized" => {
            Err(format!("compressed-tensors in the format {format}, other than FP8 and int4"))
        }
        _ => Err(format!("compressed-tensors in the format {format}")),
    }
}

/// Columns that have one scale by what compressed-tensors says of some weights, if that is clear.
fn group_of_strategy(weights: &Value) -> Option<usize> {
    let strategy = weights.get("strategy").and_then(Value::as_str).unwrap_or_default();
    match (strategy, weights.get("group_size").and_then(Value::as_i64)) {
        ("channel", None | Some(-1)) | ("", Some(-1)) => Some(usize::MAX),
        ("group" | "", Some(size)) => usize::try_from(size).ok().filter(|size| *size > 0),
        _ => None,
    }
}

/// The bytes of a small tensor.
fn bytes_of(checkpoint: &Checkpoint, name: &str) -> Result<Vec<u8>> {
    let (entry, (path, at)) = (checkpoint.entry(name)?, checkpoint.location(name).expect("it has an entry"));
    if entry.bytes as u64 > files::LONGEST_CONFIG {
        return Err(Error::tensor(path, name, format!("has {} bytes, more than such a tensor can have", entry.bytes)));
    }
    let (mut bytes, file) = (vec![0; entry.bytes], File::open(path).map_err(Error::io("open", path))?);
    file.read_exact_at(&mut bytes, at).map_err(|source| Error::Read {
        unit: "the quantised weights".into(),
        tensor: name.into(),
        path: path.into(),
        offset: at,
        source: Arc::new(source),
    })?;
    Ok(bytes)
}

/// Whether the groups of so many columns, which this tensor tells, are not simply one after the other. Where there may be columns
/// without a group (-1) there is no order if any is so, as compressed-tensors has it.
fn is_mixed(checkpoint: &Checkpoint, name: &str, columns: usize, groups: usize, unset: bool) -> Result<bool> {
    let entry = checkpoint.entry(name)?;
    if (entry.dtype, entry.shape.as_slice()) != (DType::I32, &[columns]) {
        let cause = format!("is {} {:?}, expected I32 [{columns}]", entry.dtype, entry.shape);
        return Err(refused(checkpoint, name, cause));
    }
    let bytes = bytes_of(checkpoint, name)?;
    let order = || bytes.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
    if unset && order().any(|group| group == -1) {
        return Ok(false);
    }
    let is_none = |group: &i32| usize::try_from(*group).map_or(true, |group| group >= groups);
    if let Some(group) = order().find(is_none) {
        let cause = format!("names the group {group}, but the scales are of {groups}, which are counted from 0");
        return Err(refused(checkpoint, name, cause));
    }
    let group = columns.div_ceil(groups.max(1)).max(1);
    Ok(order().enumerate().any(|(column, of)| of as usize != column / group))
}

fn refused(checkpoint: &Checkpoint, name: &str, cause: String) -> Error {
    let (path, _) = checkpoint.location(name).expect("its bytes were read");
    Error::tensor(path, name, cause)
}

/// The weights of a block, and the bits of what is added to scales where these are quantised too, from what bitsandbytes keeps beside
/// the weight of this name, which is of this shape.
fn nf4_state(checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<(usize, Option<u32>)> {
    let map = format!("{name}.quant_map");
    if checkpoint.stores(&map) {
        let usual: Vec<_> = NF4.iter().flat_map(|number| number.to_le_bytes()).collect();
        if bytes_of(checkpoint, &map)? != usual {
            return Err(refused(checkpoint, &map, "has other numbers than bitsandbytes has for NF4".into()));
        }
    }
    let state_name = format!("{name}.quant_state.bitsandbytes__nf4");
    let bytes = bytes_of(checkpoint, &state_name)?;
    let wrong = |cause: String| refused(checkpoint, &state_name, cause);
    let state: Value = serde_json::from_slice(&bytes).map_err(|error| wrong(format!("is no valid JSON: {error}")))?;
    if let Some(said) = state.get("shape").filter(|said| **said != serde_json::json!(shape)) {
        return Err(wrong(format!("says the shape {said}, but {shape:?} by config.json")));
    }
    let count = |key: &str| state.get(key).and_then(Value::as_u64);
    let block = count("blocksize").and_then(|block| usize::try_from(block).ok()).filter(|block| *block > 0);
    let block = block.ok_or_else(|| wrong("says no blocksize".into()))?;
    let scales = format!("{name}.absmax");
    let (found, weights) = (checkpoint.entry(&scales)?.elements(), shape[0].saturating_mul(shape[1]));
    if found > 0 && weights.is_multiple_of(found) && weights / found != block {
        let each = weights / found;
        let cause = format!(
            "has {found} scales of a matrix {shape:?}, one for each {each} weights, but {state_name} states a blocksize \
             of {block}; download the weights anew"
        );
        return Err(refused(checkpoint, &scales, cause));
    }
    let Some(offset) = state.get("nested_offset") else { return Ok((block, None)) };
    let offset = offset.as_f64().ok_or_else(|| wrong("has a nested_offset that is no number".into()))?;
    match count("nested_blocksize") {
        Some(256) => Ok((block, Some((offset as f32).to_bits()))),
        Some(other) => Err(wrong(format!("has a nested_blocksize of {other}, expected 256"))),
        None => Err(wrong("says no nested_blocksize".into())),
    }
}

/// The refusal of weights that are said, in this place, to be quantised by another method.
pub(crate) fn not_read(place: String, method: &str) -> Error {
    Error::Unsupported {
        what: format!("{place}: weights quantised by {method}"),
        remedy: "take the unquantised model, whose weights are F32, F16 or BF16, or one whose config.json says in \
                 quantization_config that it is of FP8, GPTQ or AWQ in 4 bits, NF4, or int4 of compressed-tensors"
            .into(),
    }
}
