//! Tensors that are loaded once and stay on the device: embeddings, the final norm, the output head.

use std::{
    collections::VecDeque,
    slice,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    arena::Arena,
    checkpoint::Checkpoint,
    device::{Device, DevicePtr, TensorRef},
    error::{Error, Result},
    io::{self, CHUNK, Engine, Source},
    layout::{Extent, Staging, UnitLayout},
    pipeline::{arrival::Arrival, compute::view},
    plan::{Reader, Settings, Unit},
    sync::Signal,
};

/// Blocks through which static tensors pass on their way to the device.
pub(super) const BLOCKS: usize = 8;

/// Tensors in device memory, freed when this is dropped.
pub struct StaticTensors<D: Device> {
    device: D,
    memory: D::Memory,
    plan: UnitLayout,
}

impl<D: Device> StaticTensors<D> {
    /// Loads the tensors of `unit` for a streamer that is yet to be made, while nothing else reads; else as
    /// [`load_static_unit`](super::LayerStreamer::load_static_unit). It waits for the disk as long as that takes.
    ///
    /// # Errors
    /// As there.
    pub fn new(device: &D, checkpoint: &Checkpoint, unit: &Unit, settings: &Settings) -> Result<Self> {
        device.bind_thread()?;
        let sources = io::open_all(checkpoint, settings.cache)?;
        Self::load(device, &sources, settings.reader, UnitLayout::new(checkpoint, unit)?, &mut |_, _| Ok(()))
    }

    /// Reads the tensors of `plan` chunk by chunk, so that host memory stays small however large they are. `idle` is called again
    /// and again while it waits, with the file that it waits for and since when.
    pub(super) fn load(
        device: &D,
        sources: &Arc<[Source]>,
        backend: Reader,
        plan: UnitLayout,
        idle: &mut dyn FnMut(usize, Duration) -> Result<()>,
    ) -> Result<Self> {
        let memory = device.allocate("static tensors", plan.device_bytes)?;
        let base = device.address(&memory);
        let signal = Signal::new();
        let blocks = Arena::new("static tensors on their way", BLOCKS, CHUNK)?;
        // Registering a few blocks for one use would cost more than it saves; and what went when the streamer started may not
        // go now, for want of a descriptor.
        let backend = if backend == Reader::Pread { backend } else { Reader::Auto };
        // A chunk comes at a time.
        let staging = Staging::of(slice::from_ref(&plan)).at_most(CHUNK);
        let mut arrival = Arrival::new(device, staging, c"layer-streamer statics")?;
        // SAFETY: there are no registered buffers.
        let (mut engine, ..) = unsafe { Engine::new(backend, sources, &[], &signal) }?;
        let loaded = fill(sources, &plan, &mut arrival, base, &blocks, &mut engine, &signal, idle);
        if let Err(error) = loaded {
            // Reads and copies that are under way end here, or what they use is left to them.
            let (reads_end, copies_end) = (engine.quiesce(), arrival.drain().is_ok());
            if !(reads_end && copies_end) {
                std::mem::forget(blocks);
            }
            if !copies_end {
                std::mem::forget((memory, arrival));
            }
            return Err(error);
        }
        Ok(Self { device: device.clone(), memory, plan })
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_, D>> {
        let index = self.plan.find(name)?;
        // SAFETY: the plan placed the tensor, aligned, inside the memory, which lives as long as this.
        unsafe { view(self.device.address(&self.memory), &self.plan.tensors[index]) }
    }

    /// Device memory taken, in bytes.
    pub fn bytes(&self) -> usize {
        self.plan.device_bytes
    }
}

/// Reads everything that `plan` names, chunk by chunk, and has it arrive where it belongs from `base` on.
#[allow(clippy::too_many_arguments, reason = "the body of one function, apart so that its errors meet in one place")]
fn fill<D: Device>(
    sources: &Arc<[Source]>,
    plan: &UnitLayout,
    arrival: &mut Arrival<D>,
    base: DevicePtr,
    blocks: &Arena,
    engine: &mut Engine,
    signal: &Signal,
    idle: &mut dyn FnMut(usize, Duration) -> Result<()>,
) -> Result<()> {
    let failed = |error| Error::io("read with io_uring from", &sources[0].path)(error);
    // Chunks may finish in any order; a block is not used again before it was copied.
    let mut parts = plan.extents.iter().flat_map(|extent| extent.overlapping_parts(CHUNK));
    let mut waiting = VecDeque::with_capacity(BLOCKS);
    let (mut number, mut free): (usize, Vec<usize>) = (0, (0..BLOCKS).collect());
    let (mut failure, mut last) = (None, Instant::now());
    loop {
        let ticket = signal.ticket();
        while failure.is_none() && engine.has_room() && !free.is_empty() {
            let Some((part, window)) = parts.next() else { break };
            let block = free.pop().expect("checked above");
            // The block stands for the part of the slot that is read into it.
            let part = Extent { at: 0, ..part };
            // SAFETY: the block holds one chunk, and is not handed out again before this one was copied.
            unsafe {
                let to = blocks.slot(block).as_ptr();
                engine.submit(io::chunk_at(&sources[part.file], &part, 0, to, number));
            }
            waiting.push_back((number, part.file, block, window));
            number += 1;
        }
        let Some(&(_, first, ..)) = waiting.front() else { break };
        engine.flush().map_err(failed)?;
        let Some(done) = engine.completion() else {
            engine.wait(signal, ticket).map_err(failed)?;
            idle(first, last.elapsed())?;
            continue;
        };
        last = Instant::now();
        let index = waiting.iter().position(|(number, ..)| *number == done.tag).expect("it was submitted");
        let (_, _, block, window) = waiting.remove(index).expect("found above");
        free.push(block);
        match done.result {
            Err(error) => failure = failure.or(Some((done.file, error))),
            Ok(_) if failure.is_some() => {}
            Ok(_) => {
                // SAFETY: the chunk holds the window, and a page more, in which its last element ends; the block and the memory
                // stay until all is drained.
                unsafe { arrival.enqueue(plan, window, blocks.slot(block).as_ptr(), base)? };
                arrival.drain()?;
            }
        }
    }
    if let Some((file, failure)) = failure {
        return Err(Error::Read {
            unit: plan.name.clone(),
            tensor: plan.tensor_at(file, failure.offset).to_owned(),
            path: sources[file].path.clone(),
            offset: failure.offset,
            source: failure.source(),
        });
    }
    Ok(())
}
