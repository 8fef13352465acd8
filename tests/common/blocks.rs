//! Blocks of quantised weights.

use half::bf16;
use layer_streamer::{
    Checkpoint, DType, Element, Error, LayerStreamer, Settings, Unit,
    device::{Device, TensorRef, download},
    plan::{Arrival, ArrivalOp, Tier},
};
use support::data;

/// All types of blocks.
pub const BLOCKS: [DType; 13] = [
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
    DType::MXFP4,
];

/// Weights of each type in `data/blocks.gguf`.
const WEIGHTS: usize = 5120;

/// All blocks of `data/blocks.gguf`, which arrive as this type, by the names of their types.
pub fn unit_of_blocks(to: DType) -> Unit {
    let mut unit = Unit::new("blocks");
    for dtype in BLOCKS {
        let (output, inputs) = (format!("{dtype}"), vec![format!("blocks.{dtype}")]);
        unit.add(Arrival { output, inputs, op: ArrivalOp::To(to) });
    }
    unit
}

/// All NaN are alike.
pub(super) fn bits(weight: f32) -> u32 {
    if weight.is_nan() { f32::NAN.to_bits() } else { weight.to_bits() }
}

pub(super) fn values<D: Device, T: Element>(
    device: &D,
    stream: &D::Stream,
    tensor: TensorRef<'_, D>,
    zero: T,
) -> Vec<T> {
    let mut values = vec![zero; tensor.elements()];
    download(device, stream, tensor, &mut values).unwrap();
    values
}

/// Holds what a device makes of blocks, as F32 and as BF16, against what the Python package `gguf` makes of them.
pub fn check_blocks<D: Device>(device: &D) {
    let checkpoint = Checkpoint::open(data("blocks.gguf")).unwrap();
    let stream = device.stream().unwrap();
    for tier in [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked] {
        let mut units = [unit_of_blocks(DType::F32), unit_of_blocks(DType::BF16)];
        for unit in &mut units {
            // Beside each what it must become.
            BLOCKS.iter().for_each(|dtype| _ = unit.keep(format!("{dtype} expected"), format!("weights.{dtype}")));
            unit.set_tier(tier);
        }
        let mut streamer = LayerStreamer::new(device, &checkpoint, &units, &Settings::default()).unwrap();
        for _ in 0..2 {
            let pass = streamer.run_pass(&stream, 0, |compared, layer| {
                for dtype in BLOCKS {
                    let expected = values(device, &stream, layer.tensor(&format!("{dtype} expected"))?, 0.0f32);
                    let tensor = layer.tensor(dtype.name())?;
                    assert_eq!(tensor.shape(), [10, 512]);
                    let narrow = |weight: f32| bf16::from_f32(weight).to_f32();
                    let (made, expected): (Vec<f32>, Vec<f32>) = match layer.index() {
                        0 => (values(device, &stream, tensor, 0.0f32), expected),
                        _ => {
                            let made = values(device, &stream, tensor, bf16::ZERO);
                            (made.into_iter().map(bf16::to_f32).collect(), expected.into_iter().map(narrow).collect())
                        }
                    };
                    let same = made.iter().zip(&expected).all(|(made, expected)| bits(*made) == bits(*expected));
                    assert!(same && made.len() == WEIGHTS, "{dtype} {tier}");
                }
                Ok::<_, Error>(compared + BLOCKS.len())
            });
            assert_eq!(pass.unwrap(), 2 * BLOCKS.len());
        }
    }
}
