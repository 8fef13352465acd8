//! Work on pieces of a tensor by all processors, whose results are taken in order.

use std::{
    io,
    sync::{
        Mutex,
        mpsc::{self, Receiver},
    },
    thread,
};

use super::{Failure, Interrupted};
use crate::interrupt;

/// What one piece needs. It is used again for another, so that memory is reserved once.
#[derive(Default)]
pub struct Buffer {
    pub bytes: Vec<u8>,
    pub weights: Vec<u16>,
}

/// Threads, and the buffers that are not in use.
pub struct Team {
    threads: usize,
    spare: Mutex<Vec<Buffer>>,
}

impl Team {
    /// As many threads as there are processors for this process.
    pub fn new() -> Self {
        Self { threads: thread::available_parallelism().map_or(1, usize::from), spare: Mutex::default() }
    }

    /// Does `work` on each piece, and hands it to `take`, the first piece first. No more than two buffers for each thread are in
    /// use at any time. The first error of the pieces' order
    /// ends it, and so does Ctrl-C.
    pub fn in_order(
        &self,
        pieces: usize,
        work: impl Fn(usize, &mut Buffer) -> Result<(), Failure> + Sync,
        mut take: impl FnMut(usize, &mut Buffer) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let workers = self.threads.min(pieces);
        let done = |piece| {
            let mut buffer = self.spare.lock().expect("no thread panics with it").pop().unwrap_or_default();
            work(piece, &mut buffer).map(|()| buffer)
        };
        let mut take = |piece, mut buffer: Buffer| {
            if interrupt::is_noted() {
                return Err(Interrupted.into());
            }
            take(piece, &mut buffer)?;
            self.spare.lock().expect("no thread panics with it").push(buffer);
            Ok(())
        };
        if workers < 2 {
            return (0..pieces).try_for_each(|piece| take(piece, done(piece)?));
        }
        thread::scope(|scope| {
            // Each thread takes every so many-th piece, and is at most one ahead of what was taken.
            let start = |first: usize| -> io::Result<Receiver<Result<Buffer, Failure>>> {
                let (sender, results) = mpsc::sync_channel(1);
                let done = &done;
                let work = move || {
                    for piece in (first..pieces).step_by(workers) {
                        let result = done(piece);
                        let is_last = result.is_err();
                        if sender.send(result).is_err() || is_last {
                            break;
                        }
                    }
                };
                thread::Builder::new().name("piece".into()).spawn_scoped(scope, work)?;
                Ok(results)
            };
            let results = (0..workers).map(start).collect::<io::Result<Vec<_>>>();
            let results = results.map_err(|error| {
                format!("cannot start {workers} threads: {error}; raise the limit on processes (ulimit -u)")
            })?;
            for piece in 0..pieces {
                let done = results[piece % workers].recv().map_err(|_| "a thread panicked")?;
                take(piece, done?)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[test]
    fn pieces_come_in_order_and_no_more_than_two_for_each_thread_are_in_memory() {
        let team = Team { threads: 3, spare: Mutex::default() };
        let (begun, mut taken) = (AtomicUsize::new(0), 0);
        let work = |piece: usize, buffer: &mut Buffer| {
            begun.fetch_add(1, SeqCst);
            buffer.bytes = vec![piece as u8];
            Ok(())
        };
        let take = |piece: usize, buffer: &mut Buffer| {
            assert_eq!((piece, &buffer.bytes), (taken, &vec![piece as u8]));
            taken += 1;
            if piece == 50 {
                thread::sleep(std::time::Duration::from_millis(50));
                // Each thread has one in hand and one on its way.
                assert!(begun.load(SeqCst) <= taken + 2 * 3, "{begun:?}");
            }
            Ok(())
        };
        team.in_order(100, work, take).unwrap();
        assert_eq!(taken, 100);
        assert!(team.spare.lock().unwrap().len() <= 2 * 3 + 1);
    }

    #[test]
    fn the_first_error_in_order_ends_it() {
        let team = Team { threads: 4, spare: Mutex::default() };
        let work = |piece: usize, _: &mut Buffer| if piece % 10 == 7 { Err(format!("{piece}").into()) } else { Ok(()) };
        let mut taken = 0;
        let take = |_, _: &mut Buffer| {
            taken += 1;
            Ok(())
        };
        let error = team.in_order(1000, work, take).unwrap_err();
        assert_eq!((error.to_string().as_str(), taken), ("7", 7));
        let error = team.in_order(1000, |_, _| Ok(()), |piece, _| if piece == 3 { Err("3".into()) } else { Ok(()) });
        assert_eq!(error.unwrap_err().to_string(), "3");
    }
}
