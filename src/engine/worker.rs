//! The engine's thread: takes in what came, puts together a pass, and hands out what it gave.

#[cfg(test)]
mod tests;

use std::{
    iter,
    ops::ControlFlow,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};

use super::{
    End, EngineStats, Event, Limits, Logprobs, Request, Token,
    pace::Pace,
    schedule::{self, Next, Queue},
};
use crate::{
    error::{Error, Result},
    kernels::{Kernels, PAGE},
    model::{Decoder, Sampler, Sampling, Sequence},
};

type Sink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

pub(super) enum Command {
    Submit(Box<Job>),
    Cancel(u64),
    /// End when nothing is left to do.
    Finish,
    /// End, and cancel what is left.
    Drop,
}

/// A request on its way.
pub(super) struct Job {
    ticket: u64,
    request: Request,
    sink: Sink,
    /// Its prompt, and the tokens that were chosen.
    tokens: Vec<u32>,
    /// Tokens that were chosen.
    new: usize,
    /// It had a row before.
    began: bool,
    cancelled: bool,
}

impl Job {
    pub(super) fn new(ticket: u64, mut request: Request, sink: Sink) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        Self { ticket, request, sink, tokens, new: 0, began: false, cancelled: false }
    }

    /// Whether it has tokens to compute before the next one can be chosen, of which so many are held, or is at its beginning.
    fn is_prompt(&self, held: usize) -> bool {
        self.tokens.len() - held > 1 || self.new == 0
    }

    /// Tells of an event.
    fn tell(&mut self, event: Event) {
        // A sink that panics has said so; the others' requests go on.
        let told = panic::catch_unwind(AssertUnwindSafe(|| (self.sink)(event)));
        self.cancelled |= told.map_or(true, |flow| flow.is_break());
    }
}

/// A job that has a row of the cache.
struct Running {
    job: Box<Job>,
    row: usize,
}

/// What is counted, and seen from other threads.
#[derive(Debug, Default)]
pub(super) struct Counts {
    waiting: AtomicUsize,
    running: AtomicUsize,
    ended: AtomicU64,
    passes: AtomicU64,
    prompt_tokens: AtomicU64,
    reused_tokens: AtomicU64,
    new_tokens: AtomicU64,
    put_back: AtomicU64,
}

impl Counts {
    /// One more waits, unless so many wait and run.
    pub(super) fn enter(&self, most: usize) -> bool {
        let running = self.running.load(Ordering::Relaxed);
        let entered = |waiting: usize| (waiting + running < most).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, entered).is_ok()
    }

    /// It does not, after all.
    pub(super) fn leave(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn stats(&self) -> EngineStats {
        let [ended, passes, prompt_tokens, reused_tokens, new_tokens, put_back] =
            [&self.ended, &self.passes, &self.prompt_tokens, &self.reused_tokens, &self.new_tokens, &self.put_back]
                .map(|count| count.load(Ordering::Relaxed));
        let [waiting, running] = [&self.waiting, &self.running].map(|count| count.load(Ordering::Relaxed));
        EngineStats { waiting, running, ended, passes, prompt_tokens, reused_tokens, new_tokens, put_back }
    }
}

pub(super) struct Worker<D: Kernels> {
    decoder: Decoder<D>,
    sampler: Sampler,
    commands: Receiver<Command>,
    counts: Arc<Counts>,
    pace: Pace,
    queue: Queue<Box<Job>>,
    running: Vec<Running>,
    free_rows: Vec<usize>,
    finishing: bool,
}

impl<D: Kernels> Worker<D> {
    pub(super) fn new(
        mut decoder: Decoder<D>,
        limits: Limits,
        commands: Receiver<Command>,
        counts: Arc<Counts>,
    ) -> Result<Self> {
        let rows = decoder.rows();
        (0..rows).try_for_each(|row| decoder.truncate(row, 0))?;
        let sampler = Sampler::new(Sampling::default(), decoder.model().config.vocab)?;
        let pace = Pace::new(limits.delay, decoder.pass_tokens());
        let (queue, free_rows) = (Queue::new(), (0..rows).rev().collect());
        Ok(Self { decoder, sampler, commands, counts, pace, queue, running: Vec::new(), free_rows, finishing: false })
    }

