//! A conversation with a chat model on the terminal, or line by line.
//!
//! Only the answers go to stdout; what the program says goes to stderr.

mod conversation;
mod input;

use std::path::Path;

use clap::{Args, builder::NonEmptyStringValueParser};
use conversation::{Conversation, Setting};
use input::Input;
use layer_streamer::{
    kernels::Kernels,
    model::{Cache, Model, Sampler},
};

use crate::{
    Failure,
    device::Chosen,
    interrupt,
    placing::Placing,
    prompt::Talk,
    run,
    sampling::SamplingOptions,
    text::{self, Text},
    waiting::Waiting,
};

/// Tokens that the KV cache holds where nobody says how many.
const USUAL_CONTEXT: usize = 4096;

/// So often Ctrl-C is pressed before it ends the program in the middle of an answer.
const PATIENCE: u32 = 4;

const HELP: &str = "\
/reset         forget the conversation, but not the system prompt
/system TEXT   set the system prompt; without TEXT there is none
/save FILE     write the conversation to a file, as JSON
/load FILE     go on with a conversation from such a file
/stats         what the last answer took, and what the KV cache holds
/help          this list
/exit          leave; so does Ctrl-D
A line that ends with \\ goes on in the next one, and lines between \"\"\" and \"\"\" are one message. Ctrl-C stops an answer. A message
that begins with / takes a space before it.";

/// Talk with a chat model whose layers are streamed from disk while they compute
#[derive(Args)]
#[command(
    mut_arg("max_new_tokens", |most| most
        .default_value("4294967295")
        .hide_default_value(true)
        .help("Cut off an answer after this many tokens [default: none]")),
    mut_arg("context", |context| context
        .help("Tokens of conversation that the KV cache holds [default: 4096, or what the model was made for if that is less]")),
    after_help = "\
The model's folder has to have a chat template. What was computed stays in the KV cache: with each turn only new tokens go
through the model. /help lists what can be typed besides messages.

Examples:
  layer-streamer chat --model ~/models/Qwen3-8B                        talk on the terminal
  layer-streamer chat --model Qwen/Qwen3-8B --sample                  by its name on the hub; answers vary
  layer-streamer chat --model DIR --system 'Answer in one sentence'    with a system prompt
  layer-streamer chat --model DIR --ram 8GB --context 8192             in so much memory, with so long a conversation
  printf 'Hello\\nAnd you?\\n' | layer-streamer chat --quiet --model DIR  each line is a message"
)]
pub struct Options {
    #[command(flatten)]
    placing: Placing,

    #[command(flatten)]
    talk: Talk,

    #[command(flatten)]
    sampling: SamplingOptions,

    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    match options.placing.device()? {
        Chosen::Cpu(device) => run_on(&device, options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, options),
    }
}

fn run_on<D: Kernels>(device: &D, Options { placing, talk, sampling, stop }: &Options) -> Result<(), Failure> {
    placing.model.fetch(placing.quiet)?;
    let waiting = Waiting::on("reading the checkpoint's headers", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let sampling = sampling.chosen(&model)?;
    let sampler = sampling.map(|sampling| Sampler::new(sampling, model.config.vocab)).transpose()?;
    let folder = placing.model.display();
    let Some(text) = Text::open(&placing.model)? else {
        let what = if placing.model.is_file() { "tokenizer" } else { "tokenizer.json" };
        return Err(format!("{folder}: there is no {what}; `generate` takes --prompt-ids").into());
    };
    let Some(template) = text.template()? else {
        return Err(format!(
            "{folder}: the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), \
             so it knows no conversation; `generate` goes on from any text"
        )
        .into());
    };
    drop(waiting);
    let context = placing.context.unwrap_or(USUAL_CONTEXT.min(model.config.max_positions));
    let own = text::memory(&placing.model, &model).into_iter().chain(sampler.as_ref().map(|sampler| sampler.memory(1)));
    let loaded = run::load(device, placing, &mut model, Cache::full(1, context), own.collect(), None)?;
    let mut stop_tokens = model.config.stop.clone();
    stop_tokens.extend(text.end_of_turn());
    let setting = Setting {
        text: &text,
        template,
        stop_tokens,
        stop_texts: stop,
        most: placing.max_new_tokens,
        sampler,
        thinking: talk.thinking,
        quiet: placing.quiet,
    };
    let mut input = Input::open()?;
    if input.is_terminal() && !placing.quiet {
        say!("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends");
    }
    converse(&mut input, Conversation::new(setting, loaded, talk.system.as_deref()))
}

/// Message by message, to the end of the input.
fn converse<D: Kernels>(input: &mut Input, mut conversation: Conversation<'_, D>) -> Result<(), Failure> {
    while let Some(message) = {
        wait_for_user(input.is_terminal());
        input.message()?
    } {
        let words = message.trim();
        let done = match words.split_once(char::is_whitespace).unwrap_or((words, "")) {
            _ if words.is_empty() => Ok(()),
            _ if !message.starts_with('/') => conversation.say(message),
            ("/exit" | "/quit", _) => return Ok(()),
            (command, words) => obey(&mut conversation, command, words.trim()),
        };
        if conversation.is_unread() {
            return Ok(());
        }
        match done {
            // Someone who sees it can go on; what reads a pipe's answers cannot.
            Err(error) if input.is_terminal() => say!("error: {error}"),
            other => other?,
        }
    }
    Ok(())
}

/// What Ctrl-C means now. While a line is edited it is a key; around that, on a terminal, it must not end what an impatient user
/// has only stopped. Where nobody edits it ends the program.
fn wait_for_user(is_terminal: bool) {
    interrupt::forget(PATIENCE);
    if is_terminal { interrupt::listen() } else { interrupt::leave() }
}

fn obey<D: Kernels>(conversation: &mut Conversation<'_, D>, command: &str, words: &str) -> Result<(), Failure> {
    let file = || match words {
        "" => Err(format!("{command} takes the name of a file")),
        words => Ok(Path::new(words)),
    };
    match command {
        "/help" => say!("{HELP}"),
        "/reset" => {
            conversation.reset();
            say!("a new conversation");
        }
        "/system" => {
            conversation.set_system(words);
            say!("{}", if words.is_empty() { "no system prompt" } else { "the system prompt is set" });
        }
        "/save" => {
            conversation.save(file()?)?;
            say!("{} turns are in {words}", conversation.turns());
        }
        "/load" => {
            conversation.load(file()?)?;
            say!("{} turns from {words}", conversation.turns());
        }
        "/stats" => say!("{}", conversation.stats()),
        other => return Err(format!("{other}: there is no such command; /help lists them").into()),
    }
    Ok(())
}
