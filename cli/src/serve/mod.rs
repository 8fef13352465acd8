//! Answers requests over HTTP, in the manner of OpenAI's API: what many clients ask shares the passes over the layers.
//!
//! ```text
//! connection ──► routes ──► body ──► request (JSON, tokens) ──► choices ──submit──► Engine
//!      ▲                                                          ▲                    │
//!      └──────── respond (whole, or as a stream) ◄── deltas ──────┴──────events────────┘
//! ```
//!
//! The engine's thread hands each event to a channel and never waits. A client that goes away drops its `Choices`, which cancels.

mod body;
pub mod choices;
mod closing;
mod connections;
pub mod cost;
mod counts;
pub mod error;
mod key;
mod patience;
pub mod request;
mod respond;
pub mod room;
mod routes;
pub mod server;

use std::{env, net::TcpListener as Listener, sync::Arc, thread, time::Duration};

use clap::{Args, builder::NonEmptyStringValueParser};
use counts::Memory;
use key::Key;
use layer_streamer::{
    engine::{Engine, Limits},
    kernels::Kernels,
    model::{Cache, Model, Sampler},
};
use room::Room;
use server::{Rules, Server};
use tokio::{net::TcpListener, runtime};

use crate::{
    Failure,
    budget::Amount,
    device::Chosen,
    placing::Placing,
    run,
    text::{self, Text},
    waiting::Waiting,
};

/// Tokens that a request and its answer may have where nobody says how many.
const USUAL_CONTEXT: usize = 4096;

/// How many whole contexts the KV cache has room for, where nobody says it: most sequences are far shorter.
const USUAL_CONTEXTS: usize = 4;

/// The variable that may have the key in place of the option, which other users of the machine can see.
const KEY: &str = "LAYER_STREAMER_API_KEY";

/// Threads that serve connections; what computes has its own.
const THREADS: usize = 2;

/// Answer requests over HTTP as OpenAI's API does, many at a time
#[derive(Args)]
#[command(
    mut_arg("max_new_tokens", |most| most
        .default_value("4294967295")
        .hide_default_value(true)
        .help("Cut off any answer after this many tokens, whatever its request says [default: none]")),
    mut_arg("context", |context| context
        .help("Tokens that a prompt may have with its answer [default: 4096, or what the model was made for if that is less]")),
    after_help = "\
Paths: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, and a page to talk to the model at /.
Requests that run at the same time share each pass over the layers, and get the same text as alone. Ctrl-C or SIGTERM lets those
that run end; a second one ends at once.

Examples:
  layer-streamer serve --model ~/models/Qwen3-8B                     on http://127.0.0.1:8080, for this machine
  layer-streamer serve --model Qwen/Qwen3-8B --ram 8GB               by its name on the hub, in so much memory
  layer-streamer serve --model DIR --sequences 32 --context 2048     more at a time, each of them shorter
  layer-streamer serve --model DIR --host 0.0.0.0 --api-key SECRET   for other machines, which name the key
  layer-streamer serve --model DIR --port 8000 --name my-model       on another port, by another name

  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}], \"stream\": true}'"
)]
pub struct Options {
    #[command(flatten)]
    placing: Placing,

    /// Name or address of this machine to listen at; 0.0.0.0 is all of them
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    host: String,

    /// Port to listen at; 0 is any that is free, which is told
    #[arg(long, value_name = "PORT", default_value_t = 8080, help_heading = "Server")]
    port: u16,

    /// What clients have to send as `Authorization: Bearer KEY`, but for / and /health [default: LAYER_STREAMER_API_KEY, if that is
    /// set, which other users of this machine do not see]
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    api_key: Option<String>,

    /// What clients call the model [default: its name on the hub, or that of its folder or file]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new(), help_heading = "Server")]
    name: Option<String>,

    /// Sequences that run at a time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one, help_heading = "Server")]
    sequences: usize,

    /// Tokens that the KV cache has room for, of all sequences together; where it is full, sequences wait [default: those of four whole
    /// contexts]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Server")]
    cache_tokens: Option<usize>,

    /// Sequences that wait to run; one more is refused, with status 429
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Server")]
    queue: usize,

    /// The longest request, such as 4MiB; a longer one is refused, with status 413
    #[arg(long, value_name = "SIZE", default_value = "4MiB", help_heading = "Server")]
    body_limit: Amount,

    /// Seconds that a client may take to send its request, and to take anything of what it is sent
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Server")]
    patience: u32,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "give a number from 1 on".into())
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let key = options.api_key.clone().or_else(|| env::var(KEY).ok()).map(Key::new).transpose()?;
    // Before the long work, so that an address that cannot be had is known at once.
    let listener = connections::bind(&options.host, options.port)?;
    match options.placing.device()? {
        Chosen::Cpu(device) => run_on(&device, options, key, listener),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, options, key, listener),
    }
}

