//! What a tool sees that is attached through NVTX: exactly the ranges of a known run. The tool is `nvtx/injection.c`, and each
//! run has a process of its own, since NVTX looks for a tool once.

mod common;
#[path = "nvtx/tool.rs"]
mod tool;

use std::{
    collections::{BTreeMap, HashMap},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use common::LentSlots;
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device},
    plan::{CachePolicy, Reader, Tier},
    trace::{Activity, Begun, Mark, Observer, Stage},
};

/// Where the child process puts its files.
const CHILD: &str = "LAYER_STREAMER_NVTX_CHILD";
const PAGE: usize = 4096;
const TIERS: [Tier; 6] = [Tier::Disk, Tier::Ram, Tier::Disk, Tier::Pinned, Tier::Gpu, Tier::Disk];

/// Of whole pages, so that every stage moves as many bytes.
fn bytes_of(unit: usize) -> usize {
    PAGE * (3 + 2 * unit)
}

/// Larger than what of a tier's memory is present from the start.
const LATE: usize = 20 << 20;

/// Units of these sizes and tiers, one after the other in a file.
fn units(path: &Path, units: impl Iterator<Item = (usize, Tier)>) -> (Checkpoint, Vec<Unit>) {
    let (mut tensors, mut made, mut end) = (Vec::new(), Vec::new(), 0);
    for (number, (bytes, tier)) in units.enumerate() {
        let name = format!("tensor {number}");
        let mut unit = Unit::new(format!("unit {number}"));
        unit.keep("t", &name).set_tier(tier);
        made.push(unit);
        tensors.push(StoredTensor {
            name,
            file: path.into(),
            offset: end as u64,
            dtype: DType::U8,
            shape: vec![bytes],
        });
        end += bytes;
    }
    fs::write(path, vec![7; end]).unwrap();
    (Checkpoint::from_table(tensors).unwrap(), made)
}

/// What an observer is told, in the words of the tool.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn begin(&self, span: &Begun) {
        let what = match span.activity {
            Activity::Unit { unit, .. } => format!("unit {unit}\t{}", span.bytes),
            Activity::Starved => "starved\t".into(),
            Activity::Blocked => "blocked\t".into(),
        };
        self.0.lock().unwrap().push(format!("{}\t{what}", span.stage));
    }

    fn mark(&self, mark: &Mark) {
        let what = match mark {
            Mark::PassBegun { passes } => format!("pass begins\t{passes}"),
            Mark::PassEnded { passes } => format!("pass ends\t{passes}"),
            Mark::Rewind => "rewind\t".into(),
            Mark::Cancelled => "cancelled\t".into(),
            Mark::Late { unit } => format!("late\t{unit}"),
            Mark::Failed(_) => "failed\t".into(),
            Mark::Leaked { bytes } => format!("leaked\t{bytes}"),
            other => panic!("{other:?}"),
        };
        self.0.lock().unwrap().push(format!("mark\t{what}"));
    }
}

