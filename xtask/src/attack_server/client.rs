//! What clients do, who behave or not.

use std::{
    io::{self, Read, Write},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::server::client::{Client, post};

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asks, and reads the answer.
    Whole,
    /// The same as a stream.
    Stream,
    /// Goes away in the middle of a stream.
    HangsUp,
    /// Goes away while it waits for a whole answer.
    Impatient,
    /// Asks for much, and reads nothing of it.
    StopsReading,
    /// Sends half of a request, and waits.
    Half,
    /// Sends what is no HTTP.
    Garbage,
    /// Sends HTTP that asks for nothing that there is.
    Nonsense,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Whole,
        Self::Stream,
        Self::HangsUp,
        Self::Impatient,
        Self::StopsReading,
        Self::Half,
        Self::Garbage,
        Self::Nonsense,
    ];

    pub fn behaved(random: &mut Random) -> Self {
        Self::ALL[random.below(2) as usize]
    }

    pub fn misbehaved(random: &mut Random) -> Self {
        Self::ALL[2 + random.below(6) as usize]
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Stream => "streams",
            Self::HangsUp => "hung up",
            Self::Impatient => "did not wait",
            Self::StopsReading => "stopped reading",
            Self::Half => "sent half",
            Self::Garbage => "sent garbage",
            Self::Nonsense => "asked nonsense",
        }
    }
}

/// Random numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % most
    }
}

/// The most new tokens of request `number`; as many as it has, since the model never ends an answer.
pub fn tokens(number: u64) -> u64 {
    4 + number % 29
}

/// What request `number` asks for: greedily, or drawn.
pub fn request(number: u64) -> Value {
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 1.2 };
    json!({ "prompt": format!("{}=", 37 * number + 5), "temperature": temperature, "seed": number, "max_tokens": tokens(number) })
}

/// Does what nobody should, and goes.
pub fn misbehave(client: &Client, kind: Kind, random: &mut Random) -> io::Result<()> {
    let mut stream = client.connect()?;
    let much = |stream: bool| {
        post(&json!({ "prompt": "4096=", "max_tokens": 4000, "stream": stream, "logprobs": 5 }).to_string())
    };
    let wait = Duration::from_millis(random.below(400));
    match kind {
        Kind::Whole | Kind::Stream => {}
        Kind::HangsUp => {
            stream.write_all(much(true).as_bytes())?;
            let mut some = vec![0; random.below(5000) as usize];
            stream.read_exact(&mut some)?;
        }
        Kind::Impatient => {
            stream.write_all(much(false).as_bytes())?;
            thread::sleep(wait);
        }
        Kind::StopsReading => {
            stream.write_all(much(true).as_bytes())?;
            // Some stay beyond the server's patience.
            thread::sleep(wait * 8);
        }
        Kind::Half => {
            let whole = much(true);
            stream.write_all(&whole.as_bytes()[..random.below(whole.len() as u64) as usize])?;
            thread::sleep(wait * 8);
        }
        Kind::Garbage => {
            let garbage: Vec<u8> = (0..random.below(3000)).map(|_| random.below(256) as u8).collect();
            stream.write_all(&garbage)?;
            thread::sleep(wait / 4);
        }
        Kind::Nonsense => {
            let bodies = [
                r#"{"prompt": 5}"#,
                r#"{"prompt": [[[[]]]]}"#,
                "{",
                "",
                r#"{"prompt": "x", "n": 1e99}"#,
                r#"{"messages": [{}]}"#,
                r#"{"prompt": [9999999]}"#,
                r#"{"prompt": "x", "odd": null, "stop": [""]}"#,
            ];
            stream.write_all(post(bodies[random.below(bodies.len() as u64) as usize]).as_bytes())?;
            stream.read_to_end(&mut Vec::new())?;
        }
    }
    Ok(())
}
