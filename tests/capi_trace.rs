//! The trace that the C API writes: refused before anything is opened, or a file when the streamer is closed.

use std::{
    ffi::{CStr, CString, c_void},
    fs, mem,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    ptr,
};

use layer_streamer::capi::{ls_status::*, *};
use serde_json::Value;

/// The model that comes with the project.
fn speller() -> CString {
    CString::new(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/speller")).unwrap()
}

/// Opens the model with this trace, and returns how that ended.
fn open(trace: &Path) -> (ls_status, ls_model) {
    let (trace, mut model) = (CString::new(trace.as_os_str().as_bytes()).unwrap(), ls_model { id: 0 });
    // SAFETY: what is handed over lives as long as the calls, and the sizes are the structures' own.
    let status = unsafe {
        let (mut streamer, mut options, mut device) = (mem::zeroed(), mem::zeroed(), mem::zeroed());
        assert_eq!(ls_streamer_options_init(&mut streamer, size_of::<ls_streamer_options>()), LS_OK);
        assert_eq!(ls_model_options_init(&mut options, size_of::<ls_model_options>()), LS_OK);
        assert_eq!(ls_device_cpu(&mut device), LS_OK);
        streamer.trace = trace.as_ptr();
        options.streamer = &streamer;
        let status = ls_model_open(device, speller().as_ptr(), &options, &mut model);
        assert_eq!(ls_device_close(device), LS_OK);
        status
    };
    (status, model)
}

fn generate(model: ls_model) {
    extern "C" fn take(_: *mut c_void, _: usize, _: u32) -> i32 {
        0
    }
    let sequence = ls_sequence { row: 0, tokens: [1, 2, 3].as_ptr(), count: 3 };
    // SAFETY: as above.
    assert_eq!(unsafe { ls_model_generate(model, &sequence, 1, 4, Some(take), ptr::null_mut()) }, LS_OK);
}

fn message() -> String {
    // SAFETY: it is never NULL, and the library's until the next failure.
    unsafe { CStr::from_ptr(ls_last_error()) }.to_str().unwrap().to_owned()
}

fn names(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_trace_is_written_when_the_model_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let [json, html] = ["trace.json", "trace.html"].map(|name| folder.path().join(name));
    for path in [&json, &html] {
        let (status, model) = open(path);
        assert_eq!(status, LS_OK, "{}", message());
        generate(model);
        assert!(!path.exists(), "it is written in one piece, at the end");
        assert_eq!(ls_model_close(model), LS_OK, "{}", message());
    }
    let trace: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let layers = events.iter().filter(|event| event["ph"] == "X" && event["name"].as_str().unwrap().contains("layer"));
    assert!(layers.count() >= 8 * 2, "each layer is read, and computed");
    let page = fs::read_to_string(&html).unwrap();
    assert!(page.contains("bound by"), "the verdict is in it");
    assert_eq!(names(folder.path()).len(), 2, "nothing is left beside the two");
}

#[test]
fn a_trace_that_cannot_be_written_is_refused_before_anything_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    for (name, expected) in [("missing/trace.json", LS_IO), (".", LS_INVALID), ("trace.svg", LS_INVALID)] {
        let (status, model) = open(&folder.path().join(name));
        assert_eq!((status, model.id), (expected, 0), "{name}: {}", message());
        assert!(message().contains("trace"), "{}", message());
    }
    assert!(names(folder.path()).is_empty());
}

#[test]
fn where_the_trace_is_lost_the_model_is_closed_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let (status, model) = open(&inner.join("trace.json"));
    assert_eq!(status, LS_OK, "{}", message());
    generate(model);
    fs::remove_dir_all(&inner).unwrap();
    assert_eq!(ls_model_close(model), LS_IO);
    assert!(message().contains("trace.json"), "{}", message());
    assert_eq!(ls_model_close(model), LS_CLOSED);
}

#[test]
fn a_question_about_memory_takes_no_place_for_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let path = CString::new(folder.path().join("missing/trace.json").as_os_str().as_bytes()).unwrap();
    // SAFETY: as above.
    unsafe {
        let (mut options, mut checkpoint, mut memory): (_, _, ls_memory) =
            (mem::zeroed(), mem::zeroed(), mem::zeroed());
        assert_eq!(ls_streamer_options_init(&mut options, size_of::<ls_streamer_options>()), LS_OK);
        assert_eq!(ls_checkpoint_open(speller().as_ptr(), &mut checkpoint), LS_OK);
        (options.trace, memory.size) = (path.as_ptr(), size_of::<ls_memory>());
        assert_eq!(ls_streamer_memory(checkpoint, &options, &mut memory), LS_OK, "{}", message());
        assert_eq!(ls_checkpoint_close(checkpoint), LS_OK);
    }
}
