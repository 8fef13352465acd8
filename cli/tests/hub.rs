//! `--model ORG/NAME`: downloaded once from a hub, here one on this machine, and never used half.

mod common;
#[path = "hub/refusals.rs"]
mod refusals;
#[path = "hub/server.rs"]
mod server;
#[path = "hub/tls.rs"]
mod tls;
#[path = "hub/world.rs"]
mod world;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    os::unix::process::CommandExt,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use server::{Answer, COMMIT, NEEDED, Servers, etag, held};
use support::{folder, speller};
use world::{FIRST, SECOND, TEXT, World, assert_says, only, ranges, right, spoilt, text};

#[test]
fn a_model_is_downloaded_once_and_needs_no_network_from_then_on() {
    let hub = right();
    let world = World::new(&hub);
    let done = world.command("generate", "org/speller").arg("4096=").output().unwrap();
    let said = text(&done.stderr);
    assert_eq!(text(&done.stdout), TEXT, "{said}");
    assert_says(
        &said,
        &["downloading org/speller: 2 files of weights, 3.25 MB, to ", "downloaded org/speller: 3.25 MB in "],
    );
    let taken = hub.asked().into_iter().filter(|asked| asked.of_hub && asked.method == "GET").map(|asked| asked.path);
    let address = |file: &&str| format!("/org/speller/resolve/{COMMIT}/{file}");
    let listing = "/api/models/org/speller/revision/main".to_owned();
    assert_eq!(taken.collect::<Vec<_>>(), [vec![listing], NEEDED.iter().map(address).collect()].concat());
    let world = world.without_network();
    world.prints();
    let done = world.generate().env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_eq!(text(&done.stdout), TEXT, "{}", text(&done.stderr));
    // Other words for it, and another command.
    for (command, model) in [("generate", format!("org/speller@{COMMIT}")), ("plan", "org/speller".into())] {
        let done = world.command(command, &model).args(["--quiet", "4096="]).output().unwrap();
        assert!(done.status.success(), "{command} {model}: {}", text(&done.stderr));
    }
    let asked = hub.asked().len();
    world.with(&hub).prints();
    assert_eq!(hub.asked().len(), asked, "what is there is not asked for");
}

#[test]
fn tune_measures_a_model_of_the_hub_and_names_it_in_the_command_to_paste() {
    let hub = right();
    let world = World::new(&hub);
    let mut command = world.command("tune", "org/speller");
    command.args(["--no-probe", "--n-gpu", "1", "--n-cpu-pinned", "0", "--n-cpu", "0", "--runs", "2"]);
    let done = command.output().unwrap();
    let (said, answer) = (text(&done.stderr), text(&done.stdout));
    assert!(done.status.success() && answer.contains(" --model org/speller "), "{answer}{said}");
    assert_eq!(said.matches("downloading").count(), 1, "{said}");
}

#[test]
fn pack_takes_a_model_of_the_hub_by_its_name() {
    let hub = right();
    let (world, to) = (World::new(&hub), folder());
    let packed = to.path().join("packed");
    let done = world.program("pack").arg("org/speller").arg(&packed).arg("--quiet").output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let mut generate = world.command("generate", packed.to_str().unwrap());
    assert_eq!(text(&generate.args(["--quiet", "4096="]).output().unwrap().stdout), TEXT);
    let done = world.program("pack").arg("speller").arg(&packed).output().unwrap();
    assert!(text(&done.stderr).ends_with("layer-streamer pack ORG/speller …\n"), "{}", text(&done.stderr));
}

#[test]
fn the_token_goes_to_the_hub_and_to_no_other_host() {
    let hub = right();
    let world = World::new(&hub);
    fs::write(world.cache.path().join("token"), "of-the-file\n").unwrap();
    world.prints();
    let said = |of_hub: bool| {
        let asked = hub.asked().into_iter().filter(move |asked| asked.of_hub == of_hub);
        asked.map(|asked| asked.header("authorization").map(str::to_owned)).collect::<BTreeSet<_>>()
    };
    assert_eq!(said(true), [Some("Bearer of-the-file".into())].into());
    assert_eq!(said(false), [None].into());
    let path = world.cache.path().join("another");
    fs::write(&path, "of-another-file").unwrap();
    let hub = only(Answer::status(401));
    let done = World::new(&hub).generate().env("HF_TOKEN_PATH", &path).output().unwrap();
    assert_says(&text(&done.stderr), &["check the token of ", path.to_str().unwrap()]);
    assert_eq!(hub.asked()[0].header("authorization"), Some("Bearer of-another-file"));
    fs::write(&path, "").unwrap();
    let hub = right();
    assert!(World::new(&hub).generate().env("HF_TOKEN_PATH", &path).status().unwrap().success());
    assert_eq!(hub.asked()[0].header("authorization"), None);
    let hub = only(Answer::status(401));
    let done = World::new(&hub).generate().env("HF_TOKEN", "of-the-variable").output().unwrap();
    assert_says(&text(&done.stderr), &["401", "check the token of HF_TOKEN"]);
    assert!(!text(&done.stderr).contains("of-the-variable"));
    assert_eq!(hub.asked()[0].header("authorization"), Some("Bearer of-the-variable"));
}