    pub(super) fn run(mut self) {
        while self.take_commands().is_continue() {
            self.step();
        }
        let left = iter::from_fn(|| self.queue.take_first());
        for mut job in left.chain(self.running.into_iter().map(|running| running.job)) {
            job.tell(Event::End(End::Cancelled));
        }
    }

    /// Admits who waits, and runs a pass.
    fn step(&mut self) {
        self.admit();
        self.take_over();
        self.make_room();
        self.pass();
    }

    /// Takes in all commands that are there, and waits for one while there is nothing else to do.
    fn take_commands(&mut self) -> ControlFlow<()> {
        loop {
            let idle = self.running.is_empty() && self.queue.len() == 0;
            if idle && self.finishing {
                return ControlFlow::Break(());
            }
            let command = match self.commands.try_recv() {
                Err(TryRecvError::Empty) if idle => self.commands.recv().ok(),
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                command => command.ok(),
            };
            match command {
                Some(Command::Submit(job)) => self.queue.put(job.request.priority, job.ticket, job),
                Some(Command::Cancel(ticket)) => self.cancel(ticket),
                Some(Command::Finish) => self.finishing = true,
                Some(Command::Drop) | None => return ControlFlow::Break(()),
            }
        }
    }

    /// Shows how many have a row; before anyone is told that one ended.
    fn count_running(&self) {
        self.counts.running.store(self.running.len(), Ordering::Relaxed);
    }

    fn cancel(&mut self, ticket: u64) {
        if let Some(mut job) = self.queue.take(ticket) {
            self.counts.leave();
            self.end(&mut job, End::Cancelled);
        } else if let Some(number) = self.running.iter().position(|running| running.job.ticket == ticket) {
            self.remove(number, End::Cancelled);
        }
    }

    /// Gives rows to those that wait, while there are some, and pages for all of their tokens.
    fn admit(&mut self) {
        while let Some(mut job) = self.queue.take_first() {
            let Some(row) = self.free_rows.pop() else { return self.put(job) };
            match self.begin(row, &job) {
                Ok(true) => {
                    self.running.push(Running { job, row });
                    self.count_running();
                    // After the other, so that it is never seen in neither.
                    self.counts.leave();
                }
                Ok(false) => {
                    self.free(row);
                    return self.put(job);
                }
                Err(error) => {
                    self.free(row);
                    self.counts.leave();
                    self.end(&mut job, End::Failed(error));
                }
            }
        }
    }

    fn put(&mut self, job: Box<Job>) {
        self.queue.put(job.request.priority, job.ticket, job);
    }

    /// Begins a job in a row that is free, unless there are too few pages for it beside those that run.
    fn begin(&mut self, row: usize, job: &Job) -> Result<bool> {
        let Self { decoder, sampler, running, counts, .. } = self;
        let held = decoder.begin(row, &job.tokens)?;
        let to_come = running.iter().map(|Running { job, row }| {
            let left = job.tokens.len() - decoder.length(*row);
            decoder.pages_for(*row, left)
        });
        let all = to_come.sum::<usize>() + decoder.pages_for(row, job.tokens.len() - held);
        if !running.is_empty() && all > decoder.free_pages() {
            return Ok(false);
        }
        counts.reused_tokens.fetch_add(held as u64, Ordering::Relaxed);
        if !job.began {
            sampler.begin_by(job.ticket as usize, &job.tokens, job.request.sampling, job.request.number)?;
        }
        Ok(true)
    }

    /// Those that waited for a page have it, if it is full by now.
    fn take_over(&mut self) {
        let Self { decoder, running, counts, .. } = self;
        for Running { job, row } in running {
            let held = decoder.length(*row);
            if held.is_multiple_of(PAGE) && job.is_prompt(held) {
                let taken = decoder.take_over(*row, &job.tokens) - held;
                counts.reused_tokens.fetch_add(taken as u64, Ordering::Relaxed);
            }
        }
    }