fn run_on<D: Kernels>(device: &D, options: &Options, key: Option<Key>, listener: Listener) -> Result<(), Failure> {
    let Options { placing, sequences, cache_tokens, queue, .. } = options;
    placing.model.fetch(placing.quiet)?;
    let waiting = Waiting::on("reading the checkpoint's headers", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let Some(text) = Text::open(&placing.model)? else {
        let what = if placing.model.is_file() { "tokenizer" } else { "tokenizer.json" };
        return Err(format!("{}: there is no {what}; `generate` takes --prompt-ids", placing.model.display()).into());
    };
    let template = text.template()?;
    drop(waiting);
    let context = placing.context.unwrap_or(USUAL_CONTEXT.min(model.config.max_positions));
    let all = Cache::full(*sequences, context);
    let tokens = cache_tokens.unwrap_or(USUAL_CONTEXTS.saturating_mul(context)).min(all.tokens);
    let cache = Cache { tokens, ..all };
    let sampler = Sampler::new(model.config.suggested.sampling, model.config.vocab)?.memory(*sequences);
    let rules = options.rules(key, &listener)?;
    let connections = connections::most(sequences.saturating_add(*queue));
    let requests = room::memory(connections, *sequences, context, rules.body);
    let own = text::memory(&placing.model, &model).into_iter().chain([sampler, requests]).collect();
    let loaded = run::load(device, placing, &mut model, cache, own, None)?;
    let engine = Engine::new(loaded.decoder, Limits { waiting: *queue, ..Limits::default() })?;
    let memory = Memory { parts: loaded.parts, has_gpu: !device.memory_is_ram() };
    let room = Room::new(*sequences, context);
    let names = (options.model_name(), context, placing.max_new_tokens);
    let server = Arc::new(Server::new(engine, (text, template), &model, names, rules, (memory, room)));
    let threads = thread::available_parallelism().map_or(2, usize::from);
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(threads)
        .thread_name("ls-http")
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("cannot start the threads of the server: {error}"))?;
    runtime.block_on(listen(&server, listener, connections, options))?;
    // What is left of connections ends with it.
    drop(runtime);
    let server = Arc::into_inner(server).ok_or("a connection outlived the server; this is a bug, please report it")?;
    Ok(server.engine.finish()?)
}

/// Serves, until the server is told to end and has.
async fn listen(
    server: &Arc<Server>,
    listener: Listener,
    most_connections: usize,
    options: &Options,
) -> Result<(), Failure> {
    closing::listen(Arc::clone(server))?;
    let listener = TcpListener::from_std(listener)?;
    options.tell(server, listener.local_addr()?);
    connections::serve(Arc::clone(server), listener, routes::router(Arc::clone(server)), most_connections).await;
    Ok(())
}

impl Options {
    fn rules(&self, key: Option<Key>, listener: &Listener) -> Result<Rules, Failure> {
        let is_local = listener.local_addr()?.ip().is_loopback();
        let Amount::Bytes(body) = self.body_limit else {
            return Err("--body-limit: give an amount such as 4MiB".into());
        };
        if !is_local && key.is_none() && !self.placing.quiet {
            say!("warning: whoever reaches {} can use this server; --api-key or {KEY} asks for a key", self.host);
        }
        Ok(Rules { key, is_local, body, patience: Duration::from_secs(self.patience.into()) })
    }

    /// What clients call the model.
    fn model_name(&self) -> String {
        let model = &self.placing.model;
        let of_file = || {
            let path = std::fs::canonicalize(model).unwrap_or_else(|_| model.to_path_buf());
            let name = if path.is_file() { path.file_stem() } else { path.file_name() };
            name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
        };
        let on_hub = || model.hub_name().map(|name| name.display().to_string());
        self.name.clone().or_else(on_hub).unwrap_or_else(of_file)
    }

    /// Says where the server listens, and how to try it.
    fn tell(&self, server: &Server, address: std::net::SocketAddr) {
        say!("listening on http://{address}");
        if self.placing.quiet {
            return;
        }
        let key = if server.rules.key.is_some() { " -H \"Authorization: Bearer $KEY\"" } else { "" };
        let (path, asks) = match server.template {
            Some(_) => ("chat/completions", "\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]"),
            None => ("completions", "\"prompt\": \"Once upon a\""),
        };
        say!(
            "open it in a browser, or try:\n  curl http://{address}/v1/{path} -H 'Content-Type: application/json'{key} -d '{{{asks}}}'"
        );
    }
}
