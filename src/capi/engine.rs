//! Many sequences at once: requests from any thread, answers by callbacks.

use std::{
    ffi::{CString, c_char, c_void},
    mem,
    ops::ControlFlow,
    ptr, thread,
    time::Duration,
};

use crossbeam_utils::Backoff;

use super::{
    ffi::{Failure, Grows, Result, callback, ffi, list, ls_status, place, read_options, write_options, write_sized},
    handles::{Entered, HandleTable, Kind},
    model::{ls_model, taken_over},
    sampling::ls_sampling,
};
use crate::{
    engine::{End, Engine, EngineStats, Event, Limits, Request, Ticket},
    model::Sampling,
};

/// A model that continues any number of sequences at once, on a thread of its own. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_engine {
    /// The library's.
    pub id: u64,
}

/// What an engine allows. Fill it with ls_engine_options_init, then change what should differ.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_engine_options {
    /// sizeof(ls_engine_options).
    pub size: usize,
    /// The most requests beside those that have a row of the KV cache; one more is refused with LS_BUSY. By default 1024.
    pub waiting: usize,
    /// By how much of its time a pass may take longer so that prompts go on, while other sequences are being continued: 0.5, the
    /// default, is half as long again.
    pub delay: f64,
}

// SAFETY: `repr(C)`, all fields of eight bytes and valid whatever their bits, the first of them the size.
unsafe impl Grows for ls_engine_options {
    const FIRST: usize = mem::offset_of!(ls_engine_options, delay) + size_of::<f64>();
}

/// A prompt that is to be continued. Fill it with ls_request_init, then set the prompt and what should differ. All of it is read
/// before ls_engine_submit returns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_request {
    /// sizeof(ls_request).
    pub size: usize,
    /// The prompt's tokens.
    pub prompt: *const u32,
    /// How many; at least one.
    pub count: usize,
    /// The most new tokens; by default 256.
    pub most: usize,
    /// Tokens that end the answer, and are not part of it; NULL, the default: the model's own.
    pub stop: *const u32,
    /// How many.
    pub stop_count: usize,
    /// How tokens are drawn; NULL, the default: the most likely one is taken.
    pub sampling: *const ls_sampling,
    /// Sequences of the same seed with different numbers draw differently. By default 0.
    pub number: u64,
    /// Of those that wait the greatest is next, and of equal ones the first. From -2³¹ to 2³¹ - 1, by default 0.
    pub priority: i64,
}

// SAFETY: `repr(C)`, words and pointers that may be NULL, the first of them the size.
unsafe impl Grows for ls_request {
    const FIRST: usize = mem::offset_of!(ls_request, priority) + size_of::<i64>();
}

/// What happens to a request. All but LS_EVENT_TOKEN end the answer: nothing comes after them.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_event_kind {
    /// A new token.
    LS_EVENT_TOKEN = 0,
    /// One of its stop tokens came.
    LS_EVENT_STOP = 1,
    /// It has as many tokens as it may.
    LS_EVENT_MOST = 2,
    /// It fills the context.
    LS_EVENT_CONTEXT = 3,
    /// By ls_engine_cancel, by LS_END, or since the engine was closed.
    LS_EVENT_CANCELLED = 4,
    /// The pass failed; the engine goes on.
    LS_EVENT_FAILED = 5,
}
use ls_event_kind::*;

/// Something that happens to a request.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_event {
    /// Which.
    pub kind: ls_event_kind,
    /// Of LS_EVENT_TOKEN the new token, of LS_EVENT_STOP the one that stopped; else 0.
    pub token: u32,
    /// Of LS_EVENT_FAILED why; else LS_OK.
    pub status: ls_status,
    /// The same in words, until the callback returns; else NULL.
    pub message: *const c_char,
}

/// Given each event of a request, by the engine's thread, which waits for it: be quick. It returns 0 to go on, anything else cancels
/// the request. It may submit and cancel requests, but not close the engine (LS_BUSY). Neither longjmp nor an exception may leave it.
pub type ls_event_fn = Option<unsafe extern "C" fn(user: *mut c_void, event: *const ls_event) -> i32>;

/// What an engine did and does. Set `size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_engine_stats {
    /// sizeof(ls_engine_stats).
    pub size: usize,
    /// Requests that wait for a row of the KV cache.
    pub waiting: usize,
    /// Sequences that have one.
    pub running: usize,
    /// Requests that have ended, however.
    pub ended: u64,
    /// Passes over the layers.
    pub passes: u64,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were there already, of another sequence that begins the same.
    pub reused_tokens: u64,
    /// Tokens that were chosen.
    pub new_tokens: u64,
    /// How often a sequence gave back its place since the cache was full.
    pub put_back: u64,
}

