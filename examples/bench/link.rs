//! The link to a device that has memory of its own: what plain copies of whole layers give, from registered memory.

use std::time::{Duration, Instant};

use layer_streamer::device::Device;
use memmap2::MmapRaw;

use super::{Failure, Moved, clock, memory, units};

pub struct Link<D: Device> {
    device: D,
    stream: D::Stream,
    /// One for each of the two layers that may be under way.
    done: [D::Event; 2],
    /// Dropped before the memory that it is about.
    _registration: D::Registration,
    from: MmapRaw,
    to: D::Memory,
    layer: usize,
}

impl<D: Device> Link<D> {
    /// Copies layers of so many bytes.
    pub fn new(device: &D, layer: usize) -> Result<Self, Failure> {
        let layer = layer.max(1);
        let from = memory(2 * layer)?;
        // SAFETY: the memory lives beside its registration, which is dropped first.
        let registration = unsafe { device.register(from.as_mut_ptr(), from.len())? };
        Ok(Self {
            device: device.clone(),
            stream: device.stream()?,
            done: [device.event()?, device.event()?],
            _registration: registration,
            from,
            to: device.allocate("the limit's layers", 2 * layer)?,
            layer,
        })
    }

    pub fn name(&self) -> String {
        format!("plain copies to the device, {} at once, from pinned memory", units::bytes(self.layer as u64))
    }

    /// Copies for this long, and no less than one layer.
    pub fn window(&mut self, window: Duration) -> Result<Moved, Failure> {
        let (start, cpu) = (Instant::now(), clock::own_thread());
        let (base, mut layers) = (self.device.address(&self.to), 0);
        while layers == 0 || start.elapsed() < window {
            let (turn, at) = (layers % 2, layers % 2 * self.layer);
            self.device.synchronize(&self.done[turn])?;
            // SAFETY: two layers fit on either side, and both sides live until the stream is drained.
            unsafe {
                let from = self.from.as_ptr().add(at);
                self.device.copy_to_device(base.offset(at), from, self.layer, &self.stream)?;
            }
            self.device.record(&self.done[turn], &self.stream)?;
            layers += 1;
        }
        self.device.drain(&self.stream)?;
        let bytes = (layers * self.layer) as u64;
        Ok(Moved { bytes, seconds: start.elapsed().as_secs_f64(), cpu_seconds: clock::own_thread() - cpu })
    }
}
