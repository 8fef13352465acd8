//! `--model ORG/NAME`: downloaded once from a hub, here one on this machine, and never used half.

mod common;
#[path = "hub/server.rs"]
mod server;

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use common::program;
use server::{Answer, Asked, COMMIT, NEEDED, Servers, etag, held};
use support::limits::in_child;
use support::mounts::{fill, mount, own_mounts};
use support::{folder, speller};

const TEXT: &str = " four thousand ninety-six\n";
const FIRST: &str = NEEDED[4];
const SECOND: &str = NEEDED[5];

/// A cache, and a hub to fill it from.
struct World {
    cache: tempfile::TempDir,
    hub: String,
}

impl World {
    fn new(servers: &Servers) -> Self {
        Self { cache: folder(), hub: servers.address.clone() }
    }

    /// The same cache where there is no network: nobody listens there, nor does a server of another test.
    fn without_network(self) -> Self {
        Self { hub: "http://127.0.0.1:1".into(), ..self }
    }

    fn with(self, servers: &Servers) -> Self {
        Self { hub: servers.address.clone(), ..self }
    }

    fn command(&self, command: &str, model: &str) -> Command {
        let mut program = program(command);
        // Whatever the machine's user has set.
        for (name, _) in std::env::vars() {
            if name.starts_with("HF_") || name.to_ascii_lowercase().ends_with("_proxy") {
                program.env_remove(name);
            }
        }
        program.args(["--device", "cpu", "--model", model]);
        program.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env("HF_HOME", self.cache.path());
        program.env("HF_ENDPOINT", &self.hub);
        program
    }

    fn generate(&self) -> Command {
        let mut command = self.command("generate", "org/speller");
        command.args(["--quiet", "4096="]);
        command
    }

    /// A run that must give the speller's text, and says nothing else.
    fn prints(&self) {
        let done = self.generate().output().unwrap();
        assert_eq!((text(&done.stdout), text(&done.stderr)), (TEXT.into(), String::new()));
        assert_eq!(fs::read_to_string(self.model("refs/main")).unwrap(), COMMIT);
        assert_eq!(self.whole(), NEEDED.iter().map(ToString::to_string).collect());
    }

    /// A run that must fail, and leaves nothing that is not whole: its error.
    fn refusal(&self) -> String {
        let done = self.generate().output().unwrap();
        let said = text(&done.stderr);
        assert!(!done.status.success() && done.stdout.is_empty() && !said.contains("panicked"), "{said}");
        assert!(said.starts_with("error: ") && said.lines().count() == 1, "{said}");
        assert!(!self.model("refs/main").exists(), "{said}");
        self.whole();
        said
    }

    fn model(&self, path: &str) -> PathBuf {
        self.cache.path().join("hub/models--org--speller").join(path)
    }

    fn partial(&self, file: &str) -> PathBuf {
        self.model("blobs").join(format!("{}.incomplete", etag(file)))
    }

