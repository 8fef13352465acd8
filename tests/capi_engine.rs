//! An engine through the C API: many requests from several threads, and what ends them.

#[path = "common/c.rs"]
mod c_calls;

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_void},
    ptr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use c_calls::{c, made, message};
use layer_streamer::capi::{ls_event_kind::*, ls_status::*, *};
use support::{data, speller};

fn model(folder: &std::path::Path, batch: usize, context: usize) -> ls_model {
    let path = c(folder.to_str().unwrap());
    // SAFETY: as the header asks.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let mut options: ls_model_options = made(|to| ls_model_options_init(to, size_of::<ls_model_options>()));
        (options.batch, options.context) = (batch, context);
        let model = made(|to| ls_model_open(device, path.as_ptr(), &options, to));
        assert_eq!(ls_device_close(device), LS_OK);
        model
    }
}

fn engine(model: ls_model) -> ls_engine {
    // SAFETY: as the header asks.
    made(|to| unsafe { ls_engine_open(model, ptr::null(), to) })
}

fn request(prompt: &[u32], most: usize) -> ls_request {
    // SAFETY: as the header asks.
    let mut request: ls_request = made(|to| unsafe { ls_request_init(to, size_of::<ls_request>()) });
    (request.prompt, request.count, request.most) = (prompt.as_ptr(), prompt.len(), most);
    request
}

type Told = mpsc::Sender<(ls_event_kind, u32, String)>;

/// Passes events on to the channel that `user` is.
unsafe extern "C" fn pass_on(user: *mut c_void, event: *const ls_event) -> i32 {
    // SAFETY: every test passes a sender that it keeps until the last event, or leaks it.
    let (sender, event) = unsafe { (&*user.cast::<Told>(), &*event) };
    let words = match event.message.is_null() {
        true => String::new(),
        // SAFETY: the library's, until this returns.
        false => unsafe { CStr::from_ptr(event.message) }.to_str().unwrap().to_owned(),
    };
    i32::from(sender.send((event.kind, event.token, words)).is_err())
}

fn submit(engine: ls_engine, request: &ls_request, sender: Told) -> u64 {
    let user: *mut Told = Box::into_raw(Box::new(sender));
    // SAFETY: as the header asks; the sender is leaked.
    made(|ticket| unsafe { ls_engine_submit(engine, request, Some(pass_on), user.cast(), ticket) })
}

#[test]
fn requests_from_several_threads_are_answered_as_alone() {
    // Digits, and `=`.
    let prompts: Vec<Vec<u32>> = (0..40).map(|i| vec![17 + i % 9, 16 + i / 9, 29]).collect();
    let alone = model(&speller(), 1, 32);
    let answers = Mutex::new(BTreeMap::new());
    let expected: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            unsafe extern "C" fn keep(user: *mut c_void, _row: usize, token: u32) -> i32 {
                // SAFETY: the vector below, while the call goes on.
                unsafe { (*user.cast::<Vec<u32>>()).push(token) };
                0
            }
            let mut tokens: Vec<u32> = Vec::new();
            let sequence = ls_sequence { row: 0, tokens: prompt.as_ptr(), count: prompt.len() };
            // SAFETY: as the header asks.
            let status = unsafe { ls_model_generate(alone, &sequence, 1, 20, Some(keep), (&raw mut tokens).cast()) };
            assert_eq!((status, ls_model_truncate(alone, 0, 0)), (LS_OK, LS_OK), "{}", message());
            tokens
        })
        .collect();
    assert_eq!(ls_model_close(alone), LS_OK);
    let engine = engine(model(&speller(), 8, 32));
    thread::scope(|scope| {
        for part in [0..13, 13..25, 25..40] {
            let (prompts, answers) = (&prompts, &answers);
            scope.spawn(move || {
                let asked: Vec<_> = part
                    .map(|number| {
                        let (sender, events) = mpsc::channel();
                        submit(engine, &request(&prompts[number], 20), sender);
                        (number, events)
                    })
                    .collect();
                for (number, events) in asked {
                    let mut tokens = Vec::new();
                    let end = loop {
                        match events.recv().unwrap() {
                            (LS_EVENT_TOKEN, token, _) => tokens.push(token),
                            (end, ..) => break end,
                        }
                    };
                    assert_eq!(end, LS_EVENT_STOP);
                    answers.lock().unwrap().insert(number, tokens);
                }
            });
        }
    });
    let found: Vec<_> = answers.into_inner().unwrap().into_values().collect();
    assert!(expected.iter().any(|tokens| tokens.len() > 2));
    assert_eq!(found, expected);
    let mut stats = ls_engine_stats {
        size: size_of::<ls_engine_stats>(),
        ..made(|to: *mut ls_engine_stats| {
            // SAFETY: zeroed words, with the size.
            unsafe { to.write(std::mem::zeroed()) };
            LS_OK
        })
    };
    // SAFETY: as the header asks.
    assert_eq!(unsafe { ls_engine_describe(engine, &mut stats) }, LS_OK);
    let all: usize = expected.iter().map(Vec::len).sum();
    assert_eq!((stats.ended, stats.running, stats.waiting, stats.new_tokens), (40, 0, 0, all as u64));
    assert!(stats.passes < all as u64, "{stats:?}");
    assert_eq!(ls_engine_finish(engine), LS_OK);
    assert_eq!((ls_engine_close(engine), ls_engine_cancel(engine, 0)), (LS_CLOSED, LS_CLOSED));
}

