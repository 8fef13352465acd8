//! What observers see: every span that begins ends, in order and with its bytes, whatever happens; the device's own time; and
//! passes judged by what they waited for.

use std::{
    collections::HashMap,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    io::faults::Attempt,
    pipeline::copiers,
    trace::{Activity, Begun, Bound, Mark, Observer, PassStats, Span, Stage, Verdict},
};

/// Everything that was seen, in its order by stage.
#[derive(Default)]
struct SeenSpans {
    begun: Mutex<Vec<Begun>>,
    ended: Mutex<Vec<Span>>,
    on_device: Mutex<Vec<Span>>,
    marks: Mutex<Vec<Mark>>,
    untimed: AtomicUsize,
    times_device: bool,
}

impl Observer for SeenSpans {
    fn begin(&self, span: &Begun) {
        self.begun.lock().unwrap().push(*span);
    }

    fn end(&self, span: &Span) {
        self.ended.lock().unwrap().push(*span);
    }

    fn on_device(&self, span: &Span) {
        self.on_device.lock().unwrap().push(*span);
    }

    fn mark(&self, mark: &Mark) {
        self.marks.lock().unwrap().push(mark.clone());
    }

    fn untimed(&self, stage: Stage) {
        self.untimed.fetch_add(usize::from(stage == Stage::Compute), Relaxed);
    }

    fn times_device(&self) -> bool {
        self.times_device
    }
}

impl Case {
    fn observed(&self, seen: &Arc<SeenSpans>) -> LayerStreamer<AsyncCpu> {
        let Case { fixture: Fixture { checkpoint, .. }, units, settings, device, .. } = self;
        let settings = Settings { reader: self.streamer().stats().reader, ..settings.clone() };
        let observer: Arc<dyn Observer> = seen.clone();
        LayerStreamer::with_observers(device, checkpoint, units, &settings, &[observer]).unwrap()
    }
}

/// The units of a stage's spans, in the order in which they began, and the bytes of those that were moved to the end.
fn units_of(spans: &[Span], stage: Stage) -> Vec<(usize, u64, usize)> {
    let units = spans.iter().filter(|span| span.stage == stage).filter_map(|span| match span.activity {
        Activity::Unit { unit, pass } => Some((unit, pass, span.bytes)),
        _ => None,
    });
    units.collect()
}

#[test]
fn every_span_that_begins_ends_once_whatever_happens() {
    for seed in 0..cases(40).into() {
        let mut case = Case::new(seed);
        let (seen, streams) = (Arc::new(SeenSpans::default()), [case.device.stream().unwrap()]);
        let mut streamer = case.observed(&seen);
        let units = case.units.len();
        case.take(&streamer, &streams, units + seed as usize % units);
        streamer.canceller().cancel();
        assert!(matches!(streamer.next(&streams[0]).err(), None | Some(Error::Cancelled)));
        streamer.rewind().unwrap();
        case.take(&streamer, &streams, units);
        drop(streamer);
        case.device.drain(&streams[0]).unwrap();
        assert_eq!(case.wrong.load(SeqCst), 0, "seed {seed}");
        let mut open = HashMap::<_, i32>::new();
        let name = |stage: Stage, activity: Activity, start: Instant| (stage, format!("{activity:?}"), start);
        for begun in seen.begun.lock().unwrap().iter() {
            *open.entry(name(begun.stage, begun.activity, begun.start)).or_default() += 1;
        }
        for span in seen.ended.lock().unwrap().iter() {
            *open.entry(name(span.stage, span.activity, span.start)).or_default() -= 1;
            assert!(span.end >= span.start);
        }
        assert!(open.values().all(|count| *count == 0), "seed {seed}: {open:?}");
        let marks = seen.marks.lock().unwrap();
        let passes = marks.iter().filter(|mark| matches!(mark, Mark::PassEnded { .. })).count();
        assert!(passes >= 2, "{marks:?}");
        assert_eq!(marks.iter().filter(|mark| matches!(mark, Mark::Rewind)).count(), 1);
    }
}

