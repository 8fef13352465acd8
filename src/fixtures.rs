//! Checkpoints of random bytes, and a plain reading of them to compare with. Unit tests and integration tests share them, so
//! they know the crate by its name.
#![allow(dead_code, reason = "each test uses a part")]

use std::{collections::HashMap, fs, os::unix::fs::FileExt, path::PathBuf};

use layer_streamer::{
    Checkpoint, DType, Error, Layer, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device, TensorRef},
    packed::{self, BLOCK, Description, Encoder, Table},
};
use support::folder;

/// Files of random bytes, the table of the tensors in them, and units over those.
pub struct Fixture {
    pub folder: tempfile::TempDir,
    pub checkpoint: Checkpoint,
    pub units: Vec<Unit>,
    pub table: HashMap<String, StoredTensor>,
    /// Those that are packed.
    pub packed: HashMap<String, Description>,
}

/// A tensor to be: its type, how many elements it has, and whether they are stored packed.
type Wanted = (DType, usize, bool);

/// `units` units of BF16 tensors of these element counts, at odd offsets, dealt at random to two files.
pub fn fixture(units: usize, elements: &[usize], seed: u64) -> Fixture {
    let tensors = vec![elements.iter().map(|&count| (DType::BF16, count, false)).collect(); units];
    lay_out(&tensors, 2, &mut fastrand::Rng::with_seed(seed))
}

/// The same of packed tensors, none of which may be empty.
pub fn packed_fixture(units: usize, elements: &[usize], seed: u64) -> Fixture {
    let tensors = vec![elements.iter().map(|&count| (DType::BF16, count, true)).collect(); units];
    lay_out(&tensors, 2, &mut fastrand::Rng::with_seed(seed))
}

/// The same of plain tensors, of weights that could be packed.
pub fn weights_fixture(units: usize, elements: &[usize], seed: u64) -> Fixture {
    let fixture = fixture(units, elements, seed);
    for StoredTensor { file, offset, shape, .. } in fixture.table.values() {
        let weights = weights(shape[0], &mut fastrand::Rng::with_seed(*offset));
        let bytes: Vec<_> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        fs::OpenOptions::new().write(true).open(file).unwrap().write_all_at(&bytes, *offset).unwrap();
    }
    Fixture { checkpoint: fixture.opened_again(), ..fixture }
}

/// Units that differ, of tensors from nothing up to `most` bytes, of several types, some packed, in any order in up to three files.
pub fn random_fixture(most: usize, rng: &mut fastrand::Rng) -> Fixture {
    let types = [DType::BF16, DType::F16, DType::F32, DType::F8E4M3, DType::U8, DType::I64];
    // Of bytes some are blocks.
    let blocks = [DType::U8, DType::Q4_1, DType::Q8_0, DType::Q6_K, DType::MXFP4];
    let mut unit = || -> Vec<_> {
        let tensors = 1 + rng.usize(..6);
        (0..tensors)
            .map(|_| {
                let (dtype, scale) = (types[rng.usize(..types.len())], 1 + rng.usize(..most));
                let bytes = rng.usize(..scale.max(2));
                let dtype = if dtype == DType::U8 { blocks[bytes % blocks.len()] } else { dtype };
                let count = dtype.elements(bytes);
                (dtype, count, dtype == DType::BF16 && count > 0 && count.is_multiple_of(2))
            })
            .collect()
    };
    let units: Vec<Vec<Wanted>> = (0..9).map(|_| unit()).collect();
    let (count, files) = (1 + rng.usize(..units.len()), 1 + rng.usize(..3));
    lay_out(&units[..count], files, rng)
}

/// Random weights, most of them of a few magnitudes.
fn weights(count: usize, rng: &mut fastrand::Rng) -> Vec<u16> {
    let exponent = |rng: &mut fastrand::Rng| 0x7d - (rng.u32(..) | 1 << 30).trailing_zeros() as u16;
    (0..count).map(|_| exponent(rng) << 7 | rng.u16(..) & 0x807f).collect()
}

/// The same, packed in parts of a few blocks.
fn packed_at_random(count: usize, rng: &mut fastrand::Rng) -> (Description, Vec<u8>) {
    let weights = weights(count, rng);
    pack(&[count], BLOCK * (1 + rng.usize(..4)), &weights)
}