/// The known run: three passes, one with layers held out of order, a rewind, a cancel, a failed read; then memory that is late.
fn known_run(folder: &Path) {
    let told = Arc::new(Told::default());
    let observers = [told.clone() as Arc<dyn Observer>];
    let path = folder.join("weights");
    let (checkpoint, units_made) = units(&path, TIERS.into_iter().enumerate().map(|(i, tier)| (bytes_of(i), tier)));
    let settings = Settings { n_gpu: 2, n_cpu_pinned: 2, n_cpu: 2, ..Settings::default() };
    // Its device memory is lent, so that units are copied and every stage has something to do.
    let lent = LentSlots::new(&checkpoint, &units_made, &settings, Tier::Gpu);
    let mut streamer = lent.streamer(&checkpoint, &units_made, &settings, &observers).unwrap();
    let stream = Cpu.stream().unwrap();
    let pass = |streamer: &mut LayerStreamer<Cpu>| streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(()));
    (0..3).for_each(|_| pass(&mut streamer).unwrap());

    let [first, second] = [(); 2].map(|()| streamer.next(&stream).unwrap());
    second.release().unwrap();
    first.release().unwrap();
    (2..TIERS.len()).for_each(|_| streamer.next(&stream).unwrap().release().unwrap());

    streamer.next(&stream).unwrap().release().unwrap();
    streamer.rewind().unwrap();

    let canceller = streamer.canceller();
    let cancelled = streamer.run_pass(&stream, (), |(), layer| {
        if layer.index() == 1 {
            canceller.cancel();
        }
        Ok::<_, Error>(())
    });
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    pass(&mut streamer).unwrap();

    let before = support::whole(&path);
    fs::write(&path, "gone").unwrap();
    let failed = (0..99).find_map(|_| pass(&mut streamer).err());
    // The latter where all of it had been read before it was cut.
    assert!(matches!(failed, Some(Error::Read { .. } | Error::Checkpoint { .. })), "{failed:?}");
    support::healed(&path, &before);
    pass(&mut streamer).unwrap();
    streamer.close().unwrap();

    let (checkpoint, late) = units(&folder.join("late"), [(LATE, Tier::Ram), (LATE, Tier::Disk)].into_iter());
    let (reader, cache) = (Reader::Pread, CachePolicy::Direct);
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 1, n_cpu: 1, reader, cache, ..Settings::default() };
    let mut streamer = LayerStreamer::with_observers(&Cpu, &checkpoint, &late, &settings, &observers).unwrap();
    pass(&mut streamer).unwrap();
    drop(streamer);
    fs::write(folder.join("told"), told.0.lock().unwrap().join("\n")).unwrap();
}

/// Runs the test called `name` in a process of its own with `variables`; returns the folder that the child was given.
fn run_child(name: &str, variables: &[(&str, &Path)]) -> tempfile::TempDir {
    let folder = support::folder();
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", name, "--nocapture", "--test-threads=1"]).env_remove(tool::ATTACH);
    child.env(CHILD, folder.path()).env(tool::OUT, folder.path().join("calls")).envs(variables.iter().copied());
    let output = child.output().unwrap();
    let [said, errors] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}\n{errors}", output.status);
    folder
}

/// The folder of a child process, in one.
fn child() -> Option<PathBuf> {
    let folder = env::var_os(CHILD)?;
    // A test that hangs is one that fails.
    // SAFETY: no memory is involved.
    unsafe { libc::alarm(120) };
    Some(folder.into())
}

/// A call that the tool got.
#[derive(Clone, Debug)]
struct Call {
    nanos: u64,
    thread: u64,
    kind: String,
    domain: String,
    category: usize,
    message: String,
    payload: Option<u64>,
    /// Of a range: its number. Of a name: what is named.
    range: u64,
}

fn calls(folder: &Path) -> Vec<Call> {
    let text = fs::read_to_string(folder.join("calls")).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    let last = lines.pop().unwrap();
    assert_eq!(last, format!("{}\tcalls", lines.len()), "the tool has lost some");
    let call = |line: &&str| {
        let [nanos, thread, kind, domain, category, message, payload, range] =
            line.split('\t').collect::<Vec<_>>().try_into().unwrap_or_else(|_| panic!("{line}"));
        Call {
            nanos: nanos.parse().unwrap(),
            thread: thread.parse().unwrap(),
            kind: kind.into(),
            domain: domain.into(),
            category: category.parse().unwrap(),
            message: message.into(),
            payload: (!payload.is_empty()).then(|| payload.parse().unwrap()),
            range: range.parse().unwrap(),
        }
    };
    lines.iter().map(call).collect()
}

/// A range: the call that began it and the one that ended it.
type Range = (Call, Call);

