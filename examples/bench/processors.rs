//! What this machine's processors can do at most, measured: read memory, and multiply and add.

use std::{
    hint::black_box,
    thread,
    time::{Duration, Instant},
};

/// More memory than any cache has, yet read through in a few milliseconds.
const WORDS: usize = 16 << 20;

/// How long each limit is measured.
const WINDOW: Duration = Duration::from_millis(10);

/// Of all processors together.
#[derive(Clone, Copy)]
pub struct Limits {
    pub read_gb_s: f64,
    pub tflop_s: f64,
}

pub struct Processors {
    threads: usize,
    memory: Vec<u64>,
}

impl Processors {
    pub fn new() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Self { threads, memory: (0..WORDS as u64).collect() }
    }

    pub fn measure(&self) -> Limits {
        let share = self.memory.len().div_ceil(self.threads);
        let parts: Vec<_> = self.memory.chunks(share).collect();
        let read = self.rate(|thread| {
            black_box(xor(parts[thread]));
            parts[thread].len() as f64 * 8.0
        });
        Limits { read_gb_s: read / 1e9, tflop_s: self.rate(|_| multiply_and_add()) / 1e12 }
    }

    /// What all threads do in a second, of which `work` does and returns some.
    fn rate(&self, work: impl Fn(usize) -> f64 + Sync) -> f64 {
        let one = |thread: usize| {
            let (start, mut done) = (Instant::now(), 0.0);
            while start.elapsed() < WINDOW {
                done += work(thread);
            }
            done / start.elapsed().as_secs_f64()
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads).map(|thread| scope.spawn(move || one(thread))).collect();
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).sum()
        })
    }
}

fn xor(words: &[u64]) -> u64 {
    let (lanes, _) = words.as_chunks::<32>();
    let mut sums = [0; 32];
    for lanes in lanes {
        sums.iter_mut().zip(lanes).for_each(|(sum, lane)| *sum ^= lane);
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

/// Some multiplications and additions with the widest instructions there are; returns how many of both.
fn multiply_and_add() -> f64 {
    const ROUNDS: usize = 100_000;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;

        macro_rules! rounds {
            ($name:ident, $feature:literal, $set:ident, $fma:ident) => {
                #[target_feature(enable = $feature)]
                fn $name() {
                    // As many chains as hide how long one takes.
                    let mut sums = [$set(black_box(0.5)); 12];
                    let (factor, more) = ($set(black_box(0.999)), $set(black_box(0.001)));
                    for _ in 0..ROUNDS {
                        sums.iter_mut().for_each(|sum| *sum = $fma(*sum, factor, more));
                    }
                    black_box(sums);
                }
            };
        }
        rounds!(wide, "avx512f", _mm512_set1_ps, _mm512_fmadd_ps);
        rounds!(narrow, "avx2,fma", _mm256_set1_ps, _mm256_fmadd_ps);
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has the instructions.
            unsafe { wide() };
            return (ROUNDS * 12 * 16 * 2) as f64;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the machine has the instructions.
            unsafe { narrow() };
            return (ROUNDS * 12 * 8 * 2) as f64;
        }
    }
    let mut sums = [[black_box(0.5f32); 8]; 8];
    let (factor, more) = (black_box(0.999), black_box(0.001));
    for _ in 0..ROUNDS {
        sums.iter_mut().flatten().for_each(|sum| *sum = *sum * factor + more);
    }
    black_box(sums);
    (ROUNDS * 64 * 2) as f64
}
