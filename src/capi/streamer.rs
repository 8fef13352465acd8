//! Streamers: opened, asked about themselves, cancelled, closed. Taking layers is in `layers.rs`.

use std::{
    cell::{Cell, RefCell},
    ffi::{CString, c_char},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    any::AnyDevice,
    callbacks::Reporter,
    checkpoint::{CHECKPOINTS, ls_checkpoint},
    device::{DEVICES, Queue, ls_device},
    ffi::{Failure, Result, c_text, ffi, ls_status, place, text},
    handles::{HandleTable, Kind, Remote},
    layers::ls_tensor,
    options::{self, StreamOptions, ls_stats, ls_streamer_options, ls_unit_tensor},
    traced::{self, Traced},
};
use crate::{
    device::TensorRef,
    pipeline::{LayerStreamer, Place, StaticTensors, Taken},
};

/// Streams the units of a checkpoint to a device, pass after pass. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_streamer {
    /// The library's.
    pub id: u64,
}

/// Tensors that were loaded once and stay on the device. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_statics {
    /// The library's.
    pub id: u64,
}

/// What is known of a unit.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_unit_info {
    /// Its name; the streamer's, until that is closed.
    pub name: *const c_char,
    /// How many tensors it has.
    pub tensors: usize,
    /// What they take in their files, in bytes.
    pub bytes: usize,
}

/// A layer that is held.
pub(super) struct HeldLayer {
    pub(super) number: u64,
    pub(super) taken: Taken,
}

/// The names of a unit and of its tensors, as C sees them.
struct UnitNames {
    unit: CString,
    tensors: Vec<CString>,
}

/// What lies behind a handle.
pub(super) struct Streamer {
    pub(super) streamer: LayerStreamer<AnyDevice>,
    held: RefCell<Vec<HeldLayer>>,
    /// Of the next layer; a multiple of [`BATCH`] if a new batch is due.
    number: Cell<u64>,
    named: Vec<UnitNames>,
    progress: Option<Reporter>,
    trace: Option<Traced>,
}

pub(super) static STREAMERS: HandleTable<Streamer> = HandleTable::new(Kind::Streamer);
static STATICS: HandleTable<StaticTensors<AnyDevice>> = HandleTable::new(Kind::Statics);

/// Numbers of layers that no streamer has had yet begin here. A streamer takes them by the batch.
static NUMBERS: AtomicU64 = AtomicU64::new(BATCH);
const BATCH: u64 = 4096;

impl Streamer {
    #[inline]
    fn check_stream(&self, queue: &Queue) -> Result<()> {
        if queue.device.is(self.streamer.device()) {
            return Ok(());
        }
        Err(Failure::invalid("stream", "belongs to another device than the streamer"))
    }

    /// Takes the next layer and returns its number.
    #[inline]
    pub(super) fn take(&self, queue: &Queue) -> Result<u64> {
        self.check_stream(queue)?;
        let (taken, progress) = self.streamer.take(&queue.stream)?;
        let mut number = self.number.get();
        if number.is_multiple_of(BATCH) {
            number = NUMBERS.fetch_add(BATCH, Ordering::Relaxed);
        }
        self.number.set(number + 1);
        self.held.borrow_mut().push(HeldLayer { number, taken });
        if let Some(hook) = &self.progress {
            hook.report(progress);
        }
        Ok(number)
    }

    /// Gives back the layer of this number.
    #[inline]
    pub(super) fn give_back(&self, number: u64, queue: &Queue) -> Result<()> {
        self.check_stream(queue)?;
        let mut held = self.held.borrow_mut();
        let index = held.iter().position(|held| held.number == number).ok_or_else(|| Kind::Layer.closed())?;
        let HeldLayer { taken, .. } = held.remove(index);
        Ok(self.streamer.release(taken, &queue.stream)?)
    }

    /// Unit and place of the layer of this number, for as long as it is not given back.
    pub(super) fn find(&self, number: u64) -> Result<(usize, Place)> {
        let held = self.held.borrow();
        let found = held.iter().find(|held| held.number == number).ok_or_else(|| Kind::Layer.closed())?;
        Ok((found.taken.unit, found.taken.place))
    }

