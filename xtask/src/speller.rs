//! The model of `examples/speller` as a user runs it: installed, tuned, on the emulated GPU.

use std::fs;

use serde_json::Value;

use crate::{
    memory_bound::least_ram,
    run::{self, Failure, Run},
};

/// What the model is asked, and what it answers.
pub const PROMPT: &str = "4096=";
pub const ANSWER: &str = " four thousand ninety-six";

/// A copy of the model, in a folder that is gone at the end.
pub fn copy() -> Result<tempfile::TempDir, Failure> {
    let folder = run::scratch("speller")?;
    for entry in fs::read_dir(run::root().join("examples/speller"))? {
        let entry = entry?;
        fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    Ok(folder)
}

/// The same, which never ends an answer.
pub fn endless() -> Result<tempfile::TempDir, Failure> {
    let folder = copy()?;
    fs::remove_file(folder.path().join("generation_config.json"))?;
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    (config["eos_token_id"], config["max_position_embeddings"]) = (Value::Null, 20_000.into());
    fs::write(path, config.to_string())?;
    Ok(folder)
}

fn check(said: &str) -> Result<(), Failure> {
    if said == ANSWER { Ok(()) } else { Err(format!("the speller answers {said:?}, not {ANSWER:?}").into()) }
}

/// The program is installed, and runs where there is no repository.
pub fn installed() -> Result<(), Failure> {
    let work = run::scratch("installed")?;
    run::cargo("install -q --locked --path cli --root").arg(work.path()).run()?;
    let mut generate = run::command(work.path().join("bin/layer-streamer"), &["generate", "--quiet", PROMPT]);
    check(&generate.current_dir("/").read()?)
}

/// The tuner searches, draws, and leaves a record that `generate` takes.
pub fn tuned() -> Result<(), Failure> {
    let work = run::scratch("tuned")?;
    let (record, picture) = (work.path().join("record"), work.path().join("picture.svg"));
    let program = run::program()?;
    let tune = |ram: u64| run::command(&program, &["tune", "--device", "cpu", "--ram", &ram.to_string()]);
    // Of so little memory, three times the least, that most layers are read in every pass, and the rings matter.
    let ram = 3 * least_ram(&mut run::command(&program, &["plan", "--device", "cpu"]))?;
    let mut limited = run::command("timeout", &["60"]);
    let tune = tune(ram);
    limited
        .arg(tune.get_program())
        .args(tune.get_args())
        .arg("--json")
        .arg(&record)
        .arg("--plot")
        .arg(&picture)
        .run()?;
    if !fs::read_to_string(&picture)?.contains("</svg>") {
        return Err("tune --plot writes no whole SVG".into());
    }
    let mut generate = run::command(&program, &["generate", "--device", "cpu", "--quiet", PROMPT, "--config"]);
    check(&generate.arg(&record).read()?)
}

/// The program on the emulated GPU, which it names.
pub fn emulated() -> Result<(), Failure> {
    let mut generate = run::cargo("run -q --locked --features capi,cuda,nvtx -- generate --device cuda");
    let output = generate.arg(PROMPT).env("LAYER_STREAMER_CUDA", "emulated").quiet()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    println!("{}", errors.lines().find(|line| line.contains("emulated GPU")).ok_or("no emulated GPU is named")?);
    check(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_answer_is_refused() {
        assert!(check(ANSWER).is_ok());
        assert!(check(" four").unwrap_err().to_string().contains("four thousand"));
    }
}
