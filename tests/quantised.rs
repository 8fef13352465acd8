//! Matrices that several stored tensors make: FP8, compressed-tensors' int4, GPTQ, AWQ and NF4, held against what the formats' own
//! libraries make of them (`data/make_quantised.py`).

mod common;

use common::{check_formats, formats, unit_of_formats};
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Plan, Settings, StaticTensors, StoredTensor, Unit,
    device::{Cpu, Device, Shape, TensorMut},
    kernels::Kernels,
    plan::{Arrival, ArrivalOp, Sharing},
    quantised::Scheme,
};
use support::data;

fn checkpoint() -> Checkpoint {
    Checkpoint::open(data("quantised")).unwrap()
}

#[test]
fn every_format_becomes_what_its_library_makes_of_it_to_the_bit_in_every_tier() {
    check_formats(&Cpu);
}

#[test]
fn a_cpu_gets_blocks_that_hold_the_same_numbers() {
    let checkpoint = checkpoint();
    let mut unit = unit_of_formats(&checkpoint, None);
    formats().iter().for_each(|(case, ..)| _ = unit.keep(format!("{case} expected"), format!("{case}.expected")));
    let stream = Cpu.stream().unwrap();
    let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &[unit], &Settings::default()).unwrap();
    let pass = streamer.run_pass(&stream, (), |(), layer| {
        for (case, _, _, blocks) in formats() {
            let (tensor, expected) = (layer.tensor(case)?, layer.tensor(&format!("{case} expected"))?);
            assert_eq!(tensor.dtype(), blocks, "{case}");
            let memory = Cpu.allocate("weights", expected.bytes())?;
            // SAFETY: the memory is as long as the tensor, and nobody else's while this is used.
            let mut weights: TensorMut<'_, Cpu> =
                unsafe { TensorMut::from_raw(Cpu.address(&memory), DType::F32, Shape::new(expected.shape())?) };
            Cpu.cast(&stream, tensor, weights.borrow())?;
            let same =
                |(made, wanted): (&f32, &f32)| made.to_bits() == wanted.to_bits() || made.is_nan() && wanted.is_nan();
            let (made, wanted): (&[f32], &[f32]) = (weights.as_ref().as_slice()?, expected.as_slice()?);
            assert!(made.iter().zip(wanted).all(same), "{case}");
        }
        Ok::<_, Error>(())
    });
    pass.unwrap();
}

#[test]
fn tensors_that_do_not_fit_together_are_refused_by_name() {
    let checkpoint = checkpoint();
    let refused = |scheme, shape, inputs: &[&str], words: &[&str]| {
        let mut unit = Unit::new("a unit");
        let inputs = inputs.iter().map(|input| (*input).into()).collect();
        unit.add(Arrival { output: "w".into(), inputs, op: ArrivalOp::Dequantise { scheme, shape, to: None } });
        let error = Plan::new(&checkpoint, &[unit], &Settings::default(), Sharing::Ram).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let gptq = Scheme::Gptq { zero: 1, order: false };
    let [codes, scales, zeros] = ["gptq.qweight", "gptq.scales", "gptq.qzeros"];
    refused(gptq, [32, 256], &[codes, scales], &["a unit", "w", "3 stored tensors", "not 2"]);
    refused(gptq, [32, 512], &[codes, scales, zeros], &[codes, "[32, 32]", "expected I32 [64, 32]"]);
    refused(gptq, [32, 256], &[scales, scales, zeros], &[scales, "F16", "expected I32"]);
    refused(gptq, [32, 256], &[codes, codes, zeros], &[codes, "is I32", "expected F16 or BF16 or F32"]);
    refused(gptq, [32, 256], &[codes, scales, codes], &[codes, "expected I32 [2, 4]"]);
    refused(Scheme::Awq, [36, 256], &[codes, scales, zeros], &[codes, "36 rows", "multiple of 8"]);
    let nf4 = |block| Scheme::Nf4 { block, offset: None };
    let [codes, scales] = ["nf4.weight", "nf4.weight.absmax"];
    refused(nf4(0), [16, 128], &[codes, scales], &[codes, "2048 weights", "multiple of 0"]);
    refused(nf4(96), [16, 128], &[codes, scales], &[codes, "2048 weights", "multiple of 96"]);
    refused(nf4(64), [512, 4], &[codes, scales], &[codes, "4 columns", "multiple of 8"]);
    refused(nf4(4), [16, 128], &[codes, scales], &[codes, "4 weights of a block", "multiple of 8"]);
    refused(
        Scheme::Fp8,
        [usize::MAX, 48],
        &["fp8_row.weight", "fp8_row.weight_scale"],
        &["fp8_row.weight", "[16, 48]"],
    );
    refused(nf4(64), [usize::MAX, 128], &[codes, scales], &[codes]);
    refused(Scheme::Fp8, [16, 48], &["fp8_row.weight", "nothing"], &["nothing", "not in the checkpoint"]);
}

#[test]
fn scales_whose_groups_are_not_alike_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let tensor = |name: &str, offset, dtype, shape: [usize; 2]| StoredTensor {
        name: name.into(),
        file: file.path().into(),
        offset,
        dtype,
        shape: shape.into(),
    };
    // 16 columns for each of 9 groups, and 8 columns more.
    let tensors = [tensor("codes", 0, DType::I32, [8, 19]), tensor("scales", 4096, DType::F16, [8, 9])];
    let (checkpoint, scheme) = (Checkpoint::from_table(tensors).unwrap(), Scheme::Rows { zeros: false, order: false });
    let mut unit = Unit::new("a unit");
    let op = ArrivalOp::Dequantise { scheme, shape: [8, 152], to: None };
    unit.add(Arrival { output: "w".into(), inputs: vec!["codes".into(), "scales".into()], op });
    let error = Plan::new(&checkpoint, &[unit], &Settings::default(), Sharing::Ram).unwrap_err().to_string();
    assert!(error.contains("tensor scales") && error.contains("all alike"), "{error}");
}

#[test]
fn a_static_tensor_of_several_is_refused() {
    let checkpoint = checkpoint();
    let unit = unit_of_formats(&checkpoint, None);
    let error = StaticTensors::new(&Cpu, &checkpoint, &unit, &Settings::default()).err().unwrap().to_string();
    assert!(error.contains("stream it"), "{error}");
}
