//! A model's chat template: how the turns of a conversation become the text that it was trained with.
//!
//! Templates are written for Jinja as transformers sets it up, so the same is done here: blocks take their line's end and
//! indentation with them, nothing is escaped, and what Python brings is in [`python`].

use std::{
    error::Error as _,
    fmt, panic,
    path::{Path, PathBuf},
    thread,
    time::SystemTime,
};

use layer_streamer::files;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};
use serde_json::{Map, Value as Json};

use super::{
    config::{TokenizerConfig, read_json},
    python,
};
use crate::Failure;

/// The largest chat_template.jinja that is read, in bytes.
const LARGEST: u64 = 4 << 20;

/// What a template may cost, in steps of it and in pieces of 64 bytes, beside what its conversation's text costs: one that never
/// ends is an error.
const FUEL: u64 = 2_000_000;

/// The stack that a template is rendered on, in bytes; what is not used takes no memory. Values within values are freed by
/// functions that call themselves, and so many steps can nest some 200,000 of them.
const STACK: usize = 256 << 20;

/// The name of the one template in its environment.
const NAME: &str = "chat";

/// Special tokens that templates may name.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A template that is ready to be rendered.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Where it is from, for messages.
    file: PathBuf,
    /// Special tokens by name, as strings.
    tokens: Map<String, Json>,
}

impl ChatTemplate {
    /// The template in a model's folder: `chat_template.jinja`, else that of `tokenizer_config.json`, else `chat_template.json`; of
    /// a model in one file, the one in it. `None` where there is none.
    ///
    /// # Errors
    /// A message that names file, line and what is wrong.
    pub fn open(model: &Path, config: &TokenizerConfig) -> Result<Option<Self>, Failure> {
        let Some((file, source)) = find(model, config)? else { return Ok(None) };
        let tokens = SPECIAL.into_iter().filter_map(|name| Some((name.to_owned(), config.special(name)?.into())));
        Self::new(file, &source, tokens.collect(), now).map(Some)
    }

    fn new(
        file: PathBuf,
        source: &str,
        tokens: Map<String, Json>,
        clock: impl Fn() -> libc::time_t + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the usual delimiters"));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| out.write_str(&python::text(value)).map_err(Error::from));
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", |value: &Value| python::text(value));
        environment.add_function("strftime_now", move |format: &str| python::strftime(format, clock()));
        environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
            let refusal = Refusal(python::text(message));
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(refusal))
        });
        match environment.add_template_owned(NAME, without_generation_blocks(source)) {
            Ok(()) => Ok(Self { environment, file, tokens }),
            Err(error) => Err(failed(&file, &error)),
        }
    }

    /// The file that it is from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The text of a conversation, which ends where the model's answer begins. `thinking`: whether the model is to think first,
    /// where its template asks for that; `None` is the template's own choice.
    ///
    /// # Errors
    /// A message that names file, line and what is wrong; for a conversation that the template refuses, what it says.
    pub fn render(&self, messages: &[Message], thinking: Option<bool>) -> Result<String, Failure> {
        self.render_with(messages, true, thinking.map(|thinking| ("enable_thinking".into(), thinking.into())))
    }

    /// With other variables. `answers`: whether the text ends where an answer begins.
    fn render_with(
        &self,
        messages: &[Message],
        answers: bool,
        variables: impl IntoIterator<Item = (String, Json)>,
    ) -> Result<String, Failure> {
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + bytes as u64 / 2));
        let others: Vec<_> = self.tokens.clone().into_iter().chain(variables).collect();
        let render = || {
            let message = |Message { role, content }: &Message| {
                Value::from_pairs([("role", Value::from(role)), ("content", Value::from(content))])
            };
            let mut context: Vec<(String, Value)> = vec![
                ("messages".into(), messages.iter().map(message).collect()),
                // transformers sets these, if only to None.
                ("tools".into(), Value::from(())),
                ("documents".into(), Value::from(())),
                ("add_generation_prompt".into(), answers.into()),
            ];
            context.extend(others.into_iter().map(|(name, value)| (name, Value::from(Serde(value)))));
            environment.get_template(NAME).and_then(|chat| chat.render(Value::from_pairs(context)))
        };
        let rendered = thread::scope(|scope| {
            let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, render);
            thread.map(|thread| thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
        });
        let failed_to_start = |error| format!("cannot start a thread to render the chat template: {error}");
        rendered.map_err(failed_to_start)?.map_err(|error| failed(&self.file, &error))
    }
}