    /// Which of the running sequences wait for a page that another one computes.
    fn waits(&self) -> Vec<bool> {
        let next = self.running.iter().map(|Running { job, row }| {
            let held = self.decoder.length(*row);
            // Of one that is continued a page takes too many passes to be waited for.
            let page = job.is_prompt(held).then(|| self.decoder.next_page(*row, &job.tokens)).flatten()?;
            let there = held % PAGE;
            // A token at least is left to compute.
            let can_wait = there == 0 && held + PAGE < job.tokens.len();
            Some(Next { page, there, can_wait, priority: job.request.priority, ticket: job.ticket })
        });
        schedule::waits(&next.collect::<Vec<_>>())
    }

    /// Where the pages do not suffice for the next pass, sequences give up their place, and wait to be computed again.
    fn make_room(&mut self) {
        // A sequence alone has room: the cache has as many pages as a whole context takes.
        while self.running.len() > 1 {
            let (shares, _) = self.shares();
            let needed =
                iter::zip(&self.running, shares).map(|(running, share)| self.decoder.pages_for(running.row, share));
            if needed.sum::<usize>() <= self.decoder.free_pages() {
                return;
            }
            let places = self.running.iter().map(|Running { job, .. }| (job.request.priority, job.ticket));
            let last = schedule::last(places).expect("more than one runs");
            let Running { mut job, row } = self.running.remove(last);
            job.began = true;
            self.free(row);
            self.put(job);
            self.counts.waiting.fetch_add(1, Ordering::Relaxed);
            self.counts.put_back.fetch_add(1, Ordering::Relaxed);
            self.count_running();
        }
    }

    /// How many tokens of each running sequence the next pass has, 0 of some if prompts are long or wait for a page; and how many sequences
    /// are continued in it. Short shares of prompts are not those: many prompts may have a token each.
    fn shares(&self) -> (Vec<usize>, usize) {
        let left = self.running.iter().map(|Running { job, row }| {
            let left = job.tokens.len() - self.decoder.length(*row);
            (left, !job.is_prompt(self.decoder.length(*row)))
        });
        let left: Vec<_> = left.collect();
        let continued = left.iter().filter(|(_, goes_on)| *goes_on).count();
        let prompts: Vec<_> = iter::zip(&left, self.waits())
            .map(|((left, goes_on), waits)| if *goes_on || waits { 0 } else { *left })
            .collect();
        // A token for each at least, so that a long prompt moves on whatever shorter ones come.
        let pending = prompts.iter().filter(|left| **left > 0).count();
        let allowed = match self.pace.allowed(continued) {
            0 => 0,
            allowed => allowed.max(pending),
        };
        let shares = schedule::shares(&prompts, allowed);
        (iter::zip(left, shares).map(|((_, goes_on), share)| if goes_on { 1 } else { share }).collect(), continued)
    }

    /// A pass over the layers, for all that runs.
    fn pass(&mut self) {
        let (shares, continued) = self.shares();
        let batch: Vec<_> = iter::zip(&self.running, &shares)
            .filter(|(_, share)| **share > 0)
            .map(|(Running { job, row, .. }, share)| Sequence {
                row: *row,
                tokens: &job.tokens[self.decoder.length(*row)..][..*share],
            })
            .collect();
        if batch.is_empty() {
            return;
        }
        let prompts = shares.iter().sum::<usize>() - continued;
        let begun = Instant::now();
        let passed = self.decoder.forward(&batch).and_then(|()| self.choose(&shares));
        match passed {
            Ok(chosen) => {
                self.pace.note(continued, prompts, begun.elapsed());
                self.counts.passes.fetch_add(1, Ordering::Relaxed);
                self.counts.prompt_tokens.fetch_add(prompts as u64, Ordering::Relaxed);
                self.hand_out(chosen);
            }
            // Those that were not in the pass go on.
            Err(error) => (0..shares.len()).rev().filter(|number| shares[*number] > 0).for_each(|number| {
                self.remove(number, End::Failed(error.clone()));
            }),
        }
    }