/// All ranges in the order in which they began. Each must have its end: in its own thread and last in first out where it was
/// pushed, once and anywhere where it was started.
fn ranges(calls: &[Call]) -> Vec<Range> {
    let (mut pushed, mut started) = (HashMap::<u64, Vec<usize>>::new(), HashMap::<u64, usize>::new());
    let mut ends: BTreeMap<usize, Call> = BTreeMap::new();
    for (index, call) in calls.iter().enumerate() {
        let begun = match call.kind.as_str() {
            "push" => {
                let open = pushed.entry(call.thread).or_default();
                open.push(index);
                assert_eq!(open.len(), 1, "one thing at a time: {call:?}");
                continue;
            }
            "start" => {
                assert!(started.insert(call.range, index).is_none());
                continue;
            }
            "pop" => pushed.get_mut(&call.thread).and_then(Vec::pop),
            "end" => started.remove(&call.range),
            _ => continue,
        };
        let begun = begun.unwrap_or_else(|| panic!("nothing has begun that this ends: {call:?}"));
        assert!(calls[begun].nanos <= call.nanos);
        ends.insert(begun, call.clone());
    }
    assert!(started.is_empty() && pushed.values().all(Vec::is_empty), "ranges without an end");
    ends.into_iter().map(|(begun, end)| (calls[begun].clone(), end)).collect()
}

/// The ranges of a stage in which a unit moves.
fn moves(ranges: &[Range], stage: Stage) -> Vec<&Range> {
    let of = |(begun, _): &&Range| begun.category == stage as usize + 1 && begun.message.starts_with("unit ");
    ranges.iter().filter(of).collect()
}

fn number(range: &Range) -> usize {
    range.0.message.strip_prefix("unit ").unwrap().parse().unwrap()
}

#[test]
fn a_tool_sees_each_range_of_a_known_run_with_its_end_its_bytes_and_its_thread() {
    if let Some(folder) = child() {
        return known_run(&folder);
    }
    let compiled = support::folder();
    let tool = tool::compile(compiled.path(), &[]);
    let name = "a_tool_sees_each_range_of_a_known_run_with_its_end_its_bytes_and_its_thread";
    let folder = run_child(name, &[(tool::ATTACH, &tool)]);
    let calls = calls(folder.path());
    let ranges = ranges(&calls);
    assert!(calls.iter().all(|call| call.domain == "layer-streamer" || call.kind == "thread"));
    let of = |kind: &str| calls.iter().filter(|call| call.kind == kind).cloned().collect::<Vec<_>>();
    assert_eq!(of("domain").len(), 1, "one for both streamers");
    let categories: Vec<_> = of("category").into_iter().map(|call| (call.category, call.message)).collect();
    assert_eq!(categories, Stage::ALL.map(|stage| (stage as usize + 1, stage.name().to_owned())));

    same_as_observed(&folder, &calls, &ranges);
    // The second streamer begins with its memory; the first has too little for such threads.
    let split = of("thread").iter().rposition(|call| call.message == "ls-fault").map(|at| of("thread")[at].nanos);
    let second = split.expect("large kept units are made present by threads");
    let known: Vec<_> = ranges.iter().filter(|(begun, _)| begun.nanos < second).cloned().collect();
    units_move_in_order(&known);
    layers_are_as_they_were_held(&moves(&known, Stage::Compute));
    marks_tell_what_the_caller_did(&calls, second);
    threads_are_named(&of("thread"), &ranges);
}

