//! Streamers: opened, asked about themselves, cancelled, closed. Taking layers is in `layers.rs`.

use std::{
    cell::RefCell,
    ffi::{CString, c_char},
};

use super::{
    any::AnyDevice,
    checkpoint::{CHECKPOINTS, ls_checkpoint},
    device::{DEVICES, Queue, ls_device},
    ffi::{Failure, Result, c_text, ffi, ls_status, place, text},
    handles::{HandleTable, Kind, Remote},
    layers::ls_tensor,
    options::{self, StreamOptions, ls_stats, ls_streamer_options},
    traced::{self, Traced},
    units::{self, ls_unit_tensor},
};
use crate::{
    device::TensorRef,
    pipeline::{Layer, LayerStreamer, LayerToken, StaticTensors},
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

/// The names of a unit and of its tensors, as C sees them.
struct UnitNames {
    unit: CString,
    tensors: Vec<CString>,
}

/// What lies behind a handle.
pub(super) struct Streamer {
    pub(super) streamer: LayerStreamer<AnyDevice>,
    held: RefCell<Vec<LayerToken>>,
    named: Vec<UnitNames>,
    trace: Option<Traced>,
}

pub(super) static STREAMERS: HandleTable<Streamer> = HandleTable::new(Kind::Streamer);
static STATICS: HandleTable<StaticTensors<AnyDevice>> = HandleTable::new(Kind::Statics);

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
        Ok(self.hold(self.streamer.next(&queue.stream)?))
    }

    /// Keeps a layer until it is given back by its number, which this returns.
    #[inline]
    fn hold(&self, layer: Layer<'_, AnyDevice>) -> u64 {
        let token = layer.into_token();
        let number = token.number();
        self.held.borrow_mut().push(token);
        number
    }

    /// Gives back the layer of this number.
    #[inline]
    pub(super) fn give_back(&self, number: u64, queue: &Queue) -> Result<()> {
        self.check_stream(queue)?;
        let mut held = self.held.borrow_mut();
        let index = held.iter().position(|token| token.number() == number).ok_or_else(|| Kind::Layer.closed())?;
        let token = held.remove(index);
        // SAFETY: the token is this streamer's; the header asks that the layer's work is on this stream, or that follows it.
        unsafe { self.streamer.release_token(token, &queue.stream) }.map_err(Failure::from)
    }

    /// Looks at the layer of this number, if it is held.
    pub(super) fn with_layer<R>(&self, number: u64, look: impl FnOnce(&LayerToken) -> Result<R>) -> Result<R> {
        let held = self.held.borrow();
        look(held.iter().find(|token| token.number() == number).ok_or_else(|| Kind::Layer.closed())?)
    }

    /// Runs a pass in which `layer_fn` is given each layer's number, and may look at the layer while it runs.
    pub(super) fn run_pass(&self, queue: &Queue, mut layer_fn: impl FnMut(u64) -> Result<()>) -> Result<()> {
        self.check_stream(queue)?;
        self.streamer.pass(&queue.stream, (), |(), layer| {
            let number = self.hold(layer);
            let called = layer_fn(number);
            called.and(self.give_back(number, queue))
        })
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
/// thread's current one. Only ls_cancel and ls_streamer_stats may be called beside another call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_open(
    device: ls_device,
    checkpoint: ls_checkpoint,
    options: *const ls_streamer_options,
    streamer: *mut ls_streamer,
) -> ls_status {
    ffi(|| {
        let to = place(streamer, "streamer")?;
        // SAFETY: the caller says that options lie there, if it is not NULL.
        let chosen = unsafe { StreamOptions::read(options)? };
        let device = DEVICES.enter(device.id)?.device.clone();
        let checkpoint = CHECKPOINTS.enter(checkpoint.id)?.checkpoint.clone();
        let mut units = chosen.units(&checkpoint)?;
        let (observers, trace) = chosen.observers()?;
        let settings = &chosen.fit(&device, &checkpoint, &mut units)?;
        // SAFETY: the caller says that memory which is lent is the streamer's alone until it is closed, and how long it is.
        let mut streamer = unsafe {
            LayerStreamer::with_lent_memory(&device, &checkpoint, &units, settings, &observers, &chosen.lent)?
        };
        if let Some(progress) = chosen.progress {
            streamer.track_progress(move |now| progress.report(now));
        }
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
        let made = Streamer { streamer, held, named, trace };
        let made = STREAMERS.open(made, Some(remote))?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
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

/// Whether no packed weights were found corrupt so far, or LS_CHECKPOINT with the tensor that is. A device finds out when it unpacks them,
/// and nobody waits for that: ask when the work of a pass is done, before its results are used.
#[unsafe(no_mangle)]
pub extern "C" fn ls_streamer_check_arrivals(streamer: ls_streamer) -> ls_status {
    ffi(|| Ok(STREAMERS.enter_lent(streamer.id)?.streamer.check_arrivals()?))
}

/// How many units a pass has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_unit_count(streamer: ls_streamer, count: *mut usize) -> ls_status {
    ffi(|| {
        let to = place(count, "count")?;
        let count = STREAMERS.enter_lent(streamer.id)?.named.len();
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
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
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
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
        // SAFETY: the caller says that a text ends there, if it is not NULL.
        let name = unsafe { text(name, "name")? };
        let streamer = STREAMERS.enter_lent(streamer.id)?;
        streamer.named(unit)?;
        let index = streamer.streamer.plan().units[unit].find(name)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
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
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
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
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { options::write_stats(to, &stats) }
    })
}

/// Loads tensors that stay on the device until ls_statics_close, each stored by itself. Call it before the first pass: it reads
/// beside the pipeline.
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
        // SAFETY: the caller says that so many tensors lie there.
        let unit = unsafe { units::statics(tensors, count)? };
        let loaded = STREAMERS.enter(streamer.id)?.streamer.load_static_unit(&unit)?;
        let made = STATICS.open(loaded, None)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
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
        // SAFETY: the caller says that a text ends there, if it is not NULL.
        let name = unsafe { text(name, "name")? };
        let statics = STATICS.enter(statics.id)?;
        let found: TensorRef<'_, AnyDevice> = statics.tensor(name)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(ls_tensor::view(found)) };
        Ok(())
    })
}

/// Frees static tensors. The device must be done with them.
#[unsafe(no_mangle)]
pub extern "C" fn ls_statics_close(statics: ls_statics) -> ls_status {
    ffi(|| STATICS.close(statics.id, |_| Ok(())).map(drop))
}
