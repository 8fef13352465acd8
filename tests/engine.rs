//! The engine: answers in company are those alone, whatever comes and goes; and nobody waits for ever.

use std::{
    fs,
    ops::ControlFlow,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use layer_streamer::{
    Error, Settings,
    device::Cpu,
    engine::{End, Engine, Event, Limits, Logprobs, Request, Ticket, Token},
    kernels::PAGE,
    model::{Cache, Choice, Decoder, Model, Sampler, Sampling, Sequence, Tables},
    plan::CachePolicy,
};
use safetensors::SafeTensors;
use support::{copy_of, data, healed, speller, whole};

const CONTEXT: usize = 300;

fn model() -> Model {
    let mut model = Model::open(data("qwen2-tied")).unwrap();
    model.config.max_positions = CONTEXT;
    model
}

fn engine(model: &Model, rows: usize, limits: Limits) -> Engine {
    Engine::new(Decoder::new(&Cpu, model, &Settings::default(), rows, CONTEXT).unwrap(), limits).unwrap()
}

/// How an answer ended, in a word.
fn word(end: &End) -> &'static str {
    match end {
        End::Stop(_) => "stop",
        End::Most => "most",
        End::Context => "context",
        End::Cancelled => "cancelled",
        End::Failed(_) => "failed",
    }
}

/// All tokens of an answer, and how it ended.
fn collected(events: impl IntoIterator<Item = Event>) -> (Vec<Token>, &'static str) {
    let (mut tokens, mut ended) = (Vec::new(), Vec::new());
    for event in events {
        assert!(ended.is_empty(), "{event:?} after the end");
        match event {
            Event::Token(token) => tokens.push(token),
            Event::End(end) => ended.push(word(&end)),
        }
    }
    (tokens, ended.first().copied().unwrap_or("nothing"))
}

fn drawn(rng: &mut fastrand::Rng) -> Request {
    let length = (CONTEXT as f64).powf(rng.f64()).round() as usize;
    let prompt = (0..length.max(1)).map(|_| rng.u32(3..300)).collect();
    let sampling = match rng.u8(..3) {
        0 => Sampling { temperature: 0.0, ..Sampling::default() },
        1 => Sampling { temperature: 0.9, top_k: 40, seed: rng.u64(..), ..Sampling::default() },
        _ => Sampling {
            temperature: 0.7,
            repetition_penalty: 1.3,
            presence_penalty: 0.5,
            seed: 3,
            ..Sampling::default()
        },
    };
    Request {
        sampling,
        stop: vec![7, 8, 9],
        number: rng.u64(..3),
        logprobs: rng.bool().then(|| rng.usize(..6)),
        priority: rng.i32(-2..3),
        ..Request::new(prompt, rng.usize(1..9))
    }
}

/// What a request comes to by a decoder of its own, written down plainly.
fn alone(model: &Model, request: &Request) -> (Vec<Token>, &'static str) {
    let mut decoder = Decoder::new(&Cpu, model, &Settings::default(), 1, CONTEXT).unwrap();
    let mut sampler = Sampler::new(Sampling::default(), model.config.vocab).unwrap();
    sampler.begin_by(0, &request.prompt, request.sampling, request.number).unwrap();
    let (mut answer, mut next) = (Vec::new(), request.prompt.clone());
    loop {
        decoder.forward(&[Sequence { row: 0, tokens: &next }]).unwrap();
        let mut logits = Vec::new();
        decoder
            .last_logits(|row| {
                logits.extend_from_slice(row);
                Ok::<_, Error>(())
            })
            .unwrap();
        let id = sampler.choose(0, &logits).unwrap();
        if request.stop.contains(&id) {
            return (answer, "stop");
        }
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let logprobs = request.logprobs.map(|top| {
            let mut all: Vec<(u32, f32)> =
                logits.iter().zip(0..).map(|(logit, id)| (id, (f64::from(*logit) - sum.ln()) as f32)).collect();
            let chosen = all[id as usize].1;
            all.sort_by(|a, b| logits[b.0 as usize].total_cmp(&logits[a.0 as usize]).then(a.0.cmp(&b.0)));
            all.truncate(top);
            Logprobs { chosen, top: all }
        });
        answer.push(Token { id, logprobs });
        next = vec![id];
        if answer.len() == request.most {
            return (answer, "most");
        }
        if decoder.length(0) == CONTEXT {
            return (answer, "context");
        }
    }
}

