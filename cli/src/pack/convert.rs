//! One file: its tensors are packed or unpacked, written, and read back.

use std::{
    fs::{self, File},
    hash::Hasher,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
};

use indicatif::ProgressBar;
use layer_streamer::packed::{Description, Encoder, PART, Packed, Table, count};
use twox_hash::XxHash3_64;

use super::{
    Failure, Interrupted, cannot,
    header::{AGAIN, Header, Tensor},
    journal::{Begun, Journal, State, Written},
    out::{self, Out},
    team::{Buffer, Team},
};

/// Bytes of a piece of what is not packed: as many as a part of BF16 weights has.
const PIECE: u64 = 2 * PART as u64;

/// What to do about damaged files that were written here; those that are read are to be taken [`AGAIN`].
const WRITTEN: &str = "the disk does not give back what was written; run the same command again, or name another disk";

/// Converts files from one folder to another.
pub struct Converter<'a> {
    pub from: &'a Path,
    pub to: &'a Path,
    /// To packed ones; else to those that were packed.
    pub packing: bool,
    pub team: &'a Team,
    pub bar: &'a ProgressBar,
}

impl Converter<'_> {
    /// Makes sure that a file is written, whole and right. Goes on where an earlier process ended. Returns its tensors before and
    /// after.
    ///
    /// # Errors
    /// Where a file cannot be read or written, has changed meanwhile, or does not hold what was written. Then none has its name.
    pub fn file(&self, name: &Path, journal: &mut Journal) -> Result<(Vec<Tensor>, Vec<Tensor>), Failure> {
        let path = self.from.join(name);
        let source = File::open(&path).map_err(cannot("open", &path))?;
        let state = State::of(&source, &path)?;
        let from = Reader { file: &source, path: &path, team: self.team, remedy: AGAIN };
        let header = Header::read(&source, &path)?;
        let (whole, partial) = (self.to.join(name), partial_of(&self.to.join(name)));
        let data = header.most_bytes(self.packing).map_err(|error| format!("{}: {error}", path.display()))?;
        let begun = self.begun(name, &header, data, state, journal)?;
        if whole.exists() {
            self.bar.inc(header.tensors.iter().map(Tensor::bytes).sum());
            let checksums: Vec<_> = begun.tensors.iter().map(|written| written.checksum).collect();
            return Ok((header.tensors, self.read_back(name, &whole, &checksums)?));
        }
        self.say(if self.packing { "packing" } else { "unpacking" }, name);
        whole.parent().map_or(Ok(()), fs::create_dir_all).map_err(cannot("create the folder of", &whole))?;
        let checksums = self.write(name, from, &header, (data, begun), journal)?;
        if State::of(&source, &path)? != state {
            let _ = fs::remove_file(&partial);
            return Err(format!("{} changed while it was read; run the same command again", path.display()).into());
        }
        let tensors = self.read_back(name, &partial, &checksums)?;
        fs::rename(&partial, &whole).map_err(cannot("rename", &partial))?;
        Ok((header.tensors, tensors))
    }

    /// Writes what is missing of a file whose tensors begin at `data`. Returns all checksums.
    fn write(
        &self,
        name: &Path,
        from: Reader<'_>,
        header: &Header,
        (data, begun): (u64, Begun),
        journal: &mut Journal,
    ) -> Result<Vec<u64>, Failure> {
        let partial = partial_of(&self.to.join(name));
        let mut tensors = Vec::with_capacity(header.tensors.len());
        let mut at = data;
        for (written, tensor) in begun.tensors.iter().zip(&header.tensors) {
            let (packed, checksum) = (written.packed()?, Some(written.checksum));
            tensors.push(Tensor { start: at, end: at + written.stored, packed, checksum, ..tensor.clone() });
            at += written.stored;
            self.bar.inc(tensor.bytes());
        }
        let out = Out::open(&partial, at).map_err(cannot("create", &partial))?;
        let mut to = Writer { out, path: &partial };
        let mut noted = tensors.len();
        let mut note = |tensors: &[Tensor], until: u64| {
            while let Some(tensor) = tensors.get(noted).filter(|tensor| tensor.end <= until) {
                let checksum = tensor.checksum.unwrap_or_default();
                journal.note(name, Written::new(&tensor.name, checksum, tensor.stored(), tensor.packed.as_ref()))?;
                noted += 1;
            }
            Ok::<_, Failure>(())
        };
        for tensor in &header.tensors[tensors.len()..] {
            if let Some(next) = header.tensors.get(tensors.len() + 1) {
                from.read_ahead(next);
            }
            tensors.push(match tensor.can_be_packed() && self.packing {
                true => self.pack(from, tensor, &mut to)?,
                false => self.copy(from, tensor, &mut to)?,
            });
            // What is on its way would be lost with the process.
            note(&tensors, to.out.written())?;
        }
        let file = to.out.wait().map_err(cannot("write", &partial))?;
        note(&tensors, u64::MAX)?;
        let checksums = tensors.iter().map(|tensor| tensor.checksum.unwrap_or_default()).collect();
        let header = Header { tensors, metadata: header.metadata.clone() };
        let bytes = header.to_bytes()?;
        let end = header.tensors.last().map_or(bytes.len() as u64, |last| last.end);
        out::finish(&file, &bytes, end).map_err(cannot("write", &partial))?;
        Ok(checksums)
    }

    /// What is there of a file whose tensors begin at `data`. Where that is of no use the file is begun anew.
    fn begun(
        &self,
        name: &Path,
        header: &Header,
        data: u64,
        state: State,
        journal: &mut Journal,
    ) -> Result<Begun, Failure> {
        let (whole, partial) = (self.to.join(name), partial_of(&self.to.join(name)));
        if let Some(begun) = journal.begun(name) {
            let length = fs::metadata(&partial).map_or(0, |metadata| metadata.len());
            let written = data + begun.tensors.iter().map(|written| written.stored).sum::<u64>();
            if begun.state != state {
                let source = self.from.join(name);
                say!("{} has changed since {} was begun: it is written anew", source.display(), whole.display());
            } else if (whole.exists() || length >= written)
                && begun.suits(header.tensors.iter().map(|tensor| &tensor.name))
            {
                return Ok(begun.clone());
            }
        }
        for path in [&whole, &partial] {
            if path.exists() {
                fs::remove_file(path).map_err(cannot("remove", path))?;
            }
        }
        journal.begin(name, state)?;
        Ok(Begun { state, tensors: Vec::new() })
    }

    /// Writes a tensor packed, if that makes it smaller.
    fn pack(&self, from: Reader<'_>, tensor: &Tensor, to: &mut Writer<'_>) -> Result<Tensor, Failure> {
        let part = Description::part_of(&tensor.shape);
        let parts = tensor.stored().div_ceil(2 * part as u64) as usize;
        let read = |piece, buffer: &mut Buffer| from.weights(tensor, piece, part, &mut buffer.weights);
        let (counts, mut hash) = (Mutex::new([0; 256]), XxHash3_64::new());
        let counted = |piece, buffer: &mut Buffer| {
            read(piece, buffer)?;
            count(&buffer.weights, &mut counts.lock().expect("no thread panics with it"));
            Ok(())
        };
        self.team.in_order(parts, counted, |_, buffer| {
            hash.write(bytemuck::cast_slice(&buffer.weights));
            Ok(())
        })?;
        let (counts, checksum) = (counts.into_inner().expect("no thread panicked"), hash.finish());
        let table = Table::new(&counts);
        let encoder = Encoder::new(table);
        if encoder.most_bytes(&counts, parts) >= tensor.stored() {
            return self.copy(from, &Tensor { checksum: Some(checksum), ..tensor.clone() }, to);
        }
        let (start, mut lengths) = (to.out.at(), Vec::with_capacity(parts));
        let encoded = |piece, buffer: &mut Buffer| {
            read(piece, buffer)?;
            buffer.bytes.clear();
            encoder.append(&buffer.weights, &mut buffer.bytes);
            Ok(())
        };
        self.team.in_order(parts, encoded, |_, buffer| {
            lengths.push(buffer.bytes.len() as u32);
            self.bar.inc(2 * buffer.weights.len() as u64);
            to.write(&buffer.bytes)
        })?;
        let packed = Some(Description { shape: tensor.shape.clone(), table, checksum, part, lengths });
        Ok(Tensor { start, end: to.out.at(), packed, checksum: Some(checksum), ..tensor.clone() })
    }

    /// Writes a tensor as it is when it is not packed.
    fn copy(&self, from: Reader<'_>, tensor: &Tensor, to: &mut Writer<'_>) -> Result<Tensor, Failure> {
        let start = to.out.at();
        let checksum = from.checked(tensor, tensor.checksum, |bytes| {
            self.bar.inc(bytes.len() as u64);
            to.write(bytes)
        })?;
        Ok(Tensor { start, end: to.out.at(), packed: None, checksum: Some(checksum), ..tensor.clone() })
    }

    /// Compares what was written with these checksums. What is wrong is removed, so that the next process begins it anew.
    fn read_back(&self, name: &Path, path: &Path, checksums: &[u64]) -> Result<Vec<Tensor>, Failure> {
        self.say("verifying", name);
        verify(path, Some(checksums), self.team, self.bar).inspect_err(|error| {
            if !error.is::<Interrupted>() {
                let _ = fs::remove_file(path);
            }
        })
    }

    fn say(&self, what: &'static str, name: &Path) {
        self.bar.set_message(format!("{what} {}", name.display()));
    }
}