    /// The snapshot's files: each is what the hub has, by a link that holds wherever the cache is moved to. And what is no
    /// snapshot's has a name that says so.
    fn whole(&self) -> BTreeSet<String> {
        let names = |folder: &str| {
            let entries = fs::read_dir(self.model(folder)).into_iter().flatten();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<BTreeSet<_>>()
        };
        let snapshot = names(&format!("snapshots/{COMMIT}"));
        for file in &snapshot {
            let path = self.model("snapshots").join(COMMIT).join(file);
            assert_eq!(fs::read_link(&path).unwrap(), Path::new("../../blobs").join(etag(file)), "{file}");
            assert!(fs::read(&path).unwrap() == held(file), "{file}");
        }
        let blobs = names("blobs").into_iter().filter(|name| !name.ends_with(".incomplete"));
        assert_eq!(blobs.collect::<BTreeSet<_>>(), snapshot.iter().map(|file| etag(file)).collect());
        snapshot
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn assert_says(said: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(said.contains(part), "{said} lacks {part}"));
}

/// A hub that is as it should be.
fn right() -> Servers {
    Servers::start(|_, answer| answer)
}

/// Spoils what comes for the bytes of a file, the first so many times.
fn spoilt(file: &'static str, times: usize, spoil: impl Fn(Answer) -> Answer + Send + Sync + 'static) -> Servers {
    let left = AtomicUsize::new(times);
    let is_left = move || left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
    Servers::start(move |asked, answer| if asked.is_bytes_of(file) && is_left() { spoil(answer) } else { answer })
}

/// A hub that answers every question with this status.
fn only(answer: Answer) -> Servers {
    Servers::start(move |_, _| answer.clone())
}

/// The ranges of a file that were asked for.
fn ranges(asked: &[Asked], file: &str) -> Vec<Option<String>> {
    asked.iter().filter(|asked| asked.is_bytes_of(file)).map(|asked| asked.header("range").map(str::to_owned)).collect()
}

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
fn a_file_of_another_length_or_hash_is_refused_and_deleted() {
    let longer = |mut answer: Answer| {
        answer.body.push(0);
        answer
    };
    let shorter = |mut answer: Answer| {
        answer.body.pop();
        answer
    };
    let other = |mut answer: Answer| {
        answer.body[1000] ^= 1;
        answer
    };
    // It does not say how long it is.
    let unsaid = move |answer| longer(answer).with("Content-Length", "");
    for (hub, cause) in [
        (spoilt(FIRST, 9, longer), "has 1669937 bytes, not the 1669936 that the hub announced"),
        (spoilt(FIRST, 9, shorter), "has 1669935 bytes, not the 1669936 that the hub announced"),
        (spoilt(FIRST, 9, unsaid), "more than the 1669936 bytes come that the hub announced"),
        (spoilt(FIRST, 9, other), "has another hash than the hub announced"),
    ] {
        let world = World::new(&hub);
        assert_says(&world.refusal(), &[FIRST, cause, "deleted", "try again"]);
        assert!(!world.partial(FIRST).exists(), "{cause}");
        assert!(!world.whole().contains(FIRST), "{cause}");
        world.with(&right()).prints();
    }
}

#[test]
fn each_refusal_of_the_hub_has_its_remedy() {
    for (answer, parts) in [
        (Answer::status(401), &["no model org/speller", "does not exist, or is private or gated", "set HF_TOKEN"][..]),
        (
            Answer::status(403).with("X-Error-Code", "GatedRepo"),
            &["is gated", "accept its licence at http", "set HF_TOKEN"],
        ),
        (Answer::status(404), &["no such model or revision", "404", "no folder either"]),
        (Answer::status(404).with("X-Error-Code", "RevisionNotFound"), &["no such revision"]),
        (Answer::status(429).with("Retry-After", "0"), &["answers 429", "5 times in a row"]),
        (Answer::status(500).with("Retry-After", "0"), &["answers 500", "5 times in a row"]),
        (Answer::status(418), &["answers 418", "HF_ENDPOINT"]),
        (Answer::status(302).with("Location", "/again"), &["more than 10 redirects"]),
        (Answer::status(302), &["points to no address"]),
        (Answer { body: b"<html>".to_vec(), ..Answer::status(200) }, &["makes no sense"]),
    ] {
        let hub = only(answer);
        let world = World::new(&hub);
        assert_says(&world.refusal(), parts);
        assert!(!world.cache.path().join("hub").exists(), "{parts:?}");
    }
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
fn names_that_lead_out_of_the_models_folder_are_refused() {
    let listing = |files: &'static str| {
        let body = format!(r#"{{"sha": "{COMMIT}", "siblings": [{files}]}}"#).into_bytes();
        Servers::start(move |asked, answer| match asked.path.starts_with("/api/") {
            true => Answer { body: body.clone(), ..Answer::status(200) },
            false => answer,
        })
    };
    for file in ["../evil", "a/../../evil", "/evil", "a//evil", "..\\\\evil"] {
        let file = format!(r#"{{"rfilename": "config.json"}}, {{"rfilename": "{file}"}}"#);
        let world = World::new(&listing(file.leak()));
        assert_says(&world.refusal(), &["evil", "outside the model's folder", "nothing is taken"]);
        assert!(!world.cache.path().join("hub").exists());
    }
    // Names that the hub's other answers give to files.
    let index = br#"{"weight_map": {"a": "../evil.safetensors"}}"#;
    let hub = Servers::start(move |asked, answer| match asked.path.ends_with("index.json") {
        true => Answer { body: index.to_vec(), ..answer },
        false => answer,
    });
    let world = World::new(&hub);
    let done = world.generate().output().unwrap();
    assert_says(&text(&done.stderr), &["model.safetensors.index.json", "no plain file name"]);
    let hub = Servers::start(|asked, answer| match asked.path.ends_with("tokenizer.json") {
        true => answer.with("ETag", "\"../../evil\""),
        false => answer,
    });
    assert_says(&World::new(&hub).refusal(), &["tokenizer.json", "no ETag"]);
    let hub = only(Answer { body: br#"{"sha": "../evil", "siblings": []}"#.to_vec(), ..Answer::status(200) });
    assert_says(&World::new(&hub).refusal(), &["no commit"]);
}

#[test]
fn a_model_without_safetensors_is_refused_with_what_it_has() {
    let files = ["config.json", "pytorch_model.bin", "q4.gguf", "README.md"];
    let files = files.map(|file| format!(r#"{{"rfilename": "{file}"}}"#)).join(",");
    let body = format!(r#"{{"sha": "{COMMIT}", "siblings": [{files}]}}"#).into_bytes();
    let hub = only(Answer { body, ..Answer::status(200) });
    let said = World::new(&hub).refusal();
    assert_says(
        &said,
        &["neither", "but pytorch_model.bin, q4.gguf;", "name a repository of this model that has safetensors"],
    );
    assert_eq!(hub.asked().len(), 1, "nothing is taken");
}

#[test]
fn a_full_disk_is_known_before_the_weights_are_begun() {
    let name = "a_full_disk_is_known_before_the_weights_are_begun";
    if !in_child(name) || !own_mounts() {
        return;
    }
    let hub = right();
    let world = World::new(&hub);
    // Room for what is small.
    mount("none", world.cache.path(), Some("tmpfs"), 0, "size=1m").unwrap();
    let said = world.refusal();
    assert_says(&said, &["models--org--speller: ", "MB are missing: the model takes 3.25 MB more", "HF_HUB_CACHE"]);
    assert!(hub.asked().iter().all(|asked| asked.of_hub), "no weights are asked for");
    // Room for nothing.
    let world = World::new(&hub);
    fill(world.cache.path());
    assert_says(&world.refusal(), &[" are missing: the model takes ", "free some, or set HF_HUB_CACHE"]);
    // A disk that fills up meanwhile: by what it says itself, as much as is needed is free.
    let cache = folder();
    mount("none", cache.path(), Some("tmpfs"), 0, "size=3600k").unwrap();
    let filler = cache.path().join("filler");
    let hub = Servers::start(move |asked, answer| {
        if asked.is_bytes_of(FIRST) {
            fs::write(&filler, vec![0; 3 << 20]).unwrap();
        }
        answer
    });
    let world = World { cache, ..World::new(&hub) };
    assert_says(&world.refusal(), &[".incomplete", "No space left on device", "MB more are needed"]);
    fs::remove_file(world.cache.path().join("filler")).unwrap();
    world.with(&right()).prints();
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
fn a_file_that_another_process_has_begun_anew_gets_no_name() {
    let place = folder();
    let partial = place.path().join("hub/models--org--speller/blobs").join(format!("{}.incomplete", etag(FIRST)));
    let begun_anew = partial.clone();
    // As it happens where locks do nothing.
    let hub = spoilt(FIRST, 1, move |answer| {
        fs::remove_file(&begun_anew).unwrap();
        fs::write(&begun_anew, &held(FIRST)[..1000]).unwrap();
        answer
    });
    let world = World { cache: place, ..World::new(&hub) };
    assert_says(&world.refusal(), &[".incomplete", "locks do nothing", "try again"]);
    assert_eq!(fs::read(partial).unwrap(), held(FIRST)[..1000]);
    world.with(&right()).prints();
}

#[test]
fn ctrl_c_keeps_what_has_come() {
    let hub = Servers::start(|asked, answer| match asked.is_bytes_of(SECOND) && asked.header("range").is_none() {
        // The rest never comes.
        true => Answer { cut: Some(1_000_000), holds: true, ..answer },
        false => answer,
    });
    let world = World::new(&hub);
    let mut child = world.generate().stderr(Stdio::null()).spawn().unwrap();
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
fn a_name_without_an_owner_and_a_folder_that_is_missing_are_not_asked_for() {
    let hub = right();
    let world = World::new(&hub);
    let refusal = |model: &str| {
        let done = world.command("generate", model).args(["--quiet", "4096="]).output().unwrap();
        assert!(!done.status.success());
        text(&done.stderr)
    };
    let said = refusal("speller");
    assert_says(&said, &["speller: there is no such folder", "layer-streamer generate --model ORG/speller"]);
    for folder in ["./org/speller", "/org/speller", "~/speller", "a/b/c"] {
        assert_says(&refusal(folder), &[folder, "config.json", "No such file"]);
    }
    assert!(hub.asked().is_empty());
    // A folder is a folder, whatever its name looks like.
    let place = folder();
    fs::create_dir(place.path().join("org")).unwrap();
    symlink(speller(), place.path().join("org/speller")).unwrap();
    let done = world.generate().current_dir(place.path()).output().unwrap();
    assert_eq!(text(&done.stdout), TEXT, "{}", text(&done.stderr));
    assert!(hub.asked().is_empty());
}

#[test]
fn offline_and_not_in_the_cache_is_refused_with_the_command_that_downloads() {
    let hub = right();
    let offline = |world: &World| {
        let done = world.generate().env("HF_HUB_OFFLINE", "1").output().unwrap();
        assert!(!done.status.success());
        text(&done.stderr)
    };
    let world = World::new(&hub);
    let online = "HF_HUB_OFFLINE=0 ";
    assert_says(&offline(&world), &["org/speller is not in the cache", online, "generate --model org/speller"]);
    assert!(hub.asked().is_empty());
    // Nor is a part of it enough.
    world.prints();
    fs::remove_file(world.model("snapshots").join(COMMIT).join(SECOND)).unwrap();
    assert_says(&offline(&world), &["or not all of it", online]);
    // The blob is there, so nothing comes but the link.
    world.prints();
    assert_eq!(ranges(&hub.asked(), SECOND), [None]);
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
fn no_network_is_said_at_once() {
    let world = World::new(&right()).without_network();
    assert_says(&world.refusal(), &["cannot reach http://127.0.0.1", "refused", "check the network"]);
    // Somebody who takes the call and never speaks.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let world = World { hub: format!("http://{}", silent.local_addr().unwrap()), ..world };
    let output = |command: &mut Command| command.env("HF_HUB_DOWNLOAD_TIMEOUT", "0.2").output().unwrap();
    let Output { stderr, .. } = output(&mut world.generate());
    assert_says(&text(&stderr), &["cannot reach http://127.0.0.1", "check the network"]);
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
