//! The bodies of requests.

use serde_json::{Map, Value, json};

use super::{Ask, Fields, Prompt, fields};
use crate::text::Message;

/// What a request is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A conversation goes on by one turn.
    Chat,
    /// A text goes on.
    Completions,
}

impl Endpoint {
    pub const ALL: [Self; 2] = [Self::Chat, Self::Completions];

    /// By its path.
    pub fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.url() == url)
    }

    pub fn url(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }

    /// What a body asks for.
    ///
    /// # Errors
    /// A message that names the field.
    pub fn parse(self, body: Map<String, Value>) -> Result<Ask, String> {
        let mut fields = Fields::new(body);
        let prompt = match self {
            Self::Chat => chat(&mut fields)?,
            Self::Completions => completion(&mut fields)?,
        };
        let most = match (fields.size("max_completion_tokens")?, fields.size("max_tokens")?) {
            (Some(new), Some(old)) if new != old => {
                return Err(format!("max_tokens: is {old}, but max_completion_tokens {new}; give one of them"));
            }
            (new, old) => new.or(old),
        };
        if most == Some(0) {
            return Err("max_tokens: is 0; ask for at least one token".into());
        }
        let (stop, sampling, model) = (fields.stops()?, fields.sampling()?, fields.text("model")?);
        fields.only("n", &[json!(1)])?;
        fields.only("stream", &[json!(false)])?;
        fields.only("stream_options", &[])?;
        fields.only("frequency_penalty", &[json!(0), json!(0.0)])?;
        fields.only("logit_bias", &[json!({})])?;
        fields.ignore(&["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"]);
        fields.end()?;
        Ok(Ask { prompt, most, stop, sampling, model })
    }
}

fn chat(fields: &mut Fields) -> Result<Prompt, String> {
    let Some(turns) = fields.take("messages") else { return Err("messages: is missing; give a list of turns".into()) };
    let turns = messages(&turns)?;
    fields.only("logprobs", &[json!(false)])?;
    fields.only("top_logprobs", &[json!(0)])?;
    fields.only("response_format", &[json!({ "type": "text" })])?;
    fields.only("modalities", &[json!(["text"])])?;
    fields.only("tools", &[json!([])])?;
    fields.only("tool_choice", &[json!("none"), json!("auto")])?;
    fields.only("functions", &[json!([])])?;
    fields.ignore(&["parallel_tool_calls"]);
    Ok(Prompt::Messages(turns))
}

fn completion(fields: &mut Fields) -> Result<Prompt, String> {
    let prompt = match fields.take("prompt") {
        Some(Value::String(text)) => Prompt::Text(text),
        Some(Value::Array(list)) if list.len() == 1 && list[0].is_string() => {
            Prompt::Text(list[0].as_str().unwrap_or_default().into())
        }
        Some(Value::Array(list)) if list.len() == 1 && list[0].is_array() => {
            Prompt::Ids(fields::ids(&list[0]).ok_or("prompt: has something else than token ids")?)
        }
        Some(list) if fields::ids(&list).is_some_and(|ids| !ids.is_empty()) => {
            Prompt::Ids(fields::ids(&list).unwrap_or_default())
        }
        Some(_) => return Err("prompt: must be one text, or one list of token ids; give each prompt a request".into()),
        None => return Err("prompt: is missing; give a text".into()),
    };
    fields.only("logprobs", &[])?;
    fields.only("echo", &[json!(false)])?;
    fields.only("best_of", &[json!(1)])?;
    fields.only("suffix", &[json!("")])?;
    Ok(prompt)
}

/// The turns of a conversation. Content is text, or a list of parts that are.
///
/// # Errors
/// A message that names the turn.
pub fn messages(turns: &Value) -> Result<Vec<Message>, String> {
    let turns = turns.as_array().filter(|turns| !turns.is_empty()).ok_or("messages: must be a list of turns")?;
    turns
        .iter()
        .enumerate()
        .map(|(number, turn)| message(turn).map_err(|why| format!("messages[{number}]{why}")))
        .collect()
}

