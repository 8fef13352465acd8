//! Weights that `quantization_config` says are quantised, named through the C API as if they were stored by themselves.

#[path = "common/c.rs"]
mod c_calls;

use std::{fs, slice};

use c_calls::{c, made, message};
use layer_streamer::{
    Checkpoint,
    capi::{ls_dtype::*, ls_status::*, *},
};
use serde_json::{Value, json};
use support::{copy_of, data};
use tempfile::TempDir;

/// The matrices of all formats, in a folder whose configuration names this one.
fn folder(said: &Value) -> TempDir {
    let folder = copy_of(&data("quantised"));
    fs::write(folder.path().join("config.json"), json!({ "quantization_config": said }).to_string()).unwrap();
    folder
}

/// Opens a unit of this tensor of the folder and calls `with` with the streamer and a layer, or returns the refusal.
fn streamed(
    folder: &TempDir,
    stored: &str,
    dtype: ls_dtype,
    [rows, columns]: [usize; 2],
    with: impl FnOnce(ls_streamer, ls_tensor),
) -> ls_status {
    let (path, stored) = (c(folder.path().to_str().unwrap()), c(stored));
    let tensor = ls_unit_tensor { name: c"w".as_ptr(), stored: stored.as_ptr(), dtype: dtype as i32, rows, columns };
    let unit = ls_unit { name: c"a unit".as_ptr(), tensors: &tensor, count: 1, tier: 0 };
    // SAFETY: as the header asks.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let stream = made(|to| ls_stream_open(device, to));
        let checkpoint = made(|to| ls_checkpoint_open(path.as_ptr(), to));
        let mut options: ls_streamer_options =
            made(|to| ls_streamer_options_init(to, size_of::<ls_streamer_options>()));
        (options.units, options.unit_count) = (&unit, 1);
        let mut streamer = ls_streamer { id: 0 };
        let status = ls_streamer_open(device, checkpoint, &options, &mut streamer);
        if status == LS_OK {
            let layer = made(|to| ls_next_layer(streamer, stream, to));
            with(streamer, made(|to| ls_layer_tensor(layer, c"w".as_ptr(), to)));
            assert_eq!((ls_release_layer(layer, stream), ls_streamer_close(streamer)), (LS_OK, LS_OK));
        }
        assert_eq!(
            (ls_checkpoint_close(checkpoint), ls_stream_close(stream), ls_device_close(device)),
            (LS_OK, LS_OK, LS_OK)
        );
        status
    }
}

/// The matrix that must come out, and its shape.
fn expected(case: &str) -> (Vec<u32>, [usize; 2]) {
    let checkpoint = Checkpoint::open(data("quantised")).unwrap();
    let name = format!("{case}.expected");
    let ((path, at), (_, shape)) = (checkpoint.location(&name).unwrap(), checkpoint.describe(&name).unwrap());
    let bytes = fs::read(path).unwrap();
    let words =
        bytes[at as usize..].as_chunks().0.iter().take(shape[0] * shape[1]).map(|word| u32::from_le_bytes(*word));
    (words.collect(), [shape[0], shape[1]])
}

fn compressed(symmetric: bool) -> Value {
    let weights = json!({ "num_bits": 4, "type": "int", "symmetric": symmetric });
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "group_0": { "weights": weights } },
    })
}

