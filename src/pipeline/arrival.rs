//! Arrival: how the stored bytes of a unit become its tensors on the device. The one implementation for units that stream, for
//! those that are kept, and for static tensors.
//!
//! ```text
//! copy stream       copies of what stays as it is, then for each piece that is cast: wait(consumed) → copy → record(staged)
//! cast stream       for each piece: wait(staged) → cast → record(consumed)        only if tensors change on arrival
//! ```
//!
//! **Invariant**: of the two staging blocks each is written again only once the cast that read it has been enqueued and is waited
//! for.

use std::{ffi::CStr, ops::Range};

use crate::{
    device::{Device, DevicePtr},
    error::Result,
    layout::{Staging, UnitLayout},
};

/// The streams that tensors arrive by, and what they pass through on their way.
pub(super) struct ArrivalStream<D: Device> {
    device: D,
    stream: D::Stream,
    staging: Option<StagingBlocks<D>>,
}

/// Two blocks through which stored bytes pass on their way to a cast, on a stream of their own, so that the copies of the next
/// piece need not wait for it.
struct StagingBlocks<D: Device> {
    memory: D::Memory,
    sizes: Staging,
    stream: D::Stream,
    staged: [D::Event; 2],
    consumed: [D::Event; 2],
    turn: usize,
}

impl<D: Device> ArrivalStream<D> {
    /// With these staging blocks, if any; tools show the stream of copies as `name`.
    pub(super) fn new(device: &D, sizes: Staging, name: &CStr) -> Result<Self> {
        let staging = || {
            Ok(StagingBlocks {
                memory: device.allocate("staging blocks", sizes.bytes())?,
                sizes,
                stream: device.named_stream(c"layer-streamer convert")?,
                staged: [device.event()?, device.event()?],
                consumed: [device.event()?, device.event()?],
                turn: 0,
            })
        };
        Ok(Self {
            stream: device.named_stream(name)?,
            staging: (sizes.bytes() > 0).then(staging).transpose()?,
            device: device.clone(),
        })
    }

    /// Where the copies are enqueued. Casts follow them, and end with [`record`](Self::record).
    pub(super) fn stream(&self) -> &D::Stream {
        &self.stream
    }

    /// Enqueues what makes `unit`'s tensors from `target` on of the stored bytes of `window`, a range of the unit's host slot:
    /// bytes that stay as they are, and elements that begin in it. Its first byte lies at `source`, where the last of these
    /// elements is whole.
    ///
    /// # Safety
    /// Both sides are as long as the plan of the unit says. Until the copies are done `source` is written by nobody; until what
    /// [`record`](Self::record) marks is reached, the tensors are used by nobody.
    pub(super) unsafe fn enqueue(
        &mut self,
        unit: &UnitLayout,
        window: Range<usize>,
        source: *const u8,
        target: DevicePtr,
    ) -> Result<()> {
        for copy in unit.copies.iter().filter_map(|copy| copy.within(&window)) {
            // SAFETY: the bytes lie in the window, and where they go in the unit; the rest is the caller's.
            unsafe {
                let from = source.add(copy.from - window.start);
                self.device.copy_to_device(target.offset(copy.to), from, copy.bytes, &self.stream)?;
            }
        }
        let Some(staging) = &mut self.staging else { return Ok(()) };
        for piece in unit.casts.iter().flat_map(|cast| cast.pieces(&window, staging.sizes.block_bytes)) {
            let turn = staging.turn;
            staging.turn = 1 - turn;
            let block = self.device.address(&staging.memory).offset(staging.sizes.block_at(turn));
            let (to, from) = ((target.offset(piece.to), piece.to_type), (block, piece.from_type));
            self.device.wait(&self.stream, &staging.consumed[turn])?;
            // SAFETY: the elements lie at `source`, a piece is no longer than a block, and the result lies in the unit; the
            // waits on `consumed` and `staged` order the two uses of the block; the rest is the caller's.
            unsafe {
                let stored = source.add(piece.from - window.start);
                self.device.copy_to_device(block, stored, piece.bytes(), &self.stream)?;
                self.device.record(&staging.staged[turn], &self.stream)?;
                self.device.wait(&staging.stream, &staging.staged[turn])?;
                self.device.cast_raw(to, from, piece.elements, &staging.stream)?;
            }
            self.device.record(&staging.consumed[turn], &staging.stream)?;
        }
        Ok(())
    }

    /// Marks where all of `unit`, enqueued last, has arrived.
    pub(super) fn record(&self, unit: &UnitLayout, arrived: &D::Event) -> Result<()> {
        match &self.staging {
            // No tensor that is cast is empty: the last cast waits for its own copy, which comes after all others.
            Some(staging) if !unit.casts.is_empty() => self.device.record(arrived, &staging.stream),
            _ => self.device.record(arrived, &self.stream),
        }
    }

    /// Blocks until all that was enqueued is done.
    pub(super) fn drain(&self) -> Result<()> {
        self.device.drain(&self.stream)?;
        self.staging.as_ref().map_or(Ok(()), |staging| self.device.drain(&staging.stream))
    }
}