fn message(turn: &Value) -> Result<Message, String> {
    let role = match turn["role"].as_str() {
        // What newer models call it; chat templates know the older name.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        _ => {
            let role = &turn["role"];
            return Err(format!(".role: is {role}, must be \"system\", \"user\" or \"assistant\""));
        }
    };
    if turn.get("tool_calls").is_some_and(|calls| !calls.is_null() && *calls != json!([])) {
        return Err(".tool_calls: is not supported; leave it out".into());
    }
    let part = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        _ => Err(".content: has a part that is not text; only text is supported".to_owned()),
    };
    let content = match &turn["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(part).collect::<Result<String, _>>()?,
        _ => return Err(".content: must be a text".into()),
    };
    Ok(Message::new(role, content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::SamplingOptions;

    fn parse(endpoint: Endpoint, body: Value) -> Result<Ask, String> {
        endpoint.parse(body.as_object().unwrap().clone())
    }

    #[test]
    fn a_conversation_has_its_turns_limits_and_chances() {
        let ask = parse(
            Endpoint::Chat,
            json!({ "model": "m", "messages": [{ "role": "developer", "content": "s" },
                { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }], "name": "x" }],
                "max_completion_tokens": 7, "temperature": 0.5, "top_p": 1, "seed": 18446744073709551615u64, "stop": "x",
                "n": 1, "stream": false, "user": "me", "frequency_penalty": 0, "logit_bias": null, "tools": [] }),
        );
        let sampling =
            SamplingOptions { temperature: Some(0.5), top_p: Some(1.0), seed: Some(u64::MAX), ..Default::default() };
        let prompt = Prompt::Messages(vec![Message::new("system", "s"), Message::new("user", "ab")]);
        let (stop, model) = (Some(vec!["x".into()]), Some("m".into()));
        assert_eq!(ask.unwrap(), Ask { prompt, most: Some(7), stop, sampling, model });
    }

    #[test]
    fn a_completion_goes_on_from_one_text_or_one_list_of_tokens() {
        for (prompt, expected) in [
            (json!("a"), Prompt::Text("a".into())),
            (json!(["a"]), Prompt::Text("a".into())),
            (json!([1, 2]), Prompt::Ids(vec![1, 2])),
            (json!([[1, 2]]), Prompt::Ids(vec![1, 2])),
        ] {
            assert_eq!(parse(Endpoint::Completions, json!({ "prompt": prompt })).unwrap().prompt, expected);
        }
        for bad in
            [json!(["a", "b"]), json!([]), json!([-1]), json!([4294967296u64]), json!(7), json!({}), json!([[1], [2]])]
        {
            let said = parse(Endpoint::Completions, json!({ "prompt": bad })).unwrap_err();
            assert!(said.starts_with("prompt: "), "{bad}: {said}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (name, value) in [
            ("n", json!(2)),
            ("stream", json!(true)),
            ("logprobs", json!(true)),
            ("tools", json!([{ "type": "function" }])),
            ("response_format", json!({ "type": "json_object" })),
            ("frequency_penalty", json!(0.5)),
            ("temperature", json!("hot")),
            ("max_tokens", json!(-1)),
            ("max_tokens", json!(0)),
            ("seed", json!(1.5)),
            ("stop", json!(["a", ""])),
            ("stop", json!(7)),
            ("temprature", json!(1)),
        ] {
            let mut body = json!({ "messages": [{ "role": "user", "content": "a" }] });
            assert!(parse(Endpoint::Chat, body.clone()).is_ok());
            body[name] = value;
            let said = parse(Endpoint::Chat, body.clone()).unwrap_err();
            assert!(said.starts_with(&format!("{name}: ")), "{body}: {said}");
        }
        for (turns, part) in [
            (json!([]), "messages: "),
            (json!([{ "role": "tool", "content": "a" }]), "messages[0].role"),
            (json!([{ "role": "user", "content": "a" }, { "role": "user" }]), "messages[1].content"),
            (json!([{ "role": "user", "content": [{ "type": "image_url" }] }]), "messages[0].content"),
        ] {
            let said = parse(Endpoint::Chat, json!({ "messages": turns })).unwrap_err();
            assert!(said.starts_with(part), "{said}");
        }
    }
}
