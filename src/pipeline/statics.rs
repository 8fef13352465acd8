//! Tensors that are loaded once and stay on the device: embeddings, the final norm, the output head.

use std::{mem, ops::Range, slice, sync::Arc, time::Duration};

use crate::{
    arena::Arena,
    checkpoint::Checkpoint,
    device::{Device, DevicePtr, TensorRef},
    error::{Error, Result},
    io::{self, BlockReader, CHUNK, ReadBlock, Source},
    layout::{Extent, PAGE, Staging, UnitLayout},
    pipeline::{
        arrival::{ArrivalStream, Form},
        compute::view,
        reports::Reports,
    },
    plan::{Reader, Settings, Sharing, Unit},
};

/// Blocks through which static tensors pass on their way to the device, at most.
const BLOCKS: usize = 8;

/// Tensors in device memory, freed when this is dropped.
pub struct StaticTensors<D: Device> {
    device: D,
    memory: D::Memory,
    layout: UnitLayout,
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
        Self::load(device, checkpoint, &sources, settings.reader, unit, &mut |_, _| Ok(()))
    }

    /// Reads the tensors of `unit` chunk by chunk, so that host memory stays small however large they are. `idle` is called again
    /// and again while it waits, with the file that it waits for and since when.
    pub(super) fn load(
        device: &D,
        checkpoint: &Checkpoint,
        sources: &Arc<[Source]>,
        reader: Reader,
        unit: &Unit,
        idle: &mut dyn FnMut(usize, Duration) -> Result<()>,
    ) -> Result<Self> {
        let layout = UnitLayout::new(checkpoint, unit)?;
        if !layout.dequantises.is_empty() {
            // They come in chunks, which have no order.
            let cause = "a static tensor cannot be made of several stored ones: stream it, as a unit";
            return Err(Error::setting("unit", cause));
        }
        let reports = Reports::new(device, checkpoint, slice::from_ref(&layout))?;
        let memory = device.allocate("static tensors", layout.device_bytes)?;
        let base = device.address(&memory);
        let count = layout.reads(CHUNK).take(BLOCKS).count().max(1);
        let blocks = Arc::new(Arena::new("static tensors on their way", count, CHUNK)?);
        // A chunk comes at a time.
        let staging = Staging::of(slice::from_ref(&layout), Sharing::of(device)).at_most(CHUNK);
        let mut arrival = ArrivalStream::new(device, staging, reports.map(Arc::new), c"layer-streamer statics")?;
        let mut reader = BlockReader::new(reader, sources, &blocks, count)?;
        if let Err(error) = fill(sources, &layout, &mut arrival, base, &blocks, &mut reader, idle) {
            // Reads and copies that are under way end here, or what they use is left to them.
            drop(reader);
            if arrival.drain().is_err() {
                mem::forget((blocks, memory, arrival));
            }
            return Err(error);
        }
        Ok(Self { device: device.clone(), memory, layout })
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_, D>> {
        let index = self.layout.find(name)?;
        // SAFETY: the layout placed the tensor, aligned, inside the memory, which lives as long as this.
        unsafe { view(self.device.address(&self.memory), &self.layout.tensors[index]) }
    }

    /// Device memory taken, in bytes.
    pub fn bytes(&self) -> usize {
        self.layout.device_bytes
    }
}

/// Reads everything that `layout` names, chunk by chunk, and has it arrive where it belongs from `base` on.
fn fill<D: Device>(
    sources: &[Source],
    layout: &UnitLayout,
    arrival: &mut ArrivalStream<D>,
    base: DevicePtr,
    blocks: &Arena,
    reader: &mut BlockReader<(usize, Range<usize>)>,
    idle: &mut dyn FnMut(usize, Duration) -> Result<()>,
) -> Result<()> {
    // Chunks may come in any order; a block is not used again before it was copied.
    let mut parts = layout.reads(CHUNK);
    let mut failure = None;
    loop {
        while failure.is_none() && reader.has_room() {
            let Some((part, window)) = parts.next() else { break };
            // The block stands for the part of the slot that is read into it.
            reader.submit(&Extent { at: 0, ..part }, (part.file, window));
        }
        let Some(ReadBlock { block, note: (file, window), result }) =
            reader.next(|(file, _), since| idle(*file, since))?
        else {
            break;
        };
        match result {
            Err(error) => failure = failure.or(Some((file, error))),
            Ok(_) if failure.is_some() => {}
            Ok(_) => {
                // Its first byte is that of a page.
                let skipped = window.start % PAGE;
                // SAFETY: the chunk holds the window, with all of its last element; the block and the memory stay until all is
                // drained.
                unsafe {
                    arrival.enqueue(layout, window, blocks.slot(block).as_ptr().add(skipped), base, Form::Plain)?
                };
                arrival.drain()?;
                arrival.check()?;
            }
        }
        reader.free(block);
    }
    failure.map_or(Ok(()), |(file, failure)| {
        Err(failure.of(&layout.name, layout.tensor_at(file, failure.offset), &sources[file]))
    })
}
