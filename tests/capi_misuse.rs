//! The C API in the hands of a host with bugs: a status each time, never a crash, and what was right before is right after.

#[path = "common/c.rs"]
mod c_calls;
mod common;
#[path = "common/host.rs"]
mod host;

use std::{
    ffi::{CStr, CString, c_char, c_void},
    fmt::Write,
    fs, mem,
    path::Path,
    process::Command,
    ptr, slice,
    sync::{
        Barrier, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
};

use c_calls::{c, made, message};
use common::{Fixture, SIZES, fixture};
use host::{CPP17, SANITIZED, printed};
use layer_streamer::capi::{ls_status::*, *};
use support::speller;

const NO_DEVICE: ls_device = ls_device { id: 0 };
const NO_LAYER: ls_layer = ls_layer { id: 0 };
const NO_STREAM: ls_stream = ls_stream { id: 0 };

/// A streamer over random bytes, opened by way of a table of the caller's, with its stream.
struct Opened {
    fixture: Fixture,
    streamer: ls_streamer,
    stream: ls_stream,
}

fn options() -> ls_streamer_options {
    // SAFETY: the size is the structure's.
    made(|to| unsafe { ls_streamer_options_init(to, size_of::<ls_streamer_options>()) })
}

fn open_checkpoint(fixture: &Fixture) -> ls_checkpoint {
    let tensors: Vec<_> = fixture.table.values().collect();
    let names: Vec<_> = tensors.iter().map(|t| (c(t.name.as_str()), c(t.file.to_str().unwrap()))).collect();
    let table = tensors.iter().zip(&names).map(|(tensor, (name, file))| ls_stored_tensor {
        name: name.as_ptr(),
        file: file.as_ptr(),
        offset: tensor.offset,
        shape: tensor.shape.as_ptr(),
        rank: tensor.shape.len(),
        dtype: ls_dtype::LS_BF16 as i32,
    });
    let table: Vec<_> = table.collect();
    // SAFETY: as the header asks.
    made(|to| unsafe { ls_checkpoint_from_table(table.as_ptr(), table.len(), to) })
}

/// Calls `with` with options that name the units of the fixture.
fn with_units<R>(fixture: &Fixture, with: impl FnOnce(&mut ls_streamer_options) -> R) -> R {
    let name = |text: &str| c(text);
    let names: Vec<Vec<_>> = (fixture.units.iter())
        .map(|unit| unit.arrivals().iter().map(|a| (name(&a.output), name(&a.inputs[0]))).collect())
        .collect();
    let tensors: Vec<Vec<_>> = (names.iter())
        .map(|unit| {
            let tensor = |(output, input): &(CString, CString)| ls_unit_tensor {
                name: output.as_ptr(),
                stored: input.as_ptr(),
                dtype: 0,
                rows: 0,
                columns: 0,
            };
            unit.iter().map(tensor).collect()
        })
        .collect();
    let unit_names: Vec<_> = fixture.units.iter().map(|unit| c(unit.name())).collect();
    let units: Vec<_> = (tensors.iter().zip(&unit_names))
        .map(|(t, name)| ls_unit { name: name.as_ptr(), tensors: t.as_ptr(), count: t.len(), tier: 0 })
        .collect();
    let mut options = options();
    (options.units, options.unit_count) = (units.as_ptr(), units.len());
    with(&mut options)
}

impl Opened {
    fn new() -> Self {
        let fixture = fixture(5, &SIZES, 31);
        // SAFETY: as the header asks.
        unsafe {
            let device = made(|to| ls_device_cpu(to));
            let stream = made(|to| ls_stream_open(device, to));
            let checkpoint = open_checkpoint(&fixture);
            let streamer = with_units(&fixture, |options| made(|to| ls_streamer_open(device, checkpoint, options, to)));
            assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
            Self { fixture, streamer, stream }
        }
    }

    fn next(&self) -> ls_layer {
        // SAFETY: as the header asks.
        made(|to| unsafe { ls_next_layer(self.streamer, self.stream, to) })
    }

    /// Compares a layer with the files.
    fn check(&self, layer: ls_layer) {
        // SAFETY: as the header asks; the layer is held, and its memory is RAM.
        unsafe {
            let unit = made(|to| ls_layer_index(layer, to));
            for arrival in self.fixture.units[unit].arrivals() {
                let name = c(arrival.output.as_str());
                let tensor = made(|to| ls_layer_tensor(layer, name.as_ptr(), to));
                let index = made(|to| ls_streamer_tensor_index(self.streamer, unit, name.as_ptr(), to));
                assert_eq!(made(|to| ls_layer_tensor_at(layer, index, to)).data, tensor.data);
                let bytes = slice::from_raw_parts(tensor.data.cast::<u8>(), tensor.shape[0] * 2);
                assert!(bytes == self.fixture.stored(&arrival.inputs[0]));
            }
        }
    }

    /// A pass by callback that checks every layer.
    fn checked_pass(&self) {
        extern "C" fn check(user: *mut c_void, layer: ls_layer) -> i32 {
            // SAFETY: what is passed below.
            let (opened, seen) = unsafe { &mut *user.cast::<(&Opened, usize)>() };
            opened.check(layer);
            *seen += 1;
            0
        }
        let mut user = (self, 0usize);
        // SAFETY: as the header asks.
        let pass = unsafe { ls_run_pass(self.streamer, self.stream, Some(check), (&raw mut user).cast()) };
        assert_eq!((pass, user.1), (LS_OK, 5), "{}", message());
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if !thread::panicking() {
            assert_eq!(
                (ls_streamer_close(self.streamer), ls_stream_close(self.stream)),
                (LS_OK, LS_OK),
                "{}",
                message()
            );
        }
    }
}

/// A function of the header: its name, each parameter's type and name, and its comment.
type Function = (String, Vec<(String, String)>, String);

fn functions(header: &str) -> Vec<Function> {
    let (mut found, mut comment) = (Vec::new(), String::new());
    let mut statement = String::new();
    for line in header[header.find("extern \"C\"").unwrap()..].lines().skip(1) {
        if let Some(text) = line.strip_prefix("//") {
            comment.push_str(text);
            continue;
        }
        statement.push_str(line.trim());
        statement.push(' ');
        if !line.ends_with(';') {
            if line.is_empty() || line.starts_with('#') {
                statement.clear();
                comment.clear();
            }
            continue;
        }
        let (head, tail) = statement.split_once('(').unwrap();
        let name = head.rsplit([' ', '*']).next().unwrap().to_owned();
        let parameters = tail.split(')').next().unwrap().split(',').filter(|p| p.trim() != "void").map(|parameter| {
            let at = parameter.rfind([' ', '*']).unwrap() + 1;
            (parameter[..at].replace("struct ", "").trim().to_owned(), parameter[at..].to_owned())
        });
        found.push((name, parameters.collect(), std::mem::take(&mut comment)));
        statement.clear();
    }
    found
}

#[test]
fn null_for_every_pointer_of_every_function_is_a_status() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/layer_streamer.h");
    let functions = functions(&fs::read_to_string(header).unwrap());
    let (mut calls, mut cases) = (String::new(), 0);
    for (name, parameters, comment) in &functions {
        if ["ls_version", "ls_status_name", "ls_last_error"].contains(&name.as_str()) {
            continue;
        }
        let is_pointer = |kind: &str| kind.ends_with('*') || kind.ends_with("_fn");
        let argument = |(kind, _): &(String, String)| match kind.as_str() {
            "ls_layer_fn" => "layer_fn".into(),
            "ls_token_fn" => "token_fn".into(),
            "ls_event_fn" => "event_fn".into(),
            "size_t" | "uint32_t" | "uint64_t" | "int32_t" | "float" => "1".into(),
            pointer if pointer.ends_with('*') => format!("({pointer})scratch"),
            handle => format!("no_{handle}"),
        };
        let whole: Vec<String> = parameters.iter().map(argument).collect();
        for (at, (kind, parameter)) in parameters.iter().enumerate() {
            let may_be = parameter == "user" || comment.contains(&format!("`{parameter}` may be NULL"));
            if !is_pointer(kind) || may_be {
                continue;
            }
            let mut arguments = whole.clone();
            arguments[at] = "NULL".into();
            writeln!(calls, "    check(\"{name} {parameter}\", {name}({}), 1);", arguments.join(", ")).unwrap();
            cases += 1;
        }
        // With handles that stand for nothing it fails too, and nothing is written.
        if parameters.iter().any(|(kind, _)| kind.starts_with("ls_") && !is_pointer(kind)) {
            writeln!(calls, "    check(\"{name}\", {name}({}), 0);", whole.join(", ")).unwrap();
            cases += 1;
        }
    }
    assert!(functions.len() > 50 && cases > 100, "{} functions, {cases} cases", functions.len());
    let handles = ["checkpoint", "device", "stream", "streamer", "layer", "statics", "model", "engine"];
    let handles: String = handles.iter().map(|kind| format!("static ls_{kind} no_ls_{kind};\n")).collect();
    let program = format!(
        r#"#include <layer_streamer.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static uint64_t scratch[1024], zeros[1024];
{handles}
static int32_t layer_fn(void *user, ls_layer layer) {{ (void)user; (void)layer; return 0; }}
static int32_t token_fn(void *user, size_t row, uint32_t token) {{ (void)user; (void)row; (void)token; return 0; }}
static int32_t event_fn(void *user, const ls_event *event) {{ (void)user; (void)event; return 0; }}
static void check(const char *what, ls_status got, int null)
{{
    if ((null ? got != LS_NULL : got == LS_OK) || memcmp(scratch, zeros, sizeof zeros) != 0) {{
        fprintf(stderr, "%s: %s, %s\n", what, ls_status_name(got), ls_last_error());
        exit(1);
    }}
}}
int main(void)
{{
{calls}    printf("%s\n", ls_status_name(99));
    return 0;
}}
"#
    );
    let folder = support::folder();
    let (source, object) = (folder.path().join("null.c"), folder.path().join("null"));
    fs::write(&source, program).unwrap();
    for build in [SANITIZED, CPP17] {
        build.compile(&source, &object);
        assert_eq!(printed(&mut Command::new(&object)), "unknown\n");
    }
}

