//! Breaks the code in one place at a time, and demands that the tests notice.
//!
//! All mutants are compiled into one executable, in a copy of the tree; a variable of the environment picks one.

mod codec;
mod company;
mod equivalent;
mod kernels;
mod pipeline;

use std::{
    collections::VecDeque,
    fmt, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use regex::Regex;

use crate::{
    run::{self, Failure, Run},
    tests,
};

/// Break the code in one place at a time, and demand that the tests notice.
///
/// kernels: every barrier and wait of `cuda/` is left out, every check of a bound is left out or weakened by one, every choice of
/// a bound is decided one way; the tests are those of `tests/cuda_kernels.rs`, on kernels compiled for the host.
///
/// pipeline: every wait, record and query of events in `src/pipeline` is left out, and what must come after a record is done
/// before; the tests are the pipeline's own unit tests, on the asynchronous CPU device.
///
/// codec: expressions of `src/packed` and of the arithmetic of packed tensors are replaced, by a list; the tests are unit tests.
///
/// company: what keeps a sequence's bits the same in any company is changed, by a list; the tests are `tests/invariance.rs` and, on
/// kernels compiled for the host, `tests/cuda_invariance.rs`.
///
/// Fails if one survives without a reason given in `xtask/src/mutants/equivalent.rs`, or if a reason is given for none.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask mutants pipeline
  cargo xtask mutants kernels 'rope.cu:'   # those whose line in the table matches")]
pub struct Options {
    #[arg(value_enum)]
    part: Part,
    /// A regular expression: which mutants
    #[arg(default_value = "")]
    pattern: Regex,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    Codec,
    Company,
    Kernels,
    Pipeline,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    match options.part {
        Part::Codec => codec::run(&options.pattern),
        Part::Company => company::run(&options.pattern),
        Part::Kernels => kernels::run(&options.pattern),
        Part::Pipeline => pipeline::run(&options.pattern),
    }
}

/// Picks the mutant by its number; 0 is none.
const VARIABLE: &str = "LAYER_STREAMER_MUTANT";
/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(300);

/// One place, one change.
pub struct Mutant {
    number: usize,
    file: String,
    line: usize,
    code: String,
    change: String,
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.file, self.line, self.code, self.change)
    }
}

/// A file's text, and what is to be put in between.
struct Source<'a> {
    file: String,
    text: &'a str,
    inserts: Vec<(usize, String)>,
}

impl<'a> Source<'a> {
    fn new(file: &str, text: &'a str) -> Self {
        Self { file: file.to_owned(), text, inserts: Vec::new() }
    }

    /// Notes a mutant; returns its number. The same change of the same code further on is told apart by a number of its own.
    fn mutant(&self, at: usize, code: &str, change: &str, mutants: &mut Vec<Mutant>) -> usize {
        let code = code.split_whitespace().collect::<Vec<_>>().join(" ");
        let is_same = |mutant: &&Mutant| {
            let rest = mutant.code.strip_prefix(&code);
            (&*mutant.file, &*mutant.change) == (&*self.file, change)
                && rest.is_some_and(|it| it.is_empty() || is_count(it))
        };
        let code = match mutants.iter().filter(is_same).count() {
            0 => code,
            same => format!("{code} ({})", same + 1),
        };
        let (number, line) = (mutants.len() + 1, self.text[..at].matches('\n').count() + 1);
        mutants.push(Mutant { number, file: self.file.clone(), line, code, change: change.to_owned() });
        number
    }

    fn insert(&mut self, at: usize, text: String) {
        self.inserts.push((at, text));
    }

    /// The text with all of it. Of two at one place the later one comes first.
    fn finish(mut self) -> String {
        self.inserts.sort_by_key(|(at, _)| *at);
        let mut out = self.text.to_owned();
        while let Some((at, _)) = self.inserts.last() {
            let first = self.inserts.partition_point(|(other, _)| other < at);
            let at = *at;
            for (_, insert) in self.inserts.drain(first..) {
                out.insert_str(at, &insert);
            }
        }
        out
    }
}

