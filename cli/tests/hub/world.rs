//! A cache to fill, and how the program fills it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use support::folder;

use crate::{
    common::program,
    server::{Answer, Asked, COMMIT, NEEDED, Servers, etag, held},
};

pub const TEXT: &str = " four thousand ninety-six\n";
pub const FIRST: &str = NEEDED[4];
pub const SECOND: &str = NEEDED[5];

/// A cache, and a hub to fill it from.
pub struct World {
    pub cache: tempfile::TempDir,
    pub hub: String,
    /// The certificates to trust, if not the system's.
    pub authority: Option<PathBuf>,
}

impl World {
    pub fn new(servers: &Servers) -> Self {
        Self { cache: folder(), hub: servers.address.clone(), authority: None }
    }

    /// The same cache where there is no network: nobody listens there, nor does a server of another test.
    pub fn without_network(self) -> Self {
        Self { hub: "http://127.0.0.1:1".into(), ..self }
    }

    pub fn with(self, servers: &Servers) -> Self {
        Self { hub: servers.address.clone(), ..self }
    }

    pub fn command(&self, command: &str, model: &str) -> Command {
        let mut program = self.program(command);
        program.args(["--device", "cpu", "--model", model]);
        program
    }

    /// The program with one of its commands, in this world.
    pub fn program(&self, command: &str) -> Command {
        let mut program = program(command);
        // Whatever the machine's user has set.
        for (name, _) in std::env::vars() {
            if name.starts_with("HF_") || name.starts_with("SSL_CERT_") || name.to_ascii_lowercase().ends_with("_proxy")
            {
                program.env_remove(name);
            }
        }
        program.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env("HF_HOME", self.cache.path());
        program.env("HF_ENDPOINT", &self.hub);
        self.authority.iter().for_each(|file| _ = program.env("SSL_CERT_FILE", file));
        program
    }

    pub fn generate(&self) -> Command {
        let mut command = self.command("generate", "org/speller");
        command.args(["--quiet", "4096="]);
        command
    }

    /// A run that must give the speller's text, and says nothing else.
    pub fn prints(&self) {
        let done = self.generate().output().unwrap();
        assert_eq!((text(&done.stdout), text(&done.stderr)), (TEXT.into(), String::new()));
        assert_eq!(fs::read_to_string(self.model("refs/main")).unwrap(), COMMIT);
        assert_eq!(self.whole(), NEEDED.iter().map(ToString::to_string).collect());
    }

    /// A run that must fail, and leaves nothing that is not whole: its error.
    pub fn refusal(&self) -> String {
        let done = self.generate().output().unwrap();
        let said = text(&done.stderr);
        assert!(!done.status.success() && done.stdout.is_empty() && !said.contains("panicked"), "{said}");
        assert!(said.starts_with("error: ") && said.lines().count() == 1, "{said}");
        assert!(!self.model("refs/main").exists(), "{said}");
        self.whole();
        said
    }

    pub fn model(&self, path: &str) -> PathBuf {
        self.cache.path().join("hub/models--org--speller").join(path)
    }

    pub fn partial(&self, file: &str) -> PathBuf {
        self.model("blobs").join(format!("{}.incomplete", etag(file)))
    }

    /// The snapshot's files: each is what the hub has, by a link that holds wherever the cache is moved to. And what is no
    /// snapshot's has a name that says so.
    pub fn whole(&self) -> BTreeSet<String> {
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

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn assert_says(said: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(said.contains(part), "{said} lacks {part}"));
}

/// A hub that is as it should be.
pub fn right() -> Servers {
    Servers::start(|_, answer| answer)
}

/// Spoils what comes for the bytes of a file, the first so many times.
pub fn spoilt(file: &'static str, times: usize, spoil: impl Fn(Answer) -> Answer + Send + Sync + 'static) -> Servers {
    let left = AtomicUsize::new(times);
    let is_left = move || left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
    Servers::start(move |asked, answer| if asked.is_bytes_of(file) && is_left() { spoil(answer) } else { answer })
}

/// A hub that answers every question with this status.
pub fn only(answer: Answer) -> Servers {
    Servers::start(move |_, _| answer.clone())
}

/// The ranges of a file that were asked for.
pub fn ranges(asked: &[Asked], file: &str) -> Vec<Option<String>> {
    asked.iter().filter(|asked| asked.is_bytes_of(file)).map(|asked| asked.header("range").map(str::to_owned)).collect()
}
