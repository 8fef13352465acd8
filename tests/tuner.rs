//! The tuner with workers that misbehave in every way. `cli/tests/tune.rs` has the program's `tune`.

mod common;

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    iter,
    ops::ControlFlow,
    os::{fd::FromRawFd, unix::process::CommandExt},
    path::Path,
    process::{self, Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use layer_streamer::{
    Settings,
    plan::Placement,
    tuner::{self, Candidate, Comparison, Ended, Outcome, Ranking, Record, SearchEvent, Trial, Tuner},
};
use support::marked::{marked, nothing_is_left};

const GOOD: usize = 1;
const GOOD_SLOWER: usize = 2;
const SLOW: usize = 3;
const ABORTS: usize = 4;
const IS_KILLED: usize = 5;
const EATS_MEMORY: usize = 6;
const HANGS: usize = 7;
const HANGS_IN_SET_UP: usize = 8;
const HANGS_WITH_A_CHILD: usize = 9;
const TALKS_NONSENSE: usize = 10;
const REFUSES: usize = 11;
const FAILS: usize = 12;
const LEAVES: usize = 13;
const LEAVES_A_CHILD: usize = 14;
const REFUSES_WITH_A_CHILD: usize = 15;
const STOPS_WITH_A_CHILD: usize = 16;
const STOPS_IN_THE_PAUSE: usize = 17;
const WRITES_NO_END: usize = 18;
const WRITES_LINES: usize = 19;
const TRICKLES: usize = 20;
const CLOSES_ITS_CHANNEL: usize = 21;
const VARIES: usize = 22;
const HANGS_IN_RUN_2: usize = 23;
const SAYS_ITS_LIMIT: usize = 24;
const LUCKY_ONCE: usize = 25;

/// The patience of these tests' tuners, and how long a slow run takes: far longer.
const PATIENCE: Duration = Duration::from_secs(2);
const SLOWLY: Duration = Duration::from_secs(60);

fn hang() -> ! {
    loop {
        thread::sleep(Duration::from_secs(1000));
    }
}

/// The worker's end of its channel, which this process, to be ended soon, shares.
fn channel() -> File {
    let variable = env::var("LAYER_STREAMER_TUNER_WORKER").unwrap();
    let descriptor = variable.split(',').next().unwrap().parse().unwrap();
    // SAFETY: the channel's own descriptor, open until the process ends.
    unsafe { File::from_raw_fd(descriptor) }
}

fn write_for_ever(text: &[u8], pause: Duration) -> ! {
    let mut channel = channel();
    loop {
        channel.write_all(text).unwrap();
        thread::sleep(pause);
    }
}

/// Says that each of a tuner's runs took so long, which no clock of a busy machine has a part in, and ends.
fn claim(seconds: f64) -> ! {
    let mut channel = channel();
    for run in 0..Tuner::default().runs {
        // The first was begun by whoever called.
        let begun = if run > 0 { "\"begun\"\n" } else { "" };
        writeln!(channel, "{begun}{{\"took\":{seconds}}}").unwrap();
    }
    process::exit(0);
}

/// A process in this one's group that starts another; both bear the mark, the second in its environment alone.
fn children() -> Command {
    let mark = env::args().next_back().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "sleep 1000; : $0", &mark]).env("MARK", &mark);
    command
}

/// Starts those, and goes on once both run.
#[expect(clippy::zombie_processes, reason = "the tuner ends them")]
fn start_children() {
    children().spawn().unwrap();
    both_run(Path::new(&env::args().next_back().unwrap()));
}

fn both_run(mark: &Path) {
    until("children", || marked(mark).iter().any(|line| line.contains(": sleep")));
}

fn data_limit() -> libc::rlimit {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is the call's while it runs.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_DATA, &raw mut limit) }, 0);
    limit
}

