//! Options of the C API filled with anything: numbers of any size, structures of any length, pointers that are NULL or point to what
//! the header asks for, handles that were never opened. A status each time, nothing written unless that is LS_OK, and what is
//! open beside it goes on. How long, and from which seed: see `common/fuzz.rs`.

mod common;

use std::{
    cell::Cell,
    ffi::{CStr, CString, c_char, c_void},
    hash::{DefaultHasher, Hasher},
    mem, ptr, slice,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use layer_streamer::capi::{ls_status::*, *};
use support::{
    fuzz::{number, rounds},
    speller,
};

/// As long as a structure may be, and a little more.
const LONGEST: usize = 4096 + 64;
/// What no call writes.
const UNTOUCHED: u64 = 0x5eed_5eed_5eed_5eed;

fn message() -> String {
    // SAFETY: it is never NULL, and the library's until the next failure.
    unsafe { CStr::from_ptr(ls_last_error()) }.to_str().unwrap().to_owned()
}

/// Whether a call did it; else it has said why not, and that is no bug of the library's.
fn did(status: ls_status) -> bool {
    assert!(status == LS_OK || !message().is_empty(), "{status:?} without a message");
    assert!(![LS_PANICKED, LS_LEAKED, LS_BUSY].contains(&status), "{status:?}: {}", message());
    status == LS_OK
}

/// The handle that a call wrote, if it did it.
fn handle<T: Copy>(call: impl FnOnce(*mut T) -> ls_status) -> Option<T> {
    assert_eq!(size_of::<T>(), 8);
    let mut to = UNTOUCHED;
    let status = call((&raw mut to).cast());
    assert_eq!(status == LS_OK, to != UNTOUCHED, "{status:?}");
    // SAFETY: handles are as long as a number, and any number is one.
    did(status).then(|| unsafe { (&raw const to).cast::<T>().read() })
}

/// Any number of a structure that may be read or written to its longest, with this at its start.
struct Structure([u64; LONGEST / 8]);

impl Structure {
    /// Of any bytes behind it, or of zeros.
    fn of<T: Copy>(value: T, rng: &mut fastrand::Rng) -> Self {
        let any = rng.u8(..4) == 0;
        let mut words = [0; LONGEST / 8].map(|_: u64| if any { rng.u64(..) } else { 0 });
        // SAFETY: it is shorter, and aligned as the words are.
        unsafe { words.as_mut_ptr().cast::<T>().write(value) };
        words[0] = match rng.u8(..8) {
            0 => number(rng) as u64,
            1 => 8 * rng.u64(..600),
            _ => size_of::<T>() as u64,
        };
        Self(words)
    }

    /// Where it is; sometimes nowhere, or where none can be.
    fn at<T>(&mut self, rng: &mut fastrand::Rng) -> *mut T {
        match rng.u8(..40) {
            0 => ptr::null_mut(),
            1 => self.0.as_mut_ptr().wrapping_byte_add(rng.usize(1..8)).cast(),
            _ => self.0.as_mut_ptr().cast(),
        }
    }
}

/// A number of slots, rows or bytes that is either small or refused: what lies between is memory that a test should not take.
fn small_or_huge(rng: &mut fastrand::Rng, usual: usize) -> usize {
    match rng.u8(..24) {
        0..17 => usual,
        17..22 => rng.usize(..4),
        _ => number(rng).max(1 << 17),
    }
}

/// A code of an enumeration.
fn code(rng: &mut fastrand::Rng) -> i32 {
    match rng.u8(..16) {
        0 => rng.i32(..),
        1 => rng.i32(-1..6),
        _ => rng.i32(0..3),
    }
}

static TOLD: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_progress(_: *mut c_void, progress: *const ls_progress) {
    // SAFETY: the library's.
    let ls_progress { done, units, .. } = unsafe { *progress };
    assert!(done <= units);
    TOLD.fetch_add(1, Relaxed);
}

extern "C" fn on_log(_: *mut c_void, level: i32, message: *const c_char) {
    // SAFETY: the library's, for this call.
    let message = unsafe { CStr::from_ptr(message) }.to_str().unwrap();
    assert!((0..3).contains(&level) && !message.is_empty() && !message.contains('\n'), "{message:?}");
    TOLD.fetch_add(1, Relaxed);
}

extern "C" fn on_token(_: *mut c_void, _: usize, _: u32) -> i32 {
    0
}

/// Sums up a layer's bytes.
extern "C" fn on_layer(user: *mut c_void, layer: ls_layer) -> i32 {
    // SAFETY: what is passed below; the layer is held, and its memory is RAM.
    unsafe {
        let sum = &mut *user.cast::<DefaultHasher>();
        for index in 0.. {
            let mut tensor: ls_tensor = mem::zeroed();
            if ls_layer_tensor_at(layer, index, &mut tensor) != LS_OK {
                break;
            }
            let elements: usize = tensor.shape[..tensor.rank as usize].iter().product();
            let size = [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8][tensor.dtype as usize];
            sum.write(slice::from_raw_parts(tensor.data.cast(), elements * size));
        }
    }
    0
}

/// The sum of a pass, if it went well.
fn pass(streamer: ls_streamer, stream: ls_stream) -> Option<u64> {
    let mut sum = DefaultHasher::new();
    // SAFETY: as the header asks.
    let status = unsafe { ls_run_pass(streamer, stream, Some(on_layer), (&raw mut sum).cast()) };
    did(status).then(|| sum.finish())
}

/// Memory to lend: on a boundary of pages.
struct Lent(Vec<u8>, usize);

impl Lent {
    fn new(bytes: usize) -> Self {
        let memory = vec![0u8; bytes + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        Self(memory, skip)
    }

    /// Some of it, sometimes from where none can begin.
    fn range(&mut self, rng: &mut fastrand::Rng) -> (*mut c_void, usize) {
        let from = [0, 0, 0, 0, 4096, 256, 8, 1][rng.usize(..8)];
        let most = self.0.len() - self.1 - from;
        let bytes = if rng.u8(..4) == 0 { rng.usize(..=most) } else { most };
        (self.0[self.1 + from..].as_mut_ptr().cast(), bytes)
    }
}

/// What texts may be, and NULL.
struct Texts(Vec<CString>);

impl Texts {
    fn new(texts: &[&[u8]]) -> Self {
        Self(texts.iter().map(|text| CString::new(*text).unwrap()).collect())
    }

    fn any(&self, rng: &mut fastrand::Rng) -> *const c_char {
        rng.choice(&self.0).map_or(ptr::null(), |text| text.as_ptr())
    }
}

/// What options may point to.
struct Pointed {
    tiers: Texts,
    traces: Texts,
    names: Texts,
    stored: Texts,
    lent: [Lent; 3],
    tensors: Vec<ls_unit_tensor>,
    units: Vec<ls_unit>,
}

impl Pointed {
    fn new(folder: &std::path::Path, stored: &[&[u8]]) -> Self {
        let at = |name: &str| folder.join(name).into_os_string().into_encoded_bytes();
        let traces =
            [at("t.html"), at("t.json"), at("t.txt"), at("missing/t.html"), b"\xff.html/x.json".to_vec(), vec![]];
        let tiers: [&[u8]; 9] = [
            b"",
            b"0-7=pinned",
            b"0=gpu,3-5=ram",
            b"0-1=disk,0=ram",
            b"0=gpu",
            b"7-0=gpu",
            b"99=ram",
            b"0-18446744073709551615=gpu",
            b"\xff=gpu",
        ];
        Self {
            tiers: Texts::new(&tiers),
            traces: Texts::new(&traces.each_ref().map(Vec::as_slice)),
            names: Texts::new(&[b"a", b"b", b"c", b"d", b"", b"\xc3\x28", b"with\nline"]),
            stored: Texts::new(&[stored, &[b"none", b"\xff"]].concat()),
            lent: [0; 3].map(|_| Lent::new(16 << 20)),
            tensors: Vec::new(),
            units: Vec::new(),
        }
    }

    /// Units of the caller's, made anew.
    fn units(&mut self, rng: &mut fastrand::Rng) -> (*const ls_unit, usize) {
        let careless = rng.u8(..3) == 0;
        let or_null = |text: *const c_char, rng: &mut fastrand::Rng| match careless && rng.u8(..12) == 0 {
            true => ptr::null(),
            false => text,
        };
        self.tensors.clear();
        for index in 0..12 {
            let name = if careless { self.names.any(rng) } else { self.names.0[index % 4].as_ptr() };
            let which = if careless { rng.usize(..self.stored.0.len()) } else { rng.usize(..self.stored.0.len() - 2) };
            let dtype = if careless { rng.i32(-1..17) } else { [0, 0, 12, 9][rng.usize(..4)] };
            let stored = or_null(self.stored.0[which].as_ptr(), rng);
            let [rows, columns] = if careless { [rng.usize(..3), rng.usize(..3)] } else { [0; 2] };
            self.tensors.push(ls_unit_tensor { name: or_null(name, rng), stored, dtype, rows, columns });
        }
        self.units.clear();
        for start in [0, 4, 8] {
            let name = if careless { self.names.any(rng) } else { self.names.0[0].as_ptr() };
            let tensors = if careless && rng.u8(..12) == 0 { ptr::null() } else { self.tensors[start..].as_ptr() };
            let count = if careless && rng.u8(..9) == 0 { number(rng).max(usize::MAX >> 5) } else { rng.usize(..5) };
            self.units.push(ls_unit { name: or_null(name, rng), tensors, count, tier: code(rng) });
        }
        let count = if rng.u8(..12) == 0 { number(rng).max(usize::MAX >> 5) } else { rng.usize(..4) };
        (self.units.as_ptr(), count)
    }

    /// Options of a streamer, and whether it streams the layers as they are.
    fn options(&mut self, rng: &mut fastrand::Rng) -> (ls_streamer_options, bool) {
        // SAFETY: the size is the structure's.
        let mut options = unsafe {
            let mut options = mem::MaybeUninit::uninit();
            let status = ls_streamer_options_init(options.as_mut_ptr(), size_of::<ls_streamer_options>());
            assert_eq!(status, LS_OK);
            options.assume_init()
        };
        let ls_streamer_options { n_gpu, n_cpu_pinned, n_cpu, .. } = options;
        options.n_gpu = small_or_huge(rng, n_gpu);
        options.n_cpu_pinned = small_or_huge(rng, n_cpu_pinned);
        options.n_cpu = small_or_huge(rng, n_cpu);
        options.batch_gpu = small_or_huge(rng, 0);
        options.batch_cpu_pinned = small_or_huge(rng, 0);
        options.batch_cpu = small_or_huge(rng, 0);
        (options.reader, options.cache) = (code(rng), code(rng));
        // What users are given may be anything.
        (options.progress_user, options.log_user) = (number(rng) as *mut c_void, number(rng) as *mut c_void);
        options.progress = rng.bool().then_some(on_progress as _);
        options.log = rng.bool().then_some(on_log as _);
        if rng.u8(..3) == 0 {
            (options.units, options.unit_count) = self.units(rng);
        } else if rng.u8(..20) == 0 {
            options.unit_count = number(rng);
        }
        let budget = rng.u8(..3) == 0;
        if budget {
            options.host_budget = match rng.u8(..3) {
                0 => number(rng),
                1 => usize::MAX,
                _ => rng.usize(..8 << 20),
            };
        }
        if rng.u8(..if budget { 4 } else { 20 }) == 0 {
            options.device_budget = number(rng);
        }
        if rng.u8(..if budget { 2 } else { 20 }) == 0 {
            options.pack = code(rng) as u64;
        }
        if rng.u8(..if budget { 20 } else { 3 }) == 0 {
            options.tiers = self.tiers.any(rng);
        }
        if rng.u8(..if budget { 20 } else { 4 }) == 0 {
            let [ram, pinned, gpu] = self.lent.each_mut().map(|lent| lent.range(rng));
            let given =
                |range, rng: &mut fastrand::Rng| if rng.u8(..3) == 0 { (ptr::null_mut(), number(rng)) } else { range };
            (options.ram_memory, options.ram_bytes) = given(ram, rng);
            (options.pinned_memory, options.pinned_bytes) = given(pinned, rng);
            (options.gpu_memory, options.gpu_bytes) = given(gpu, rng);
        }
        if rng.u8(..6) == 0 {
            options.trace = self.traces.any(rng);
        }
        (options, options.units.is_null())
    }
}

#[test]
fn options_of_anything_are_taken_or_refused_and_the_library_goes_on() {
    let folder = support::folder();
    let path = CString::new(speller().into_os_string().into_encoded_bytes()).unwrap();
    // SAFETY: as the header asks, but for what is tested: lengths, numbers and handles.
    unsafe {
        let device = handle(|to| ls_device_cpu(to)).unwrap();
        let stream = handle(|to| ls_stream_open(device, to)).unwrap();
        let checkpoint = handle(|to| ls_checkpoint_open(path.as_ptr(), to)).unwrap();
        let lasting: ls_streamer = handle(|to| ls_streamer_open(device, checkpoint, ptr::null(), to)).unwrap();
        let sum = pass(lasting, stream).unwrap();
        let names: Vec<&[u8]> = (0..9)
            .map(|index| {
                let mut tensor: ls_stored_tensor = mem::zeroed();
                assert_eq!(ls_checkpoint_tensor_at(checkpoint, index, &mut tensor), LS_OK);
                CStr::from_ptr(tensor.name).to_bytes()
            })
            .collect();
        let (mut pointed, round) = (Pointed::new(folder.path(), &names), Cell::new(0u64));
        let [opened, planned, modelled] = [const { Cell::new(0) }; 3];
        let count = |of: &Cell<u64>| of.set(of.get() + 1);
        rounds("options", |rng| {
            count(&round);
            let id = |id: u64, rng: &mut fastrand::Rng| if rng.u8(..30) == 0 { number(rng) as u64 } else { id };
            let (of_device, of_checkpoint) =
                (ls_device { id: id(device.id, rng) }, ls_checkpoint { id: id(checkpoint.id, rng) });
            let (options, as_they_are) = pointed.options(rng);
            let mut options = Structure::of(options, rng);
            let taken = match rng.u8(..8) {
                0 => {
                    let (to, size) = (options.at(rng), options.0[0] as usize);
                    did(ls_streamer_options_init(to, size))
                }
                1 => {
                    let size = options.0[0] as usize;
                    did(ls_model_options_init(options.at(rng), size))
                }
                2 => {
                    let mut memory = Structure::of(mem::zeroed::<ls_memory>(), rng);
                    let before = memory.0;
                    let (from, to) = (options.at(rng), memory.at(rng));
                    let done = did(ls_streamer_memory(of_checkpoint, from, to));
                    assert!(done || memory.0 == before, "written after an error");
                    if done {
                        count(&planned);
                    }
                    done
                }
                3 => {
                    let value = ls_model_options {
                        size: 0,
                        batch: small_or_huge(rng, 1),
                        context: if rng.bool() { 0 } else { number(rng) },
                        streamer: if rng.u8(..3) == 0 { ptr::null() } else { options.at(rng) },
                    };
                    let mut value = Structure::of(value, rng);
                    let from = value.at(rng);
                    match handle(|to| ls_model_open(of_device, path.as_ptr(), from, to)) {
                        Some(model) => {
                            use_model(model, rng);
                            count(&modelled);
                            true
                        }
                        None => false,
                    }
                }
                _ => {
                    let from: *mut ls_streamer_options = options.at(rng);
                    let as_they_are = as_they_are || from.is_null();
                    match handle(|to| ls_streamer_open(of_device, of_checkpoint, from, to)) {
                        Some(streamer) => {
                            let found = pass(streamer, stream);
                            assert!(!as_they_are || found == Some(sum), "{}", message());
                            let mut stats = Structure::of(mem::zeroed::<ls_stats>(), rng);
                            did(ls_streamer_stats(streamer, stats.at(rng)));
                            assert!(did(ls_streamer_close(streamer)));
                            count(&opened);
                            true
                        }
                        None => false,
                    }
                }
            };
            if round.get().is_multiple_of(16) {
                assert_eq!(pass(lasting, stream), Some(sum), "{}", message());
            }
            taken
        });
        let [opened, planned, modelled] = [opened, planned, modelled].map(|of| of.get());
        println!("options: {opened} streamers, {planned} plans, {modelled} models, {} lines", TOLD.load(Relaxed));
        assert_eq!(pass(lasting, stream), Some(sum));
        assert_eq!((ls_streamer_close(lasting), ls_stream_close(stream)), (LS_OK, LS_OK));
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

/// Any numbers, most of them within their range.
fn any_sampling(rng: &mut fastrand::Rng) -> ls_sampling {
    let mut float = |most: f64| match rng.u8(..24) {
        0 => f64::from_bits(rng.u64(..)),
        1 => [f64::NAN, f64::INFINITY, -0.0, -1.0, f64::MAX, f64::MIN_POSITIVE][rng.usize(..6)],
        _ => most * rng.f64(),
    };
    let [temperature, top_p, min_p, repetition_penalty, presence_penalty] = [2.0, 1.0, 1.0, 2.0, 2.0].map(&mut float);
    let (top_k, seed) = (number(rng), rng.u64(..));
    ls_sampling { size: 0, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed }
}

/// A token or two of a model, which is closed.
///
/// # Safety
/// It is open.
unsafe fn use_model(model: ls_model, rng: &mut fastrand::Rng) {
    let tokens = [22u32, 10];
    // SAFETY: the caller's, and as the header asks.
    unsafe {
        let mut info = Structure::of(mem::zeroed::<ls_model_info>(), rng);
        did(ls_model_describe(model, info.at(rng)));
        let count = if rng.u8(..9) == 0 { number(rng).min(2) } else { 2 };
        let row = if rng.u8(..9) == 0 { number(rng) } else { 0 };
        let sequence = ls_sequence { row, tokens: tokens.as_ptr(), count };
        did(ls_model_generate(model, &sequence, 1, 1 + rng.usize(..2), Some(on_token), ptr::null_mut()));
        let mut suggested = Structure::of(mem::zeroed::<ls_sampling>(), rng);
        did(ls_model_suggested_sampling(model, suggested.at(rng)));
        let mut sampling = Structure::of(any_sampling(rng), rng);
        did(ls_model_sample(model, &sequence, 1, 2, sampling.at(rng), Some(on_token), ptr::null_mut()));
        assert!(did(ls_model_close(model)));
    }
}