#[test]
fn stages_tell_of_each_unit_that_moves_in_order_with_its_bytes_and_of_no_other() {
    let mut case = Case::new(11);
    let units = case.units.len();
    for (number, unit) in case.units.iter_mut().enumerate() {
        unit.set_tier(TIERS[number % 4]);
    }
    case.settings = Settings { n_cpu_pinned: 2, n_cpu: 2, ..Settings::default() };
    // Nothing is delayed, and no memory of the device's late.
    case.device.pace_copies(Duration::ZERO);
    let (seen, stream) = (Arc::new(SeenSpans::default()), case.device.stream().unwrap());
    let mut streamer = case.observed(&seen);
    for _ in 0..3 {
        streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap();
    }
    let plan = streamer.plan.clone();
    let stats = streamer.stats();
    drop(streamer);
    let ended = seen.ended.lock().unwrap();
    let marks = seen.marks.lock().unwrap();
    let is_late = |unit: usize| marks.iter().any(|mark| matches!(mark, Mark::Late { unit: late } if *late == unit));
    let expected = |moves: fn(Tier) -> bool, bytes: fn(&crate::layout::UnitLayout) -> usize| -> Vec<_> {
        let all = (0..3u64).flat_map(|pass| (0..units).map(move |unit| (unit, pass)));
        let moves = |unit: usize, pass: u64| {
            // Units whose memory was late are read once more.
            pass == 0 || pass == 1 && is_late(unit) || moves(plan.units[unit].tier)
        };
        all.filter(|&(unit, pass)| bytes(&plan.units[unit]) > 0 && moves(unit, pass))
            .map(|(unit, pass)| (unit, pass, bytes(&plan.units[unit])))
            .collect()
    };
    // Stages run ahead of the pass that the caller takes.
    let three = |stage| -> Vec<_> {
        let all = units_of(&ended, stage).into_iter().filter(|(_, pass, bytes)| *pass < 3 && *bytes > 0);
        let mut all: Vec<_> = all.collect();
        // Reads of neighbours may end in any order.
        all.sort_by_key(|(unit, pass, _)| (*pass, *unit));
        all
    };
    assert_eq!(three(Stage::Read), expected(|tier| tier == Tier::Disk, |unit| unit.read_bytes));
    // The second reading of a unit that was late may begin before the first has been copied. That copy then stays, and there is no
    // other: one is enough.
    let once = |spans: Vec<(usize, u64, usize)>| -> Vec<_> {
        let again = |unit: usize, pass: u64| pass == 1 && plan.units[unit].tier == Tier::Gpu;
        spans.into_iter().filter(|(unit, pass, _)| !again(*unit, *pass)).collect()
    };
    let copied = three(Stage::Transfer);
    assert_eq!(once(copied.clone()), once(expected(|tier| tier != Tier::Gpu, |unit| unit.disk_bytes)));
    assert!(copied.iter().all(|(unit, pass, _)| *pass != 1 || plan.units[*unit].tier != Tier::Gpu || is_late(*unit)));
    assert_eq!(three(Stage::Compute), expected(|_| true, |unit| unit.disk_bytes));
    let pinned = three(Stage::Pin);
    assert!(pinned.iter().all(|(unit, pass, _)| plan.units[*unit].tier != Tier::Pinned || *pass == 0), "{pinned:?}");
    // What passes moved is told by pass, and apart from the first.
    let (first, steady) = (stats.first.unwrap(), stats.steady.unwrap());
    let sum = |tiers: &[Tier], bytes: fn(&crate::layout::UnitLayout) -> usize| -> f64 {
        plan.units.iter().filter(|unit| tiers.contains(&unit.tier)).map(bytes).sum::<usize>() as f64
    };
    assert_eq!((first.passes, steady.passes, stats.passes), (1, 1, 3));
    assert_eq!(first.direct_bytes + first.buffered_bytes, sum(&TIERS, |unit| unit.read_bytes));
    assert_eq!(first.transferred_bytes, sum(&TIERS, |unit| unit.disk_bytes));
    assert_eq!(steady.transferred_bytes, sum(&TIERS[..3], |unit| unit.disk_bytes));
}