/// No test, but what the tests start again: a worker that behaves as `n_gpu` says. Its last argument is a mark, to find it by.
#[test]
fn worker() {
    tuner::worker(|placement| {
        let behaviour = placement.settings.n_gpu;
        match behaviour {
            HANGS_IN_SET_UP => hang(),
            REFUSES => return Err("these settings do not suit me".to_owned()),
            TALKS_NONSENSE => {
                channel().write_all(b"{\"took\":\"long\"}\n").unwrap();
                hang();
            }
            REFUSES_WITH_A_CHILD => {
                start_children();
                return Err("not with children".to_owned());
            }
            STOPS_WITH_A_CHILD => {
                start_children();
                // SAFETY: no memory is involved.
                unsafe { libc::kill(0, libc::SIGSTOP) };
                // It may reach this thread a moment later.
                hang();
            }
            WRITES_NO_END => write_for_ever(&[b'x'; 4096], Duration::ZERO),
            WRITES_LINES => write_for_ever(b"\"begun\"\n", Duration::ZERO),
            TRICKLES => write_for_ever(b"x", Duration::from_millis(10)),
            CLOSES_ITS_CHANNEL => {
                start_children();
                drop(channel());
                hang();
            }
            SAYS_ITS_LIMIT => return Err(format!("{} bytes of data", data_limit().rlim_cur)),
            _ => {}
        }
        let mut runs = 0;
        Ok(move || {
            runs += 1;
            match behaviour {
                GOOD => claim(0.02),
                LUCKY_ONCE => {
                    // Its first process leaves a file.
                    let left = Path::new(&env::args().next_back().unwrap()).join("lucky");
                    claim(if File::create_new(left).is_ok() { 0.02 } else { 0.07 });
                }
                GOOD_SLOWER => claim(0.06),
                // Not in the first run, which is not measured.
                SLOW => thread::sleep(if runs == 1 { Duration::from_millis(20) } else { SLOWLY }),
                ABORTS => process::abort(),
                // SAFETY: no memory is involved.
                IS_KILLED => _ = unsafe { libc::kill(libc::getpid(), libc::SIGKILL) },
                EATS_MEMORY => {
                    let mut eaten = Vec::new();
                    loop {
                        eaten.push(Vec::<u8>::with_capacity(16 << 20));
                    }
                }
                HANGS => hang(),
                HANGS_WITH_A_CHILD => _ = children().status().unwrap(),
                LEAVES_A_CHILD => {
                    start_children();
                    process::exit(0);
                }
                STOPS_IN_THE_PAUSE => {
                    thread::spawn(|| {
                        thread::sleep(Duration::from_millis(50));
                        // SAFETY: no memory is involved.
                        unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
                    });
                }
                VARIES => thread::sleep(Duration::from_millis([0, 100, 800][runs - 1])),
                HANGS_IN_RUN_2 => thread::sleep(if runs == 1 { Duration::ZERO } else { SLOWLY }),
                FAILS => return Err("the third layer failed".to_owned()),
                LEAVES => process::exit(0),
                _ => unreachable!("no such behaviour"),
            }
            Ok(())
        })
    });
}

/// One whose worker behaves so.
fn candidate(behaviour: usize) -> Candidate {
    Placement::new(Settings { n_gpu: behaviour, ..Settings::default() }, 1, "").unwrap().into()
}

/// A tuner whose workers bear `mark`.
fn tuner(mark: &Path, n_gpu: &[usize]) -> Tuner {
    let arguments = ["--exact", "worker"].map(OsString::from).into_iter().chain([mark.into()]);
    Tuner {
        candidates: n_gpu.iter().map(|behaviour| candidate(*behaviour)).collect(),
        patience: PATIENCE,
        memory_limit: Some(1 << 30),
        arguments: Some(arguments.collect()),
        ..Tuner::default()
    }
}

fn run(tuner: &Tuner) -> Ranking {
    run_with(tuner, || {})
}

/// Has `wait` done before the tuner listens to a worker.
fn run_with(tuner: &Tuner, wait: impl Fn()) -> Ranking {
    let ranking = tuner.run(|event| {
        if let SearchEvent::Waiting = event {
            wait();
        }
        ControlFlow::Continue(())
    });
    let ranking = ranking.unwrap();
    // Those that nobody waited for as well. Not all systems have the file.
    let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    assert_eq!(children, "", "children of this thread");
    ranking
}