// SAFETY: `repr(C)`, all fields words, the first of them the size.
unsafe impl Grows for ls_engine_stats {
    const FIRST: usize = mem::offset_of!(ls_engine_stats, put_back) + size_of::<u64>();
}

struct OpenEngine {
    engine: Engine,
    /// The model's own.
    stop: Vec<u32>,
}

static ENGINES: HandleTable<OpenEngine> = HandleTable::new(Kind::Engine);

/// Every call but closing takes a moment: another thread's is waited for.
fn enter(engine: ls_engine) -> Result<Entered<'static, OpenEngine>> {
    let backoff = Backoff::new();
    loop {
        match ENGINES.enter(engine.id) {
            Err(failure) if failure.status == ls_status::LS_BUSY => match backoff.is_completed() {
                true => thread::sleep(Duration::from_micros(50)),
                false => backoff.snooze(),
            },
            entered => return entered,
        }
    }
}

/// C's callback with what it asked for.
struct Told {
    event_fn: unsafe extern "C" fn(*mut c_void, *const ls_event) -> i32,
    user: *mut c_void,
}

// SAFETY: the header says that the engine's thread calls the function with `user`; whoever passes them agrees.
unsafe impl Send for Told {}

impl Told {
    fn tell(&self, event: Event) -> ControlFlow<()> {
        let (mut token, mut status, mut message) = (0, ls_status::LS_OK, CString::default());
        let kind = match event {
            Event::Token(new) => {
                token = new.id;
                LS_EVENT_TOKEN
            }
            Event::End(End::Stop(id)) => {
                token = id;
                LS_EVENT_STOP
            }
            Event::End(End::Most) => LS_EVENT_MOST,
            Event::End(End::Context) => LS_EVENT_CONTEXT,
            Event::End(End::Cancelled) => LS_EVENT_CANCELLED,
            Event::End(End::Failed(error)) => {
                let failure = Failure::from(error);
                (status, message) = (failure.status, failure.line());
                LS_EVENT_FAILED
            }
        };
        let words = if status == ls_status::LS_OK { ptr::null() } else { message.as_ptr() };
        let event = ls_event { kind, token, status, message: words };
        // SAFETY: the caller's own function, with what it asked for; the event lives through the call.
        match unsafe { (self.event_fn)(self.user, &raw const event) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// Fills `options`, which is `size` bytes long (sizeof(ls_engine_options)), with the defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_engine_options_init(options: *mut ls_engine_options, size: usize) -> ls_status {
    // SAFETY: the caller says that so many bytes may be written.
    ffi(|| unsafe { write_options(options, size, "options", default_options()) })
}

fn default_options() -> ls_engine_options {
    let Limits { waiting, delay } = Limits::default();
    ls_engine_options { size: size_of::<ls_engine_options>(), waiting, delay }
}

/// Fills `request`, which is `size` bytes long (sizeof(ls_request)), with the defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_request_init(request: *mut ls_request, size: usize) -> ls_status {
    // SAFETY: the caller says that so many bytes may be written.
    ffi(|| unsafe { write_options(request, size, "request", default_request()) })
}

fn default_request() -> ls_request {
    ls_request {
        size: size_of::<ls_request>(),
        prompt: ptr::null(),
        count: 0,
        most: 256,
        stop: ptr::null(),
        stop_count: 0,
        sampling: ptr::null(),
        number: 0,
        priority: 0,
    }
}

/// Makes an engine of a model, which it takes over: its handle is closed, whatever this returns, and its KV cache emptied; it has as
/// many sequences at once as ls_model_options.batch says. `options` may be NULL: the defaults. LS_INVALID, and the model stays, if it
/// was opened with a trace.
///
/// An engine may be used by any number of threads at once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_engine_open(
    model: ls_model,
    options: *const ls_engine_options,
    engine: *mut ls_engine,
) -> ls_status {
    ffi(|| {
        let to = place(engine, "engine")?;
        let options = match options.is_null() {
            true => default_options(),
            // SAFETY: the caller says that as many bytes lie there as its size says.
            false => unsafe { read_options(options, "options", default_options())? },
        };
        let decoder = taken_over(model)?;
        let stop = decoder.model().config.stop.clone();
        let engine = Engine::new(decoder, Limits { waiting: options.waiting, delay: options.delay })?;
        let id = ENGINES.open(OpenEngine { engine, stop }, None)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(ls_engine { id }) };
        Ok(())
    })
}

