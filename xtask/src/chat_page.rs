//! The page at which people talk to the model, in a browser, as they use it: keys, buttons, and what is to be seen then.

use std::{fs, path::Path};

use serde_json::json;

use crate::{
    browser::{Browser, Window},
    run::{self, Failure},
    server::Server,
    speller::{self, ANSWER, PROMPT},
};

/// Narrow, as a phone's.
const WINDOW: Window = Window { width: 400, height: 800, scale: 1.0, dark: false };
const KEY: &str = "sesame";
/// How turns become text for a model that is asked as `4096=`.
const TEMPLATE: &str = "\
{%- for m in messages -%}
    {{- m.content + {'system': '', 'user': '=', 'assistant': '<|endoftext|>'}[m.role] -}}
{%- endfor -%}";

pub fn check() -> Result<(), Failure> {
    let program = run::program()?;
    let work = run::scratch("chat-page")?;
    let mut browser = Browser::start(work.path(), &WINDOW)?;
    answers(&mut browser, &program)?;
    println!("an answer, a second turn, and a new conversation: as they should be");
    stops(&mut browser, &program)?;
    println!("a key that is asked for, an answer that is stopped, and an error: as they should be");
    Ok(())
}

/// The page of a server, when it knows its model, or has been told why not.
fn open(browser: &mut Browser, server: &Server) -> Result<(), Failure> {
    browser.events.clear();
    browser.open(&format!("http://{}/", server.address), "(document.getElementById('state')?.textContent ?? '') !== ''")
}

/// Whether an element's text is this.
fn is(id: &str, text: &str) -> String {
    format!("document.getElementById('{id}').textContent === {}", json!(text))
}

/// Whether the conversation is this: what kind of turn each one is, and its text.
fn turns(wanted: &[(&str, &str)]) -> String {
    let wanted = wanted.iter().map(|(kind, text)| json!([format!("turn {kind}"), text])).collect::<Vec<_>>();
    let found =
        "[...document.querySelectorAll('.turn')].map((turn) => [turn.className, turn.querySelector('p').textContent])";
    format!("JSON.stringify({found}) === JSON.stringify({})", json!(wanted))
}

/// A chat of two turns with a model that ends its answers.
fn answers(browser: &mut Browser, program: &Path) -> Result<(), Failure> {
    let model = speller::copy()?;
    fs::write(model.path().join("chat_template.jinja"), TEMPLATE)?;
    let mut server = Server::start(program, model.path(), "--name speller --context 128")?;
    open(browser, &server)?;
    browser.wait(&is("model", "speller"), "the model is named")?;
    browser.wait(&is("state", "128 tokens of context"), "its context is told")?;
    browser.wait(&is("empty", "Say something."), "an empty page says what to do")?;

    let asked = PROMPT.trim_end_matches('=');
    browser.write(asked)?;
    browser.key("Enter")?;
    browser.wait(&turns(&[("user", asked), ("answer", ANSWER)]), "Enter sends, and the answer is shown")?;
    browser.wait(
        "/^5 tokens, [0-9.]+ a second$/.test(document.getElementById('state').textContent)",
        "its pace is told",
    )?;
    // What is no number, and looks like a part of a page.
    let markup = "<b onclick=x>7</b>";
    browser.write(markup)?;
    browser.click("#send")?;
    browser.wait(
        "document.querySelectorAll('.turn').length === 4 && !document.getElementById('send').disabled",
        "the button sends",
    )?;
    browser
        .wait("document.querySelector('main b[onclick]') === null", "what was said is text, and no part of the page")?;
    browser.wait("document.documentElement.scrollWidth <= innerWidth", "the page is no wider than the window")?;
    browser.click("#new")?;
    browser.wait(&turns(&[]), "a new conversation is empty")?;
    browser.write(asked)?;
    browser.key("Enter")?;
    browser.wait(&turns(&[("user", asked), ("answer", ANSWER)]), "and is answered as the first")?;
    no_errors(browser, &server)?;
    server.end()
}

/// A server with a key, whose model has no chat template and goes on until it is stopped.
fn stops(browser: &mut Browser, program: &Path) -> Result<(), Failure> {
    let model = speller::endless()?;
    let options = format!("--name endless --context 20000 --api-key {KEY} --patience 2");
    let mut server = Server::start(program, model.path(), &options)?;
    open(browser, &server)?;
    browser.wait("document.getElementById('options').open", "who has no key is shown where to give it")?;
    browser.wait("document.getElementById('model').textContent !== 'endless'", "nothing is told without a key")?;
    browser.click("#key")?;
    browser.write(KEY)?;
    browser.key("Tab")?;
    browser.value("document.activeElement.blur()")?;
    browser.wait(&is("model", "endless"), "with a key the model is named")?;
    browser.wait(
        "document.getElementById('empty').textContent.includes('no chat template')",
        "it is told that it completes text",
    )?;

    // Enough that there is time to stop it.
    browser.click("summary")?;
    browser.value("document.getElementById('most').select()")?;
    browser.write("19000")?;
    browser.click("#text")?;
    browser.write(PROMPT)?;
    browser.key("Enter")?;
    browser
        .wait("document.querySelector('.answer p')?.textContent.length > 100", "an answer is shown while it comes")?;
    browser.key("Escape")?;
    browser.wait(&is("state", "stopped"), "Esc stops it")?;
    browser.wait("!document.getElementById('send').disabled", "and the next one can be asked for")?;
    browser.write(PROMPT)?;
    browser.click("#send")?;
    browser.wait("document.querySelectorAll('.answer p')[1]?.textContent.length > 100", "the next one comes")?;
    browser.click("#stop")?;
    browser.wait(&is("state", "stopped"), "the button stops it")?;
    // The refusal of the key is an error that Chromium notes; there is no other.
    let errors = browser.errors();
    if errors.len() != 1 || !errors[0].contains("401") {
        return Err(format!("other errors than the key's: {errors:?}").into());
    }

    browser.write(&PROMPT.repeat(5000))?;
    browser.click("#send")?;
    browser.wait(
        "(document.querySelector('.error p')?.textContent ?? '').includes('20000')",
        "an error is told in the server's words",
    )?;
    server.end()
}

/// Nothing went wrong that a person would find in the console, and nobody but the server was asked.
fn no_errors(browser: &Browser, server: &Server) -> Result<(), Failure> {
    let errors = browser.errors();
    if !errors.is_empty() {
        return Err(format!("errors on the page: {errors:?}").into());
    }
    let own = format!("http://{}/", server.address);
    match browser.requests().into_iter().find(|url| !url.starts_with(&own)) {
        Some(other) => Err(format!("the page asks {other}").into()),
        None => Ok(()),
    }
}