#[test]
fn what_was_closed_or_released_is_known_as_such() {
    let opened = Opened::new();
    let Opened { streamer, stream, .. } = opened;
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let (first, second) = (opened.next(), opened.next());
        let mut third = NO_LAYER;
        assert_eq!(ls_next_layer(streamer, stream, &mut third), LS_LAYERS_HELD);
        assert_eq!((ls_streamer_close(streamer), ls_rewind(streamer)), (LS_LAYERS_HELD, LS_LAYERS_HELD));
        extern "C" fn never(_: *mut c_void, _: ls_layer) -> i32 {
            unreachable!("layers are held")
        }
        assert_eq!(ls_run_pass(streamer, stream, Some(never), ptr::null_mut()), LS_LAYERS_HELD);
        assert_eq!(ls_release_layer(second, NO_STREAM), LS_CLOSED);
        assert_eq!((ls_release_layer(second, stream), ls_release_layer(second, stream)), (LS_OK, LS_CLOSED));
        opened.check(first);
        let (mut index, mut tensor) = (77, mem::zeroed());
        assert_eq!(ls_layer_index(second, &mut index), LS_CLOSED);
        assert_eq!(ls_layer_tensor_at(second, 0, &mut tensor), LS_CLOSED);
        assert_eq!(ls_layer_tensor_at(first, 99, &mut tensor), LS_INVALID);
        assert_eq!(ls_layer_tensor(first, c"nothing".as_ptr(), &mut tensor), LS_NO_TENSOR);
        assert!(message().contains("nothing") && message().contains("t0"), "{}", message());
        assert_eq!((index, tensor.data), (77, ptr::null_mut()), "nothing is written after an error");
        assert_eq!(ls_release_layer(first, stream), LS_OK);
        assert_eq!(ls_rewind(streamer), LS_OK);
        opened.checked_pass();

        let other = Opened::new();
        let (layer, closed) = (other.next(), other.streamer);
        assert_eq!(ls_release_layer(layer, other.stream), LS_OK);
        drop(other);
        assert_eq!((ls_release_layer(layer, stream), ls_streamer_close(closed)), (LS_CLOSED, LS_CLOSED));
        assert_eq!((ls_cancel(closed), ls_rewind(closed)), (LS_CLOSED, LS_CLOSED));
        // Handles of another kind, and made up.
        for id in [stream.id, closed.id + (1 << 20), 1, u64::MAX] {
            assert_eq!(ls_next_layer(ls_streamer { id }, stream, &mut third), LS_CLOSED);
        }
        let device = made(|to| ls_device_cpu(to));
        assert_eq!((ls_device_close(device), ls_device_close(device)), (LS_OK, LS_CLOSED));
        assert_eq!(ls_stream_open(device, ptr::null_mut()), LS_NULL);
        assert_eq!(ls_stream_open(NO_DEVICE, &mut NO_STREAM.clone()), LS_CLOSED);
    }
}

