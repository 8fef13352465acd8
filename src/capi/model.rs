//! One level up: a decoder-only model, its KV cache, and decoding.

use std::{
    cell::RefCell,
    ffi::{c_char, c_void},
    mem,
    ops::ControlFlow,
    path::Path,
    ptr::{self, NonNull},
};

use super::{
    any::AnyDevice,
    budget::ls_placement,
    device::{DEVICES, ls_device},
    ffi::{
        Failure, Grows, Result, callback, ffi, list, ls_status, path, place, read_options, write_options, write_sized,
    },
    handles::{HandleTable, Kind, Remote},
    options::{self, StreamOptions, ls_stats, ls_streamer_options},
    sampling::ls_sampling,
    traced::{self, Traced},
};
use crate::{
    device::Device,
    model::{Cache, Choice, Decoder, Model, Sampler, Sampling, Sequence},
    plan::Settings,
};

/// A model with its memory on a device. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_model {
    /// The library's.
    pub id: u64,
}

/// What a model is opened with. Fill it with ls_model_options_init, then change what should differ.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_model_options {
    /// sizeof(ls_model_options).
    pub size: usize,
    /// Rows of the KV cache: how many sequences it holds.
    pub batch: usize,
    /// Tokens that each may have; 0, the default: 512, or as many as the model takes if that is less.
    pub context: usize,
    /// How its layers are streamed; NULL: the defaults. There `units` and memory must be NULL.
    pub streamer: *const ls_streamer_options,
}

// SAFETY: `repr(C)`, words and pointers that may be NULL, the first of them the size.
unsafe impl Grows for ls_model_options {
    const FIRST: usize = mem::offset_of!(ls_model_options, streamer) + size_of::<*const c_void>();
}

/// What is known of a model. Set `size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_model_info {
    /// sizeof(ls_model_info).
    pub size: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Tokens that the model was made for.
    pub max_positions: usize,
    /// Tokens that a row of the KV cache holds.
    pub context: usize,
    /// Rows of the KV cache.
    pub batch: usize,
}

// SAFETY: `repr(C)`, all fields words, the first of them the size.
unsafe impl Grows for ls_model_info {
    const FIRST: usize = mem::offset_of!(ls_model_info, batch) + size_of::<usize>();
}

/// New tokens of one sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_sequence {
    /// Its row in the KV cache.
    pub row: usize,
    /// The tokens that follow what the cache holds.
    pub tokens: *const u32,
    /// How many; at least one.
    pub count: usize,
}

/// Given each new token of each sequence. It returns 0 to go on, LS_END to end this sequence; anything else ends the call with
/// LS_CALLBACK. It must not call the model (LS_BUSY), but for ls_model_cancel. Neither longjmp nor an exception may leave it.
pub type ls_token_fn = Option<unsafe extern "C" fn(user: *mut c_void, row: usize, token: u32) -> i32>;

/// What an ls_token_fn returns to end a sequence.
pub const LS_END: i32 = 1;

struct OpenModel {
    decoder: RefCell<Decoder<AnyDevice>>,
    batch: usize,
    trace: Option<Traced>,
}

static MODELS: HandleTable<OpenModel> = HandleTable::new(Kind::Model);

/// Fills `options`, which is `size` bytes long (sizeof(ls_model_options)), with the defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_options_init(options: *mut ls_model_options, size: usize) -> ls_status {
    // SAFETY: the caller says that so many bytes may be written.
    ffi(|| unsafe { write_options(options, size, "options", defaults()) })
}

fn defaults() -> ls_model_options {
    ls_model_options { size: size_of::<ls_model_options>(), batch: 1, context: 0, streamer: ptr::null() }
}

/// What a call says of a model.
struct ModelRequest<'a> {
    folder: &'a Path,
    options: ls_model_options,
    streams: StreamOptions,
}

/// What a model is opened with.
struct Chosen {
    model: Model,
    settings: Settings,
    batch: usize,
    context: usize,
}

impl<'a> ModelRequest<'a> {
    /// # Safety
    /// `folder` is NULL or starts a path that lives for `'a`, `options` is NULL or points to what the header says.
    unsafe fn read(folder: *const c_char, options: *const ls_model_options) -> Result<Self> {
        // SAFETY: the caller promised that each is NULL or points to what its reader asks for.
        unsafe {
            let folder = path(folder, "folder")?;
            let options = if options.is_null() { defaults() } else { read_options(options, "options", defaults())? };
            Ok(Self { folder, options, streams: StreamOptions::read(options.streamer)? })
        }
    }