    fn check_none_held(&self) -> Result<()> {
        match self.held.borrow().len() {
            0 => Ok(()),
            held => {
                let message = format!("{held} layers are held: release them first");
                Err(Failure::new(ls_status::LS_LAYERS_HELD, message))
            }
        }
    }

    fn named(&self, unit: usize) -> Result<&UnitNames> {
        let units = self.named.len();
        self.named.get(unit).ok_or_else(|| Failure::invalid("unit", format!("is {unit}, there are {units}")))
    }
}

/// Plans, reserves, registers, opens files, starts the threads; the first units are being read when this returns. Device and
/// checkpoint may be closed before the streamer is. `options` may be NULL: the defaults.
///
/// The streamer is used by one thread at a time (another gets LS_BUSY), not always the same; with CUDA its device must be the
/// thread's current one. Only ls_cancel may be called beside another call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_open(
    device: ls_device,
    checkpoint: ls_checkpoint,
    options: *const ls_streamer_options,
    streamer: *mut ls_streamer,
) -> ls_status {
    ffi(|| {
        let to = place(streamer, "streamer")?;
        // SAFETY: the module's invariant.
        let chosen = unsafe { StreamOptions::read(options)? };
        let device = DEVICES.enter(device.id)?.device.clone();
        let checkpoint = CHECKPOINTS.enter(checkpoint.id)?.checkpoint.clone();
        let mut units = chosen.units(&checkpoint)?;
        let (observers, trace) = chosen.observers()?;
        let settings = &chosen.fit(&device, &checkpoint, &mut units)?;
        // SAFETY: as above.
        let streamer =
            unsafe { LayerStreamer::with_memory(&device, &checkpoint, &units, settings, &observers, &chosen.lent)? };
        let named = streamer.plan().units.iter().map(|unit| {
            let tensors = unit.tensors.iter().map(|tensor| c_text(&tensor.name)).collect::<Result<_>>()?;
            Ok(UnitNames { unit: c_text(&unit.name)?, tensors })
        });
        let named = named.collect::<Result<_>>()?;
        if let Some(log) = &chosen.log {
            log.opened(&streamer.plan().memory(), &streamer.stats());
        }
        let remote = Remote { canceller: streamer.canceller(), meter: streamer.meter() };
        let held = RefCell::new(Vec::with_capacity(settings.n_gpu));
        let made = Streamer { streamer, held, number: Cell::new(0), named, progress: chosen.progress, trace };
        let made = STREAMERS.open(made, Some(remote))?;
        // SAFETY: as above.
        unsafe { to.write(ls_streamer { id: made }) };
        Ok(())
    })
}

/// Stops the threads, waits until the device is done with the layers that were released, frees everything. LS_LAYERS_HELD,
/// and nothing happens, while layers are held. LS_LEAKED where the device does not answer: the handle is closed, but memory that
/// was lent must stay. LS_IO where only the trace could not be written.
#[unsafe(no_mangle)]
pub extern "C" fn ls_streamer_close(streamer: ls_streamer) -> ls_status {
    ffi(|| {
        let mut closed = STREAMERS.close(streamer.id, Streamer::check_none_held)?;
        traced::end(&mut closed.streamer, closed.trace)
    })
}

/// Cancels the pass under way, or, between passes, the next one: the call that waits for a layer, or the next that asks for
/// one, returns LS_CANCELLED; so does ls_statics_load while it waits for the disk. Layers that are held stay usable. After ls_rewind, or with the next ls_run_pass, a new pass
/// begins. From any thread, also while another call uses the streamer, also from a callback.
#[unsafe(no_mangle)]
pub extern "C" fn ls_cancel(streamer: ls_streamer) -> ls_status {
    ffi(|| STREAMERS.cancel(streamer.id))
}

/// Goes back to the first unit: after an error, after a cancel, or in the middle of a pass. No thread or memory is made anew.
/// LS_LAYERS_HELD while layers are held.
#[unsafe(no_mangle)]
pub extern "C" fn ls_rewind(streamer: ls_streamer) -> ls_status {
    ffi(|| {
        let streamer = STREAMERS.enter(streamer.id)?;
        streamer.check_none_held()?;
        Ok(streamer.streamer.restart()?)
    })
}

/// How many units a pass has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_unit_count(streamer: ls_streamer, count: *mut usize) -> ls_status {
    ffi(|| {
        let to = place(count, "count")?;
        let count = STREAMERS.enter_lent(streamer.id)?.named.len();
        // SAFETY: the module's invariant.
        unsafe { to.write(count) };
        Ok(())
    })
}