/// A tensor of this shape, packed in parts of so many weights.
pub fn pack(shape: &[usize], part: usize, weights: &[u16]) -> (Description, Vec<u8>) {
    let mut counts = [0; 256];
    packed::count(weights, &mut counts);
    let table = Table::new(&counts);
    let parts: Vec<_> = weights.chunks(part).map(|weights| Encoder::new(table).part(weights)).collect();
    let lengths = parts.iter().map(|part| part.len() as u32).collect();
    (Description { shape: shape.to_vec(), table, checksum: 0, part, lengths }, parts.concat())
}

/// Tensors given by type and length, unit by unit, written to files of random bytes in any order.
fn lay_out(units: &[Vec<Wanted>], files: usize, rng: &mut fastrand::Rng) -> Fixture {
    let folder = folder();
    let files: Vec<_> = (0..files).map(|file| folder.path().join(format!("{}.bin", ["a", "b", "c"][file]))).collect();
    let mut order: Vec<_> =
        (0..units.len()).flat_map(|unit| (0..units[unit].len()).map(move |index| (unit, index))).collect();
    rng.shuffle(&mut order);
    let (mut ends, mut table, mut all_packed) = (vec![0u64; files.len()], HashMap::new(), HashMap::new());
    let mut contents = Vec::new();
    for (unit, index) in order {
        let ((mut dtype, mut count, is_packed), file) = (units[unit][index], rng.usize(..files.len()));
        let offset = ends[file] + 2 * rng.u64(..40) + if rng.u8(..8) == 0 { 2 * rng.u64(..60_000) } else { 0 };
        let name = format!("{unit}.{index}");
        if is_packed {
            let (description, bytes) = packed_at_random(count, &mut fastrand::Rng::with_seed(offset));
            (dtype, count) = (DType::U8, bytes.len());
            all_packed.insert(name.clone(), description);
            contents.push((file, offset, bytes));
        }
        ends[file] = offset + dtype.bytes(count) as u64;
        table.insert(name.clone(), StoredTensor { name, file: files[file].clone(), offset, dtype, shape: vec![count] });
    }
    for (file, end) in files.iter().zip(ends) {
        let mut bytes = vec![0; end as usize];
        rng.fill(&mut bytes);
        fs::write(file, bytes).unwrap();
    }
    for (file, offset, bytes) in contents {
        fs::OpenOptions::new().write(true).open(&files[file]).unwrap().write_all_at(&bytes, offset).unwrap();
    }
    let named = |(number, tensors): (usize, &Vec<_>)| {
        let mut unit = Unit::new(format!("unit {number}"));
        (0..tensors.len()).for_each(|index| _ = unit.keep(format!("t{index}"), format!("{number}.{index}")));
        unit
    };
    let units = units.iter().enumerate().map(named).collect();
    Fixture { checkpoint: open(&table, &all_packed), folder, units, table, packed: all_packed }
}

/// In an order that the seed decides, like all else.
fn open(table: &HashMap<String, StoredTensor>, packed: &HashMap<String, Description>) -> Checkpoint {
    let mut tensors: Vec<_> = table.values().cloned().collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Checkpoint::from_table(tensors).unwrap().with_packed(packed.clone()).unwrap()
}

impl Fixture {
    /// The checkpoint of the files as they are now.
    pub fn opened_again(&self) -> Checkpoint {
        open(&self.table, &self.packed)
    }

    /// The bytes of a stored tensor, by the plainest read there is; those that were packed, if it is.
    pub fn stored(&self, name: &str) -> Vec<u8> {
        self.tensor(name).2
    }

    /// Type, shape and bytes of the same.
    pub fn tensor(&self, name: &str) -> (DType, Vec<usize>, Vec<u8>) {
        let tensor = &self.table[name];
        let bytes = tensor.dtype.bytes_of(&tensor.shape).unwrap();
        let mut stored = vec![0; bytes];
        fs::File::open(&tensor.file).unwrap().read_exact_at(&mut stored, tensor.offset).unwrap();
        let Some(description) = self.packed.get(name) else { return (tensor.dtype, tensor.shape.clone(), stored) };
        let mut weights = vec![0; description.weights()];
        description.parts().decode(&stored, &mut weights).unwrap();
        let bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        (DType::BF16, description.shape.clone(), bytes)
    }