#[test]
fn a_callback_that_fails_ends_the_pass_and_the_next_one_is_exact() {
    extern "C" fn fail(user: *mut c_void, layer: ls_layer) -> i32 {
        // SAFETY: what is passed below.
        let at = unsafe { *user.cast::<usize>() };
        // SAFETY: as the header asks.
        if made(|to| unsafe { ls_layer_index(layer, to) }) == at { -7 } else { 0 }
    }
    let opened = Opened::new();
    for mut at in 0..5usize {
        // SAFETY: as the header asks.
        let pass = unsafe { ls_run_pass(opened.streamer, opened.stream, Some(fail), (&raw mut at).cast()) };
        assert_eq!(pass, LS_CALLBACK);
        assert!(message().contains("-7"), "{}", message());
        opened.checked_pass();
    }
}

#[test]
fn a_callback_that_calls_back_gets_busy_and_may_look_at_its_layer() {
    extern "C" fn call_back(user: *mut c_void, layer: ls_layer) -> i32 {
        // SAFETY: what is passed below; else as the header asks, but for what is tested.
        unsafe {
            let opened = &*user.cast::<Opened>();
            let Opened { streamer, stream, .. } = *opened;
            let (mut other, mut statics) = (NO_LAYER, mem::zeroed());
            let row = ls_unit_tensor { name: c"x".as_ptr(), stored: c"0.0".as_ptr(), dtype: 0, rows: 0, columns: 0 };
            let refused = [
                ls_next_layer(streamer, stream, &mut other),
                ls_release_layer(layer, stream),
                ls_rewind(streamer),
                ls_run_pass(streamer, stream, Some(call_back), user),
                ls_streamer_close(streamer),
                ls_statics_load(streamer, &row, 1, &mut statics),
                ls_stream_close(stream),
            ];
            assert_eq!(refused, [LS_BUSY; 7]);
            opened.check(layer);
            let mut stats: ls_stats = mem::zeroed();
            stats.size = size_of::<ls_stats>();
            assert_eq!(ls_streamer_stats(streamer, &mut stats), LS_OK);
            assert_eq!((stats.size, ls_stream_synchronize(stream)), (size_of::<ls_stats>(), LS_OK));
        }
        0
    }
    let opened = Opened::new();
    let user = (&raw const opened).cast_mut().cast();
    for _ in 0..2 {
        // SAFETY: as the header asks.
        assert_eq!(unsafe { ls_run_pass(opened.streamer, opened.stream, Some(call_back), user) }, LS_OK);
    }
    opened.checked_pass();
}

