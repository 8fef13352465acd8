//! Blocks of quantised weights, held against what the Python package `gguf` makes of them: `data/make_blocks.py`.

use half::bf16;
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device},
    plan::{Arrival, ArrivalOp, DEVICE_ALIGN, Purpose, Tier},
};
use support::data;

const TYPES: [DType; 13] = [
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

/// A unit of all blocks, which arrive as this type, and beside each what they must become.
fn unit(to: DType) -> Unit {
    let mut unit = Unit::new("blocks");
    for dtype in TYPES {
        let (output, inputs) = (format!("{dtype}"), vec![format!("blocks.{dtype}")]);
        unit.add(Arrival { output, inputs, op: ArrivalOp::To(to) });
        unit.keep(format!("{dtype} expected"), format!("weights.{dtype}"));
    }
    unit
}

/// All NaN are alike.
fn bits(weight: f32) -> u32 {
    if weight.is_nan() { f32::NAN.to_bits() } else { weight.to_bits() }
}

#[test]
fn blocks_of_every_type_become_what_gguf_makes_of_them_to_the_bit_in_every_tier() {
    let checkpoint = Checkpoint::open(data("blocks.gguf")).unwrap();
    for tier in [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked] {
        let mut units = [unit(DType::F32), unit(DType::BF16)];
        units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &Settings::default()).unwrap();
        for _ in 0..2 {
            let pass = streamer.run_pass(&Cpu.stream().unwrap(), 0, |compared, layer| {
                let mut compared = compared;
                for dtype in TYPES {
                    let expected: &[f32] = layer.tensor(&format!("{dtype} expected"))?.as_slice()?;
                    let made = layer.tensor(dtype.name())?;
                    assert_eq!(made.shape(), [10, 512]);
                    match layer.index() {
                        0 => {
                            let made: &[f32] = made.as_slice()?;
                            let same = |(made, expected): (&f32, &f32)| bits(*made) == bits(*expected);
                            assert!(made.iter().zip(expected).all(same), "{dtype} {tier}");
                        }
                        _ => {
                            let made: &[bf16] = made.as_slice()?;
                            let same = |(made, expected): (&bf16, &f32)| {
                                bits(made.to_f32()) == bits(bf16::from_f32(*expected).to_f32())
                            };
                            assert!(made.iter().zip(expected).all(same), "{dtype} {tier}");
                        }
                    }
                    compared += expected.len();
                }
                Ok::<_, Error>(compared)
            });
            assert_eq!(pass.unwrap(), 2 * TYPES.len() * 5120);
        }
    }
}

#[test]
fn blocks_are_kept_on_the_device_as_they_are_stored() {
    let checkpoint = Checkpoint::open(data("blocks.gguf")).unwrap();
    let mut unit = Unit::new("blocks");
    for dtype in TYPES {
        unit.add(Arrival {
            output: format!("{dtype}"),
            inputs: vec![format!("blocks.{dtype}")],
            op: ArrivalOp::To(DType::BF16),
        });
    }
    let kept = |tier: Tier| {
        let mut unit = unit.clone();
        unit.set_tier(tier);
        let streamer = LayerStreamer::new(&Cpu, &checkpoint, &[unit], &Settings::default()).unwrap();
        let parts = streamer.plan().memory();
        let kept = parts.iter().filter(|part| matches!(part.purpose, Purpose::Kept { .. }));
        kept.map(|part| part.bytes).sum::<usize>()
    };
    let stored: usize = TYPES.iter().map(|dtype| dtype.bytes(5120).next_multiple_of(DEVICE_ALIGN)).sum();
    // A device that computes in RAM has whole pages.
    assert_eq!(kept(Tier::GpuPacked), stored.next_multiple_of(4096));
    assert_eq!(kept(Tier::Gpu), (TYPES.len() * 2 * 5120_usize.next_multiple_of(DEVICE_ALIGN)).next_multiple_of(4096));
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    for (dtype, shape) in [(DType::Q8_0, vec![4, 48]), (DType::Q4_K, vec![2, 128]), (DType::Q4_K, vec![])] {
        let tensor = StoredTensor { name: "t".into(), file: file.path().into(), offset: 0, dtype, shape };
        let error = Checkpoint::from_table([tensor]).unwrap_err().to_string();
        assert!(error.contains("tensor t") && error.contains("rows that are no whole blocks"), "{error}");
    }
}