    /// Adds a matrix of random codes, as GPTQ stores them, in a file of its own: returns its tensors, in order, and its shape.
    pub fn add_gptq(&mut self, rng: &mut fastrand::Rng) -> ([String; 3], [usize; 2]) {
        let (rows, groups) = (8 * (1 + rng.usize(..9)), 1 + rng.usize(..6));
        let (columns, name) = (32 * groups, format!("gptq {}", self.table.len()));
        let tensors = [
            ("qweight", DType::I32, [columns / 8, rows]),
            ("scales", DType::F16, [groups, rows]),
            ("qzeros", DType::I32, [groups, rows / 8]),
        ];
        let (file, mut end) = (self.file(&format!("{name}.bin")), 0);
        let names = tensors.map(|(suffix, dtype, shape)| {
            let (name, offset) = (format!("{name}.{suffix}"), end + 2 * rng.u64(..40));
            end = offset + dtype.bytes_of(&shape).unwrap() as u64;
            let tensor = StoredTensor { name: name.clone(), file: file.clone(), offset, dtype, shape: shape.into() };
            self.table.insert(name.clone(), tensor);
            name
        });
        fs::write(&file, (0..end).map(|_| rng.u8(..)).collect::<Vec<_>>()).unwrap();
        self.checkpoint = self.opened_again();
        (names, [rows, columns])
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A copy of a tensor's bytes.
pub fn bytes_of(device: &Cpu, tensor: TensorRef<'_, Cpu>) -> Vec<u8> {
    let mut bytes = vec![0; tensor.bytes()];
    let stream = device.stream().unwrap();
    // SAFETY: the vector has the tensor's length, and the copy is done when the call returns.
    unsafe { device.copy_to_host(bytes.as_mut_ptr(), tensor.ptr(), bytes.len(), &stream).unwrap() };
    bytes
}

/// Compares a layer with the files.
pub fn check(fixture: &Fixture, device: &Cpu, layer: &Layer<'_, Cpu>) {
    let unit = &fixture.units[layer.index()];
    assert_eq!(layer.name(), unit.name());
    assert_eq!(layer.tensors().count(), unit.arrivals().len());
    for arrival in unit.arrivals() {
        let tensor = layer.tensor(&arrival.output).unwrap();
        let (dtype, shape, bytes) = fixture.tensor(&arrival.inputs[0]);
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, shape.as_slice()));
        assert!(tensor.ptr().as_ptr().addr().is_multiple_of(dtype.align()));
        assert!(bytes_of(device, tensor) == bytes, "{} of {}", arrival.output, layer.name());
    }
}

/// One pass that checks every unit.
pub fn checked_pass(fixture: &Fixture, streamer: &mut LayerStreamer<Cpu>) {
    let device = Cpu;
    let stream = device.stream().unwrap();
    let mut expected = 0..fixture.units.len();
    let seen = streamer.run_pass(&stream, 0, |count, layer| {
        assert_eq!(Some(layer.index()), expected.next());
        check(fixture, &device, layer);
        Ok::<_, Error>(count + 1)
    });
    assert_eq!(seen.unwrap(), fixture.units.len());
}

/// Element counts of a unit's tensors: tiny ones between large ones.
pub const SIZES: [usize; 6] = [1, 60_000, 3, 700_000, 40, 5_000];

/// So many units ahead at each stage.
pub fn settings(n_gpu: usize, n_cpu_pinned: usize, n_cpu: usize) -> Settings {
    Settings { n_gpu, n_cpu_pinned, n_cpu, ..Settings::default() }
}

/// Rings of up to four, each handed over in batches of any size that goes.
pub fn random_rings(rng: &mut fastrand::Rng) -> Settings {
    let (n_gpu, n_cpu_pinned, n_cpu) = (1 + rng.usize(..4), rng.usize(..4), rng.usize(..4));
    Settings {
        n_gpu,
        n_cpu_pinned,
        n_cpu,
        batch_gpu: rng.usize(..=n_gpu),
        batch_cpu_pinned: rng.usize(..=n_cpu_pinned),
        batch_cpu: rng.usize(..=n_cpu),
        ..Settings::default()
    }
}
