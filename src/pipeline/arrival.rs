//! Arrival: how the stored bytes of a unit become its tensors on the device. The one implementation for units that stream, for
//! those that are kept, and for static tensors.
//!
//! ```text
//! copy stream       copies of what stays as it is, then for each piece that is staged: wait(consumed) → copy → record(staged)
//! convert stream    for each piece: wait(staged) → cast, unpack or dequantise → record(consumed)   only if tensors change on arrival
//! ```
//!
//! A device that computes in RAM unpacks and dequantises weights from where they lie, on the first of the two. A unit that is kept
//! packed on the device arrives so, and is unpacked from there on the second.
//!
//! **Invariant**: of the two staging blocks each is written again only once the work that read it has been enqueued and is waited
//! for.

use std::{ffi::CStr, ops::Range, sync::Arc};

use crate::{
    device::{Device, DevicePtr},
    dtype::DType,
    error::{Error, Result},
    layout::{Cast, Dequantise, Staging, UnitLayout, Unpack},
    pipeline::reports::Reports,
};

/// In what form those of a unit's tensors arrive that are packed, or less than what they are cast to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Unpacked and cast.
    Plain,
    /// As they are, for [`Tier::GpuPacked`](crate::plan::Tier::GpuPacked).
    Packed,
}

impl Form {
    /// Whether what is cast arrives as it is.
    fn keeps(self, cast: &Cast) -> bool {
        self == Self::Packed && cast.is_kept_stored()
    }

    /// The same of what is made of several tensors.
    fn keeps_inputs(self, dequantise: &Dequantise) -> bool {
        self == Self::Packed && dequantise.is_kept_stored()
    }
}

/// Refuses matrices that a device cannot make.
pub(super) fn check<D: Device>(device: &D, units: &[UnitLayout]) -> Result<()> {
    let mut made = units.iter().flat_map(|unit| unit.dequantises.iter().map(move |made| (unit, made)));
    let Some((unit, made)) = made.find(|(_, made)| !device.dequantises_to(made.to_type)) else { return Ok(()) };
    let name = unit.tensors.iter().find(|tensor| tensor.at == made.to).map_or("", |tensor| &tensor.name);
    let cause = format!("{}: {name} becomes {}, which only a CPU makes: ask for BF16 or F32", unit.name, made.to_type);
    Err(Error::setting("unit", cause))
}

/// The streams that tensors arrive by, and what they pass through on their way.
pub(super) struct ArrivalStream<D: Device> {
    device: D,
    stream: D::Stream,
    staging: Option<StagingBlocks<D>>,
    /// Where packed tensors arrive.
    reports: Option<Arc<Reports<D>>>,
}

/// Two blocks through which stored bytes pass on their way to a cast, or to being unpacked, on a stream of their own, so that the
/// copies of the next piece need not wait for it.
struct StagingBlocks<D: Device> {
    memory: D::Memory,
    sizes: Staging,
    stream: D::Stream,
    staged: [D::Event; 2],
    consumed: [D::Event; 2],
    turn: usize,
}

