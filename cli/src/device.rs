//! `--device`, as this program and the benchmarks take it.

use std::str::FromStr;

use layer_streamer::{
    Result,
    device::{Cpu, Cuda},
};

/// What the command line asks for.
#[derive(Clone, Copy)]
pub enum Wanted {
    Cpu,
    Cuda(u32),
}

impl FromStr for Wanted {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| "cuda:N takes a number"),
            _ => Err("it is cpu, cuda or cuda:N"),
        }
    }
}

/// A device that is ready.
pub enum Chosen {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

/// The device asked for; else the first GPU, and where it is of no use the CPU, with a line on stderr that says why.
pub fn choose(wanted: Option<Wanted>) -> Result<Chosen> {
    match wanted {
        Some(Wanted::Cpu) => Ok(Chosen::Cpu(Cpu)),
        #[cfg(feature = "cuda")]
        Some(Wanted::Cuda(ordinal)) => Ok(Chosen::Cuda(Cuda::new(ordinal)?)),
        #[cfg(not(feature = "cuda"))]
        Some(Wanted::Cuda(ordinal)) => match Cuda::new(ordinal)? {},
        #[cfg(feature = "cuda")]
        None => Ok(Cuda::new(0).map(Chosen::Cuda).unwrap_or_else(|why| {
            use std::io::Write;
            // Stderr may be closed: no reason to stop.
            let _ = writeln!(std::io::stderr(), "on the CPU: {why}");
            Chosen::Cpu(Cpu)
        })),
        #[cfg(not(feature = "cuda"))]
        None => Ok(Chosen::Cpu(Cpu)),
    }
}
