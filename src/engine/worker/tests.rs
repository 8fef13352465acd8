use std::{
    ops::ControlFlow,
    sync::mpsc::{self, Receiver, Sender},
};

use super::*;
use crate::{Settings, device::Cpu, model::Model};

const CONTEXT: usize = 256;
/// Tokens that all prompts begin with.
const SHARED: usize = 3 * PAGE;

/// An engine that does as it is told, pass by pass.
struct Stepped {
    worker: Worker<Cpu>,
    commands: Sender<Command>,
    tickets: u64,
}

impl Stepped {
    /// Passes have so many tokens of prompts.
    fn new(rows: usize, tokens: usize) -> Self {
        let mut model = Model::open("tests/data/qwen2-tied").unwrap();
        model.config.max_positions = CONTEXT;
        let decoder = Decoder::new(&Cpu, &model, &Settings::default(), rows, CONTEXT).unwrap();
        let (commands, receiver) = mpsc::channel();
        let mut worker = Worker::new(decoder, Limits::default(), receiver, Arc::default()).unwrap();
        worker.pace = Pace::new(0.5, tokens);
        Self { worker, commands, tickets: 0 }
    }

    fn submit(&mut self, prompt: Vec<u32>, priority: i32) -> Receiver<Event> {
        let (sender, events) = mpsc::channel();
        let sink = move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        self.tickets += 1;
        assert!(self.worker.counts.enter(usize::MAX));
        let request = Request { priority, ..Request::new(prompt, 3) };
        self.commands.send(Command::Submit(Box::new(Job::new(self.tickets, request, Box::new(sink))))).unwrap();
        events
    }

    fn step(&mut self) {
        assert!(self.worker.take_commands().is_continue());
        self.worker.step();
    }

    /// Goes on until nobody runs; passes without end are none.
    fn finish(&mut self) -> EngineStats {
        self.commands.send(Command::Finish).unwrap();
        for _ in 0..1000 {
            if self.worker.take_commands().is_break() {
                return self.worker.counts.stats();
            }
            let before = self.worker.counts.stats().passes;
            self.worker.step();
            assert_eq!(self.worker.counts.stats().passes, before + 1, "a pass with nothing in it");
        }
        panic!("somebody waits for ever");
    }
}

/// A prompt that begins as all others do, and has a few tokens of its own.
fn prompt(number: u32) -> Vec<u32> {
    (0..SHARED as u32).map(|at| 3 + at * 7919 % 290).chain((0..5).map(|at| 3 + number * 31 + at)).collect()
}

fn tokens(events: &Receiver<Event>) -> (Vec<u32>, bool) {
    let (mut ids, mut is_whole) = (Vec::new(), false);
    for event in events.try_iter() {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::End(end) => is_whole = matches!(end, End::Most),
        }
    }
    (ids, is_whole)
}

fn alone(prompt: Vec<u32>) -> (Vec<u32>, bool) {
    let mut engine = Stepped::new(1, CONTEXT);
    let events = engine.submit(prompt, 0);
    engine.finish();
    tokens(&events)
}

#[test]
fn what_requests_that_come_together_begin_with_is_computed_once() {
    for pass in [40, PAGE, 1000] {
        let mut engine = Stepped::new(8, pass);
        let answers: Vec<_> = (0..8).map(|number| engine.submit(prompt(number), number as i32 % 3)).collect();
        let stats = engine.finish();
        for (number, answer) in answers.iter().enumerate() {
            assert_eq!(tokens(answer), alone(prompt(number as u32)), "{number}");
        }
        let computed = (SHARED + 8 * 5) as u64;
        assert_eq!((stats.prompt_tokens, stats.reused_tokens), (computed, 7 * SHARED as u64), "{stats:?}");
    }
}

#[test]
fn if_the_one_that_others_wait_for_is_cancelled_another_goes_on_and_nothing_else_is_computed_twice() {
    // Within each page, and where one has just been filled.
    for (tokens_each, passes) in [(40, 1), (40, 2), (40, 3), (40, 4), (PAGE, 1), (PAGE, 2), (PAGE, 3)] {
        let mut engine = Stepped::new(8, tokens_each);
        let answers: Vec<_> = (0..8).map(|number| engine.submit(prompt(number), 0)).collect();
        (0..passes).for_each(|_| engine.step());
        engine.commands.send(Command::Cancel(1)).unwrap();
        let stats = engine.finish();
        assert!(tokens(&answers[0]).0.is_empty(), "cancelled before its first token");
        for (number, answer) in answers.iter().enumerate().skip(1) {
            assert_eq!(tokens(answer), alone(prompt(number as u32)), "{number}");
        }
        // What it had of a page that was not full.
        let again = tokens_each * passes % PAGE;
        assert_eq!(stats.prompt_tokens, (SHARED + again + 7 * 5) as u64, "{tokens_each}, {passes} passes: {stats:?}");
    }
}

#[test]
fn a_page_that_is_never_known_keeps_nobody_waiting() {
    let mut engine = Stepped::new(4, 40);
    let answers: Vec<_> = (0..4).map(|number| engine.submit(prompt(number), 0)).collect();
    (0..2).for_each(|_| engine.step());
    // As after weights that were found corrupt: the first one's pages are known no longer, nor are those to come.
    engine.worker.decoder.forget_pages();
    engine.finish();
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(tokens(answer), alone(prompt(number as u32)), "{number}");
    }
}
