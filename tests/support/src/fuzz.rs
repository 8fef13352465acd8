//! The driver of targets that are given random things, one after the other, and must take or refuse each. Each runs for two
//! seconds, from a seed that it prints; LAYER_STREAMER_FUZZ_SECONDS says how long, and LAYER_STREAMER_FUZZ_SEED repeats a run.

use std::{
    cell::Cell,
    env, fs,
    panic::{self, AssertUnwindSafe},
    time::{Duration, Instant},
};

thread_local! {
    /// The largest block that this thread asked for, where the program's allocator notes it.
    pub static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The largest block that a thing of so many bytes is worth: a record may be of a million units.
fn most(bytes: usize) -> usize {
    (2 << 20) + 64 * bytes
}

/// Gives `target` random numbers until the time is up. It says whether it took what it made of them; nothing may make it panic.
pub fn rounds(name: &str, target: impl FnMut(&mut fastrand::Rng) -> bool) {
    run(name, target, |_| String::new(), 1 << 18);
}

/// Gives `target` mutants of `seed`, which it takes, and of the files of that name in `tests/data/fuzz`, which it may refuse.
pub fn mutants(name: &str, seed: &[u8], mut target: impl FnMut(&[u8]) -> bool) {
    assert!(target(seed), "{name}: the seed itself is refused");
    let mut seeds = vec![seed.to_vec()];
    if let Ok(entries) = fs::read_dir(crate::data("fuzz").join(name)) {
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        seeds.extend(paths.iter().map(|path| fs::read(path).unwrap()));
    }
    // As they are, before they are changed.
    seeds.iter().for_each(|seed| _ = target(seed));
    // Half of the mutants are of the one that is right.
    let mutant = |rng: &mut fastrand::Rng| {
        let of = if rng.bool() { 0 } else { rng.usize(..seeds.len()) };
        mutated(&seeds[of], rng)
    };
    let shown = |rng: &mut fastrand::Rng| String::from_utf8_lossy(&mutant(rng)).into_owned();
    // A mutant may be a little longer.
    let longest = 1000 + seeds.iter().map(Vec::len).max().unwrap_or(0);
    run(name, |rng| target(&mutant(rng)), shown, longest);
}

/// `bytes` is how long the things are.
fn run(
    name: &str,
    mut target: impl FnMut(&mut fastrand::Rng) -> bool,
    shown: impl Fn(&mut fastrand::Rng) -> String,
    bytes: usize,
) {
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    let time = Duration::from_secs_f64(number("LAYER_STREAMER_FUZZ_SECONDS").unwrap_or(2.0));
    let first = number("LAYER_STREAMER_FUZZ_SEED").map_or_else(|| fastrand::u64(..1 << 50), |seed| seed as u64);
    println!("{name}: from seed {first}");
    let (start, mut tried, mut taken) = (Instant::now(), 0, 0);
    while start.elapsed() < time {
        let number = first + tried;
        let rng = || fastrand::Rng::with_seed(number);
        LARGEST.set(0);
        match panic::catch_unwind(AssertUnwindSafe(|| target(&mut rng()))) {
            Ok(took) => taken += u64::from(took),
            Err(_) => panic!("{name}, LAYER_STREAMER_FUZZ_SEED={number}: {}", shown(&mut rng())),
        }
        let largest = LARGEST.get();
        assert!(largest < most(bytes), "{name}, LAYER_STREAMER_FUZZ_SEED={number}: a block of {largest} bytes");
        tried += 1;
    }
    println!("{name}: {tried} tried, {taken} taken, {} refused", tried - taken);
    assert!(tried > 0);
}

/// What numbers and names are turned into.
const WORDS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "18446744073709551615",
    "18446744073709551616",
    "4294967295",
    "1e308",
    "-0.0",
    "0.1",
    "null",
    "[]",
    "{}",
    "\"\"",
    "true",
    "\"F32\"",
    "\"F8_E8M0\"",
    "[0,0]",
    "\"..\"",
];

/// Changes some of the bytes.
fn mutated(bytes: &[u8], rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(..=bytes.len());
        let end = (at + rng.usize(..40)).min(bytes.len());
        match rng.u8(..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(..8),
            1 if at < bytes.len() => bytes[at] = rng.u8(..),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            4 => {
                // A number, or whatever stands there, becomes another word.
                let digit = |byte: &u8| byte.is_ascii_digit();
                let from = bytes[at..].iter().position(digit).map_or(at, |position| at + position);
                let to =
                    bytes[from..].iter().position(|byte| !digit(byte)).map_or(bytes.len(), |position| from + position);
                bytes.splice(from..to, rng.choice(WORDS).expect("there are words").bytes());
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// A number: most often a small one, sometimes one at the edge of what there is.
pub fn number(rng: &mut fastrand::Rng) -> usize {
    match rng.u8(..8) {
        0 => 0,
        1..5 => rng.usize(..8),
        5 => rng.usize(..) >> rng.u32(..64),
        6 => (1usize << rng.u32(..64)).wrapping_add(rng.usize(..3)).wrapping_sub(1),
        _ => usize::MAX - rng.usize(..3),
    }
}
