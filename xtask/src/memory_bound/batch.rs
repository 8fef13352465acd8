//! `batch`: a file of prompts, short and long, many at a time.

use std::{
    fmt::Write,
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::Path,
};

use serde_json::{Value, json};

use super::{judge, peak_of, said, total};
use crate::run::{self, Failure};

const PROMPTS: u64 = 100;

pub fn check(program: &Path, model: &Path) -> Result<(), Failure> {
    let work = run::scratch("memory-bound")?;
    let file = work.path().join("prompts.jsonl");
    fs::write(&file, lines())?;
    let options = ["--device", "cpu", "--no-probe", "--max-new-tokens", "2", "--model"];
    // With all layers kept; then a tenth less, so that some are not.
    let mut budget = None;
    for what in ["a batch within what is free", "a batch within a budget"] {
        let mut command = run::command(program, &["batch", "--raw", "--sequences", "16", "--json"]);
        command.args(options).arg(model).arg("--output").arg(work.path().join(what)).arg(&file);
        if let Some(budget) = budget {
            command.args(["--ram", &format!("{budget}")]);
        }
        leave_out_of_page_cache(model)?;
        let (summary, peak) = peak_of(&mut command).map_err(|failure| format!("{what}: {failure}"))?;
        let summary: Value = serde_json::from_str(&summary)?;
        let said = said(&summary["memory"])?;
        judge(what, &said, &["kv_cache", "requests", "tokenizer"], peak, budget)?;
        if summary["answered"] != PROMPTS || summary["errors"] != 2 {
            return Err(format!("{what}: not {PROMPTS} answers, of which two are errors: {summary}").into());
        }
        budget = Some(total(&said) / 10 * 9);
    }
    Ok(())
}

/// The page cache has all of the model but for some in the middle: what is kept is used there in part, and read in part, and no
/// part of it is to be there twice.
fn leave_out_of_page_cache(model: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(model)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let mut file = File::open(&path)?;
            let tenth = io::copy(&mut file, &mut io::sink())?.cast_signed() / 10;
            // SAFETY: the descriptor is open.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 4 * tenth, tenth, libc::POSIX_FADV_DONTNEED) };
        }
    }
    Ok(())
}

/// Three of them are long: a prompt, a line that takes nearly all that there is to read it, and one that takes more.
fn lines() -> String {
    let mut lines = String::new();
    for number in 0..PROMPTS - 3 {
        let prompt = format!("{number} and {} make", 7 * number);
        let _ = writeln!(lines, "{}", json!({ "id": number, "prompt": prompt }));
    }
    let _ =
        writeln!(lines, "{}", json!({ "prompt": (0..100).map(|number| format!("{number}, ")).collect::<String>() }));
    for ids in [670_000, 4 << 20] {
        let _ = writeln!(lines, "{{\"prompt_ids\": [{}0]}}", "0,".repeat(ids));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prompt_has_a_line() {
        assert_eq!(lines().lines().count() as u64, PROMPTS);
        // To parse the long ones would take memory, which the peaks that other tests measure begin with.
        let lines = lines();
        let mut short = lines.lines().filter(|line| line.len() < 10_000);
        assert!(short.all(|line| serde_json::from_str::<Value>(line).is_ok()));
    }
}