    /// The next token of each running sequence whose last token was in the pass.
    fn choose(&mut self, shares: &[usize]) -> Result<Vec<Option<Result<Token>>>> {
        let Self { decoder, sampler, running, .. } = self;
        let in_pass = || iter::zip(running.iter(), shares).enumerate().filter(|(_, (_, share))| **share > 0);
        let is_complete =
            |decoder: &Decoder<D>, running: &Running| decoder.length(running.row) == running.job.tokens.len();
        let complete: Vec<bool> = running.iter().map(|running| is_complete(decoder, running)).collect();
        let mut chosen = Vec::new();
        chosen.resize_with(running.len(), || None);
        let plain =
            |running: &Running| running.job.request.sampling.is_greedy() && running.job.request.logprobs.is_none();
        if !complete.contains(&true) {
            return Ok(chosen);
        }
        if in_pass().all(|(number, (running, _))| !complete[number] || plain(running)) {
            let mut found = Vec::with_capacity(running.len());
            if decoder.most_likely(&mut found)? {
                for ((number, _), id) in iter::zip(in_pass(), found) {
                    chosen[number] = complete[number].then_some(Ok(Token { id, logprobs: None }));
                }
                return Ok(chosen);
            }
            // Of some there are no probabilities: the sampler says of which, and the others go on.
        }
        let mut rows = in_pass();
        decoder.last_logits(|logits| {
            let (number, (running, _)) = rows.next().expect("a row for each sequence of the pass");
            if complete[number] {
                chosen[number] = Some(sampler.choose(running.job.ticket as usize, logits).map(|id| {
                    let logprobs = running.job.request.logprobs.map(|top| Logprobs::of(logits, id, top));
                    Token { id, logprobs }
                }));
            }
            Ok::<_, Error>(())
        })?;
        drop(rows);
        Ok(chosen)
    }

    /// Tells of the new tokens, and ends what ends with them.
    fn hand_out(&mut self, chosen: Vec<Option<Result<Token>>>) {
        for (number, chosen) in chosen.into_iter().enumerate().rev() {
            let running = &mut self.running[number];
            let request = &running.job.request;
            let end = match chosen {
                None => None,
                Some(Err(error)) => Some(End::Failed(error)),
                Some(Ok(token)) if request.stop.contains(&token.id) => Some(End::Stop(token.id)),
                Some(Ok(token)) => {
                    running.job.new += 1;
                    running.job.tokens.push(token.id);
                    self.counts.new_tokens.fetch_add(1, Ordering::Relaxed);
                    running.job.tell(Event::Token(token));
                    let full = self.decoder.length(running.row) == self.decoder.context();
                    let most = running.job.new == running.job.request.most;
                    if most { Some(End::Most) } else { full.then_some(End::Context) }
                }
            };
            let end = if self.running[number].job.cancelled { Some(End::Cancelled) } else { end };
            if let Some(end) = end {
                self.remove(number, end);
            }
        }
    }

    /// Ends a running sequence; its row is free.
    fn remove(&mut self, number: usize, end: End) {
        let Running { mut job, row } = self.running.remove(number);
        self.count_running();
        self.free(row);
        self.end(&mut job, end);
    }

    /// The row's pages are free, and so is the row.
    fn free(&mut self, row: usize) {
        self.decoder.truncate(row, 0).expect("a row that there is, and a length that it has");
        self.free_rows.push(row);
    }

    fn end(&mut self, job: &mut Job, end: End) {
        self.sampler.forget(job.ticket as usize);
        self.counts.ended.fetch_add(1, Ordering::Relaxed);
        job.tell(Event::End(end));
    }
}

impl Logprobs {
    fn of(logits: &[f32], chosen: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
        let of = |logit: f32| (f64::from(logit - largest) - sum.ln()) as f32;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let rank = |token: &u32| (-logits[*token as usize], *token);
        let by_rank = |a: &u32, b: &u32| rank(a).0.total_cmp(&rank(b).0).then(a.cmp(b));
        let top = top.min(order.len());
        if top > 0 && top < order.len() {
            order.select_nth_unstable_by(top - 1, by_rank);
        }
        order.truncate(top);
        order.sort_unstable_by(by_rank);
        let top = order.into_iter().map(|token| (token, of(logits[token as usize]))).collect();
        Self { chosen: of(logits[chosen as usize]), top }
    }
}