#[test]
fn a_matrix_named_as_if_it_were_plain_arrives_as_its_formats_library_makes_it() {
    let gptq = json!({ "quant_method": "gptq", "bits": 4 });
    let nf4 = json!({ "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4" });
    let cases = [
        ("fp8_row", json!({ "quant_method": "fp8" }), LS_F32),
        ("ct_group", compressed(true), LS_U4_128),
        ("ct_asym", compressed(false), LS_U4_32),
        ("gptq", gptq.clone(), LS_U4_128),
        ("gptq_act", gptq, LS_F32),
        ("awq", json!({ "quant_method": "awq", "bits": 4 }), LS_U4_128),
        ("nf4_double", nf4, LS_NF4_64),
    ];
    for (case, said, stored) in cases {
        let (folder, (expected, shape)) = (folder(&said), expected(case));
        let name = format!("{case}.weight");
        let same = |_, tensor: ls_tensor| {
            assert_eq!((tensor.dtype, tensor.shape[..tensor.rank as usize].to_vec()), (LS_F32 as i32, shape.to_vec()));
            // SAFETY: the layer is held, and its memory is RAM.
            let made = unsafe { slice::from_raw_parts(tensor.data.cast::<u32>(), expected.len()) };
            let is_nan = |word: u32| f32::from_bits(word).is_nan();
            let same = |(made, wanted): (&u32, &u32)| made == wanted || is_nan(*made) && is_nan(*wanted);
            assert!(made.iter().zip(&expected).all(same), "{case}");
        };
        assert_eq!(streamed(&folder, &name, LS_F32, shape, same), LS_OK, "{case}: {}", message());
        let of_blocks = |_, tensor: ls_tensor| assert_eq!(tensor.dtype, stored as i32, "{case}");
        assert_eq!(streamed(&folder, &name, LS_AS_STORED, shape, of_blocks), LS_OK, "{case}: {}", message());
        // What was left alone is as it is stored.
        let plain = |_, tensor: ls_tensor| assert_eq!(tensor.dtype, LS_F32 as i32, "{case}");
        let name = format!("{case}.expected");
        assert_eq!(streamed(&folder, &name, LS_AS_STORED, shape, plain), LS_OK, "{case}: {}", message());
    }
}

#[test]
fn what_is_not_there_or_does_not_fit_is_refused_by_name() {
    let awq = folder(&json!({ "quant_method": "awq", "bits": 4 }));
    let refused = |folder: &TempDir, dtype, shape, status, words: &[&str]| {
        assert_eq!(
            streamed(folder, "awq.weight", dtype, shape, |_, _| panic!("it is refused")),
            status,
            "{}",
            message()
        );
        assert!(words.iter().all(|word| message().contains(word)), "{}", message());
    };
    let (_, [rows, columns]) = expected("awq");
    refused(&awq, LS_F32, [rows, 0], LS_INVALID, &["rows and columns", "awq.weight", "neither"]);
    refused(&awq, LS_F32, [0, 0], LS_CHECKPOINT, &["awq.weight"]);
    refused(&awq, LS_F32, [rows + 8, columns], LS_CHECKPOINT, &["awq.qweight"]);
    refused(&awq, LS_F16, [rows, columns], LS_CHECKPOINT, &["awq.qweight", "F16"]);
    let gptq = folder(&json!({ "quant_method": "gptq", "bits": 3 }));
    refused(&gptq, LS_F32, [rows, columns], LS_UNSUPPORTED, &["gptq of 3 bits"]);
    let unsaid = folder(&Value::Null);
    refused(&unsaid, LS_F32, [rows, columns], LS_CHECKPOINT, &["awq.weight"]);
}

#[test]
fn a_static_tensor_is_stored_by_itself() {
    let awq = folder(&json!({ "quant_method": "awq", "bits": 4 }));
    let (_, shape) = expected("awq");
    let with = |streamer, _| {
        let tensor = |rows, columns, stored: *const _| ls_unit_tensor {
            name: c"s".as_ptr(),
            stored,
            dtype: LS_AS_STORED as i32,
            rows,
            columns,
        };
        let (plain, matrix) =
            (tensor(0, 0, c"awq.expected".as_ptr()), tensor(shape[0], shape[1], c"awq.weight".as_ptr()));
        let mut statics = ls_statics { id: 0 };
        // SAFETY: as the header asks.
        unsafe {
            assert_eq!(ls_statics_load(streamer, &matrix, 1, &mut statics), LS_INVALID);
            assert!(message().contains("awq.weight") && message().contains("rows and columns"), "{}", message());
            assert_eq!(ls_statics_load(streamer, &plain, 1, &mut statics), LS_OK, "{}", message());
            assert_eq!(ls_statics_close(statics), LS_OK);
        }
    };
    assert_eq!(streamed(&awq, "awq.weight", LS_F32, shape, with), LS_OK, "{}", message());
}