/// Cancels all requests, waits until each has been told so, and frees everything. LS_BUSY from inside a callback.
#[unsafe(no_mangle)]
pub extern "C" fn ls_engine_close(engine: ls_engine) -> ls_status {
    ffi(|| {
        drop(closed(engine)?.engine);
        Ok(())
    })
}

/// Lets all requests end, then closes the engine. LS_BUSY from inside a callback.
#[unsafe(no_mangle)]
pub extern "C" fn ls_engine_finish(engine: ls_engine) -> ls_status {
    ffi(|| Ok(closed(engine)?.engine.finish()?))
}

/// Takes the engine off its handle, unless this is its own thread, which would wait for itself.
fn closed(engine: ls_engine) -> Result<OpenEngine> {
    if enter(engine)?.engine.is_this_thread() {
        return Err(Failure::new(ls_status::LS_BUSY, "a callback cannot close the engine that called it"));
    }
    let backoff = Backoff::new();
    loop {
        match ENGINES.close(engine.id, |_| Ok(())) {
            Err(failure) if failure.status == ls_status::LS_BUSY => backoff.snooze(),
            closed => return closed,
        }
    }
}

/// Hands in a request; `event_fn` is called with `user` for each of its events. `ticket` may be NULL: what the request can be cancelled by,
/// never 0; it is written when the call returns, before which callbacks may come. LS_INVALID names what is wrong with the request; LS_BUSY
/// if too many wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_engine_submit(
    engine: ls_engine,
    request: *const ls_request,
    event_fn: ls_event_fn,
    user: *mut c_void,
    ticket: *mut u64,
) -> ls_status {
    ffi(|| {
        let told = Told { event_fn: callback(event_fn, "event_fn")?, user };
        // SAFETY: the caller says that as many bytes lie there as its size says.
        let asked = unsafe { read_options(request, "request", default_request())? };
        // SAFETY: the caller says that so many tokens lie there.
        let prompt = unsafe { list(asked.prompt, asked.count, "prompt")? }.to_vec();
        let priority = i32::try_from(asked.priority);
        let priority = priority.map_err(|_| Failure::invalid("priority", format!("is {}", asked.priority)))?;
        let sampling = match asked.sampling.is_null() {
            true => None,
            // SAFETY: the caller says that as many bytes lie there as its size says.
            false => Some(unsafe { read_options(asked.sampling, "sampling", Sampling::default().into())? }),
        };
        let stop = match asked.stop.is_null() {
            true => None,
            // SAFETY: the caller says that so many tokens lie there.
            false => Some(unsafe { list(asked.stop, asked.stop_count, "stop")? }.to_vec()),
        };
        let opened = enter(engine)?;
        let plain = Request::new(prompt, asked.most);
        let sent = opened.engine.submit(
            Request {
                stop: stop.unwrap_or_else(|| opened.stop.clone()),
                sampling: sampling.map_or(plain.sampling, Sampling::from),
                number: asked.number,
                priority,
                ..plain
            },
            // The whole of it, which may go to another thread, not its parts.
            move |event| {
                let told = &told;
                told.tell(event)
            },
        )?;
        if let Ok(to) = place(ticket, "ticket") {
            // SAFETY: the pointer was checked; the caller says that what it points to may be written.
            unsafe { to.write(sent.number()) };
        }
        Ok(())
    })
}

/// Ends a request at the end of the pass that runs; its last event is LS_EVENT_CANCELLED. One that has ended stays as it is.
#[unsafe(no_mangle)]
pub extern "C" fn ls_engine_cancel(engine: ls_engine, ticket: u64) -> ls_status {
    ffi(|| {
        enter(engine)?.engine.cancel(Ticket::of(ticket));
        Ok(())
    })
}

/// What the engine did, and does now. Set `stats->size` to sizeof(ls_engine_stats) before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_engine_describe(engine: ls_engine, stats: *mut ls_engine_stats) -> ls_status {
    ffi(|| {
        let to = place(stats, "stats")?;
        let EngineStats { waiting, running, ended, passes, prompt_tokens, reused_tokens, new_tokens, put_back } =
            enter(engine)?.engine.stats();
        let size = size_of::<ls_engine_stats>();
        let stats = ls_engine_stats {
            size,
            waiting,
            running,
            ended,
            passes,
            prompt_tokens,
            reused_tokens,
            new_tokens,
            put_back,
        };
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { write_sized(to, "stats", stats) }
    })
}