/// Whether it is as in " (2)".
fn is_count(text: &str) -> bool {
    let digits = text.strip_prefix(" (").and_then(|rest| rest.strip_suffix(')'));
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// An expression of a file, and what stands in its place. It stands there once.
type Change = (&'static str, &'static str, &'static str);

/// Replaces each of them in a copy of the tree by one or the other, as the switch says.
fn replace(tree: &Path, changes: &[Change], mutants: &mut Vec<Mutant>) -> Result<(), Failure> {
    let mut files: Vec<_> = changes.iter().map(|(file, ..)| *file).collect();
    files.dedup();
    for file in files {
        let path = tree.join(file);
        let text = fs::read_to_string(&path)?;
        let mut source = Source::new(file, &text);
        for (_, code, instead) in changes.iter().filter(|(of, ..)| *of == file) {
            let places: Vec<_> = text.match_indices(code).map(|(at, _)| at).collect();
            let [at] = places[..] else {
                return Err(format!("{file} has {} times what it should have once: {code}", places.len()).into());
            };
            let number = source.mutant(at, code, instead, mutants);
            let [before, after] = match file.ends_with(".rs") {
                true => [format!("(if crate::mutated({number}) {{ {instead} }} else {{ "), " })".to_owned()],
                false => [format!("(mutated({number}) ? ({instead}) : ("), "))".to_owned()],
            };
            source.insert(at, before);
            source.insert(at + code.len(), after);
        }
        fs::write(&path, source.finish())?;
    }
    Ok(())
}

/// Gives a copy of the tree the function that says which mutant is chosen.
fn with_switch(tree: &Path) -> Result<(), Failure> {
    let mut library = fs::File::options().append(true).open(tree.join("src/lib.rs"))?;
    writeln!(
        library,
        "\npub(crate) fn mutated(number: usize) -> bool {{\n    static MUTANT: std::sync::OnceLock<usize> = \
         std::sync::OnceLock::new();\n    let chosen = || std::env::var(\"{VARIABLE}\").ok().and_then(|number| \
         number.parse().ok()).unwrap_or(0);\n    *MUTANT.get_or_init(chosen) == number\n}}"
    )?;
    Ok(())
}

fn folder() -> PathBuf {
    run::target().join("mutants")
}

/// A copy of the tree as it is, less what git does not know and would ignore.
fn copy_tree() -> Result<PathBuf, Failure> {
    let tree = folder().join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let listed = run::command("git", &["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).read()?;
    for name in listed.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (run::root().join(name), tree.join(name));
        if from.is_file() {
            fs::create_dir_all(to.parent().ok_or("a file has no folder")?)?;
            fs::copy(&from, &to)?;
            // cargo builds what is newer than what it has built.
            fs::File::open(&to)?.set_modified(fs::metadata(&from)?.modified()?)?;
        }
    }
    Ok(tree)
}

/// The folder's files with such an extension, in order.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, Failure> {
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, Failure>>()?;
    let is_wanted = |path: &PathBuf| extensions.iter().any(|wanted| path.extension().is_some_and(|it| it == *wanted));
    let mut paths = paths.into_iter().filter(is_wanted).collect::<Vec<_>>();
    paths.sort();
    Ok(paths)
}

/// Those whose line in the table matches.
fn pick(mutants: Vec<Mutant>, pattern: &Regex) -> Vec<Mutant> {
    mutants.into_iter().filter(|mutant| pattern.is_match(&mutant.to_string())).collect()
}

/// The executable with all mutants.
struct Built {
    executable: PathBuf,
    tree: PathBuf,
}

impl Built {
    /// Builds the tests called `name` as cargo's `arguments` say.
    fn new(tree: &Path, arguments: &str, name: &str, environment: &[(&str, &str)]) -> Result<Self, Failure> {
        let options = "--no-run --message-format=json-render-diagnostics";
        let mut build = run::cargo(&format!("test --locked -p layer-streamer {arguments} {options}"));
        build.current_dir(tree).env("CARGO_TARGET_DIR", folder().join("target")).envs(environment.iter().copied());
        // Nobody minds what the compiler thinks of code that is put in between, as long as it takes it.
        let messages = String::from_utf8(build.quiet()?.stdout)?;
        let found = tests::executables(&messages)?.into_iter().find(|test| test.name == name);
        let executable = found.ok_or_else(|| format!("cargo has built no tests called {name}"))?.path;
        Ok(Self { executable, tree: tree.to_owned() })
    }

    /// Without a mutant the tests pass.
    fn passes(&self, tests: &[&str]) -> Result<(), Failure> {
        match self.failure(tests, 0)? {
            Some(failure) => Err(format!("the tests fail without a mutant: {failure}").into()),
            None => Ok(()),
        }
    }

    /// How the tests fail with a mutant, if they do.
    fn failure(&self, tests: &[&str], number: usize) -> Result<Option<String>, Failure> {
        for test in tests {
            let mut command = Command::new(&self.executable);
            command.args([test, "--test-threads=1"]).current_dir(&self.tree).stdin(Stdio::null());
            command
                .env(VARIABLE, number.to_string())
                .env("LAYER_STREAMER_TEST_DEVICE", "cuda")
                .env("RUST_BACKTRACE", "0");
            let Some((code, said)) = limited(&mut command)? else {
                return Ok(Some(format!("{test}: no end in {} s", LIMIT.as_secs())));
            };
            if code != Some(0) {
                let ending = said.lines().find(|line| is_telling(line)).map(str::to_owned);
                let ending =
                    ending.unwrap_or_else(|| code.map_or("a signal".to_owned(), |code| format!("exit {code}")));
                return Ok(Some(format!("{test}: {ending}")));
            }
        }
        Ok(None)
    }
}

/// The code with which a command ended (none by a signal) and what it said, or nothing if it did not end.
fn limited(command: &mut Command) -> Result<Option<(Option<i32>, String)>, Failure> {
    let log = tempfile::NamedTempFile::new()?;
    let mut child = command.stdout(log.reopen()?).stderr(log.reopen()?).spawn()?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2));
    };
    Ok(Some((status.code(), String::from_utf8_lossy(&fs::read(log.path())?).into_owned())))
}