fn assert_same(found: &(Vec<Token>, &str), expected: &(Vec<Token>, &str), what: &str) {
    let ids = |of: &[Token]| of.iter().map(|token| token.id).collect::<Vec<_>>();
    assert_eq!((ids(&found.0), found.1), (ids(&expected.0), expected.1), "{what}");
    for (found, expected) in found.0.iter().zip(&expected.0) {
        let [found, expected] = [found, expected].map(|token| token.logprobs.clone());
        let near = |a: f32, b: f32| (a - b).abs() <= 1e-4;
        let same = match (&found, &expected) {
            (Some(a), Some(b)) => {
                let tokens = a.top.iter().zip(&b.top).all(|(a, b)| a.0 == b.0 && near(a.1, b.1));
                near(a.chosen, b.chosen) && a.top.len() == b.top.len() && tokens
            }
            (None, None) => true,
            _ => false,
        };
        assert!(same, "{what}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn answers_in_any_company_are_those_alone() {
    let (mut rng, model) = (fastrand::Rng::new(), model());
    println!("seed {}", rng.get_seed());
    let requests: Vec<Request> = (0..40).map(|_| drawn(&mut rng)).collect();
    let expected: Vec<_> = requests.iter().map(|request| alone(&model, request)).collect();
    for (rows, delay) in [(1, 0.5), (5, 0.0), (16, 2.0)] {
        let engine = engine(&model, rows, Limits { delay, ..Limits::default() });
        let mut order: Vec<usize> = (0..requests.len()).collect();
        rng.shuffle(&mut order);
        let mut answers = Vec::new();
        for number in order {
            answers.push((number, engine.answer(requests[number].clone()).unwrap()));
            thread::sleep(Duration::from_micros(rng.u64(..3000)));
        }
        for (number, answer) in answers {
            assert_same(&collected(answer), &expected[number], &format!("{rows} rows, {:?}", requests[number]));
        }
        let stats = engine.stats();
        assert_eq!((stats.ended, stats.waiting), (40, 0));
        let tokens: usize = expected.iter().map(|(tokens, _)| tokens.len()).sum();
        assert_eq!(stats.new_tokens, tokens as u64);
        // Passes are shared: alone each token would take one.
        assert!(rows == 1 || stats.passes < tokens as u64, "{stats:?}");
        engine.finish().unwrap();
    }
}

#[test]
fn where_the_cache_is_full_sequences_wait_and_none_fails() {
    let (mut rng, model) = (fastrand::Rng::new(), model());
    println!("seed {}", rng.get_seed());
    // Many begin alike, and grow into pages that are not there.
    let system: Vec<u32> = (0..2 * PAGE + 9).map(|_| rng.u32(3..300)).collect();
    let requests: Vec<Request> = (0..24)
        .map(|_| {
            let mut request = drawn(&mut rng);
            let shared = if rng.bool() { system.len() } else { 0 };
            request.prompt.truncate(CONTEXT - shared - 1);
            request.prompt.splice(..0, system[..shared].iter().copied());
            request.most = rng.usize(1..120);
            request
        })
        .collect();
    let expected: Vec<_> = requests.iter().map(|request| alone(&model, request)).collect();
    let mut put_back = 0;
    for pages in [5, 7, 12] {
        let cache = Cache { sequences: 8, context: CONTEXT, tokens: pages * PAGE };
        let decoder = Decoder::with_cache(&Cpu, &model, &Settings::default(), cache).unwrap();
        let engine = Engine::new(decoder, Limits::default()).unwrap();
        let answers: Vec<_> = requests.iter().map(|request| engine.answer(request.clone()).unwrap()).collect();
        for (number, answer) in answers.into_iter().enumerate() {
            assert_same(&collected(answer), &expected[number], &format!("{pages} pages, {:?}", requests[number]));
        }
        let stats = engine.stats();
        assert!(stats.reused_tokens >= 2 * PAGE as u64, "{stats:?}");
        put_back += stats.put_back;
        engine.finish().unwrap();
    }
    assert!(put_back > 0);
}

/// Waits until something is so.
fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A request that goes on until the context is full.
fn long() -> Request {
    Request::new(vec![5], 2 * CONTEXT)
}

#[test]
fn who_leaves_frees_a_place_and_disturbs_nobody() {
    let model = model();
    let expected = alone(&model, &Request::new(vec![11, 12], 250));
    let engine = engine(&model, 4, Limits::default());
    let stays = engine.answer(Request::new(vec![11, 12], 250)).unwrap();
    let (sender, breaks) = mpsc::channel();
    let mut tokens = 0;
    engine
        .submit(long(), move |event| {
            tokens += usize::from(matches!(event, Event::Token(_)));
            sender.send(event).unwrap();
            if tokens < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .unwrap();
    let mut dropped = engine.answer(long()).unwrap();
    let (sender, cancelled) = mpsc::channel();
    let ticket = engine.submit(long(), move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    });
    // A fifth waits for a place, and is cancelled there.
    let (sender, waits) = mpsc::channel();
    let waiting = engine.submit(long(), move |event| {
        sender.send(event).unwrap();
        ControlFlow::Continue(())
    });
    assert!(matches!(dropped.next(), Some(Event::Token(_))));
    drop(dropped);
    assert!(matches!(cancelled.recv().unwrap(), Event::Token(_)));
    let cancel = |ticket: Result<Ticket, Error>| engine.cancel(ticket.unwrap());
    cancel(waiting);
    cancel(ticket);
    let (tokens, end) = collected(breaks);
    assert_eq!((tokens.len(), end), (3, "cancelled"));
    assert_eq!(collected(cancelled).1, "cancelled");
    assert_eq!(collected(waits).1, "cancelled");
    assert_same(&collected(stays), &expected, "who stayed");
    until("all have left", || engine.stats().running == 0 && engine.stats().ended == 5);
    assert_eq!(engine.stats().waiting, 0);
}

#[test]
fn the_most_important_is_next_and_one_too_many_is_refused() {
    let engine = engine(&model(), 1, Limits { waiting: 3, ..Limits::default() });
    let first = engine.answer(long()).unwrap();
    until("the first runs", || engine.stats().running == 1);
    let (sender, order) = mpsc::channel();
    for priority in [0, -1, 1] {
        let sender = sender.clone();
        let request = Request { priority, ..Request::new(vec![6], 2) };
        engine
            .submit(request, move |event| {
                if let Event::End(_) = event {
                    sender.send(priority).unwrap();
                }
                ControlFlow::Continue(())
            })
            .unwrap();
    }
    let refused = engine.answer(long()).unwrap_err();
    assert!(matches!(refused, Error::Busy { waiting: 3 }), "{refused}");
    assert_eq!(collected(first).1, "context");
    assert_eq!([(); 3].map(|()| order.recv().unwrap()), [1, 0, -1]);
    engine.answer(Request::new(vec![6], 1)).unwrap();
}

#[test]
fn a_long_prompt_does_not_stop_those_that_go_on() {
    let mut model = model();
    model.config.max_positions = 4000;
    let decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 4000).unwrap();
    let engine = Engine::new(decoder, Limits { delay: 0.1, ..Limits::default() }).unwrap();
    let (sender, events) = mpsc::channel();
    for (who, request) in
        [(0, Request::new(vec![5], 3000)), (1, Request::new((0..3900).map(|i| 3 + i % 290).collect(), 1))]
    {
        let sender = sender.clone();
        engine
            .submit(request, move |event| match sender.send((who, event)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            })
            .unwrap();
        until("it runs", || engine.stats().running > who && (who == 1 || engine.stats().new_tokens > 3));
    }
    let mut between = 0;
    for (who, event) in events {
        match event {
            Event::Token(_) if who == 0 => between += 1,
            Event::End(_) if who == 1 => break,
            _ => {}
        }
    }
    assert!(between >= 10, "{between} tokens while 3900 of a prompt were computed");
}

#[test]
fn what_is_wrong_with_a_request_is_said_by_name() {
    let engine = engine(&model(), 1, Limits::default());
    let plain = Request::new(vec![5], 1);
    let hot = Sampling { temperature: -1.0, ..Sampling::default() };
    for (request, said) in [
        (Request { prompt: Vec::new(), ..plain.clone() }, "prompt: is empty"),
        (Request { prompt: vec![5; CONTEXT + 1], ..plain.clone() }, "prompt: has 301 tokens, the context 300"),
        (Request { prompt: vec![5, 100_000], ..plain.clone() }, "prompt: token 100000 is not in the vocabulary"),
        (Request { most: 0, ..plain.clone() }, "most: is 0"),
        (Request { sampling: hot, ..plain.clone() }, "temperature: is -1"),
    ] {
        let found = engine.answer(request).unwrap_err().to_string();
        assert!(found.contains(said), "{found}");
    }
    let whole = Request { prompt: vec![5; CONTEXT], most: 9, ..plain };
    let (tokens, end) = collected(engine.answer(whole).unwrap());
    assert_eq!((tokens.len(), end), (1, "context"));
    let decoder = Decoder::new(&Cpu, &model(), &Settings::default(), 1, 8).unwrap();
    assert!(Engine::new(decoder, Limits { delay: f64::NAN, ..Limits::default() }).is_err());
}

#[test]
fn a_pass_that_fails_ends_who_was_in_it_and_the_next_one_works() {
    let folder = copy_of(&speller());
    let path = folder.path().join("model-00001-of-00002.safetensors");
    let before = whole(&path);
    let model = Model::open(folder.path()).unwrap();
    let settings = Settings { cache: CachePolicy::Direct, ..Settings::default() };
    let decoder = Decoder::new(&Cpu, &model, &settings, 2, 32).unwrap();
    let engine = Engine::new(decoder, Limits::default()).unwrap();
    let ask = || {
        collected(engine.answer(Request { stop: model.config.stop.clone(), ..Request::new(vec![23, 29], 8) }).unwrap())
    };
    let ids = |tokens: Vec<Token>| tokens.iter().map(|token| token.id).collect::<Vec<_>>();
    let (tokens, end) = ask();
    assert_eq!((ids(tokens), end), (vec![284], "stop"));
    std::fs::File::options().write(true).open(&path).unwrap().set_len(before.0.len() as u64 / 2).unwrap();
    // What was read ahead may still be there for a pass.
    assert!((0..8).any(|_| ask().1 == "failed"));
    healed(&path, &before);
    let mut last = ask();
    for _ in 0..8 {
        last = ask();
    }
    assert_eq!((ids(last.0), last.1), (vec![284], "stop"));
}

/// A model that computes NaN for every sequence that has this token.
fn spoilt(token: usize) -> tempfile::TempDir {
    let folder = copy_of(&data("mistral"));
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let table = SafeTensors::deserialize(&bytes).unwrap().tensor("model.embed_tokens.weight").unwrap();
    let (row, start) = (table.data().len() / table.shape()[0], table.data().as_ptr().addr() - bytes.as_ptr().addr());
    // In BF16 that is a NaN.
    bytes[start + token * row..][..row].fill(0xff);
    fs::write(&path, bytes).unwrap();
    folder
}

#[test]
fn a_sequence_whose_logits_are_nan_fails_alike_greedily_and_drawn_and_disturbs_nobody() {
    let folder = spoilt(17);
    for tables in [Tables::OnDevice, Tables::HeadStreamed] {
        let mut model = Model::open(folder.path()).unwrap();
        model.tables = tables;
        let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 4, 64).unwrap();
        let mut sampler = Sampler::new(Sampling::default(), model.config.vocab).unwrap();
        let mut said = Vec::new();
        for choice in [Choice::Greedy, Choice::Sample(&mut sampler)] {
            let on_token = |_, token| panic!("{token} of NaN");
            let failed = decoder.generate::<Error>(&[&[5, 17]], 3, &[], choice, on_token).unwrap_err();
            assert!(matches!(failed, Error::Setting { name: "logits", .. }), "{failed}");
            said.push(failed.to_string());
            decoder.truncate(0, 0).unwrap();
        }
        let expected = alone(&model, &Request::new(vec![5, 6], 9));
        let engine = Engine::new(decoder, Limits::default()).unwrap();
        let healthy = engine.answer(Request::new(vec![5, 6], 9)).unwrap();
        let greedy = Request::new(vec![5, 17], 9);
        let drawn = Request { sampling: Sampling::default(), ..greedy.clone() };
        // Alone with greedy ones, which the device chooses for, and beside one that is drawn.
        for requests in [&[greedy.clone()][..], &[greedy, drawn]] {
            let answers: Vec<_> = requests.iter().map(|request| engine.answer(request.clone()).unwrap()).collect();
            for answer in answers {
                let events: Vec<_> = answer.collect();
                let [Event::End(End::Failed(failed))] = &events[..] else { panic!("{events:?}") };
                said.push(failed.to_string());
            }
        }
        assert!(
            said[0].contains("logits: NaN for token 0: ") && said.iter().all(|other| *other == said[0]),
            "{said:?}"
        );
        assert_same(&collected(healthy), &expected, "beside them");
    }
}

#[test]
fn an_engine_that_is_dropped_cancels_and_one_that_is_finished_lets_all_end() {
    let model = model();
    let dropped = engine(&model, 1, Limits::default());
    let answers = [dropped.answer(long()).unwrap(), dropped.answer(long()).unwrap()];
    drop(dropped);
    assert_eq!(answers.map(|answer| collected(answer).1), ["cancelled"; 2]);
    let finished = engine(&model, 1, Limits::default());
    let answers = [(); 3].map(|()| finished.answer(Request::new(vec![5], 4)).unwrap());
    finished.finish().unwrap();
    assert_eq!(answers.map(|answer| collected(answer).1), ["most"; 3]);
}

#[test]
fn who_drops_an_answer_that_waits_frees_its_place_and_a_sink_that_panics_ends_its_own_request_alone() {
    let engine = engine(&model(), 1, Limits { waiting: 1, ..Limits::default() });
    let first = engine.answer(long()).unwrap();
    drop(engine.answer(long()).unwrap());
    until("its place is free", || engine.stats().waiting == 0);
    drop(first);
    engine.submit(long(), |_| panic!("on purpose")).unwrap();
    until("the row is free", || engine.stats().running == 0 && engine.stats().ended == 3);
    assert_eq!(collected(engine.answer(Request::new(vec![5], 3)).unwrap()).1, "most");
}

#[test]
fn an_engine_may_be_dropped_by_what_it_calls() {
    let shared = Arc::new(Mutex::new(None));
    let (sender, events) = mpsc::channel();
    let inside = Arc::clone(&shared);
    let engine = engine(&model(), 1, Limits::default());
    engine
        .submit(long(), move |event| {
            drop(inside.lock().unwrap().take());
            sender.send(event).unwrap();
            ControlFlow::Continue(())
        })
        .unwrap();
    *shared.lock().unwrap() = Some(engine);
    assert_eq!(collected(events).1, "cancelled");
}