#[test]
fn a_download_that_breaks_goes_on_where_it_was() {
    let hub = spoilt(FIRST, 1, |answer| Answer { cut: Some(1_000_000), ..answer });
    World::new(&hub).prints();
    assert_eq!(ranges(&hub.asked(), FIRST), [None, Some("bytes=1000000-".into())]);
    // So does one that falls silent.
    let hub = spoilt(FIRST, 1, |answer| Answer { cut: Some(1_000_000), holds: true, ..answer });
    let done = World::new(&hub).generate().env("HF_HUB_DOWNLOAD_TIMEOUT", "0.3").output().unwrap();
    assert_eq!((text(&done.stdout), text(&done.stderr)), (TEXT.into(), String::new()));
    assert_eq!(ranges(&hub.asked(), FIRST), [None, Some("bytes=1000000-".into())]);
    // In the next run too.
    let hub = Servers::start(|asked, answer| match asked.header("range") {
        Some(_) => Answer::status(404),
        None if asked.is_bytes_of(SECOND) => Answer { cut: Some(1_000_000), ..answer },
        None => answer,
    });
    let world = World::new(&hub);
    assert_says(&world.refusal(), &["answers 404", "though the model has it"]);
    assert_eq!(fs::read(world.partial(SECOND)).unwrap(), held(SECOND)[..1_000_000]);
    assert!(!world.whole().contains(SECOND));
    let hub = right();
    world.with(&hub).prints();
    assert_eq!(ranges(&hub.asked(), SECOND), [Some("bytes=1000000-".into())]);
    assert_eq!(ranges(&hub.asked(), FIRST), []);
}

#[test]
fn a_server_that_ignores_ranges_sends_all_of_it_again() {
    let hub = Servers::start(|asked, answer| match answer.status {
        206 => Answer { body: held(FIRST), ..Answer::status(200) },
        _ if asked.is_bytes_of(FIRST) => Answer { cut: Some(1_000_000), ..answer },
        _ => answer,
    });
    World::new(&hub).prints();
    assert_eq!(ranges(&hub.asked(), FIRST).len(), 2);
}

#[test]
fn what_came_before_and_is_wrong_is_downloaded_anew() {
    let hub = right();
    let world = World::new(&hub);
    fs::create_dir_all(world.model("blobs")).unwrap();
    // Of other bytes; too long; whole, but for its name.
    let mut wrong = held(FIRST);
    wrong.truncate(1000);
    wrong[0] ^= 1;
    fs::write(world.partial(FIRST), wrong).unwrap();
    fs::write(world.partial(SECOND), [held(SECOND), vec![0]].concat()).unwrap();
    fs::write(world.partial("tokenizer.json"), held("tokenizer.json")).unwrap();
    world.prints();
    assert_eq!(ranges(&hub.asked(), FIRST), [Some("bytes=1000-".into()), None]);
    assert_eq!(ranges(&hub.asked(), SECOND), [None]);
    let tokenizers = hub.asked().into_iter().filter(|asked| asked.path.ends_with("tokenizer.json"));
    assert_eq!(tokenizers.map(|asked| asked.method).collect::<Vec<_>>(), ["HEAD"]);
}

#[test]
fn what_passes_by_itself_is_asked_again() {
    for status in [429, 500, 503] {
        let left = AtomicUsize::new(3);
        let hub = Servers::start(move |asked, answer| {
            let is_early = asked.is_bytes_of(FIRST) || asked.path.starts_with("/api/");
            match is_early && left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                true => Answer::status(status).with("Retry-After", "0"),
                false => answer,
            }
        });
        World::new(&hub).prints();
    }
}