/// Where a file lies until it is whole.
pub fn partial_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Reads a file's tensors and compares them with these checksums, which are in the order of their bytes, and with those that the file
/// has of them. Returns the tensors.
pub fn verify(path: &Path, checksums: Option<&[u64]>, team: &Team, bar: &ProgressBar) -> Result<Vec<Tensor>, Failure> {
    let file = File::open(path).map_err(cannot("open", path))?;
    let tensors = Header::read(&file, path)?.tensors;
    if checksums.is_some_and(|checksums| checksums.len() != tensors.len()) {
        return Err(
            format!("{}: has other tensors than were written; run the same command again", path.display()).into()
        );
    }
    let remedy = if checksums.is_some() { WRITTEN } else { AGAIN };
    let from = Reader { file: &file, path, team, remedy };
    for (number, tensor) in tensors.iter().enumerate() {
        let expected = checksums.map(|checksums| checksums[number]).or(tensor.checksum);
        from.checked(tensor, expected, |bytes| {
            bar.inc(bytes.len() as u64);
            Ok(())
        })?;
    }
    Ok(tensors)
}

/// A file to read tensors from.
#[derive(Clone, Copy)]
struct Reader<'a> {
    file: &'a File,
    path: &'a Path,
    team: &'a Team,
    /// What to do about a damaged tensor.
    remedy: &'static str,
}

