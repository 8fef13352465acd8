//! Programs are run here: what failed is named by its whole command line.

use std::{
    env,
    error::Error,
    ffi::OsStr,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    time::Instant,
};

/// What a person is told, who then corrects the command or the code.
pub type Failure = Box<dyn Error + Send + Sync>;

/// The repository's folder, where this was compiled.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in a folder of the repository")
}

/// Where cargo puts what it builds in the repository.
pub fn target() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// `PROGRAM WORDS…` in the repository's folder.
pub fn command(program: impl AsRef<OsStr>, words: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).args(words);
    command
}

/// `cargo WORDS…` in the repository's folder, WORDS given as one text without quotes.
pub fn cargo(words: &str) -> Command {
    let mut command = command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), &[]);
    command.args(words.split_whitespace());
    command
}

/// The program of the workspace, in the release build.
pub fn program() -> Result<PathBuf, Failure> {
    cargo("build -q --release --locked --bin layer-streamer").run()?;
    Ok(target().join("release/layer-streamer"))
}

/// A folder that is gone at the end.
pub fn scratch(name: &str) -> Result<tempfile::TempDir, Failure> {
    let made = tempfile::Builder::new().prefix(&format!("layer-streamer-{name}.")).tempdir();
    made.map_err(|error| format!("cannot make a folder in {}: {error}", env::temp_dir().display()).into())
}

/// An option's path, which may be relative to where the command was typed.
pub fn absolute(path: &str) -> io::Result<PathBuf> {
    std::path::absolute(path)
}

/// Whether a program of this name is on the PATH.
pub fn is_there(name: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(name).is_file()))
}

/// How a command is run, and that its failure is ours.
pub trait Run {
    /// Its output is passed on.
    fn run(&mut self) -> Result<(), Failure>;
    /// What it writes to stdout, without the last line feeds; the rest is passed on.
    fn read(&mut self) -> Result<String, Failure>;
    /// All that it writes, which nobody sees unless it fails.
    fn quiet(&mut self) -> Result<Output, Failure>;
    /// All that it writes, line by line as it comes, and then in one piece.
    fn tee(&mut self) -> Result<String, Failure>;
}

impl Run for Command {
    fn run(&mut self) -> Result<(), Failure> {
        let ended = self.status();
        check(self, ended)
    }

    fn read(&mut self) -> Result<String, Failure> {
        let output = self.stderr(Stdio::inherit()).output();
        let (ended, text) = match output {
            Ok(output) => (Ok(output.status), output.stdout),
            Err(error) => (Err(error), Vec::new()),
        };
        check(self, ended)?;
        Ok(String::from_utf8(text)?.trim_end_matches('\n').to_owned())
    }

    fn quiet(&mut self) -> Result<Output, Failure> {
        let output = self.output().map_err(|error| cannot_run(self, &error))?;
        check(self, Ok(output.status)).map_err(|failure| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            format!("{failure}\n{}{}", text(&output.stdout), text(&output.stderr))
        })?;
        Ok(output)
    }

    fn tee(&mut self) -> Result<String, Failure> {
        let (read, write) = io::pipe()?;
        let mut child =
            self.stdout(write.try_clone()?).stderr(write).spawn().map_err(|error| cannot_run(self, &error))?;
        // The pipe ends when the last who can write to it is gone, and the command would be one of them.
        self.stdout(Stdio::null()).stderr(Stdio::null());
        let mut all = String::new();
        for line in BufReader::new(read).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            all.push_str(&line);
            all.push('\n');
        }
        let ended = child.wait();
        check(self, ended)?;
        Ok(all)
    }
}

/// The failure of a command that did not start or did not end with 0.
fn check(command: &Command, ended: io::Result<ExitStatus>) -> Result<(), Failure> {
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{}` ended with {status}", line(command)).into()),
        Err(error) => Err(cannot_run(command, &error)),
    }
}

fn cannot_run(command: &Command, error: &io::Error) -> Failure {
    let name = command.get_program().to_string_lossy();
    match error.kind() {
        io::ErrorKind::NotFound => format!("{name} is not there: install it").into(),
        _ => format!("cannot run `{}`: {error}", line(command)).into(),
    }
}

/// The command as a person would type it.
fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The parts of a longer check, each with its name and the seconds since the first.
pub struct Steps {
    of: &'static str,
    begun: Instant,
}

impl Steps {
    pub fn of(of: &'static str) -> Self {
        Self { of, begun: Instant::now() }
    }

    pub fn begin(&self, name: &str) {
        println!("\n== {}: {name} ({} s)", self.of, self.begun.elapsed().as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_is_named_with_what_it_said() {
        let failure = command("sh", &["-c", "echo out; echo err >&2; exit 3"]).quiet().unwrap_err().to_string();
        assert!(failure.contains("exit status: 3") && failure.contains("out\nerr"), "{failure}");
        assert!(
            command("no-such-program", &[]).run().unwrap_err().to_string().contains("no-such-program is not there")
        );
        assert!(command("false", &[]).read().is_err() && command("false", &[]).tee().is_err());
    }

    #[test]
    fn what_both_outputs_carry_is_kept_in_order() {
        let said = command("sh", &["-c", "echo one; echo two >&2; echo three"]).tee().unwrap();
        assert_eq!(said, "one\ntwo\nthree\n");
        assert_eq!(command("printf", &[" a\\n\\n"]).read().unwrap(), " a");
    }
}