/// Stage by stage the tool was told what an observer was.
fn same_as_observed(folder: &tempfile::TempDir, calls: &[Call], ranges: &[Range]) {
    let told = fs::read_to_string(folder.path().join("told")).unwrap();
    for stage in Stage::ALL {
        let prefix = format!("{stage}\t");
        let told: Vec<_> = told.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect();
        let seen = ranges.iter().filter(|(begun, _)| begun.category == stage as usize + 1);
        let payload = |call: &Call| call.payload.map_or(String::new(), |bytes| bytes.to_string());
        let seen: Vec<_> = seen.map(|(begun, _)| format!("{}\t{}", begun.message, payload(begun))).collect();
        assert_eq!(seen, told, "{stage}");
        assert!(seen.iter().any(|line| line.starts_with("unit ")), "{stage}");
    }
    let mut told: Vec<_> = told.lines().filter_map(|line| line.strip_prefix("mark\t")).map(str::to_owned).collect();
    let marks = calls.iter().filter(|call| call.kind == "mark").map(|call| {
        let message = if call.message.starts_with("failed: ") { "failed" } else { &call.message };
        format!("{message}\t{}", call.payload.map_or(String::new(), |payload| payload.to_string()))
    });
    let mut marks: Vec<_> = marks.collect();
    // Two threads may tell the two in different orders.
    told.sort();
    marks.sort();
    assert_eq!(marks, told);
}

/// Every stage moves, pass after pass, the units that it must, with their bytes, and from the first on after a rewind.
fn units_move_in_order(ranges: &[Range]) {
    // A rewind, one after the cancel, and one after the failed read.
    const RESTARTS: usize = 3;
    let always =
        |tiers: &[Tier]| -> Vec<usize> { (0..TIERS.len()).filter(|unit| tiers.contains(&TIERS[*unit])).collect() };
    for (stage, first, steady) in [
        (Stage::Read, always(&TIERS), always(&[Tier::Disk])),
        (Stage::Pin, always(&[Tier::Disk, Tier::Ram, Tier::Gpu]), always(&[Tier::Disk, Tier::Ram])),
        (Stage::Transfer, always(&TIERS), always(&[Tier::Disk, Tier::Ram, Tier::Pinned])),
    ] {
        let moves = moves(ranges, stage);
        let numbers: Vec<_> = moves.iter().map(|range| number(range)).collect();
        for range in &moves {
            assert_eq!(range.0.payload, Some(bytes_of(number(range)) as u64), "{stage}: {range:?}");
        }
        assert_eq!(numbers[..first.len()], first, "{stage}, the first pass");
        // Four passes and one that was begun, at least, have been handed on.
        let least = first.len() + 3 * steady.len() + 1;
        assert!(numbers.len() >= least, "{stage}: {numbers:?}");
        let (mut at, mut restarts) = (0, 0);
        for &unit in &numbers[first.len()..] {
            if unit != steady[at] {
                assert_eq!(unit, steady[0], "{stage}: {numbers:?}");
                (at, restarts) = (0, restarts + 1);
            }
            at = (at + 1) % steady.len();
        }
        assert!(restarts <= RESTARTS, "{stage}: {numbers:?}");
    }
}

/// The layers in the order in which the caller took them, and in which it gave them back.
fn layers_are_as_they_were_held(layers: &[&Range]) {
    let all: Vec<_> = (0..TIERS.len()).collect();
    let numbers: Vec<_> = layers.iter().map(|range| number(range)).collect();
    let certain = [&all.repeat(4)[..], &[0], &[0, 1], &all].concat();
    assert_eq!(numbers[..certain.len()], certain);
    // Until the read fails, and the pass after.
    assert_eq!(numbers[numbers.len() - all.len()..], all);
    for range in layers {
        assert_eq!(range.0.payload, Some(bytes_of(number(range)) as u64), "{range:?}");
    }
    let held = &layers[3 * all.len()..];
    assert!(held[1].1.nanos < held[0].1.nanos && held[0].1.nanos <= held[2].0.nanos, "given back out of order");
}

