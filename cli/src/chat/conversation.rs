//! A conversation with a model: its turns, and the tokens of them that the KV cache holds.

use std::{io::Write, path::Path};

use layer_streamer::{
    files::{self, NewFile},
    kernels::Kernels,
    model::{Choice, Sampler},
};
use serde_json::{Value, json};

use crate::{
    Failure,
    run::{self, Answer, End, Limits, Loaded, Report, Run},
    text::{ChatTemplate, Message, Text},
};

/// The largest file of a conversation that is read, in bytes.
const LARGEST: u64 = 64_000_000;

/// What a conversation is held with.
pub struct Setting<'a> {
    pub text: &'a Text,
    pub template: ChatTemplate,
    /// Tokens that end an answer, and texts.
    pub stop_tokens: Vec<u32>,
    pub stop_texts: &'a [String],
    /// The most tokens of an answer.
    pub most: usize,
    /// Draws tokens; without it the most likely one is taken.
    pub sampler: Option<Sampler>,
    pub thinking: Option<bool>,
    pub quiet: bool,
}

pub struct Conversation<'a, D: Kernels> {
    setting: Setting<'a>,
    loaded: Loaded<D>,
    /// The system prompt first, if there is one; then user and assistant in turn.
    messages: Vec<Message>,
    /// The last answer, and how many tokens before it were in the cache already.
    last: Option<(Run, usize)>,
}

impl<'a, D: Kernels> Conversation<'a, D> {
    pub fn new(setting: Setting<'a>, loaded: Loaded<D>, system: Option<&str>) -> Self {
        let mut new = Self { setting, loaded, messages: Vec::new(), last: None };
        new.set_system(system.unwrap_or_default());
        new
    }

    /// What the user says. The answer goes to stdout; why it ended, where that is not plain, to stderr. After an error, and where
    /// there was no answer, it is as if nothing had been said.
    pub fn say(&mut self, message: String) -> Result<(), Failure> {
        self.messages.push(Message::new("user", message));
        let answered = self.answer();
        match answered {
            Ok(text) if !text.is_empty() => self.messages.push(Message::new("assistant", text)),
            other => {
                self.messages.pop();
                other?;
            }
        }
        Ok(())
    }

    /// The model's answer to the conversation so far. Of its tokens, those that follow what the cache holds are computed.
    fn answer(&mut self) -> Result<String, Failure> {
        let Self { setting, loaded: Loaded { decoder, .. }, messages, last } = self;
        let tokens = setting.text.encode_turns(&setting.template.render(messages, setting.thinking)?)?;
        let (context, longest) = (decoder.context(), decoder.model().config.max_positions);
        let more = match longest > context {
            true => format!("a start with --context N makes room for more (this model was made for {longest})"),
            false => "that is as many as this model was made for".into(),
        };
        if tokens.len() >= context {
            let length = tokens.len();
            return Err(format!(
                "with this message the conversation is {length} tokens long, and the context has {context}: \
                 /reset begins anew; {more}"
            )
            .into());
        }
        let Some((_, but_last)) = tokens.split_last() else {
            return Err(
                format!("{}: the chat template makes no text of this", setting.template.file().display()).into()
            );
        };
        // The last token is always computed: the answer follows from it.
        let kept = decoder.tokens(0).iter().zip(but_last).take_while(|(held, token)| held == token).count();
        decoder.truncate(0, kept)?;
        let limits = Limits { most: setting.most, stop: &setting.stop_tokens };
        let answer = Answer::new(Some(setting.text), setting.stop_texts, true);
        let choice = setting.sampler.as_mut().map_or(Choice::Greedy, Choice::Sample);
        let ran = run::answer(decoder, &tokens[kept..], &limits, choice, answer, setting.quiet, |_| Ok(()));
        let (run, text) = ran?;
        if run.end == End::Interrupt {
            // A cancel that came after the last pass is not for the next one.
            decoder.streamer().rewind()?;
        }
        let text = text.unwrap_or_default();
        match &run.end {
            _ if text.is_empty() => {
                let why = run::why_empty(&run, Some(&text), Some(setting.text), true);
                say!("{}; your message is taken back", why.unwrap_or_else(|| "no answer".into()));
            }
            End::Limit => say!("cut off: --max-new-tokens {}", setting.most),
            End::Context => say!("cut off: the context of {context} tokens is full. /reset begins anew; {more}"),
            End::Interrupt if !setting.quiet => say!("stopped"),
            _ => {}
        }
        *last = Some((run, kept));
        Ok(text)
    }