#[test]
fn two_processes_at_once_download_each_file_once() {
    let heads = AtomicUsize::new(0);
    let hub = Servers::start(move |asked, answer| {
        if asked.method == "HEAD" && asked.path.ends_with(SECOND) {
            heads.fetch_add(1, SeqCst);
        }
        // Both want the weights before one has them.
        let deadline = Instant::now() + Duration::from_secs(60);
        while asked.is_bytes_of(FIRST) && heads.load(SeqCst) < 2 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        answer
    });
    let world = World::new(&hub);
    let start = || world.generate().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    for run in [start(), start()].map(|child| child.wait_with_output().unwrap()) {
        assert_eq!((text(&run.stdout), text(&run.stderr)), (TEXT.into(), String::new()));
    }
    for file in [FIRST, SECOND] {
        assert_eq!(ranges(&hub.asked(), file), [None], "{file}");
    }
    world.without_network().prints();
}

#[test]
fn ctrl_c_keeps_what_has_come() {
    let hub = Servers::start(|asked, answer| match asked.is_bytes_of(SECOND) && asked.header("range").is_none() {
        // The rest never comes.
        true => Answer { cut: Some(1_000_000), holds: true, ..answer },
        false => answer,
    });
    let world = World::new(&hub);
    let mut command = world.generate();
    // A shell that started the tests in the background left Ctrl-C ignored.
    // SAFETY: the call is one that may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            Ok(())
        })
    };
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::metadata(world.partial(SECOND)).map_or(0, |partial| partial.len()) < 1_000_000 {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(2));
    }
    // SAFETY: no memory is involved, and the child has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    assert!(!child.wait().unwrap().success());
    assert!(!world.model("refs/main").exists() && !world.whole().contains(SECOND));
    world.prints();
    assert_eq!(ranges(&hub.asked(), SECOND), [None, Some("bytes=1000000-".into())]);
}

#[test]
fn the_cache_lies_where_pythons_does() {
    let world = World::new(&right());
    let (model, home) = ("models--org--speller", [("HOME", "/h")]);
    for (variables, folder) in [
        (&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f"), ("XDG_CACHE_HOME", "/x")][..], "/c/"),
        (&[("HF_HOME", "/f"), ("XDG_CACHE_HOME", "/x")], "/f/hub/"),
        (&[("HF_HOME", "~/f"), ("HF_HUB_CACHE", "")], "/h/f/hub/"),
        (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub/"),
        (&[], "/h/.cache/huggingface/hub/"),
    ] {
        let mut command = world.generate();
        command.env_remove("HF_HOME").env_remove("XDG_CACHE_HOME").env("HF_HUB_OFFLINE", "on").envs(home);
        let done = command.envs(variables.iter().copied()).output().unwrap();
        assert_says(&text(&done.stderr), &[&format!("({folder}{model})")]);
    }
}

#[test]
fn a_cache_that_python_made_is_used() {
    let hub = right();
    let world = World::new(&hub).without_network();
    // It notes no file that the hub does not have.
    for folder in ["blobs", "refs", &format!("snapshots/{COMMIT}")] {
        fs::create_dir_all(world.model(folder)).unwrap();
    }
    for file in NEEDED {
        fs::copy(speller().join(file), world.model("blobs").join(etag(file))).unwrap();
        let link = world.model("snapshots").join(COMMIT).join(file);
        symlink(Path::new("../../blobs").join(etag(file)), link).unwrap();
    }
    fs::write(world.model("refs/main"), COMMIT).unwrap();
    let done = world.generate().env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_eq!((text(&done.stdout), text(&done.stderr)), (TEXT.into(), String::new()));
    world.prints();
    let loud = |world: &World| {
        let done = world.command("generate", "org/speller").arg("4096=").output().unwrap();
        assert_eq!(text(&done.stdout), TEXT);
        text(&done.stderr)
    };
    assert_says(&loud(&world), &["cannot reach", "taking org/speller as it is in the cache", "HF_HUB_OFFLINE=1"]);
    // With a network the hub is asked once whether it has more.
    let world = world.with(&hub);
    world.prints();
    let paths: Vec<_> = hub.asked().into_iter().map(|asked| asked.path).collect();
    assert_eq!(paths, [format!("/api/models/org/speller/revision/{COMMIT}")]);
    let said = loud(&world.without_network());
    assert!(!said.contains("cannot reach"), "{said}");
}