fn marks_tell_what_the_caller_did(calls: &[Call], second: u64) {
    let marks = calls.iter().filter(|call| call.kind == "mark" && call.nanos < second);
    let caller = calls.iter().find(|call| call.message == "pass begins" && call.kind == "mark").unwrap().thread;
    let (by_caller, by_stages): (Vec<&Call>, Vec<&Call>) = marks.partition(|call| call.thread == caller);
    let by_caller: Vec<_> = by_caller.iter().map(|call| (call.message.as_str(), call.payload)).collect();
    let (begins, ends, rewind) =
        (|passes| ("pass begins", Some(passes)), |passes| ("pass ends", Some(passes)), ("rewind", None));
    let passes = (0..4).flat_map(|pass| [begins(pass), ends(pass + 1)]);
    let rest = [begins(4), rewind, begins(4), ("cancelled", None), rewind, begins(4), ends(5)];
    let certain: Vec<_> = passes.chain(rest).collect();
    assert_eq!(by_caller[..certain.len()], certain);
    // Passes until the read fails, and the one after.
    let failed = by_caller.iter().rposition(|mark| *mark == rewind).unwrap();
    let done = by_caller[failed + 1].1.unwrap();
    let mut until: Vec<_> = (5..done).flat_map(|pass| [begins(pass), ends(pass + 1)]).collect();
    until.extend([begins(done), rewind, begins(done), ends(done + 1)]);
    assert_eq!(by_caller[certain.len()..], until);
    let [failure] = &by_stages[..] else { panic!("{by_stages:?}") };
    // The tool keeps the beginning of the message.
    let causes = ["cannot read tensor", "/weights"];
    assert!(causes.iter().any(|cause| failure.message.contains(cause)), "{failure:?}");
    let late: Vec<_> = calls.iter().filter(|call| call.message == "late" && call.kind == "mark").collect();
    assert!(matches!(late[..], [mark] if mark.payload == Some(0) && mark.nanos > second), "{late:?}");
}

/// Every thread of the pipeline has named itself, and the stages' ranges come from theirs.
fn threads_are_named(named: &[Call], ranges: &[Range]) {
    let with = |name: &str| named.iter().filter(|call| call.message == name).map(|call| call.range).collect::<Vec<_>>();
    assert!(named.iter().all(|call| call.thread == call.range), "each names itself");
    for stage in [Stage::Read, Stage::Pin, Stage::Transfer] {
        let threads = with(&format!("ls-{stage}"));
        // Nothing is pinned where units are used in place, as in the second streamer.
        assert_eq!(threads.len(), if stage == Stage::Pin { 1 } else { 2 }, "{stage}, of both streamers");
        let mut of = ranges.iter().filter(|(begun, _)| begun.category == stage as usize + 1);
        assert!(of.all(|(begun, _)| threads.contains(&begun.thread)), "{stage}");
    }
    let copiers = std::thread::available_parallelism().unwrap().get().min(8) - 1;
    assert_eq!(with("ls-pin-copy").len(), copiers);
    assert!(!with("ls-fault").is_empty() && !with("ls-pread").is_empty());
}

#[test]
fn without_a_tool_or_with_one_that_cannot_be_used_a_run_goes_as_ever_and_nothing_is_recorded() {
    if let Some(folder) = child() {
        return known_run(&folder);
    }
    let name = "without_a_tool_or_with_one_that_cannot_be_used_a_run_goes_as_ever_and_nothing_is_recorded";
    let compiled = support::folder();
    let refuses = tool::compile(compiled.path(), &["-DREFUSES"]);
    let [nowhere, text] = ["nowhere.so", "text.so"].map(|name| compiled.path().join(name));
    fs::write(&text, "no library").unwrap();
    let libc = Path::new("libc.so.6");
    for variables in [&[][..], &[(tool::ATTACH, nowhere.as_path())], &[(tool::ATTACH, &text)], &[(tool::ATTACH, libc)]]
    {
        let folder = run_child(name, variables);
        assert!(folder.path().join("told").exists() && !folder.path().join("calls").exists(), "{variables:?}");
    }
    // It is loaded, and says that it cannot work.
    let folder = run_child(name, &[(tool::ATTACH, &refuses)]);
    assert!(folder.path().join("told").exists() && calls(folder.path()).is_empty());
}