#[test]
fn what_ends_a_request_is_told_and_a_callback_cannot_close_its_engine() {
    static OPENED: AtomicU64 = AtomicU64::new(0);
    unsafe extern "C" fn close_it(user: *mut c_void, event: *const ls_event) -> i32 {
        let engine = ls_engine { id: OPENED.load(Ordering::Relaxed) };
        assert_eq!((ls_engine_close(engine), ls_engine_finish(engine)), (LS_BUSY, LS_BUSY));
        // SAFETY: as the test that passes both.
        unsafe { pass_on(user, event) }
    }
    let engine = engine(model(&data("qwen2-tied"), 2, 64));
    OPENED.store(engine.id, Ordering::Relaxed);
    let prompt = [5, 6, 7];
    let (sender, events) = mpsc::channel();
    let user: *mut Told = Box::into_raw(Box::new(sender));
    let few = ls_request { stop: prompt.as_ptr(), stop_count: 0, ..request(&prompt, 3) };
    // SAFETY: as the header asks; the sender is leaked.
    let status = unsafe { ls_engine_submit(engine, &few, Some(close_it), user.cast(), ptr::null_mut()) };
    assert_eq!(status, LS_OK, "{}", message());
    let kinds = [(); 4].map(|()| events.recv().unwrap().0);
    assert_eq!(kinds, [LS_EVENT_TOKEN, LS_EVENT_TOKEN, LS_EVENT_TOKEN, LS_EVENT_MOST]);

    let (sender, events) = mpsc::channel();
    let endless = ls_request { stop: prompt.as_ptr(), stop_count: 0, ..request(&prompt, 1000) };
    submit(engine, &endless, sender.clone());
    assert_eq!(events.iter().find(|event| event.0 != LS_EVENT_TOKEN).unwrap().0, LS_EVENT_CONTEXT);
    let ticket = submit(engine, &endless, sender.clone());
    assert_eq!(events.recv().unwrap().0, LS_EVENT_TOKEN);
    assert_eq!((ls_engine_cancel(engine, ticket), ls_engine_cancel(engine, u64::MAX)), (LS_OK, LS_OK));
    let end = events.iter().find(|event| event.0 != LS_EVENT_TOKEN).unwrap().0;
    assert!([LS_EVENT_CANCELLED, LS_EVENT_CONTEXT].contains(&end), "{end:?}");

    submit(engine, &endless, sender);
    assert_eq!(ls_engine_close(engine), LS_OK);
    let end = events.iter().find(|event| event.0 != LS_EVENT_TOKEN).unwrap().0;
    assert!([LS_EVENT_CANCELLED, LS_EVENT_CONTEXT].contains(&end), "{end:?}");
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    let opened = model(&data("qwen2-tied"), 1, 32);
    let mut options: ls_engine_options =
        // SAFETY: as the header asks.
        made(|to| unsafe { ls_engine_options_init(to, size_of::<ls_engine_options>()) });
    options.waiting = 0;
    let mut engine = ls_engine { id: 0 };
    // SAFETY: as the header asks.
    assert_eq!(unsafe { ls_engine_open(opened, &options, &mut engine) }, LS_OK);
    assert_eq!(ls_model_close(opened), LS_CLOSED, "the engine has it");
    let prompt = [5, 6];
    let plain = request(&prompt, 4);
    let hot = ls_sampling {
        temperature: -1.0,
        // SAFETY: as the header asks.
        ..made(|to| unsafe { ls_sampling_init(to, size_of::<ls_sampling>()) })
    };
    // The engine's thread waits in this one's callback, so that the row stays taken.
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    unsafe extern "C" fn wait(_user: *mut c_void, _event: *const ls_event) -> i32 {
        while !IS_OVER.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        1
    }
    // SAFETY: as the header asks.
    let status = unsafe { ls_engine_submit(engine, &plain, Some(wait), ptr::null_mut(), ptr::null_mut()) };
    assert_eq!(status, LS_OK, "{}", message());
    for (request, status, said) in [
        (ls_request { count: 0, ..plain }, LS_INVALID, "prompt: is empty"),
        (ls_request { prompt: ptr::null(), ..plain }, LS_NULL, "prompt"),
        (ls_request { most: 0, ..plain }, LS_INVALID, "most: is 0"),
        (ls_request { priority: 1 << 40, ..plain }, LS_INVALID, "priority: is 1099511627776"),
        (ls_request { sampling: &hot, ..plain }, LS_INVALID, "temperature: is -1"),
        (ls_request { size: 3, ..plain }, LS_INVALID, "request"),
        (plain, LS_BUSY, "0 requests wait already"),
    ] {
        // SAFETY: as the header asks; no event comes.
        let found = unsafe { ls_engine_submit(engine, &request, Some(pass_on), ptr::null_mut(), ptr::null_mut()) };
        assert_eq!(found, status, "{said}: {}", message());
        assert!(message().contains(said), "{said}: {}", message());
    }
    IS_OVER.store(true, Ordering::Relaxed);
    // SAFETY: as the header asks.
    let found = unsafe { ls_engine_submit(engine, &plain, None, ptr::null_mut(), ptr::null_mut()) };
    assert_eq!((found, ls_engine_close(engine), ls_engine_close(ls_engine { id: 0 })), (LS_NULL, LS_OK, LS_CLOSED));
}
