//! Matrices that several stored tensors make, held against what the formats' own libraries make of them.

use half::bf16;
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, Unit,
    device::{Device, download},
    plan::{Arrival, ArrivalOp, Tier},
    quantised::Scheme,
};
use support::data;

use super::blocks::bits;

const ROWS: Scheme = Scheme::Rows { zeros: false, order: false };
const GPTQ: Scheme = Scheme::Gptq { zero: 1, order: false };
const FP8: &[&str] = &["weight", "weight_scale"];
const FP8_INVERSE: &[&str] = &["weight", "weight_scale_inv"];
const CODES: &[&str] = &["qweight", "scales", "qzeros"];
const WITH_ORDER: &[&str] = &["qweight", "scales", "qzeros", "g_idx"];

/// Each case of `data/quantised`: its name, how it is stored, its tensors, and the type of blocks that holds its numbers.
pub fn formats() -> Vec<(&'static str, Scheme, &'static [&'static str], DType)> {
    let checkpoint = Checkpoint::open(data("quantised")).unwrap();
    // What the file says of its scales of scales is the JSON's.
    let nested = Scheme::Nf4 { block: 64, offset: Some(nested_offset(&checkpoint).to_bits()) };
    vec![
        ("fp8_tensor", Scheme::Fp8, FP8, DType::F32),
        ("fp8_tensor1", Scheme::Fp8, FP8, DType::F32),
        ("fp8_row", Scheme::Fp8, FP8, DType::F32),
        ("fp8_row_bf16", Scheme::Fp8, FP8, DType::F32),
        ("fp8_block", Scheme::Fp8, FP8_INVERSE, DType::F32),
        ("fp8_block_tall", Scheme::Fp8, FP8_INVERSE, DType::F32),
        ("ct_channel", ROWS, &["weight_packed", "weight_scale"], DType::U4_128),
        ("ct_group", ROWS, &["weight_packed", "weight_scale"], DType::U4_128),
        (
            "ct_asym",
            Scheme::Rows { zeros: true, order: false },
            &["weight_packed", "weight_scale", "weight_zero_point"],
            DType::U4_32,
        ),
        (
            "ct_act",
            Scheme::Rows { zeros: false, order: true },
            &["weight_packed", "weight_scale", "weight_g_idx"],
            DType::F32,
        ),
        ("gptq", GPTQ, CODES, DType::U4_128),
        ("gptq_asym", GPTQ, CODES, DType::U4_32),
        ("gptq_act", Scheme::Gptq { zero: 1, order: true }, WITH_ORDER, DType::F32),
        ("gptq_v2", Scheme::Gptq { zero: 0, order: false }, CODES, DType::U4_32),
        ("gptq_channel", GPTQ, CODES, DType::U4_32),
        ("awq", Scheme::Awq, CODES, DType::U4_128),
        ("awq_64", Scheme::Awq, CODES, DType::U4_32),
        ("nf4", Scheme::Nf4 { block: 64, offset: None }, &["weight", "weight.absmax"], DType::NF4_64),
        (
            "nf4_double",
            nested,
            &["weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map"],
            DType::NF4_64,
        ),
    ]
}

fn nested_offset(checkpoint: &Checkpoint) -> f32 {
    let name = "nf4_double.weight.quant_state.bitsandbytes__nf4";
    let ((path, at), (_, shape)) = (checkpoint.location(name).unwrap(), checkpoint.describe(name).unwrap());
    let file = std::fs::read(path).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&file[at as usize..][..shape[0]]).unwrap();
    state["nested_offset"].as_f64().unwrap() as f32
}

/// All of them as one unit, whose matrices become this type.
pub fn unit_of_formats(checkpoint: &Checkpoint, to: Option<DType>) -> Unit {
    let mut unit = Unit::new("formats");
    for (case, scheme, tensors, _) in formats() {
        let (_, shape) = checkpoint.describe(&format!("{case}.expected")).unwrap();
        let inputs = tensors.iter().map(|tensor| format!("{case}.{tensor}")).collect();
        let op = ArrivalOp::Dequantise { scheme, shape: [shape[0], shape[1]], to };
        unit.add(Arrival { output: case.into(), inputs, op });
    }
    unit
}

/// Holds what a device makes of each format, as F32 and as BF16, in every tier, against what it must be.
pub fn check_formats<D: Device>(device: &D) {
    let checkpoint = Checkpoint::open(data("quantised")).unwrap();
    let stream = device.stream().unwrap();
    for tier in [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked, Tier::PinnedPacked] {
        let mut units = [DType::F32, DType::BF16].map(|to| unit_of_formats(&checkpoint, Some(to)));
        for unit in &mut units {
            for (case, ..) in formats() {
                unit.keep(format!("{case} expected"), format!("{case}.expected"));
            }
            unit.set_tier(tier);
        }
        let mut streamer = LayerStreamer::new(device, &checkpoint, &units, &Settings::default()).unwrap();
        for _ in 0..3 {
            let pass = streamer.run_pass(&stream, 0, |compared, layer| {
                for (case, ..) in formats() {
                    let expected = layer.tensor(&format!("{case} expected"))?;
                    let mut wanted = vec![0.0f32; expected.elements()];
                    download(device, &stream, expected, &mut wanted)?;
                    let tensor = layer.tensor(case)?;
                    assert_eq!(tensor.shape(), expected.shape());
                    let mut made = vec![0.0f32; wanted.len()];
                    if layer.index() == 0 {
                        download(device, &stream, tensor, &mut made)?;
                    } else {
                        let mut narrow = vec![bf16::ZERO; wanted.len()];
                        download(device, &stream, tensor, &mut narrow)?;
                        made = narrow.into_iter().map(bf16::to_f32).collect();
                        wanted.iter_mut().for_each(|weight| *weight = bf16::from_f32(*weight).to_f32());
                    }
                    let wrong = made.iter().zip(&wanted).position(|(made, wanted)| bits(*made) != bits(*wanted));
                    assert_eq!(wrong, None, "{case} {tier}, layer {}", layer.index());
                }
                Ok::<_, Error>(compared + 1)
            });
            assert_eq!(pass.unwrap(), 2);
        }
    }
}
