//! The C API asked beforehand what it would take, for what a host needs to choose tokens by itself, and for tokens that are drawn.

#[path = "common/c.rs"]
mod c_calls;
mod common;
#[path = "common/gguf.rs"]
mod gguf;

use std::{
    ffi::{CString, c_void},
    fs, mem,
    ops::ControlFlow,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    ptr,
};

use c_calls::{c, made, message};
use layer_streamer::{
    Checkpoint, Error, Settings,
    capi::{ls_status::*, *},
    device::Cpu,
    model::{Choice, Decoder, Model, Sampler, Sampling, Sequence},
};
use support::{copy_of, data, speller};

fn folder() -> CString {
    c(speller().to_str().unwrap())
}

fn placement() -> ls_placement {
    ls_placement { size: size_of::<ls_placement>(), ..ls_placement::default() }
}

#[test]
fn a_plan_says_what_an_open_takes_and_what_would_do() {
    // SAFETY: as the header asks.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let checkpoint = made(|to| ls_checkpoint_open(folder().as_ptr(), to));
        let mut options: ls_streamer_options =
            made(|to| ls_streamer_options_init(to, size_of::<ls_streamer_options>()));
        let plan = |options: &ls_streamer_options, tiers: &mut [i32]| {
            let mut told = placement();
            let status = ls_streamer_plan(device, checkpoint, options, &mut told, tiers.as_mut_ptr(), tiers.len());
            (status, told)
        };

        options.tiers = c"0=ram,7=gpu".as_ptr();
        let mut tiers = [9; 8];
        let (status, told) = plan(&options, &mut tiers);
        assert_eq!((status, tiers), (LS_OK, [1, 0, 0, 0, 0, 0, 0, 3]), "{}", message());
        assert_eq!((told.units, told.units_disk, told.units_ram, told.units_gpu), (8, 6, 1, 1));
        assert_eq!((told.n_gpu, told.n_cpu_pinned, told.n_cpu), (options.n_gpu, options.n_cpu_pinned, 0));
        let mut lent: ls_memory = mem::zeroed();
        lent.size = size_of::<ls_memory>();
        assert_eq!(ls_streamer_memory(checkpoint, &options, &mut lent), LS_OK);
        // What the CPU device takes is RAM; it needs no slots to copy to, as where memory is lent.
        let copying = lent.ram + lent.pinned + lent.gpu;
        assert!((copying / 2..copying).contains(&told.host_bytes), "{} of {copying}", told.host_bytes);
        assert_eq!(told.device_bytes, 0);

        // The least that is told will do, and a byte less will not.
        (options.tiers, options.host_budget) = (ptr::null(), 4096);
        let (status, refused) = plan(&options, &mut []);
        assert_eq!((status, refused.n_gpu, refused.least_device_bytes), (LS_TOO_LITTLE, 0, 0));
        assert!(message().contains(&format!("the least that will do, {}", refused.least_host_bytes)), "{}", message());
        options.host_budget = refused.least_host_bytes;
        let (status, told) = plan(&options, &mut tiers[..1]);
        assert_eq!((status, told.units_disk, told.least_host_bytes, tiers[0]), (LS_OK, 8, 0, 0), "{}", message());
        assert!(told.host_bytes <= options.host_budget);
        options.host_budget -= 1;
        assert_eq!(plan(&options, &mut []).0, LS_TOO_LITTLE);
        options.host_budget = 1 << 30;
        assert_eq!(plan(&options, &mut []).1.units_disk, 0, "everything fits");

        let mut model: ls_model_options = made(|to| ls_model_options_init(to, size_of::<ls_model_options>()));
        model.streamer = &options;
        let mut ask = |model: &ls_model_options| {
            let mut told = placement();
            let status = ls_model_plan(device, folder().as_ptr(), model, &mut told, tiers.as_mut_ptr(), tiers.len());
            assert_eq!(status, LS_OK, "{}", message());
            told
        };
        let (short, long) =
            (ask(&ls_model_options { context: 8, ..model }), ask(&ls_model_options { context: 128, ..model }));
        assert!(short.units_disk == 0 && short.host_bytes > told.host_bytes);
        assert!(long.host_bytes > short.host_bytes, "a longer context takes more");

        let mut unsized_placement = ls_placement::default();
        let status = ls_streamer_plan(device, checkpoint, &options, &mut unsized_placement, ptr::null_mut(), 0);
        assert_eq!(status, LS_INVALID, "without its size");
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

#[test]
fn a_host_says_whether_a_budget_packs_in_ram_and_one_of_an_older_header_gets_the_default() {
    use ls_pack::*;
    let empty = support::folder();
    common::hollow(
        &common::Dimensions { hidden: 256, ffn: 768, layers: 40, heads: [4, 4], vocab: 64, tied: true },
        empty.path(),
    );
    let folder = c(empty.path().as_os_str().as_bytes());
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let checkpoint = made(|to| ls_checkpoint_open(folder.as_ptr(), to));
        let initial: ls_streamer_options = made(|to| ls_streamer_options_init(to, size_of::<ls_streamer_options>()));
        let asked = |options: &ls_streamer_options| {
            let mut model: ls_model_options = made(|to| ls_model_options_init(to, size_of::<ls_model_options>()));
            (model.context, model.streamer) = (8, options);
            let [mut of_model, mut of_streamer] = [placement(); 2];
            let statuses = [
                ls_model_plan(device, folder.as_ptr(), &model, &mut of_model, ptr::null_mut(), 0),
                ls_streamer_plan(device, checkpoint, options, &mut of_streamer, ptr::null_mut(), 0),
            ];
            (statuses, [of_model, of_streamer].map(|told| told.units_pinned_packed))
        };
        let budget = ls_streamer_options { host_budget: 30 << 20, ..initial };
        let plan = |options: &ls_streamer_options| {
            let (statuses, told) = asked(options);
            assert_eq!(statuses, [LS_OK; 2], "{}", message());
            told
        };
        let [auto, never, always] = [LS_PACK_AUTO, LS_PACK_NEVER, LS_PACK_ALWAYS]
            .map(|pack| plan(&ls_streamer_options { pack: pack as u64, ..budget }));
        assert!(auto[0] > 0 && auto[1] == 0, "{auto:?}");
        assert_eq!(never, [0; 2]);
        assert!(always.iter().all(|packed| *packed > 0), "{always:?}");

        let older = ls_streamer_options { size: mem::offset_of!(ls_streamer_options, pack), pack: 9, ..budget };
        assert_eq!(plan(&older), auto);
        for (pack, host_budget, part) in [(3, budget.host_budget, "pack: is 3"), (1, 0, "pack: is given without")] {
            assert_eq!(asked(&ls_streamer_options { pack, host_budget, ..initial }).0, [LS_INVALID; 2]);
            assert!(message().contains(part), "{}", message());
        }
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

#[test]
fn a_host_has_the_logits_from_which_it_chooses() {
    let prompts: [&[u32]; 2] = [&[22, 10, 19, 16, 26], &[23, 29]];
    let model = Model::open(speller()).unwrap();
    let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 128).unwrap();
    let batch = [0, 1].map(|row| Sequence { row, tokens: prompts[row] });
    decoder.forward(&batch).unwrap();
    let mut expected = Vec::new();
    let kept = decoder.last_logits(|row| {
        expected.extend_from_slice(row);
        Ok::<_, Error>(())
    });
    kept.unwrap();

    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let mut options: ls_model_options = made(|to| ls_model_options_init(to, size_of::<ls_model_options>()));
        options.batch = 2;
        let model = made(|to| ls_model_open(device, folder().as_ptr(), &options, to));
        let mut logits = vec![0.0; expected.len()];
        assert_eq!(ls_model_logits(model, logits.as_mut_ptr(), logits.len()), LS_INVALID, "before any pass");
        let sequences = [0, 1].map(|row| ls_sequence { row, tokens: prompts[row].as_ptr(), count: prompts[row].len() });
        assert_eq!(ls_model_forward(model, sequences.as_ptr(), 2), LS_OK, "{}", message());
        assert_eq!(ls_model_logits(model, logits.as_mut_ptr(), logits.len() - 1), LS_INVALID, "no room");
        assert!(message().contains(&format!("the logits are {}", logits.len())), "{}", message());
        assert_eq!(ls_model_logits(model, logits.as_mut_ptr(), logits.len()), LS_OK, "{}", message());
        assert!(logits == expected);
        let row = ls_sequence { row: 7, ..sequences[0] };
        assert_eq!(ls_model_forward(model, &row, 1), LS_INVALID);
        assert_eq!((ls_model_close(model), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

/// Tokens by row.
type Drawn = [Vec<u32>; 2];

extern "C" fn keep(user: *mut c_void, row: usize, token: u32) -> i32 {
    // SAFETY: what `drawn_by_c` passes.
    let drawn = unsafe { &mut *user.cast::<Drawn>() };
    drawn[row].push(token);
    0
}

/// What ls_model_sample draws after these prompts, in an empty cache.
fn drawn_by_c(model: ls_model, prompts: [&[u32]; 2], sampling: *const ls_sampling) -> (ls_status, Drawn) {
    let sequences = [0, 1].map(|row| ls_sequence { row, tokens: prompts[row].as_ptr(), count: prompts[row].len() });
    let mut drawn = Drawn::default();
    let user = (&raw mut drawn).cast();
    assert_eq!([0, 1].map(|row| ls_model_truncate(model, row, 0)), [LS_OK; 2]);
    // SAFETY: as the header asks.
    let status = unsafe { ls_model_sample(model, sequences.as_ptr(), 2, 20, sampling, Some(keep), user) };
    (status, drawn)
}

#[test]
fn tokens_are_drawn_as_in_rust_by_values_that_a_host_or_the_model_s_makers_choose() {
    let copy = copy_of(&speller());
    let suggestion =
        r#"{ "eos_token_id": 0, "do_sample": true, "temperature": 1.5, "top_k": 40, "repetition_penalty": 1.05 }"#;
    fs::write(copy.path().join("generation_config.json"), suggestion).unwrap();
    let prompts: [&[u32]; 2] = [&[22, 10, 19, 16, 26], &[23, 29]];
    let model = Model::open(copy.path()).unwrap();
    let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 128).unwrap();
    let mut drawn_by_rust = |sampling| {
        let mut sampler = Sampler::new(sampling, model.config.vocab).unwrap();
        common::forget(&mut decoder, 2);
        let mut drawn = Drawn::default();
        let generated =
            decoder.generate(&prompts, 20, &model.config.stop, Choice::Sample(&mut sampler), |row, token| {
                drawn[row].push(token);
                Ok::<_, Error>(ControlFlow::Continue(()))
            });
        generated.unwrap();
        drawn
    };
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let mut options: ls_model_options = made(|to| ls_model_options_init(to, size_of::<ls_model_options>()));
        (options.batch, options.context) = (2, 128);
        let folder = c(copy.path().as_os_str().as_bytes());
        let model = made(|to| ls_model_open(device, folder.as_ptr(), &options, to));
        let none: ls_sampling = made(|to| ls_sampling_init(to, size_of::<ls_sampling>()));
        assert_eq!((Sampling::from(none), none.size), (Sampling::default(), size_of::<ls_sampling>()));
        let mut suggested = none;
        assert_eq!(ls_model_suggested_sampling(model, &mut suggested), LS_OK, "{}", message());
        assert_eq!((suggested.temperature, suggested.top_k, suggested.repetition_penalty), (1.5, 40, 1.05));
        let wild = ls_sampling { temperature: 4.0, top_p: 0.99, min_p: 1e-4, presence_penalty: 0.5, seed: 5, ..none };
        for sampling in [none, suggested, wild, ls_sampling { seed: 6, ..wild }] {
            let drawn = drawn_by_rust(Sampling::from(sampling));
            assert_eq!(drawn_by_c(model, prompts, &sampling), (LS_OK, drawn), "{sampling:?}: {}", message());
        }
        assert_ne!(drawn_by_c(model, prompts, &wild), drawn_by_c(model, prompts, &ls_sampling { seed: 6, ..wild }));
        for (wrong, part) in [
            (ls_sampling { temperature: -1.0, ..none }, "temperature: is -1"),
            (ls_sampling { top_p: f64::NAN, ..none }, "top_p"),
            (ls_sampling { repetition_penalty: 0.0, ..none }, "repetition_penalty"),
            (ls_sampling { size: 8, ..none }, "sampling: its size is 8"),
        ] {
            assert_eq!(drawn_by_c(model, prompts, &wrong), (LS_INVALID, Drawn::default()), "{part}");
            assert!(message().contains(part), "{}", message());
            assert_eq!(made(|to| ls_model_length(model, 0, to)), 0, "nothing went through the model");
        }
        assert_eq!(drawn_by_c(model, prompts, ptr::null()).0, LS_NULL);
        assert_eq!((ls_model_close(model), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

#[test]
fn a_tensor_says_how_long_it_is() {
    assert_eq!(
        [ls_dtype::LS_F32 as i32, ls_dtype::LS_BF16 as i32, 0, 99].map(|dtype| ls_dtype_size(dtype)),
        [4, 2, 0, 0]
    );
    let mut tensor =
        ls_tensor { data: ptr::null_mut(), dtype: ls_dtype::LS_BF16 as i32, rank: 2, shape: [3, 5, 0, 0, 0, 0, 0, 0] };
    // SAFETY: as the header asks.
    unsafe {
        let mut bytes = 0;
        assert_eq!((ls_tensor_bytes(&tensor, &mut bytes), bytes), (LS_OK, 30));
        tensor.shape[0] = usize::MAX;
        assert_eq!(ls_tensor_bytes(&tensor, &mut bytes), LS_INVALID);
        (tensor.shape[0], tensor.rank) = (3, 9);
        assert_eq!(ls_tensor_bytes(&tensor, &mut bytes), LS_INVALID);
    }
}

extern "C" fn nothing(_: *mut c_void, _: ls_layer) -> i32 {
    0
}

#[test]
fn c_learns_what_is_packed_and_whether_all_of_it_arrived_whole() {
    let folder = common::packed(&speller());
    let spoilt = copy_of(folder.path());
    let of_layer = Checkpoint::open(spoilt.path()).unwrap();
    let (file, offset) = of_layer.location("model.layers.3.mlp.up_proj.weight").unwrap();
    // How many escapes the first block has.
    fs::File::options().write(true).open(file).unwrap().write_all_at(&[0xff; 2], offset + 4).unwrap();
    let name = c("model.layers.3.mlp.up_proj.weight");
    for (folder, whole) in [(folder.path(), true), (spoilt.path(), false)] {
        let folder = c(folder.as_os_str().as_bytes());
        // SAFETY: texts end, places may be written, handles are closed once.
        unsafe {
            let device = made(|to| ls_device_cpu(to));
            let stream = made(|to| ls_stream_open(device, to));
            let checkpoint = made(|to| ls_checkpoint_open(folder.as_ptr(), to));
            let stored = made(|to| ls_checkpoint_stored_bytes(checkpoint, name.as_ptr(), to));
            let tensor = made(|to| ls_checkpoint_tensor(checkpoint, name.as_ptr(), to));
            let weights = of_layer.describe(name.to_str().unwrap()).unwrap().1.iter().product::<usize>();
            assert_eq!((tensor.dtype, tensor.rank), (ls_dtype::LS_BF16 as i32, 2));
            assert!(stored < 2 * weights && stored > weights, "{stored} bytes of {weights} weights");
            assert_eq!(ls_checkpoint_stored_bytes(checkpoint, c("none").as_ptr(), &mut 0), LS_NO_TENSOR);
            let streamer = made(|to| ls_streamer_open(device, checkpoint, ptr::null(), to));
            assert_eq!(
                ls_run_pass(streamer, stream, Some(nothing), ptr::null_mut()),
                if whole { LS_OK } else { LS_CHECKPOINT }
            );
            assert_eq!(ls_streamer_check_arrivals(streamer), if whole { LS_OK } else { LS_CHECKPOINT });
            assert!(whole || message().contains("up_proj.weight: its packed weights are corrupt"), "{}", message());
            assert_eq!(ls_streamer_close(streamer), LS_OK);
            assert_eq!(ls_streamer_check_arrivals(streamer), LS_CLOSED);
            assert_eq!(ls_checkpoint_close(checkpoint), LS_OK);
            assert_eq!(ls_stream_close(stream), LS_OK);
            assert_eq!(ls_device_close(device), LS_OK);
        }
    }
}

#[test]
fn a_gguf_file_is_opened_as_its_folder_is() {
    let folder = copy_of(&data("qwen3"));
    let file = folder.path().join("m.gguf");
    fs::write(&file, gguf::converted(folder.path()).bytes()).unwrap();
    let told = [folder.path(), file.as_path()].map(|path| {
        let path = c(path.as_os_str().as_bytes());
        // SAFETY: texts end, places may be written, handles are closed once.
        unsafe {
            let device = made(|to| ls_device_cpu(to));
            let checkpoint = made(|to| ls_checkpoint_open(path.as_ptr(), to));
            let tensor = made(|to| ls_checkpoint_tensor(checkpoint, c("model.norm.weight").as_ptr(), to));
            let width = *tensor.shape;
            let model = made(|to| ls_model_open(device, path.as_ptr(), ptr::null(), to));
            let mut info: ls_model_info = mem::zeroed();
            info.size = size_of::<ls_model_info>();
            assert_eq!(ls_model_describe(model, &mut info), LS_OK);
            assert_eq!(ls_model_close(model), LS_OK);
            assert_eq!(ls_checkpoint_close(checkpoint), LS_OK);
            assert_eq!(ls_device_close(device), LS_OK);
            (tensor.rank, width, [info.vocab, info.hidden, info.layers, info.max_positions])
        }
    });
    assert_eq!(told[0], told[1]);
}