    /// Looks into the folder, and gives the model's units their tiers.
    fn choose(&self, device: &AnyDevice) -> Result<Chosen> {
        let mut model = Model::open(self.folder)?;
        self.streams.place_model(&mut model.units)?;
        let ls_model_options { batch, context, .. } = self.options;
        let context = if context > 0 { context } else { model.config.max_positions.min(512) };
        let settings = self.streams.fit_model(device, &mut model, batch, context)?;
        Ok(Chosen { model, settings, batch, context })
    }
}

/// What ls_model_open with these arguments would choose and take; nothing is reserved and no weight is read. Else as
/// ls_streamer_plan, with all of the model's memory: weights, KV cache, activations. `options` may be NULL: the defaults; and
/// `tiers` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_plan(
    device: ls_device,
    folder: *const c_char,
    options: *const ls_model_options,
    placement: *mut ls_placement,
    tiers: *mut i32,
    room: usize,
) -> ls_status {
    ffi(|| {
        let to = place(placement, "placement")?;
        // SAFETY: the caller says that a path and, but for NULL, options lie there.
        let asked = unsafe { ModelRequest::read(folder, options)? };
        let device = DEVICES.enter(device.id)?.device.clone();
        let planned = asked.choose(&device).and_then(|Chosen { model, settings, batch, context }| {
            let memory = Decoder::memory(&device, &model, &settings, Cache::full(batch, context))?;
            Ok((model.placement(&settings), memory))
        });
        // SAFETY: the caller says that a placement and, but for NULL, so many tiers may be written.
        unsafe { ls_placement::write(to, planned, device.memory_is_ram(), (tiers, room)) }
    })
}

/// Opens a Hugging Face folder or a GGUF file (of a family that docs/models.md names), reserves everything, loads what stays on the
/// device, and starts streaming. `options` may be NULL: the defaults. The device may be closed before the model is.
///
/// The model is used by one thread at a time (another gets LS_BUSY), not always the same. Only ls_model_cancel and
/// ls_model_stats may be called beside another call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_open(
    device: ls_device,
    folder: *const c_char,
    options: *const ls_model_options,
    model: *mut ls_model,
) -> ls_status {
    ffi(|| {
        let to = place(model, "model")?;
        // SAFETY: the caller says that a path and, but for NULL, options lie there.
        let asked = unsafe { ModelRequest::read(folder, options)? };
        let device = DEVICES.enter(device.id)?.device.clone();
        let (observers, trace) = asked.streams.observers()?;
        let Chosen { model, settings, batch, context } = &asked.choose(&device)?;
        let mut decoder = Decoder::with_observers(&device, model, settings, Cache::full(*batch, *context), &observers)?;
        if let Some(progress) = asked.streams.progress {
            decoder.streamer().track_progress(move |now| progress.report(now));
        }
        if let Some(log) = &asked.streams.log {
            let memory = Decoder::memory(&device, model, settings, Cache::full(*batch, *context))?;
            log.opened(&memory, &decoder.streamer().stats());
        }
        let streamer = decoder.streamer();
        let remote = Remote { canceller: streamer.canceller(), meter: streamer.meter() };
        let made = OpenModel { decoder: RefCell::new(decoder), batch: *batch, trace };
        let made = MODELS.open(made, Some(remote))?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(ls_model { id: made }) };
        Ok(())
    })
}

/// Closes a model: stops its threads and frees its memory. LS_LEAKED where the device does not answer: the handle is closed, but
/// what the device may still use stays reserved. LS_IO where only the trace could not be written.
#[unsafe(no_mangle)]
pub extern "C" fn ls_model_close(model: ls_model) -> ls_status {
    ffi(|| {
        let mut closed = MODELS.close(model.id, |_| Ok(()))?;
        traced::end(closed.decoder.get_mut().streamer(), closed.trace)
    })
}

/// Closes a model, for an engine that has its decoder from then on.
pub(super) fn taken_over(model: ls_model) -> Result<Decoder<AnyDevice>> {
    let closed = MODELS.close(model.id, |opened| match opened.trace {
        None => Ok(()),
        Some(_) => Err(Failure::invalid("model", "writes a trace, which an engine does not: open it without one")),
    })?;
    Ok(closed.decoder.into_inner())
}

