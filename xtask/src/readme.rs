//! README's commands, which are run as they stand there.
//!
//! A command is a line of a fenced block in `sh`, split into words as a shell would do, with quotes and comments. Nothing is
//! expanded: a line that needs a shell (variables, pipes, several commands) is refused if it is asked for.

use std::{fs, process::Command};

use crate::run::{self, Failure, Run};

/// A fenced block: the word behind the opening fence, and the lines up to the closing one.
struct Block<'a> {
    language: &'a str,
    lines: Vec<&'a str>,
}

fn blocks(text: &str) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block<'_>> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(language), false) => blocks.push(Block { language, lines: Vec::new() }),
            (Some(_), true) => {}
            (None, true) => blocks.last_mut().expect("a block is open").lines.push(line),
            (None, false) => {}
        }
        inside ^= line.starts_with("```");
    }
    blocks
}

/// The words of a command that needs no shell.
fn words(line: &str) -> Result<Vec<String>, Failure> {
    match line.find(['$', '`', '|', '&', ';', '<', '>', '*', '?', '~', '(']) {
        Some(at) => Err(format!("`{line}` needs a shell, for its {:?}", &line[at..=at]).into()),
        None => Ok(shlex::split(line).ok_or_else(|| format!("`{line}` has a quote without its end"))?),
    }
}

/// The first command that begins so, and the number of its block.
fn find(blocks: &[Block<'_>], begins: &str) -> Result<(Vec<String>, usize), Failure> {
    for (number, block) in blocks.iter().enumerate().filter(|(_, block)| block.language == "sh") {
        let same = |line: &str| line.strip_prefix(begins).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '));
        if let Some(line) = block.lines.iter().find(|line| same(line)) {
            return Ok((words(line)?, number));
        }
    }
    Err(format!("README.md has no command `{begins}` in a block of sh").into())
}

/// README's command that begins so.
pub fn command(begins: &str) -> Result<Command, Failure> {
    let text = fs::read_to_string(run::root().join("README.md"))?;
    let (words, _) = find(&blocks(&text), begins)?;
    Ok(as_command(&words))
}

fn as_command(words: &[String]) -> Command {
    let mut command = run::command(&words[0], &[]);
    command.args(&words[1..]);
    command
}

/// Runs the first `cargo run` of README.md, and holds its answer against the one that stands there.
pub fn check_first_run() -> Result<(), Failure> {
    let text = fs::read_to_string(run::root().join("README.md"))?;
    let (words, promised) = first_run(&text)?;
    let said = as_command(&words).read()?;
    if said != promised {
        return Err(format!("README.md promises {promised:?} of `{}`, which says {said:?}", words.join(" ")).into());
    }
    println!("{said}");
    Ok(())
}

/// The first `cargo run`, and the answer that README.md shows: the first line of the block in `text` that comes next.
fn first_run(text: &str) -> Result<(Vec<String>, &str), Failure> {
    let blocks = blocks(text);
    let (words, number) = find(&blocks, "cargo run --release --")?;
    let shown = blocks[number..].iter().find(|block| block.language == "text").and_then(|block| block.lines.first());
    Ok((words, shown.ok_or("README.md shows no output, in a block of text, after its first `cargo run`")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "cargo test outside\n```text\ncargo test in a picture\n```\nand\n```sh\ncargo run --release -- say \
                        \"4096=\"  # why\ncargo tester\ncargo test\n```\nsays\n```text\n four\nand more\n```\n";

    #[test]
    fn commands_are_whole_lines_of_blocks_in_sh() {
        let blocks = blocks(TEXT);
        assert_eq!(find(&blocks, "cargo test").unwrap(), (vec!["cargo".to_owned(), "test".into()], 1));
        assert!(find(&blocks, "cargo test in").unwrap_err().to_string().contains("no command"));
    }

    #[test]
    fn the_first_run_comes_with_the_answer_below_it() {
        let (words, promised) = first_run(TEXT).unwrap();
        assert_eq!(words, ["cargo", "run", "--release", "--", "say", "4096="]);
        assert_eq!(promised, " four");
        assert!(first_run("```sh\ncargo run --release -- x\n```\n").is_err());
    }

    #[test]
    fn what_needs_a_shell_is_refused() {
        for line in ["cargo test $(cat x)", "cargo test; rm x", "cargo test | cat", "cargo test >x", "cargo test ~/x"] {
            assert!(words(line).unwrap_err().to_string().contains("needs a shell"), "{line}");
        }
        assert!(words("cargo test \"x").unwrap_err().to_string().contains("quote"));
    }

    #[test]
    fn the_readme_has_both_commands() {
        let text = fs::read_to_string(run::root().join("README.md")).unwrap();
        assert_eq!(find(&blocks(&text), "cargo test").unwrap().0[..2], ["cargo", "test"]);
        assert!(first_run(&text).is_ok());
    }
}