/// What a template said when it refused a conversation.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn failed(file: &Path, error: &Error) -> Failure {
    let line = error.line().map_or_else(String::new, |line| format!("line {line} of "));
    let mut cause = error.source();
    while let Some(found) = cause {
        if let Some(refusal) = found.downcast_ref::<Refusal>() {
            return format!("{}: the chat template refuses this conversation: {refusal}", file.display()).into();
        }
        cause = found.source();
    }
    let detail = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it takes too long: does it ever end?".to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    format!("{}: {line}the chat template: {detail}", file.display()).into()
}

/// Where the template is, and its text.
fn find(model: &Path, config: &TokenizerConfig) -> Result<Option<(PathBuf, String)>, Failure> {
    let configured =
        || Ok(chosen(config.chat_template(), config.file())?.map(|source| (config.file().to_owned(), source)));
    // What lies beside a model in one file is not its own.
    if model.is_file() {
        return configured();
    }
    let file = model.join("chat_template.jinja");
    if let Some(bytes) = files::read_small(&file, LARGEST)? {
        let source = String::from_utf8(bytes).map_err(|error| {
            format!("{}: is not UTF-8 from byte {} on", file.display(), error.utf8_error().valid_up_to())
        })?;
        return Ok(Some((file, source)));
    }
    if let Some(found) = configured()? {
        return Ok(Some(found));
    }
    let file = model.join("chat_template.json");
    let json = read_json(&file)?.unwrap_or_default();
    Ok(chosen(&json["chat_template"], &file)?.map(|source| (file, source)))
}

/// The template itself, or of several that have names, the one named `default`.
fn chosen(template: &Json, file: &Path) -> Result<Option<String>, Failure> {
    let wrong = |cause: String| Err(format!("{}: chat_template {cause}", file.display()).into());
    match template {
        Json::Null => Ok(None),
        Json::String(source) => Ok(Some(source.clone())),
        Json::Array(named) => match named.iter().find(|one| one["name"] == "default") {
            Some(Json::Object(one)) if one.get("template").is_some_and(Json::is_string) => {
                Ok(one["template"].as_str().map(str::to_owned))
            }
            _ => wrong("is a list without a template named \"default\"".into()),
        },
        other => wrong(format!("is neither text nor a list of templates, but {other}")),
    }
}

/// `{% generation %}` marks, for training, what an assistant wrote. It is a block with variables of its own, as `{% with %}` is.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inside = tag.trim_start_matches(['-', '+']).trim_start();
        let name = inside.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        let other = match name {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => name,
        };
        out.push_str(&tag[..tag.len() - inside.len()]);
        out.push_str(other);
        rest = &inside[name.len()..];
    }
    out + rest
}