#[test]
fn the_device_tells_its_own_time_where_it_is_asked_and_makes_no_timed_event_where_not() {
    let case = Case::new(3);
    let (copy, compute) = (Duration::from_millis(4), Duration::from_millis(3));
    case.device.pace_copies(copy);
    for times_device in [false, true] {
        let seen = Arc::new(SeenSpans { times_device, ..SeenSpans::default() });
        let (before, stream) = (case.device.timed_events(), case.device.stream().unwrap());
        let mut streamer = case.observed(&seen);
        let units = case.units.len();
        let plan = streamer.plan.clone();
        let start = Instant::now();
        for _ in 0..2 {
            let pass = streamer.run_pass(&stream, (), |(), _| {
                case.device.enqueue(&stream, move || simulated::sleep(compute));
                Ok::<_, Error>(())
            });
            pass.unwrap();
        }
        case.device.drain(&stream).unwrap();
        let took = start.elapsed();
        drop(streamer);
        let spans = seen.on_device.lock().unwrap();
        if !times_device {
            assert_eq!((case.device.timed_events() - before, spans.len()), (0, 0));
            continue;
        }
        let computed: Vec<_> = spans.iter().filter(|span| span.stage == Stage::Compute).collect();
        // As many as there are events for, at least: on a busy machine all may be under way when the next layer begins.
        assert!(computed.len() >= plan.layout.gpu.slots + units, "{} were timed", computed.len());
        assert_eq!(computed.len() + seen.untimed.load(Relaxed), 2 * units);
        for span in &computed {
            let time = span.end - span.start;
            assert!(time >= compute && time < 20 * compute + took / 4, "{time:?}");
        }
        let copies = |unit: usize| plan.units[unit].copies.len() + plan.units[unit].casts.len();
        let copied = spans.iter().filter(|span| span.stage == Stage::Transfer);
        let mut count = 0;
        for span in copied {
            let Activity::Unit { unit, .. } = span.activity else { panic!("{span:?}") };
            assert!(span.end - span.start >= copy * copies(unit) as u32, "{span:?}");
            count += 1;
        }
        assert!(count >= units, "{count} copies of {units} units");
        // By the host's clock, in order.
        assert!(computed.windows(2).all(|pair| pair[1].start >= pair[0].end), "one stream runs in order");
        let slack = Duration::from_millis(2);
        assert!(computed[0].start + slack >= start && computed[units - 1].end <= start + took + slack);
    }
}

/// What is slow on a machine that is made for the test.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Slow {
    Disk,
    Pin,
    Copy,
    Compute,
    Nothing,
}

/// Steady passes on such a machine.
fn judged(slow: Slow) -> Verdict {
    let fixture = fixtures::fixture(8, &[4_000], 5);
    copiers::pace::set(if slow == Slow::Pin { Duration::from_millis(5) } else { Duration::ZERO });
    let device = AsyncCpu::new(1);
    device.link();
    device.pace_copies(if slow == Slow::Copy { Duration::from_millis(5) } else { Duration::ZERO });
    let read = if slow == Slow::Disk { Duration::from_millis(5) } else { Duration::ZERO };
    pace_reads(read);
    let mut units = fixture.units.clone();
    let tier = match slow {
        Slow::Disk => Tier::Disk,
        Slow::Nothing => Tier::Gpu,
        _ => Tier::Ram,
    };
    units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
    let settings = Settings { n_cpu: 1, n_cpu_pinned: 2, reader: Reader::Pread, ..Settings::default() };
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &units, &settings).unwrap();
    let stream = device.stream().unwrap();
    assert_eq!(streamer.verdict(), None, "no pass is complete");
    for _ in 0..6 {
        let pass = streamer.run_pass(&stream, (), |(), _| {
            if slow == Slow::Compute {
                device.enqueue(&stream, || simulated::sleep(Duration::from_millis(5)));
            }
            Ok::<_, Error>(())
        });
        pass.unwrap();
        device.drain(&stream).unwrap();
    }
    Faults::plan(|attempt: Attempt<'_>| attempt.result);
    streamer.verdict().unwrap()
}

#[test]
fn the_verdict_names_the_stage_that_is_slow() {
    if !in_child("pipeline::tests::spans::the_verdict_names_the_stage_that_is_slow") {
        return;
    }
    simulated::begin();
    assert_named(&[
        (Slow::Disk, Bound::Disk),
        (Slow::Pin, Bound::Pin),
        (Slow::Copy, Bound::Transfer),
        (Slow::Compute, Bound::Compute),
        (Slow::Nothing, Bound::Compute),
    ]);
}