#[cfg(feature = "capi")]
#[test]
fn the_c_api_shows_the_same() {
    use layer_streamer::capi::{ls_status::LS_OK, *};

    if child().is_some() {
        let speller = std::ffi::CString::new(support::speller().to_str().unwrap()).unwrap();
        let [mut device, mut checkpoint, mut stream, mut streamer] = [0u64; 4];
        extern "C" fn nothing(_: *mut libc::c_void, _: ls_layer) -> i32 {
            0
        }
        // SAFETY: the handles are structures of one word, and open when they are used.
        unsafe {
            assert_eq!(ls_device_cpu((&raw mut device).cast()), LS_OK);
            let device = ls_device { id: device };
            assert_eq!(ls_stream_open(device, (&raw mut stream).cast()), LS_OK);
            assert_eq!(ls_checkpoint_open(speller.as_ptr(), (&raw mut checkpoint).cast()), LS_OK);
            let checkpoint = ls_checkpoint { id: checkpoint };
            assert_eq!(ls_streamer_open(device, checkpoint, std::ptr::null(), (&raw mut streamer).cast()), LS_OK);
            let (streamer, stream) = (ls_streamer { id: streamer }, ls_stream { id: stream });
            assert_eq!(ls_run_pass(streamer, stream, Some(nothing), std::ptr::null_mut()), LS_OK);
            assert_eq!((ls_streamer_close(streamer), ls_stream_close(stream)), (LS_OK, LS_OK));
        }
        return;
    }
    let compiled = support::folder();
    let tool = tool::compile(compiled.path(), &[]);
    let folder = run_child("the_c_api_shows_the_same", &[(tool::ATTACH, &tool)]);
    let calls = calls(folder.path());
    let layers = ranges(&calls).into_iter().filter(|(begun, _)| begun.category == 4 && begun.payload.is_some());
    let names: Vec<_> = layers.map(|(begun, _)| begun.message).collect();
    let layers = Checkpoint::open(support::speller()).unwrap().layers().unwrap();
    assert_eq!(names, layers.iter().map(|unit| unit.name().to_owned()).collect::<Vec<_>>());
    let marks: Vec<_> = calls.iter().filter(|call| call.kind == "mark").map(|call| call.message.as_str()).collect();
    assert_eq!(marks, ["pass begins", "pass ends"]);
}

#[cfg(cuda_emulated)]
#[test]
fn streams_of_a_gpu_are_named() {
    use layer_streamer::{
        device::Cuda,
        plan::{Arrival, ArrivalOp},
    };

    if let Some(folder) = child() {
        let table: Vec<_> = ["f16", "u8"].map(|name| (name, folder.join(name))).into();
        let stored = table.iter().map(|(name, file)| {
            fs::write(file, vec![0; PAGE]).unwrap();
            let dtype = if *name == "f16" { DType::F16 } else { DType::U8 };
            StoredTensor {
                name: (*name).into(),
                file: file.clone(),
                offset: 0,
                dtype,
                shape: vec![PAGE / dtype.size()],
            }
        });
        let checkpoint = Checkpoint::from_table(stored).unwrap();
        let mut unit = Unit::new("both");
        unit.keep("u8", "u8");
        unit.add(Arrival { output: "f16".into(), inputs: vec!["f16".into()], op: ArrivalOp::To(DType::F32) });
        let device = Cuda::new(0).unwrap();
        let stream = device.stream().unwrap();
        let mut streamer = LayerStreamer::new(&device, &checkpoint, &[unit], &Settings::default()).unwrap();
        return streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap();
    }
    let compiled = support::folder();
    let tool = tool::compile(compiled.path(), &[]);
    let folder = run_child("streams_of_a_gpu_are_named", &[(tool::ATTACH, &tool)]);
    let mut streams: Vec<_> =
        calls(folder.path()).into_iter().filter(|call| call.kind == "stream").map(|call| call.message).collect();
    streams.sort();
    assert_eq!(streams, ["layer-streamer compute", "layer-streamer convert", "layer-streamer transfer"]);
}