/// Whether a line of a test's output says what went wrong.
fn is_telling(line: &str) -> bool {
    let marks = ["is off by", "[Some", "assertion", "Err"];
    let is_message = line.starts_with(|first: char| first.is_ascii_lowercase());
    line.contains("CUDA emulation: ") || is_message && marks.iter().any(|mark| line.contains(mark))
}

/// Tries all, in as many threads as there are processors, and prints how each ended.
fn judge(
    mutants: &[Mutant],
    attempt: impl Fn(&Mutant) -> Result<Option<String>, Failure> + Sync,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let rest = Mutex::new(mutants.iter().collect::<VecDeque<_>>());
    let endings = Mutex::new(Vec::new());
    let next = || rest.lock().expect("no thread panics with the lock").pop_front();
    let work = || -> Result<(), Failure> {
        while let Some(mutant) = next() {
            let killed = attempt(mutant)?;
            let reason = equivalent::reason(mutant);
            let survives = killed.is_none() && reason.is_none();
            let ending = killed
                .as_deref()
                .map_or_else(|| reason.map_or("SURVIVES".into(), |it| format!("the same: {it}")), str::to_owned);
            println!("{mutant}\n    {}", ending.chars().take(160).collect::<String>());
            endings.lock().expect("no thread panics with the lock").push((mutant, killed.is_some(), survives));
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads = (0..thread::available_parallelism()?.get()).map(|_| scope.spawn(work)).collect::<Vec<_>>();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    let endings = endings.into_inner().expect("no thread panics with the lock");
    let killed = endings.iter().filter(|(_, killed, _)| *killed).count();
    let survivors = endings
        .iter()
        .filter(|(_, _, survives)| *survives)
        .map(|(mutant, ..)| format!("  {mutant}"))
        .collect::<Vec<_>>();
    let (count, seconds) = (mutants.len(), begun.elapsed().as_secs());
    println!("\n{count} mutants, {killed} killed, {} survive without a reason, {seconds} s", survivors.len());
    match (count, survivors.is_empty()) {
        (0, _) => Err("no mutant's line matches the pattern".into()),
        (_, true) => Ok(()),
        (_, false) => Err(format!("survivors:\n{}", survivors.join("\n")).into()),
    }
}

#[cfg(test)]
mod tests_of_judgement {
    use super::*;

    fn mutant(number: usize) -> Mutant {
        Mutant { number, file: "a.cu".into(), line: 1, code: "x".into(), change: "left out".into() }
    }

    #[test]
    fn one_that_survives_is_a_failure() {
        let mutants = [mutant(1), mutant(2)];
        assert!(judge(&mutants, |_| Ok(Some("assertion".into()))).is_ok());
        let survives = judge(&mutants, |mutant| Ok((mutant.number == 1).then(|| "assertion".into()))).unwrap_err();
        assert!(survives.to_string().contains("a.cu:1: x: left out"), "{survives}");
        assert!(judge(&[], |_| Ok(None)).is_err());
        assert!(judge(&mutants, |_| Err("cannot run".into())).is_err());
    }

    #[test]
    fn what_is_put_in_keeps_its_place() {
        let mut source = Source::new("a", "01234");
        for (at, text) in [(3, "c"), (1, "a"), (1, "b")] {
            source.insert(at, text.to_owned());
        }
        assert_eq!(source.finish(), "0ba12c34");
    }
}