fn assert_named(cases: &[(Slow, Bound)]) {
    for &(slow, bound) in cases {
        let verdict = judged(slow);
        let found = if verdict.bound == Bound::PageCache { Bound::Disk } else { verdict.bound };
        assert_eq!((found, verdict.moves), (bound, slow != Slow::Nothing), "{slow:?}: {verdict}");
        if slow != Slow::Nothing {
            assert!(verdict.busy > 0.5, "{slow:?}: {verdict}");
        }
    }
}

/// When a caller waits for what it has enqueued.
#[derive(Clone, Copy, Debug)]
enum Waits {
    AfterEachLayer,
    AfterEachPass,
}

/// The verdict on passes over units that are copied, and computed by work that is only enqueued, in so long each.
fn judged_behind_a_link(n_gpu: usize, waits: Waits, copy: Duration, compute: Duration) -> (Verdict, PassStats) {
    let mut fixture = fixtures::fixture(6, &[4_000], 5);
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Pinned));
    let device = AsyncCpu::new(1);
    device.pace_copies(copy);
    device.link();
    let settings = Settings { n_gpu, n_cpu_pinned: 2, ..Settings::default() };
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    let stream = device.stream().unwrap();
    for _ in 0..4 {
        let pass = streamer.run_pass(&stream, (), |(), _| {
            device.enqueue(&stream, move || simulated::sleep(compute));
            match waits {
                Waits::AfterEachLayer => device.drain(&stream),
                Waits::AfterEachPass => Ok(()),
            }
        });
        pass.unwrap();
        device.drain(&stream).unwrap();
    }
    (streamer.verdict().unwrap(), streamer.stats().steady.unwrap())
}

#[test]
fn behind_a_link_the_verdict_tells_copies_from_computation_though_the_caller_only_enqueues() {
    if !in_child(
        "pipeline::tests::spans::behind_a_link_the_verdict_tells_copies_from_computation_though_the_caller_only_enqueues",
    ) {
        return;
    }
    simulated::begin();
    // Where one takes much longer than the other, and where nearly as long.
    let (far, close) = ([2, 12], [12, 18]);
    let cases = [
        (1, Waits::AfterEachLayer, far),
        (2, Waits::AfterEachLayer, far),
        (2, Waits::AfterEachPass, far),
        (2, Waits::AfterEachPass, close),
    ];
    for (n_gpu, waits, times) in cases {
        let [short, long] = times.map(Duration::from_millis);
        for (copy, compute, bound) in [(long, short, Bound::Transfer), (short, long, Bound::Compute)] {
            let (verdict, stats) = judged_behind_a_link(n_gpu, waits, copy, compute);
            let case = format!("n_gpu {n_gpu}, waits {waits:?}, {copy:?} a copy, {compute:?} a layer");
            assert_eq!(verdict.bound, bound, "{case}: {verdict}, {stats:?}");
        }
    }
}

#[test]
fn a_copy_that_waits_for_computation_is_not_the_link_at_work() {
    if !in_child("pipeline::tests::spans::a_copy_that_waits_for_computation_is_not_the_link_at_work") {
        return;
    }
    simulated::begin();
    let [copy, compute, host] = [2, 40, 15].map(Duration::from_millis);
    let mut fixture = fixtures::fixture(2, &[4_000], 5);
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Pinned));
    let device = AsyncCpu::new(1);
    device.pace_copies(copy);
    device.link();
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 2, ..Settings::default() };
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    let stream = device.stream().unwrap();
    // The second copy waits for the first layer's work, while the caller, who has the second layer, wakes the stage.
    let pass = streamer.run_pass(&stream, (), |(), layer| {
        match layer.index() {
            0 => device.enqueue(&stream, move || simulated::sleep(compute)),
            _ => simulated::sleep(host),
        }
        Ok::<_, Error>(())
    });
    pass.unwrap();
    device.drain(&stream).unwrap();
    let link = *streamer.stats().stage(Stage::Transfer);
    assert!(link.busy <= 3 * copy && link.blocked >= compute - 2 * copy, "two copies of {copy:?}: {link:?}");
}