/// What is known of the model. Set `info->size` to sizeof(ls_model_info) before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_describe(model: ls_model, info: *mut ls_model_info) -> ls_status {
    ffi(|| {
        let to = place(info, "info")?;
        let opened = MODELS.enter(model.id)?;
        let decoder = opened.decoder.borrow();
        let config = &decoder.model().config;
        let info = ls_model_info {
            size: size_of::<ls_model_info>(),
            vocab: config.vocab,
            hidden: config.hidden,
            layers: config.layers,
            max_positions: config.max_positions,
            context: decoder.context(),
            batch: opened.batch,
        };
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { write_sized(to, "info", info) }
    })
}

/// The sequences of a call.
///
/// # Safety
/// `sequences` is NULL or starts `count` of them, whose tokens live for `'a`.
unsafe fn batch<'a>(sequences: *const ls_sequence, count: usize) -> Result<Vec<Sequence<'a>>> {
    // SAFETY: the caller promised that it is NULL or starts so many sequences.
    let sequences = unsafe { list(sequences, count, "sequences")? }.iter().map(|sequence| {
        // SAFETY: the caller promised that each sequence has so many tokens.
        let tokens = unsafe { list(sequence.tokens, sequence.count, "tokens")? };
        Ok(Sequence { row: sequence.row, tokens })
    });
    sequences.collect()
}

/// Runs the tokens of `count` sequences through the model, after what the KV cache holds of them, and keeps their keys and
/// values. ls_model_logits then has what comes next, for a host that chooses tokens by itself. LS_CANCELLED after
/// ls_model_cancel. After an error the cache is as it was before. What a token comes to depends on the tokens before it in its
/// sequence and on nothing else, to the last bit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_forward(model: ls_model, sequences: *const ls_sequence, count: usize) -> ls_status {
    ffi(|| {
        // SAFETY: the caller says that so many sequences lie there.
        let batch = unsafe { batch(sequences, count)? };
        let opened = MODELS.enter(model.id)?;
        let mut decoder = opened.decoder.borrow_mut();
        Ok(decoder.forward(&batch)?)
    })
}

/// Writes the logits of the last token of each sequence that went through the model last, in their order: a row of F32 as long
/// as the vocabulary for each. `room` is how many floats `logits` has room for: sequences · vocab or more. LS_INVALID if it is
/// less, or where no pass that succeeded went before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_logits(model: ls_model, logits: *mut f32, room: usize) -> ls_status {
    ffi(|| {
        let to = place(logits, "logits")?;
        let opened = MODELS.enter(model.id)?;
        let mut decoder = opened.decoder.borrow_mut();
        let needed = decoder.sequences() * decoder.model().config.vocab;
        if room < needed {
            return Err(Failure::invalid("room", format!("is {room} floats, the logits are {needed}")));
        }
        let mut written = 0;
        decoder.last_logits(|row| {
            // SAFETY: the caller says that there is room for what `needed` counts: as many rows as there are sequences.
            unsafe { to.add(written).copy_from_nonoverlapping(NonNull::from(row).cast(), row.len()) };
            written += row.len();
            Ok(())
        })
    })
}

/// Runs the tokens of `count` sequences through the model in one pass, after what the KV cache holds of them, and continues
/// each by the most likely token, again and again, until one of the model's stop tokens comes, or it has `most` new tokens, or
/// it fills the context. `token_fn` is called with `user`, in this thread, for each new token but the one that stops.
///
/// The last new token of a sequence is not in the KV cache yet: to go on later, give it as the first of the next tokens.
/// LS_CANCELLED after ls_model_cancel; the cache is then as it was before the pass that was cancelled.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_generate(
    model: ls_model,
    sequences: *const ls_sequence,
    count: usize,
    most: usize,
    token_fn: ls_token_fn,
    user: *mut c_void,
) -> ls_status {
    ffi(|| {
        let token_fn = callback(token_fn, "token_fn")?;
        // SAFETY: the caller says that so many sequences lie there.
        let batch = unsafe { batch(sequences, count)? };
        // SAFETY: the caller's own function, with what it asked for.
        MODELS.enter(model.id)?.continue_by(None, &batch, most, |row, token| unsafe { token_fn(user, row, token) })
    })
}