    /// Whether whoever read the answers went away.
    pub fn is_unread(&self) -> bool {
        self.last.as_ref().is_some_and(|(run, _)| run.end == End::ReaderGone)
    }

    /// Forgets all turns but the system prompt.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
    }

    /// Sets the system prompt, or takes it away where it is empty; the other turns stay.
    pub fn set_system(&mut self, system: &str) {
        self.messages.retain(|message| message.role != "system");
        if !system.is_empty() {
            self.messages.insert(0, Message::new("system", system));
        }
    }

    /// Writes the conversation to a file, which appears whole or not at all.
    pub fn save(&self, path: &Path) -> Result<(), Failure> {
        let failed = |error| format!("cannot write {}: {error}", path.display());
        let turn = |Message { role, content }: &Message| json!({ "role": role, "content": content });
        let text = json!({ "messages": self.messages.iter().map(turn).collect::<Value>() });
        let file = NewFile::create(path).map_err(failed)?;
        file.file().write_all(format!("{text:#}\n").as_bytes()).map_err(failed)?;
        Ok(file.keep().map_err(failed)?)
    }

    /// Takes up the conversation in a file that [`save`](Self::save) wrote. After an error this one goes on.
    pub fn load(&mut self, path: &Path) -> Result<(), Failure> {
        let Some(bytes) = files::read_small(path, LARGEST)? else {
            return Err(format!("cannot read {}: there is no such file", path.display()).into());
        };
        self.messages = parsed(&bytes).map_err(|cause| format!("{}: {cause}", path.display()))?;
        Ok(())
    }

    /// How many turns there are, beside the system prompt.
    pub fn turns(&self) -> usize {
        self.messages.iter().filter(|message| message.role != "system").count()
    }

    /// What the last answer took, and what the cache holds.
    pub fn stats(&mut self) -> String {
        let Loaded { decoder, settings, parts, probe } = &mut self.loaded;
        let cache = format!("the KV cache holds {} of {} tokens", decoder.length(0), decoder.context());
        let Some((run, kept)) = &self.last else { return format!("{cache}; nothing was answered yet") };
        let report = Report::new(decoder, settings, parts, probe.clone(), run.clone());
        format!("{cache}; {kept} were there before the last answer\n{}", report.text())
    }
}

/// The turns in a saved conversation.
fn parsed(bytes: &[u8]) -> Result<Vec<Message>, String> {
    let json: Value = serde_json::from_slice(bytes).map_err(|error| format!("is no JSON: {error}"))?;
    let turns = json["messages"].as_array().ok_or("has no list \"messages\": is it one that /save wrote?")?;
    let turn = |(number, turn): (usize, &Value)| match (turn["role"].as_str(), turn["content"].as_str()) {
        (Some(role @ ("user" | "assistant")), Some(content)) => Ok(Message::new(role, content)),
        (Some("system"), Some(content)) if number == 0 => Ok(Message::new("system", content)),
        _ => {
            Err(format!("turn {} has no content, or a role other than user, assistant and, first, system", number + 1))
        }
    };
    turns.iter().enumerate().map(turn).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_conversation_has_turns_with_known_roles_and_text() {
        let turns = |messages: &str| parsed(format!("{{\"messages\": {messages}}}").as_bytes());
        let good = r#"[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]"#;
        assert_eq!(turns(good).unwrap(), [Message::new("system", "s"), Message::new("user", "u")]);
        for (bad, said) in [
            (r#"[{"role": "user", "content": "u"}, {"role": "system", "content": "s"}]"#, "turn 2"),
            (r#"[{"role": "tool", "content": "u"}]"#, "turn 1"),
            (r#"[{"role": "user", "content": ["u"]}]"#, "turn 1"),
            (r#"{"role": "user"}"#, "no list"),
            ("[", "no JSON"),
        ] {
            assert!(turns(bad).unwrap_err().contains(said), "{bad}");
        }
    }
}