#[test]
fn a_stream_serves_one_pass_by_callback_at_a_time() {
    extern "C" fn nothing(_: *mut c_void, _: ls_layer) -> i32 {
        0
    }
    extern "C" fn another(user: *mut c_void, _: ls_layer) -> i32 {
        // SAFETY: what is passed below.
        let (other, stream) = unsafe { *user.cast::<(ls_streamer, ls_stream)>() };
        // SAFETY: as the header asks, but for what is tested.
        let pass = move || unsafe { ls_run_pass(other, stream, Some(nothing), ptr::null_mut()) };
        assert_eq!([pass(), thread::spawn(pass).join().unwrap()], [LS_BUSY; 2]);
        0
    }
    let (one, other) = (Opened::new(), Opened::new());
    let mut user = (other.streamer, one.stream);
    // SAFETY: as the header asks.
    let pass = unsafe { ls_run_pass(one.streamer, one.stream, Some(another), (&raw mut user).cast()) };
    assert_eq!(pass, LS_OK, "{}", message());
    other.checked_pass();
}

#[test]
fn a_second_thread_gets_busy_and_may_cancel() {
    struct Shared {
        opened: Opened,
        inside: Barrier,
        tried: Barrier,
    }
    extern "C" fn wait(user: *mut c_void, layer: ls_layer) -> i32 {
        // SAFETY: what is passed below.
        let shared = unsafe { &*user.cast::<Shared>() };
        shared.opened.check(layer);
        shared.inside.wait();
        shared.tried.wait();
        0
    }
    let shared = Shared { opened: Opened::new(), inside: Barrier::new(2), tried: Barrier::new(2) };
    let (streamer, stream) = (shared.opened.streamer, shared.opened.stream);
    thread::scope(|scope| {
        let pass = scope.spawn(|| {
            let user = (&raw const shared).cast_mut().cast();
            // SAFETY: as the header asks.
            unsafe { ls_run_pass(streamer, stream, Some(wait), user) }
        });
        shared.inside.wait();
        let mut layer = NO_LAYER;
        // SAFETY: as the header asks, but for what is tested.
        assert_eq!(unsafe { ls_next_layer(streamer, stream, &mut layer) }, LS_BUSY);
        assert!(message().contains("streamer is in use"), "{}", message());
        assert_eq!((ls_rewind(streamer), ls_streamer_close(streamer), ls_cancel(streamer)), (LS_BUSY, LS_BUSY, LS_OK));
        shared.tried.wait();
        assert_eq!(pass.join().unwrap(), LS_CANCELLED);
    });
    shared.opened.checked_pass();
}

#[test]
fn a_thread_that_keeps_the_counts_may_ask_at_any_time() {
    let (opened, over) = (Opened::new(), AtomicBool::new(false));
    let streamer = opened.streamer;
    thread::scope(|scope| {
        let asks = scope.spawn(|| {
            let (mut before, mut asked) = (0, 0);
            while !over.load(SeqCst) {
                // SAFETY: zeroes are a value of it.
                let mut stats: ls_stats = unsafe { mem::zeroed() };
                stats.size = size_of::<ls_stats>();
                // SAFETY: as the header asks.
                assert_eq!(unsafe { ls_streamer_stats(streamer, &mut stats) }, LS_OK, "{}", message());
                assert!(stats.compute.units >= before, "{} units after {before}", stats.compute.units);
                (before, asked) = (stats.compute.units, asked + 1);
            }
            asked
        });
        // Of many passes some calls of either side meet.
        (0..200).for_each(|_| opened.checked_pass());
        over.store(true, SeqCst);
        assert!(asks.join().unwrap() > 0);
    });
}

/// Options followed by what a later version may add.
#[repr(C)]
struct Later {
    options: ls_streamer_options,
    more: [u64; 4],
}