/// As ls_model_generate, by tokens that are drawn as `sampling` says. The repetition penalty counts all tokens that the KV cache
/// holds of a sequence, and the new ones; the presence penalty counts those that this call chooses. A draw depends on the seed, the
/// row, and the number of tokens before it alone: to draw others for the same prompt in the same row, change the seed. LS_INVALID
/// for a value out of range, or for logits that are not numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_sample(
    model: ls_model,
    sequences: *const ls_sequence,
    count: usize,
    most: usize,
    sampling: *const ls_sampling,
    token_fn: ls_token_fn,
    user: *mut c_void,
) -> ls_status {
    ffi(|| {
        let token_fn = callback(token_fn, "token_fn")?;
        // SAFETY: the caller says that so many sequences lie there.
        let batch = unsafe { batch(sequences, count)? };
        // SAFETY: the caller says that as many bytes lie there as its size says.
        let sampling = unsafe { read_options(sampling, "sampling", Sampling::default().into())? };
        let sampling = Some(Sampling::from(sampling));
        // SAFETY: the caller's own function, with what it asked for.
        MODELS.enter(model.id)?.continue_by(sampling, &batch, most, |row, token| unsafe { token_fn(user, row, token) })
    })
}

/// What the model's generation_config.json suggests to those who sample; what it leaves out has no effect. Set `sampling->size` to
/// sizeof(ls_sampling) before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_suggested_sampling(model: ls_model, sampling: *mut ls_sampling) -> ls_status {
    ffi(|| {
        let to = place(sampling, "sampling")?;
        let opened = MODELS.enter(model.id)?;
        let suggested = opened.decoder.borrow().model().config.suggested.sampling;
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { write_sized(to, "sampling", suggested.into()) }
    })
}

impl OpenModel {
    /// Runs a batch, and continues it; `told` is C's callback. Greedily without `sampling`.
    fn continue_by(
        &self,
        sampling: Option<Sampling>,
        batch: &[Sequence<'_>],
        most: usize,
        mut told: impl FnMut(usize, u32) -> i32,
    ) -> Result<()> {
        let mut decoder = self.decoder.borrow_mut();
        let config = &decoder.model().config;
        let (stop, vocab) = (config.stop.clone(), config.vocab);
        let mut sampler = sampling.map(|sampling| Sampler::new(sampling, vocab)).transpose()?;
        decoder.forward(batch)?;
        let rows: Vec<_> = batch.iter().map(|sequence| sequence.row).collect();
        let choice = sampler.as_mut().map_or(Choice::Greedy, Choice::Sample);
        decoder.decode(&rows, most, &stop, choice, |row, token| match told(row, token) {
            0 => Ok(ControlFlow::Continue(())),
            LS_END => Ok(ControlFlow::Break(())),
            other => Err(Failure::new(ls_status::LS_CALLBACK, format!("token_fn returned {other}"))),
        })
    }

    fn check_row(&self, row: usize) -> Result<()> {
        if row < self.batch {
            return Ok(());
        }
        Err(Failure::invalid("row", format!("is {row}, the KV cache has {} rows", self.batch)))
    }
}

/// How many tokens row `row` of the KV cache holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_length(model: ls_model, row: usize, length: *mut usize) -> ls_status {
    ffi(|| {
        let to = place(length, "length")?;
        let opened = MODELS.enter(model.id)?;
        opened.check_row(row)?;
        let length = opened.decoder.borrow().length(row);
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(length) };
        Ok(())
    })
}

/// Forgets all tokens of row `row` of the KV cache from number `length` on.
#[unsafe(no_mangle)]
pub extern "C" fn ls_model_truncate(model: ls_model, row: usize, length: usize) -> ls_status {
    ffi(|| {
        let opened = MODELS.enter(model.id)?;
        opened.check_row(row)?;
        let truncated = opened.decoder.borrow_mut().truncate(row, length);
        Ok(truncated?)
    })
}

/// Cancels the pass under way, or, between passes, the next one. From any thread, also while another call uses the model.
#[unsafe(no_mangle)]
pub extern "C" fn ls_model_cancel(model: ls_model) -> ls_status {
    ffi(|| MODELS.cancel(model.id))
}

/// Counts since the model was opened, from any thread at any time. Set `stats->size` to sizeof(ls_stats) before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_model_stats(model: ls_model, stats: *mut ls_stats) -> ls_status {
    ffi(|| {
        let to = place(stats, "stats")?;
        let stats = MODELS.stats(model.id)?;
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { options::write_stats(to, &stats) }
    })
}