impl Reader<'_> {
    /// Has the system read a tensor meanwhile, which will be wanted next: disks read and write at a time. Without it that takes longer.
    fn read_ahead(&self, tensor: &Tensor) {
        let (Ok(file), start, bytes) = (self.file.try_clone(), tensor.start as i64, tensor.stored() as i64) else {
            return;
        };
        let ask = move || {
            // SAFETY: the descriptor is open; the call takes numbers, and touches no memory of this process.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), start, bytes, libc::POSIX_FADV_WILLNEED) };
        };
        // The call waits where the disk has much to do.
        let _ = thread::Builder::new().name("read ahead".into()).spawn(ask);
    }

    /// Hands a tensor's bytes to `take`, as they are when it is not packed, and compares them with their checksum, which it returns.
    fn checked(
        &self,
        tensor: &Tensor,
        expected: Option<u64>,
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<u64, Failure> {
        let mut hash = XxHash3_64::new();
        let mut take = |bytes: &[u8]| {
            hash.write(bytes);
            take(bytes)
        };
        match &tensor.packed {
            None => {
                let pieces = tensor.stored().div_ceil(PIECE) as usize;
                let read = |piece: usize, buffer: &mut Buffer| {
                    let start = tensor.start + piece as u64 * PIECE;
                    buffer.bytes.resize(PIECE.min(tensor.end - start) as usize, 0);
                    self.read(&mut buffer.bytes, start)
                };
                self.team.in_order(pieces, read, |_, buffer| take(&buffer.bytes))?;
            }
            Some(packed) => {
                let mut at = tensor.start;
                let starts: Vec<_> = packed.lengths.iter().map(|&length| (at, at += u64::from(length)).0).collect();
                let decode = |piece: usize, buffer: &mut Buffer| {
                    buffer.bytes.resize(packed.lengths[piece] as usize, 0);
                    self.read(&mut buffer.bytes, starts[piece])?;
                    buffer.weights.resize(packed.part.min(packed.weights() - piece * packed.part), 0);
                    let part = Packed::new(packed.table, buffer.weights.len(), &buffer.bytes);
                    let decoded = part.and_then(|part| part.decode(&mut buffer.weights));
                    decoded.map_err(|corrupt| self.damaged(tensor, format_args!("part {piece}, {corrupt}")))
                };
                let take = |_, buffer: &mut Buffer| take(bytemuck::cast_slice(&buffer.weights));
                self.team.in_order(starts.len(), decode, take)?;
            }
        }
        let checksum = hash.finish();
        match expected.filter(|expected| *expected != checksum) {
            Some(other) => Err(self.damaged(tensor, format_args!("its checksum is {checksum:016x}, not {other:016x}"))),
            None => Ok(checksum),
        }
    }

    /// The weights of a part of a tensor that is not packed.
    fn weights(&self, tensor: &Tensor, piece: usize, part: usize, weights: &mut Vec<u16>) -> Result<(), Failure> {
        let start = piece * part;
        weights.resize(part.min(tensor.stored() as usize / 2 - start), 0);
        self.read(bytemuck::cast_slice_mut(weights), tensor.start + 2 * start as u64)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), Failure> {
        self.file.read_exact_at(bytes, at).map_err(cannot("read", self.path))
    }

    fn damaged(&self, tensor: &Tensor, how: std::fmt::Arguments<'_>) -> Failure {
        let (path, name) = (self.path.display(), &tensor.name);
        format!("{path}: tensor {name} is damaged: {how}; {}", self.remedy).into()
    }
}

/// The file that is written.
struct Writer<'a> {
    out: Out,
    path: &'a Path,
}

impl Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.out.write(bytes).map_err(cannot("write", self.path))
    }
}