/// What is known of unit number `unit`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_unit(streamer: ls_streamer, unit: usize, info: *mut ls_unit_info) -> ls_status {
    ffi(|| {
        let to = place(info, "info")?;
        let streamer = STREAMERS.enter_lent(streamer.id)?;
        let named = streamer.named(unit)?;
        let bytes = streamer.streamer.plan().units[unit].disk_bytes;
        // SAFETY: the module's invariant.
        unsafe { to.write(ls_unit_info { name: named.unit.as_ptr(), tensors: named.tensors.len(), bytes }) };
        Ok(())
    })
}

/// The number of the tensor called `name` in unit number `unit`, for ls_layer_tensor_at: looked up once, it holds in every
/// pass. Numbers follow the names' order. LS_NO_TENSOR if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_tensor_index(
    streamer: ls_streamer,
    unit: usize,
    name: *const c_char,
    index: *mut usize,
) -> ls_status {
    ffi(|| {
        let to = place(index, "index")?;
        // SAFETY: the module's invariant.
        let name = unsafe { text(name, "name")? };
        let streamer = STREAMERS.enter_lent(streamer.id)?;
        streamer.named(unit)?;
        let index = streamer.streamer.plan().units[unit].find(name)?;
        // SAFETY: as above.
        unsafe { to.write(index) };
        Ok(())
    })
}

/// The name of tensor number `index` of unit number `unit`; the streamer's, until that is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_tensor_name(
    streamer: ls_streamer,
    unit: usize,
    index: usize,
    name: *mut *const c_char,
) -> ls_status {
    ffi(|| {
        let to = place(name, "name")?;
        let streamer = STREAMERS.enter_lent(streamer.id)?;
        let named = streamer.named(unit)?;
        let name = named.tensors.get(index).ok_or_else(|| {
            Failure::invalid("index", format!("is {index}, the unit has {} tensors", named.tensors.len()))
        })?;
        // SAFETY: the module's invariant.
        unsafe { to.write(name.as_ptr()) };
        Ok(())
    })
}

/// Counts since the streamer was opened, from any thread at any time. Set `stats->size` to sizeof(ls_stats) before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_stats(streamer: ls_streamer, stats: *mut ls_stats) -> ls_status {
    ffi(|| {
        let to = place(stats, "stats")?;
        let stats = STREAMERS.stats(streamer.id)?;
        // SAFETY: the module's invariant.
        unsafe { options::write_stats(to, &stats) }
    })
}

/// Loads tensors that stay on the device until ls_statics_close. Call it before the first pass: it reads beside the pipeline.
/// The streamer may be closed before they are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_statics_load(
    streamer: ls_streamer,
    tensors: *const ls_unit_tensor,
    count: usize,
    statics: *mut ls_statics,
) -> ls_status {
    ffi(|| {
        let to = place(statics, "statics")?;
        // SAFETY: the module's invariant.
        let unit = unsafe { options::tensors("the static tensors", tensors, count)? };
        let loaded = STREAMERS.enter(streamer.id)?.streamer.load_static_unit(&unit)?;
        let made = STATICS.open(loaded, None)?;
        // SAFETY: as above.
        unsafe { to.write(ls_statics { id: made }) };
        Ok(())
    })
}

/// The static tensor called `name`. Its memory is the library's, until ls_statics_close.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_statics_tensor(
    statics: ls_statics,
    name: *const c_char,
    tensor: *mut ls_tensor,
) -> ls_status {
    ffi(|| {
        let to = place(tensor, "tensor")?;
        // SAFETY: the module's invariant.
        let name = unsafe { text(name, "name")? };
        let statics = STATICS.enter(statics.id)?;
        let found: TensorRef<'_, AnyDevice> = statics.tensor(name)?;
        // SAFETY: as above.
        unsafe { to.write(ls_tensor::view(found)) };
        Ok(())
    })
}

/// Frees static tensors. The device must be done with them.
#[unsafe(no_mangle)]
pub extern "C" fn ls_statics_close(statics: ls_statics) -> ls_status {
    ffi(|| STATICS.close(statics.id, |_| Ok(())).map(drop))
}