impl<D: Device> ArrivalStream<D> {
    /// With these staging blocks and reports, if any; tools show the stream of copies as `name`.
    pub(super) fn new(device: &D, sizes: Staging, reports: Option<Arc<Reports<D>>>, name: &CStr) -> Result<Self> {
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
            reports,
            device: device.clone(),
        })
    }

    /// Where the copies are enqueued. Casts follow them, and end with [`record`](Self::record).
    pub(super) fn stream(&self) -> &D::Stream {
        &self.stream
    }

    /// Enqueues what makes `unit`'s tensors from `target` on, as `form` has them, of the stored bytes of `window`, a range of the
    /// unit's host slot: bytes that stay as they are, and elements that begin in it. Its first byte lies at `source`, where the
    /// last of these elements is whole. Of a unit with a matrix that is made of several tensors it is the whole slot.
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
        form: Form,
    ) -> Result<()> {
        let place = |plain: usize, packed: usize| target.offset(if form == Form::Packed { packed } else { plain });
        for copy in unit.copies.iter().filter_map(|copy| copy.within(&window)) {
            // SAFETY: the bytes lie in the window, and where they go in the unit; the rest is the caller's.
            unsafe {
                let (from, to) = (source.add(copy.from - window.start), place(copy.to, copy.kept_at));
                self.device.copy_to_device(to, from, copy.bytes, &self.stream)?;
            }
        }
        let block_bytes = self.staging.as_ref().map_or(0, |staging| staging.sizes.block_bytes);
        for unpack in &unit.unpacks {
            let report = self.report(unit, unpack);
            if form == Form::Packed {
                // Of units that are kept everything is in the window.
                // SAFETY: the parts lie at `source`, and where they go in the unit; the rest is the caller's.
                unsafe {
                    let (from, to) = (source.add(unpack.from - window.start), target.offset(unpack.kept_at));
                    self.device.copy_to_device(to, from, unpack.bytes(), &self.stream)?;
                }
                continue;
            }
            if self.device.memory_is_ram() {
                for piece in unpack.pieces(&window, usize::MAX) {
                    // SAFETY: the parts lie at `source`, and where they go in the unit; the rest is the caller's.
                    unsafe {
                        let from = DevicePtr::new(source.add(piece.from - window.start).cast_mut());
                        self.device.unpack_raw(target.offset(piece.to), from, piece.parts, report, &self.stream)?;
                    }
                }
                continue;
            }
            for piece in unpack.pieces(&window, block_bytes) {
                // SAFETY: the parts lie at `source` and fit into a block, the weights lie in the unit; the rest is the caller's.
                unsafe {
                    let (from, to) = (source.add(piece.from - window.start), target.offset(piece.to));
                    self.staged([(from, piece.parts.bytes(), 0)], |device, block, stream| {
                        device.unpack_raw(to, block, piece.parts, report, stream)
                    })?;
                }
            }
        }
        for cast in unit.casts.iter().filter(|cast| form.keeps(cast)) {
            // SAFETY: as for packed tensors above.
            unsafe {
                let (from, to) = (source.add(cast.from - window.start), target.offset(cast.kept_at));
                self.device.copy_to_device(to, from, cast.bytes(), &self.stream)?;
            }
        }
        let kept = unit.dequantises.iter().filter(|made| form.keeps_inputs(made)).flat_map(|made| &made.inputs);
        for input in kept {
            // SAFETY: as for packed tensors above.
            unsafe {
                let (from, to) = (source.add(input.from), target.offset(input.kept_at));
                self.device.copy_to_device(to, from, input.bytes, &self.stream)?;
            }
        }
        // Before casts: a device in RAM makes these on the stream of copies, and where there are casts the arrival is marked on the other
        // stream, which waits for this one at the last cast.
        for made in unit.dequantises.iter().filter(|made| !form.keeps_inputs(made)) {
            let to = (place(made.to, made.kept_at), made.to_type);
            // SAFETY: the plan placed the matrix there, and the tensors that it is made of; the rest is the caller's.
            unsafe { self.dequantise(made, source, to)? };
        }
        let changing = unit.casts.iter().filter(|cast| !form.keeps(cast));
        for piece in changing.flat_map(|cast| cast.pieces(&window, block_bytes)) {
            // SAFETY: the elements lie at `source` and fit into a block, and the result lies in the unit; the rest is the caller's.
            unsafe {
                let (from, to) = (source.add(piece.from - window.start), place(piece.to, piece.kept_at));
                self.staged([(from, piece.bytes(), 0)], |device, block, stream| {
                    device.cast_raw((to, piece.to_type), (block, piece.from_type), piece.elements, stream)
                })?;
            }
        }
        Ok(())
    }

    /// Enqueues what makes a matrix of the unit whose host slot lies at `source`.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue); the matrix goes where the plan says.
    unsafe fn dequantise(&mut self, made: &Dequantise, source: *const u8, to: (DevicePtr, DType)) -> Result<()> {
        if self.device.memory_is_ram() {
            let from = made.each(|input| DevicePtr::new(source.wrapping_add(input.from).cast_mut()));
            // SAFETY: the tensors lie at `source`, and the matrix where it goes in the unit; the rest is the caller's.
            return unsafe { self.device.dequantise_raw(to, from, &made.recipe, &self.stream) };
        }
        let inputs = made.inputs.iter().map(|input| (source.wrapping_add(input.from), input.bytes, input.staged_at));
        // SAFETY: the tensors lie at `source` and fit into a block together, the matrix lies in the unit; the rest is the caller's.
        unsafe {
            self.staged(inputs, |device, block, stream| {
                device.dequantise_raw(to, made.each(|input| block.offset(input.staged_at)), &made.recipe, stream)
            })
        }
    }

    /// Enqueues, on [`converting`](Self::converting), what makes `unit`'s tensors from `target` on of those that are kept packed from
    /// `kept` on.
    ///
    /// # Safety
    /// Both are as long as the plan of the unit says, and the work is ordered behind the arrival of the one and the last use of the
    /// other.
    pub(super) unsafe fn unpack(&self, unit: &UnitLayout, kept: DevicePtr, target: DevicePtr) -> Result<()> {
        let copies = unit.copies.iter().map(|copy| (copy.kept_at, copy.to, copy.bytes));
        let cast = unit.casts.iter().filter(|cast| !cast.is_kept_stored());
        let cast = cast.map(|cast| (cast.kept_at, cast.to, cast.bytes_after()));
        let made = unit.dequantises.iter().filter(|made| !made.is_kept_stored());
        let made = made.map(|made| (made.kept_at, made.to, made.bytes().unwrap_or(0)));
        for (from, to, bytes) in copies.chain(cast).chain(made) {
            // SAFETY: the plan placed the tensors there; the rest is the caller's.
            unsafe {
                self.device.copy_on_device(target.offset(to), kept.offset(from), bytes, self.converting())?;
            }
        }
        for cast in unit.casts.iter().filter(|cast| cast.is_kept_stored()) {
            let (from, to) = (kept.offset(cast.kept_at), target.offset(cast.to));
            // SAFETY: the plan placed the tensor there; the rest is the caller's.
            unsafe {
                self.device.cast_raw((to, cast.to_type), (from, cast.from_type), cast.elements, self.converting())?;
            }
        }
        for made in unit.dequantises.iter().filter(|made| made.is_kept_stored()) {
            let from = made.each(|input| kept.offset(input.kept_at));
            // SAFETY: the plan placed the matrix there; the rest is the caller's.
            unsafe {
                let to = (target.offset(made.to), made.to_type);
                self.device.dequantise_raw(to, from, &made.recipe, self.converting())?;
            }
        }
        for unpack in &unit.unpacks {
            let (report, parts) = (self.report(unit, unpack), unpack.packed.parts());
            // SAFETY: the plan placed the tensor there; the rest is the caller's.
            unsafe {
                let (from, to) = (kept.offset(unpack.kept_at), target.offset(unpack.to));
                self.device.unpack_raw(to, from, parts, report, self.converting())?;
            }
        }
        Ok(())
    }

    /// Where the device reports of a packed tensor of the unit.
    fn report(&self, unit: &UnitLayout, unpack: &Unpack) -> *mut u32 {
        let reports = self.reports.as_ref().expect("they are there where packed tensors arrive");
        reports.word(unit.reports_at + unpack.report)
    }

    /// The stream that tensors are converted on.
    pub(super) fn converting(&self) -> &D::Stream {
        self.staging.as_ref().map_or(&self.stream, |staging| &staging.stream)
    }

    /// Copies stretches of bytes, so many each and no more together than a staging block has, to their places in one, and enqueues what
    /// `convert` makes of them there.
    ///
    /// # Safety
    /// Until the copies are done the bytes are written by nobody. `convert` enqueues on the stream that it gets, and reads no more than
    /// the bytes of the block.
    unsafe fn staged(
        &mut self,
        stretches: impl IntoIterator<Item = (*const u8, usize, usize)>,
        convert: impl FnOnce(&D, DevicePtr, &D::Stream) -> Result<()>,
    ) -> Result<()> {
        let staging = self.staging.as_mut().expect("it is there where tensors change on arrival");
        let turn = staging.turn;
        staging.turn = 1 - turn;
        let block = self.device.address(&staging.memory).offset(staging.sizes.block_at(turn));
        self.device.wait(&self.stream, &staging.consumed[turn])?;
        for (from, bytes, at) in stretches {
            // SAFETY: the block is long enough, and the waits on `consumed` and `staged` order its uses; the rest is the caller's.
            unsafe { self.device.copy_to_device(block.offset(at), from, bytes, &self.stream)? };
        }
        self.device.record(&staging.staged[turn], &self.stream)?;
        self.device.wait(&staging.stream, &staging.staged[turn])?;
        convert(&self.device, block, &staging.stream)?;
        self.device.record(&staging.consumed[turn], &staging.stream)
    }

    /// Marks where all of `unit`, enqueued last in this form, has arrived.
    pub(super) fn record(&self, unit: &UnitLayout, form: Form, arrived: &D::Event) -> Result<()> {
        let own = !self.device.memory_is_ram();
        let unpacked = own && form == Form::Plain && !unit.unpacks.is_empty();
        let made = own && unit.dequantises.iter().any(|made| !form.keeps_inputs(made));
        let staged = unit.casts.iter().any(|cast| !form.keeps(cast)) || unpacked || made;
        match &self.staging {
            // No tensor that is staged is empty: the last waits for its own copy, which comes after all others.
            Some(staging) if staged => self.device.record(arrived, &staging.stream),
            _ => self.device.record(arrived, &self.stream),
        }
    }

    /// Whether no packed weights were found corrupt so far, of what the device has done.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the tensor that is.
    pub(super) fn check(&self) -> Result<()> {
        self.reports.as_ref().map_or(Ok(()), |reports| reports.check())
    }

    /// Blocks until all that was enqueued is done.
    pub(super) fn drain(&self) -> Result<()> {
        self.device.drain(&self.stream)?;
        self.staging.as_ref().map_or(Ok(()), |staging| self.device.drain(&staging.stream))
    }
}