fn now() -> libc::time_t {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() as libc::time_t)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Noon of 26 July 2024 in London, which is that day nearly everywhere.
    fn then() -> libc::time_t {
        1_721_995_200
    }

    fn template(source: &str) -> Result<ChatTemplate, Failure> {
        ChatTemplate::new("some/file".into(), source, Map::new(), then)
    }

    /// What is made of one question.
    fn said(source: &str) -> Result<String, String> {
        let rendered = template(source).and_then(|template| template.render(&[Message::new("user", "Who?")], None));
        rendered.map_err(|error| error.to_string())
    }

    #[test]
    fn conversations_become_to_the_letter_what_transformers_makes_of_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/templates");
        let mut count = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let fixture: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            let source = fixture["template"].as_str().unwrap();
            let tokens = fixture["tokens"].as_object().unwrap().clone();
            let template = ChatTemplate::new(path.clone(), source, tokens, then).unwrap();
            for case in fixture["cases"].as_array().unwrap() {
                let messages: Vec<_> = (case["messages"].as_array().unwrap().iter())
                    .map(|turn| Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap()))
                    .collect();
                let answers = case["add_generation_prompt"].as_bool().unwrap();
                let variables = case["variables"].as_object().unwrap().clone();
                let rendered = template.render_with(&messages, answers, variables);
                match case["refused"].as_str() {
                    None => assert_eq!(rendered.unwrap(), case["expected"].as_str().unwrap(), "{}", path.display()),
                    Some(why) => assert!(rendered.unwrap_err().to_string().contains(why), "{}", path.display()),
                }
                count += 1;
            }
        }
        assert!(count > 100, "{count}");
    }

    #[test]
    fn thinking_is_asked_for_only_where_someone_says_so() {
        let chat = template("{{ enable_thinking is defined }} {{ enable_thinking }}").unwrap();
        let said = |thinking| chat.render(&[], thinking).unwrap();
        assert_eq!([said(None), said(Some(true)), said(Some(false))], ["False ", "True True", "True False"]);
    }

    #[test]
    fn what_python_and_transformers_bring_is_there() {
        for (source, expected) in [
            ("{%- generation %}a{{ messages[0].content }}{% endgeneration %}b", "aWho?b"),
            ("{%- set x = 1 %}{%- generation -%} {%- set x = 2 %}{{ x }}{%- endgeneration -%} {{ x }}", "21"),
            ("{% for c in 'abc' %}{% if c == 'b' %}{% break %}{% endif %}{{ c }}{% endfor %}", "a"),
            ("{{ strftime_now('%Y-%m-%d') }}{{ tools is none and documents is none }}", "2024-07-26True"),
            ("{{ 'a</think>b'.split('</think>')[-1].strip() }}{{ messages[::-1][0].get('role') }}", "buser"),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": "Who?"}]"#),
            ("{%- if nothing and 'x' in nothing.y %}{% endif -%}\n  {% if true %}\n a\n  {% endif %}\n", " a\n"),
            ("{{ add_generation_prompt }}\n", "True"),
        ] {
            assert_eq!(said(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_template_is_told_with_file_and_line() {
        // As deep as one loop makes it, and as deep as the steps allow.
        let nested = |loops: usize, end: &str| {
            let deeper = "{% set ns.x = [ns.x] %}";
            let looped = format!(
                "{{% for again in range({loops}) %}}{{% for i in range(99999) %}}{deeper}{{% endfor %}}{{% endfor %}}"
            );
            format!("{{% set ns = namespace(x=[]) %}}{looped}{{{{ ns.x | {end} }}}}")
        };
        assert!(said(&nested(1, "string")).unwrap().contains("[...]"));
        assert!(said(&nested(99, "string")).unwrap_err().contains("too long"));
        for (source, parts) in [
            ("a\n{% if %}", &["some/file: line 2 of the chat template", "syntax error"][..]),
            ("a\nb\n{{ messages.nothing.more }}", &["some/file: line 3 of the chat template", "undefined"]),
            ("{{ nothing() }}", &["line 1", "nothing"]),
            ("{{ raise_exception('No system turn, please') }}", &["some/file", "refuses", "No system turn, please"]),
            ("{% macro m() %}{{ raise_exception('No') }}{% endmacro %}{{ m() }}", &["some/file", "refuses", "No"]),
            ("{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}", &["too long"]),
            ("{{ 'x' * 99999999999 }}", &["some/file: line 1"]),
            (&nested(1, "tojson"), &["some/file: line 1", "lists within lists"]),
        ] {
            let error = said(source).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{source}: {error}");
        }
    }

    #[test]
    fn a_template_is_looked_for_in_its_file_then_in_the_tokenizer_s_configuration_then_in_json() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        let open = || {
            let config = TokenizerConfig::read(folder.path()).unwrap();
            let found = ChatTemplate::open(folder.path(), &config).map_err(|error| error.to_string())?;
            Ok::<_, String>(found.map(|template| template.render(&[], None).unwrap()))
        };
        assert_eq!(open(), Ok(None));
        write("chat_template.json", r#"{"chat_template": "of JSON"}"#);
        assert_eq!(open(), Ok(Some("of JSON".into())));
        let named = r#"[{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "of several"}]"#;
        write("tokenizer_config.json", &format!(r#"{{"chat_template": {named}}}"#));
        assert_eq!(open(), Ok(Some("of several".into())));
        write("tokenizer_config.json", r#"{"chat_template": "{{ bos_token }}", "bos_token": {"content": "<s>"}}"#);
        assert_eq!(open(), Ok(Some("<s>".into())));
        write("chat_template.jinja", "of its file");
        assert_eq!(open(), Ok(Some("of its file".into())));
        fs::write(folder.path().join("chat_template.jinja"), [b'a', 0xFF]).unwrap();
        assert!(open().unwrap_err().contains("chat_template.jinja: is not UTF-8 from byte 1 on"));
        fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": ""}]}"#);
        assert!(open().unwrap_err().contains("tokenizer_config.json: chat_template is a list"));
        write("tokenizer_config.json", r#"{"chat_template": 7}"#);
        assert!(open().unwrap_err().contains("but 7"));
    }
}