fn trial(ranking: &Ranking, n_gpu: usize) -> &Trial {
    ranking.trials.iter().find(|trial| trial.placement.settings.n_gpu == n_gpu).unwrap()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "no {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Each of these behaviours was refused for a reason with this in it.
fn were_refused(ranking: &Ranking, reasons: &[(usize, &str)]) {
    for (behaviour, reason) in reasons {
        let Outcome::Refused { reason: found } = &trial(ranking, *behaviour).outcome else {
            panic!("{:?}", trial(ranking, *behaviour));
        };
        println!("{behaviour}: {found}");
        assert!(found.contains(reason), "{behaviour}: {found:?} for {reason:?}");
    }
}

#[test]
fn whatever_workers_do_the_search_goes_on_and_says_why_and_no_process_is_left() {
    let folder = support::folder();
    let all: Vec<_> = (GOOD_SLOWER..=LEAVES).filter(|behaviour| *behaviour != SLOW).chain([GOOD]).collect();
    let ranking = run(&tuner(folder.path(), &all));
    nothing_is_left(folder.path());
    assert_eq!((ranking.ended, ranking.trials.len()), (Ended::Complete, all.len()));
    assert_eq!(ranking.fastest().unwrap().placement.settings.n_gpu, GOOD, "{ranking:?}");
    assert_eq!(trial(&ranking, GOOD_SLOWER).outcome, Outcome::Done);
    let answer = ranking.answer.as_ref().unwrap();
    assert_eq!(answer.placement.settings.n_gpu, GOOD);
    assert_eq!(answer.verdict, Comparison::Faster { ratio: ratio(&answer.verdict), won: 4, rounds: 4 });
    let reasons = [
        (ABORTS, "ended before it was done (signal: 6 (SIGABRT)"),
        (IS_KILLED, "ended before it was done (signal: 9 (SIGKILL)"),
        (EATS_MEMORY, "memory allocation of "),
        (HANGS, "hung: run 1 took more than 2 s; killed"),
        (HANGS_IN_SET_UP, "hung: its set-up took more than 2 s; killed"),
        (HANGS_WITH_A_CHILD, "hung: run 1 took more than 2 s; killed"),
        (TALKS_NONSENSE, "wrote nonsense on its channel: \"{\\\"took\\\":\\\"long\\\"}\\n\""),
        (REFUSES, "these settings do not suit me"),
        (FAILS, "the third layer failed"),
        (LEAVES, "ended before it was done (exit status: 0)"),
    ];
    were_refused(&ranking, &reasons);
}

fn ratio(verdict: &Comparison) -> f64 {
    let Comparison::Faster { ratio, .. } = *verdict else { panic!("{verdict:?}") };
    assert!((0.2..0.7).contains(&ratio), "20 ms of 60 are {ratio}");
    ratio
}

#[test]
fn the_answer_is_the_default_unless_another_wins_beside_it_and_a_comparison_goes_on_where_it_was_stopped() {
    let folder = support::folder();
    for (behaviours, answer, verdict) in [
        (&[GOOD][..], GOOD, Comparison::Kept),
        (&[GOOD, GOOD_SLOWER], GOOD, Comparison::Kept),
        (&[GOOD, REFUSES], GOOD, Comparison::Kept),
        (&[REFUSES, GOOD_SLOWER], GOOD_SLOWER, Comparison::NoDefault),
        // Faster in the search alone.
        (&[GOOD_SLOWER, LUCKY_ONCE], GOOD_SLOWER, Comparison::Kept),
    ] {
        let ranking = run(&tuner(folder.path(), behaviours));
        let found = ranking.answer.unwrap();
        assert_eq!((found.placement.settings.n_gpu, &found.verdict), (answer, &verdict), "{behaviours:?}");
    }
    assert!(run(&tuner(folder.path(), &[REFUSES])).answer.is_none());

    let record = folder.path().join("record");
    let recorded = Tuner { record: Some(record.clone()), ..tuner(folder.path(), &[GOOD_SLOWER, GOOD]) };
    let mut begun = Vec::new();
    let stopped = recorded.run(|event| match event {
        SearchEvent::Comparing { round, .. } => {
            begun.push(round);
            if begun.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        _ => ControlFlow::Continue(()),
    });
    let stopped = stopped.unwrap();
    assert_eq!((stopped.ended, Record::read(&record).unwrap().rounds.len()), (Ended::Cancelled, 2));
    for answer in [stopped.answer.unwrap(), Record::read(&record).unwrap().answer.unwrap()] {
        assert_eq!((answer.placement.settings.n_gpu, answer.verdict), (GOOD_SLOWER, Comparison::Unfinished));
    }
    let done = recorded.run(|event| {
        match event {
            SearchEvent::Begun { placement, .. } => panic!("{placement:?} is tried again"),
            SearchEvent::Comparing { round, .. } => begun.push(round),
            _ => {}
        }
        ControlFlow::Continue(())
    });
    let answer = done.unwrap().answer.unwrap();
    assert_eq!((answer.placement.settings.n_gpu, begun), (GOOD, vec![1, 2, 3, 3, 4]));
    assert!(matches!(answer.verdict, Comparison::Faster { won: 4, rounds: 4, .. }), "{answer:?}");
    // Numbers may come back from a file different in their last digit.
    let kept = Record::read(&record).unwrap().answer.unwrap();
    assert!(kept.placement == answer.placement && (kept.seconds - answer.seconds).abs() < 1e-9, "{kept:?}");
    nothing_is_left(folder.path());
}

#[test]
fn what_a_worker_started_ends_with_it_however_it_ends_or_stops() {
    let reasons = [
        (LEAVES_A_CHILD, "ended before it was done (exit status: 0)"),
        (REFUSES_WITH_A_CHILD, "not with children"),
        (STOPS_WITH_A_CHILD, "hung: its set-up took more than 2 s; killed"),
        (STOPS_IN_THE_PAUSE, "hung: the pause after run 1 took more than 2.2 s; killed"),
        (WRITES_NO_END, "wrote nonsense on its channel: \"xxx"),
        (WRITES_LINES, "wrote nonsense on its channel: \"\\\"begun\\\"\\n\""),
        (TRICKLES, "hung: its set-up took more than 2 s; killed"),
        (CLOSES_ITS_CHANNEL, "closed its channel and did not end; killed"),
    ];
    // Each in a folder of its own, by whose name it is seen that nothing is left.
    let check = |reason: (usize, &str)| {
        let folder = support::folder();
        let tuner = Tuner { sleep: Duration::from_millis(200), ..tuner(folder.path(), &[reason.0]) };
        // What it said is heard when it has ended already.
        let has_ended = || !marked(folder.path()).iter().any(|line| line.contains("worker"));
        let ranking = run_with(&tuner, || {
            if reason.0 == REFUSES_WITH_A_CHILD {
                until("end", has_ended);
            }
        });
        nothing_is_left(folder.path());
        were_refused(&ranking, &[reason]);
    };
    thread::scope(|scope| reasons.into_iter().for_each(|reason| _ = scope.spawn(move || check(reason))));
}

#[test]
fn a_run_is_not_said_to_be_over_a_limit_that_patience_did_not_wait_for() {
    let folder = support::folder();
    // The times vary so much that the limit is a good second.
    let hasty = Tuner { runs: 3, patience: Duration::from_secs(1), ..tuner(folder.path(), &[VARIES, HANGS_IN_RUN_2]) };
    were_refused(&run(&hasty), &[(HANGS_IN_RUN_2, "hung: run 2 took more than 1 s; killed")]);
}

#[test]
fn patience_may_be_without_end() {
    let folder = support::folder();
    let ranking = run(&Tuner { patience: Duration::MAX, sleep: SLOWLY / 1000, ..tuner(folder.path(), &[GOOD]) });
    assert_eq!(trial(&ranking, GOOD).outcome, Outcome::Done);
}

/// No test either, but a tuner in a process of its own, whose one worker behaves as a variable says.
#[test]
fn lone_tuner() {
    let Ok(behaviour) = env::var("LONE_TUNER") else { return };
    let behaviour = behaviour.parse().unwrap();
    let mark = env::args().next_back().unwrap();
    let tuner = Tuner { patience: SLOWLY, ..tuner(Path::new(&mark), &[behaviour]) };
    let lower = |resource, most: u64| {
        let limit = libc::rlimit { rlim_cur: most, ..data_limit() };
        // SAFETY: the structure is the call's while it runs.
        assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0, "{}", io::Error::last_os_error());
    };
    match behaviour {
        GOOD => {
            let all: Vec<_> = iter::from_fn(|| File::open("/dev/null").ok()).take(1 << 20).collect();
            let said = tuner.run(|_| ControlFlow::Continue(())).unwrap_err().to_string();
            drop(all);
            assert!(said.contains("cannot start a worker of ") && said.contains("ulimit -n"), "{said}");
        }
        SAYS_ITS_LIMIT => {
            lower(libc::RLIMIT_DATA, 1 << 29);
            were_refused(&run(&tuner), &[(behaviour, "536870912 bytes of data")]);
        }
        _ => _ = run(&tuner),
    }
}

fn start_lone_tuner(mark: &Path, behaviour: usize) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "lone_tuner", "--nocapture"]).arg(mark).env("LONE_TUNER", behaviour.to_string());
    // Whoever runs the tests may ignore some of them.
    let hear_signals = || {
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
            // SAFETY: no memory is involved.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: nothing but system calls.
    unsafe { command.pre_exec(hear_signals) };
    command.stdout(Stdio::null()).process_group(0).spawn().unwrap()
}