#[test]
fn structures_of_other_versions_and_values_that_are_none_are_refused_or_understood() {
    let fixture = fixture(3, &SIZES, 32);
    let checkpoint = open_checkpoint(&fixture);
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let open = |options: *const ls_streamer_options| {
            let mut streamer = ls_streamer { id: 0 };
            let status = ls_streamer_open(device, checkpoint, options, &mut streamer);
            assert_eq!(streamer.id != 0, status == LS_OK);
            if status == LS_OK {
                assert_eq!(ls_streamer_close(streamer), LS_OK);
            }
            status
        };
        with_units(&fixture, |options| {
            assert_eq!(open(options), LS_OK);
            let mut later = Later { options: *options, more: [0; 4] };
            later.options.size = size_of::<Later>();
            assert_eq!(open((&raw const later).cast()), LS_OK, "nothing new is asked for");
            later.more[2] = 1;
            assert_eq!(open((&raw const later).cast()), LS_UNSUPPORTED);
            for size in [0, 8, size_of::<ls_streamer_options>() - 1, 1 << 20, usize::MAX] {
                assert_eq!(open(&ls_streamer_options { size, ..*options }), LS_INVALID, "{size}");
                assert!(message().contains("sizeof"), "{}", message());
            }
            for (n_gpu, reader, cache, batch_gpu) in
                [(0, 0, 0, 0), (2, 4, 0, 0), (2, -1, 0, 0), (2, 0, 3, 0), (2, 0, 0, 3)]
            {
                let wrong = ls_streamer_options { n_gpu, reader, cache, batch_gpu, ..*options };
                assert_eq!(open(&wrong), LS_INVALID, "{}", message());
            }
            for tiers in [c"0=moon", c"7=ram", c"\xff"] {
                assert_eq!(open(&ls_streamer_options { tiers: tiers.as_ptr(), ..*options }), LS_INVALID);
            }
            assert_eq!(open(&ls_streamer_options { tiers: c"0-1=gpu,2=ram".as_ptr(), ..*options }), LS_OK);
            assert_eq!(open(&ls_streamer_options { units: ptr::null(), ..*options }), LS_NULL);
            assert_eq!(open(ptr::without_provenance(12)), LS_INVALID, "misaligned");
        });
        let mut whole = Later { options: options(), more: [u64::MAX; 4] };
        assert_eq!(ls_streamer_options_init((&raw mut whole).cast(), size_of::<Later>()), LS_OK);
        assert_eq!((whole.options.size, whole.options.n_gpu, whole.more), (size_of::<Later>(), 2, [0; 4]));
        let mut stats: ls_stats = mem::zeroed();
        assert_eq!(ls_streamer_stats(ls_streamer { id: 0 }, &mut stats), LS_CLOSED);
        let mut model = ls_model { id: 0 };
        let small = ls_model_options { size: 8, batch: 1, context: 4, streamer: ptr::null() };
        let folder = c(speller().to_str().unwrap());
        assert_eq!(ls_model_open(device, folder.as_ptr(), &small, &mut model), LS_INVALID);
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

/// `bytes` bytes on a boundary of 4096, with the vector that they lie in.
fn aligned(bytes: usize) -> (Vec<u8>, *mut c_void) {
    let mut memory = vec![0xa5u8; bytes + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    let start = memory[skip..].as_mut_ptr();
    (memory, start.cast())
}

#[test]
fn a_streamer_lives_in_memory_of_the_caller_s() {
    let fixture = fixture(5, &SIZES, 33);
    let checkpoint = open_checkpoint(&fixture);
    // SAFETY: as the header asks, but for what is tested; what is lent lives longer than the streamer.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        for tiers in [c"", c"0=gpu,1=pinned,2-3=ram"] {
            with_units(&fixture, |options| {
                (options.n_cpu, options.tiers) = (1, tiers.as_ptr());
                let mut needed: ls_memory = mem::zeroed();
                needed.size = size_of::<ls_memory>();
                assert_eq!(ls_streamer_memory(checkpoint, options, &mut needed), LS_OK, "{}", message());
                let (ram, pinned, gpu) = (aligned(needed.ram), aligned(needed.pinned), aligned(needed.gpu));
                (options.ram_memory, options.ram_bytes) = (ram.1, needed.ram);
                (options.pinned_memory, options.pinned_bytes) = (pinned.1, needed.pinned);
                (options.gpu_memory, options.gpu_bytes) = (gpu.1, needed.gpu);
                let mut none = ls_streamer { id: 0 };
                let short = ls_streamer_options { ram_bytes: needed.ram - 1, ..*options };
                assert_eq!(ls_streamer_open(device, checkpoint, &short, &mut none), LS_INVALID);
                assert!(message().contains(&format!("need {}", needed.ram)), "{}", message());
                let crooked = ls_streamer_options { pinned_memory: pinned.1.byte_add(64), ..*options };
                assert_eq!(ls_streamer_open(device, checkpoint, &crooked, &mut none), LS_INVALID);

                let stream = made(|to| ls_stream_open(device, to));
                let streamer = made(|to| ls_streamer_open(device, checkpoint, options, to));
                let opened = Opened { fixture: common::fixture(5, &SIZES, 33), streamer, stream };
                (0..3).for_each(|_| opened.checked_pass());
                for _ in 0..5 {
                    let layer = opened.next();
                    let at = made(|to| ls_layer_tensor_at(layer, 0, to)).data.addr();
                    assert!((gpu.1.addr()..gpu.1.addr() + needed.gpu).contains(&at));
                    assert_eq!(ls_release_layer(layer, stream), LS_OK);
                }
                drop(opened);
                for (name, (memory, start), bytes) in
                    [("ram", ram, needed.ram), ("pinned", pinned, needed.pinned), ("gpu", gpu, needed.gpu)]
                {
                    let (before, lent) = memory.split_at(start.addr() - memory.as_ptr().addr());
                    assert!(lent[..bytes].iter().any(|byte| *byte != 0xa5), "{name} is used");
                    assert!(
                        before.iter().chain(&lent[bytes..]).all(|byte| *byte == 0xa5),
                        "{name}: beyond what is lent"
                    );
                }
            });
        }
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

#[test]
fn a_budget_chooses_tiers_and_numbers_or_says_what_would_do() {
    let mut opened = Opened::new();
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let checkpoint = open_checkpoint(&opened.fixture);
        let open = |change: &dyn Fn(&mut ls_streamer_options), to: &mut ls_streamer| {
            with_units(&opened.fixture, |options| {
                change(options);
                ls_streamer_open(device, checkpoint, options, to)
            })
        };
        let mut streamer = mem::zeroed();
        let refused = [
            open(&|options| options.host_budget = 4096, &mut streamer),
            open(&|options| (options.host_budget, options.device_budget) = (1 << 30, 1 << 30), &mut streamer),
            open(&|options| options.device_budget = 1 << 30, &mut streamer),
            open(&|options| (options.host_budget, options.tiers) = (1 << 30, c"0=gpu".as_ptr()), &mut streamer),
        ];
        assert_eq!((refused, streamer.id), ([LS_TOO_LITTLE, LS_INVALID, LS_INVALID, LS_INVALID], 0));
        assert_eq!(open(&|options| options.host_budget = 4096, &mut streamer), LS_TOO_LITTLE);
        assert!(message().contains("the least that will do"), "{}", message());
        for budget in [1 << 30, usize::MAX] {
            // What the page cache has would be used there.
            let cache = ls_cache::LS_CACHE_DIRECT as i32;
            let all = |options: &mut ls_streamer_options| (options.host_budget, options.cache) = (budget, cache);
            assert_eq!(open(&all, &mut streamer), LS_OK, "{}", message());
            mem::swap(&mut opened.streamer, &mut streamer);
            let read = || {
                let mut stats: ls_stats = mem::zeroed();
                stats.size = size_of::<ls_stats>();
                assert_eq!(ls_streamer_stats(opened.streamer, &mut stats), LS_OK);
                stats.direct_bytes + stats.buffered_bytes
            };
            opened.checked_pass();
            let once = read();
            opened.checked_pass();
            assert_eq!((read(), once > 0), (once, true), "everything fits, and is read once");
            mem::swap(&mut opened.streamer, &mut streamer);
            assert_eq!(ls_streamer_close(streamer), LS_OK);
        }
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

fn tensor(data: &mut [f32], shape: &[usize]) -> ls_tensor {
    let mut dims = [0; 8];
    dims[..shape.len()].copy_from_slice(shape);
    let (dtype, rank) = (ls_dtype::LS_F32 as i32, shape.len() as u32);
    ls_tensor { data: data.as_mut_ptr().cast(), dtype, rank, shape: dims }
}

#[test]
fn kernels_compute_and_refuse_tensors_that_are_none() {
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let stream = made(|to| ls_stream_open(device, to));
        let precision = made(|to| ls_device_precision(device, to));
        assert_eq!((precision.activation, precision.weight), (ls_dtype::LS_F32 as i32, 0));
        assert_eq!(ls_stream_prepare(stream), LS_OK);
        let (mut x, mut y) = ([1.0f32, 2.0, 3.0, 4.0], [10.0f32, 20.0, 30.0, 40.0]);
        let (residual, other) = (tensor(&mut x, &[2, 2]), tensor(&mut y, &[2, 2]));
        assert_eq!(ls_add(stream, &residual, &other), LS_OK, "{}", message());
        assert_eq!(x, [11.0, 22.0, 33.0, 44.0]);
        let mut best = [0u32; 2];
        let out = ls_tensor { dtype: ls_dtype::LS_U32 as i32, ..tensor(&mut [], &[2]) };
        let out = ls_tensor { data: best.as_mut_ptr().cast(), ..out };
        assert_eq!((ls_argmax(stream, &residual, &out), best), (LS_OK, [1, 1]));

        assert_eq!(ls_add(stream, &residual, &residual), LS_KERNEL, "they overlap");
        assert_eq!(ls_add(stream, &residual, &ls_tensor { rank: 1, ..other }), LS_KERNEL);
        let wrong = [
            ls_tensor { dtype: 99, ..other },
            ls_tensor { rank: 9, ..other },
            ls_tensor { shape: [usize::MAX; 8], ..other },
            ls_tensor { data: other.data.byte_add(2), ..other },
        ];
        for wrong in wrong {
            assert_eq!(ls_add(stream, &residual, &wrong), LS_INVALID, "{}", message());
        }
        assert_eq!(ls_add(stream, &residual, &ls_tensor { data: ptr::null_mut(), ..other }), LS_NULL);
        assert_eq!(ls_rope(stream, &residual, &other, &other, 1.0, 3, &residual), LS_INVALID);
        assert_eq!(x, [11.0, 22.0, 33.0, 44.0]);
        let mut raw = ptr::null_mut();
        assert_eq!(ls_stream_to_cuda(stream, &mut raw), LS_UNSUPPORTED);
        assert_eq!(ls_stream_from_cuda(device, x.as_mut_ptr().cast(), &mut NO_STREAM.clone()), LS_UNSUPPORTED);
        assert_eq!((ls_stream_close(stream), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

/// What a token callback saw, and what it shall answer.
struct Tokens {
    model: ls_model,
    seen: Vec<u32>,
    answer: Box<dyn FnMut(usize) -> i32>,
}

extern "C" fn on_token(user: *mut c_void, row: usize, token: u32) -> i32 {
    // SAFETY: what is passed below; else as the header asks, but for what is tested.
    unsafe {
        let tokens = &mut *user.cast::<Tokens>();
        let mut length = 0;
        assert_eq!((row, ls_model_length(tokens.model, 0, &mut length)), (0, LS_BUSY));
        assert_eq!(ls_model_close(tokens.model), LS_BUSY);
        tokens.seen.push(token);
        (tokens.answer)(tokens.seen.len())
    }
}

/// Lines of a log, with their levels.
type Lines = Mutex<Vec<(i32, String)>>;

extern "C" fn keep_line(lines: *mut c_void, level: i32, message: *const c_char) {
    // SAFETY: what is passed with it, and a text of the library's.
    let (lines, message) = unsafe { (&*lines.cast::<Lines>(), CStr::from_ptr(message)) };
    lines.lock().unwrap().push((level, message.to_str().unwrap().to_owned()));
}

#[test]
fn the_log_tells_what_was_opened_and_what_went_wrong_each_with_a_level() {
    use ls_log_level::*;
    let [info, warning, error] = [LS_LOG_INFO, LS_LOG_WARNING, LS_LOG_ERROR].map(|level| level as i32);
    let lines = Lines::default();
    // Since the last time it was asked.
    let said = || mem::take(&mut *lines.lock().unwrap());
    let tells = |said: &[(i32, String)], level: i32, part: &str| {
        assert!(said.iter().any(|(l, line)| *l == level && line.contains(part)), "{part:?} is not in {said:?}");
    };
    let fixture = fixture(5, &SIZES, 35);
    let checkpoint = open_checkpoint(&fixture);
    // SAFETY: as the header asks; the file is cut short under the streamer, which is what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let stream = made(|to| ls_stream_open(device, to));
        let streamer = with_units(&fixture, |options| {
            (options.log, options.log_user) = (Some(keep_line as _), (&raw const lines).cast_mut().cast());
            (options.reader, options.cache) = (ls_reader::LS_READER_PREAD as i32, ls_cache::LS_CACHE_BUFFERED as i32);
            made(|to| ls_streamer_open(device, checkpoint, options, to))
        });
        let opened = said();
        tells(&opened, info, "bytes in RAM");
        tells(&opened, info, "reads by pread");
        tells(&opened, warning, "is read through the page cache alone: ");

        let layer = made(|to| ls_next_layer(streamer, stream, to));
        assert_eq!((ls_layer_check_cancelled(layer), ls_cancel(streamer)), (LS_OK, LS_OK));
        assert_eq!(ls_layer_check_cancelled(layer), LS_CANCELLED);
        assert_eq!((ls_release_layer(layer, stream), ls_rewind(streamer)), (LS_OK, LS_OK));
        assert_eq!(ls_layer_check_cancelled(layer), LS_CLOSED);
        let rewound = said();
        assert_eq!(rewound.len(), 1, "{rewound:?}");
        tells(&rewound, info, "rewound");

        assert_eq!(ls_cancel(streamer), LS_OK);
        let mut none = NO_LAYER;
        // However often it is asked.
        (0..2).for_each(|_| assert_eq!(ls_next_layer(streamer, stream, &mut none), LS_CANCELLED));
        let cancelled = said();
        assert_eq!(cancelled.len(), 1, "{cancelled:?}");
        tells(&cancelled, info, "cancelled");

        assert_eq!(ls_rewind(streamer), LS_OK);
        tells(&said(), info, "rewound");
        let file = &fixture.table.values().next().unwrap().file;
        fs::OpenOptions::new().write(true).open(file).unwrap().set_len(0).unwrap();
        let status = loop {
            match ls_next_layer(streamer, stream, &mut none) {
                LS_OK => assert_eq!(ls_release_layer(none, stream), LS_OK),
                status => break status,
            }
        };
        assert_eq!(status, LS_READ, "{}", message());
        let failed = said();
        assert_eq!(failed, [(error, message())]);
        assert_eq!((ls_streamer_close(streamer), ls_stream_close(stream)), (LS_OK, LS_OK));
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
    assert_eq!(said(), []);
}

#[test]
fn a_model_obeys_its_token_callback_and_survives_its_failures() {
    extern "C" fn progress(user: *mut c_void, progress: *const ls_progress) {
        // SAFETY: what is passed below, and the library's.
        unsafe {
            assert!((*progress).units == 8 && (*progress).done <= 8);
            *user.cast::<usize>() += 1;
        }
    }
    let (mut layers, lines) = (0usize, Lines::default());
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let mut streamer = options();
        (streamer.log, streamer.progress) = (Some(keep_line as _), Some(progress as _));
        streamer.log_user = (&raw const lines).cast_mut().cast();
        streamer.progress_user = (&raw mut layers).cast();
        let mut options: ls_model_options = made(|to| ls_model_options_init(to, size_of::<ls_model_options>()));
        (options.context, options.streamer) = (40, &streamer);
        let folder = c(speller().to_str().unwrap());
        let model = made(|to| ls_model_open(device, folder.as_ptr(), &options, to));
        let opened = mem::take(&mut *lines.lock().unwrap());
        let tells = |start: &str| opened.iter().any(|(_, line)| line.starts_with(start));
        assert!(tells("KV cache of 40 tokens: ") && tells("reads by "), "{opened:?}");
        let mut info: ls_model_info = mem::zeroed();
        assert_eq!(ls_model_describe(model, &mut info), LS_INVALID, "without its size");
        info.size = size_of::<ls_model_info>();
        assert_eq!(ls_model_describe(model, &mut info), LS_OK);
        assert_eq!((info.vocab, info.layers, info.context, info.batch), (343, 8, 40, 1));

        let prompt = [22u32, 10, 19, 16, 26];
        let generate = |answer: Box<dyn FnMut(usize) -> i32>| {
            assert_eq!(ls_model_truncate(model, 0, 0), LS_OK);
            let mut tokens = Tokens { model, seen: Vec::new(), answer };
            let sequence = ls_sequence { row: 0, tokens: prompt.as_ptr(), count: prompt.len() };
            let status = ls_model_generate(model, &sequence, 1, 30, Some(on_token), (&raw mut tokens).cast());
            (status, tokens.seen)
        };
        let (status, whole) = generate(Box::new(|_| 0));
        assert!(status == LS_OK && whole.len() > 4, "{whole:?}");
        assert_eq!(layers % 8, 0);
        assert!(layers >= 8 * whole.len());
        assert_eq!(generate(Box::new(|count| i32::from(count == 3))), (LS_OK, whole[..3].to_vec()));
        assert_eq!(generate(Box::new(|count| if count == 2 { -1 } else { 0 })), (LS_CALLBACK, whole[..2].to_vec()));
        let cancel = move |count| {
            if count == 2 {
                thread::spawn(move || assert_eq!(ls_model_cancel(model), LS_OK)).join().unwrap();
            }
            0
        };
        assert_eq!(generate(Box::new(cancel)), (LS_CANCELLED, whole[..2].to_vec()));
        assert_eq!(generate(Box::new(|_| 0)), (LS_OK, whole));
        let bad = [9999u32];
        let wrong = ls_sequence { row: 0, tokens: bad.as_ptr(), count: 1 };
        assert_eq!(ls_model_generate(model, &wrong, 1, 1, Some(on_token), ptr::null_mut()), LS_INVALID);
        assert_eq!((ls_model_truncate(model, 1, 0), ls_model_truncate(model, 0, 41)), (LS_INVALID, LS_INVALID));
        assert_eq!((ls_model_close(model), ls_device_close(device)), (LS_OK, LS_OK));
        assert_eq!(ls_model_cancel(model), LS_CLOSED);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_streams_and_computes_through_the_c_api_on_the_caller_s_own_stream() {
    extern "C" fn count(user: *mut c_void, layer: ls_layer) -> i32 {
        // SAFETY: what is passed below; else as the header asks.
        unsafe {
            let tensor: ls_tensor = made(|to| ls_layer_tensor(layer, c"mlp.up_proj.weight".as_ptr(), to));
            *user.cast::<usize>() += tensor.shape[0];
        }
        0
    }
    extern "C" fn keep(user: *mut c_void, _: usize, token: u32) -> i32 {
        // SAFETY: what is passed below.
        unsafe { (*user.cast::<Vec<u32>>()).push(token) };
        0
    }
    if common::gpu().is_none() {
        return;
    }
    let folder = c(speller().to_str().unwrap());
    // SAFETY: as the header asks, but for what is tested.
    unsafe {
        let (cpu, gpu) = (made(|to| ls_device_cpu(to)), made(|to| ls_device_cuda(0, to)));
        let (mut raw, own) = (ptr::null_mut(), made(|to| ls_stream_open(gpu, to)));
        assert_eq!(ls_stream_to_cuda(own, &mut raw), LS_OK);
        let stream = made(|to| ls_stream_from_cuda(gpu, raw, to));
        let elsewhere = made(|to| ls_stream_open(cpu, to));
        let checkpoint = made(|to| ls_checkpoint_open(folder.as_ptr(), to));
        let streamer = made(|to| ls_streamer_open(gpu, checkpoint, ptr::null(), to));
        assert_eq!(ls_next_layer(streamer, elsewhere, &mut NO_LAYER.clone()), LS_INVALID);
        for _ in 0..3 {
            let mut rows = 0usize;
            let pass = ls_run_pass(streamer, stream, Some(count), (&raw mut rows).cast());
            assert_eq!((pass, rows), (LS_OK, 8 * 384), "{}", message());
        }
        assert_eq!((ls_stream_synchronize(stream), ls_streamer_close(streamer)), (LS_OK, LS_OK));

        let prompt = [22u32, 10, 19, 16, 26];
        let [on_cpu, on_gpu] = [cpu, gpu].map(|device| {
            let model = made(|to| ls_model_open(device, folder.as_ptr(), ptr::null(), to));
            let sequence = ls_sequence { row: 0, tokens: prompt.as_ptr(), count: prompt.len() };
            let mut tokens = Vec::<u32>::new();
            let status = ls_model_generate(model, &sequence, 1, 20, Some(keep), (&raw mut tokens).cast());
            assert_eq!((status, ls_model_close(model)), (LS_OK, LS_OK), "{}", message());
            tokens
        });
        assert_eq!(on_gpu, on_cpu);
        for close in [stream, own, elsewhere] {
            assert_eq!(ls_stream_close(close), LS_OK);
        }
        assert_eq!((ls_device_close(cpu), ls_device_close(gpu)), (LS_OK, LS_OK));
        assert_eq!(ls_checkpoint_close(checkpoint), LS_OK);
    }
}
