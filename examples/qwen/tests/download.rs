//! A model by its name, from a hub on this machine.

#[path = "../../../cli/tests/hub/server.rs"]
#[allow(dead_code, reason = "the program's tests use the rest")]
mod server;

use std::{path::Path, process::Command};

use server::Servers;

/// The example, without the variables of whoever runs the tests, and what it says on stdout and stderr.
fn qwen(hub: &Servers, cache: &Path, model: &str) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen"));
    command.args([model, "4096="]).env_clear().env("HF_HOME", cache).env("HF_ENDPOINT", &hub.address);
    let done = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(done.stdout), text(done.stderr))
}

#[test]
fn a_model_is_downloaded_once_by_its_name() {
    let hub = Servers::start(|_, answer| answer);
    let cache = support::folder();
    let (answer, said) = qwen(&hub, cache.path(), "org/speller");
    assert_eq!(answer, " four thousand ninety-six\n", "{said}");
    assert!(said.contains("downloading org/speller: 2 files of weights, 3.25 MB"), "{said}");
    let asked = hub.asked().len();
    let (answer, said) = qwen(&hub, cache.path(), "org/speller");
    assert_eq!(answer, " four thousand ninety-six\n", "{said}");
    assert_eq!(hub.asked().len(), asked, "what is there is not asked for");
    let (_, said) = qwen(&hub, cache.path(), "speller");
    assert!(said.starts_with("error: speller is no folder, nor a name such as Qwen/"), "{said}");
}