#[test]
fn a_tuner_may_die_of_anything_and_what_its_worker_started_dies_too() {
    for behaviour in [HANGS_WITH_A_CHILD, STOPS_WITH_A_CHILD, CLOSES_ITS_CHANNEL] {
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
            let folder = support::folder();
            let mut tuner = start_lone_tuner(folder.path(), behaviour);
            both_run(folder.path());
            if behaviour == STOPS_WITH_A_CHILD {
                // All of the group but none of the tuner's.
                thread::sleep(Duration::from_millis(20));
            }
            // SAFETY: no memory is involved; the tuner has not been waited for.
            unsafe { libc::kill(tuner.id() as libc::pid_t, signal) };
            let status = tuner.wait().unwrap();
            assert_eq!(status.code(), None, "{behaviour}: {status}");
            nothing_is_left(folder.path());
        }
    }
}

#[test]
fn what_is_short_for_a_moment_ends_the_search_and_a_lower_limit_of_the_user_stays() {
    for behaviour in [GOOD, SAYS_ITS_LIMIT] {
        let folder = support::folder();
        assert!(start_lone_tuner(folder.path(), behaviour).wait().unwrap().success(), "{behaviour}");
    }
}

#[test]
fn a_slow_configuration_ends_during_its_first_slow_run() {
    let folder = support::folder();
    let patient = Tuner { patience: 10 * SLOWLY, ..tuner(folder.path(), &[GOOD, SLOW]) };
    let start = Instant::now();
    let ranking = run(&patient);
    let taken = start.elapsed();
    println!("{:.2} s in all, of a run that takes {} s", taken.as_secs_f64(), SLOWLY.as_secs());
    assert!(taken < SLOWLY / 6, "{taken:?}");
    let slow = trial(&ranking, SLOW);
    assert!(matches!(slow.outcome, Outcome::Stopped { limit } if limit < 1.0), "{slow:?}");
    assert_eq!(slow.runs.len(), 1, "the first, which is not measured");
    nothing_is_left(folder.path());
}

#[test]
fn a_search_that_is_cancelled_or_out_of_time_ends_at_once_and_leaves_nothing() {
    let folder = support::folder();
    let patient = Tuner { patience: 10 * SLOWLY, ..tuner(folder.path(), &[HANGS]) };
    let start = Instant::now();
    let mut asked = 0;
    let cancelled = patient.run(|_| {
        asked += 1;
        if asked < 5 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    assert_eq!(cancelled.unwrap().ended, Ended::Cancelled);
    let limited = Tuner { time_limit: Some(Duration::from_millis(300)), ..patient };
    let ranking = run(&limited);
    assert_eq!((ranking.ended, ranking.trials.len()), (Ended::TimeUp, 0));
    assert!(start.elapsed() < SLOWLY / 6, "{:?}", start.elapsed());
    nothing_is_left(folder.path());
}

#[test]
fn options_that_make_no_sense_are_refused_before_anything_is_started() {
    let folder = support::folder();
    let usual = tuner(folder.path(), &[GOOD]);
    for (tuner, cause) in [
        (Tuner { runs: 1, ..usual.clone() }, "the first is not measured"),
        (Tuner { candidates: vec![], ..usual.clone() }, "at least one"),
        (Tuner { record: Some(folder.path().join("no/where")), ..usual }, "no/where"),
    ] {
        let said = tuner.run(|_| panic!("something happened")).unwrap_err().to_string();
        assert!(said.contains(cause), "{said}");
    }
}
