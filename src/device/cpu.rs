//! The CPU as a device: its memory is RAM, and a stream runs each piece of work in the thread that enqueues it, before the
//! call returns. The reference for every other device, and the default where there is none.

use std::{
    ptr, slice,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    arena::Arena,
    device::{Device, DevicePtr, StreamId, pool::pool},
    dtype::{self, DType},
    error::Result,
    memory,
    packed::Parts,
    quantised::{INPUTS, Recipe},
};

/// Rows of a quantised matrix that a thread makes at a time: what lies across the rows is read in whole lines of the cache.
const ROWS: usize = 64;

/// The CPU device.
#[derive(Clone, Debug, Default)]
pub struct Cpu;

/// A stream of the CPU device: nothing is ever pending on it.
#[derive(Debug)]
pub struct CpuStream(());

/// An event of the CPU device: always reached, since a wait can only follow work that is done.
#[derive(Debug)]
pub struct CpuEvent(());

/// Memory of the CPU device.
pub struct CpuMemory(Arena);

// SAFETY: memory is an arena's, which is as long as was asked for; work is done when its call returns.
unsafe impl Device for Cpu {
    type Stream = CpuStream;
    type Event = CpuEvent;
    type Memory = CpuMemory;
    type Registration = ();

    fn describe(&self) -> String {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        format!("cpu ({threads} threads)")
    }

    fn bind_thread(&self) -> Result<()> {
        Ok(())
    }

    fn memory_is_ram(&self) -> bool {
        true
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(memory::free().unwrap_or(usize::MAX))
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<CpuMemory> {
        Ok(CpuMemory(Arena::new(what, 1, bytes)?))
    }

    fn address(&self, memory: &CpuMemory) -> DevicePtr {
        DevicePtr::new(memory.0.slot(0).as_ptr())
    }

    unsafe fn register(&self, _host: *mut u8, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn stream(&self) -> Result<CpuStream> {
        Ok(CpuStream(()))
    }

    fn stream_id(&self, _: &CpuStream) -> StreamId {
        StreamId::CALLER
    }

    fn event(&self) -> Result<CpuEvent> {
        Ok(CpuEvent(()))
    }

    unsafe fn copy_to_device(&self, to: DevicePtr, from: *const u8, bytes: usize, _: &CpuStream) -> Result<()> {
        // SAFETY: the caller promised that both ranges are valid; one is the host's and one the device's, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(from, to.as_ptr(), bytes) };
        Ok(())
    }

    unsafe fn copy_to_host(&self, to: *mut u8, from: DevicePtr, bytes: usize, _: &CpuStream) -> Result<()> {
        // SAFETY: the caller promised that both ranges are valid; one is the host's and one the device's, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, bytes) };
        Ok(())
    }

    unsafe fn copy_on_device(&self, to: DevicePtr, from: DevicePtr, bytes: usize, _: &CpuStream) -> Result<()> {
        // SAFETY: the caller promised that both ranges are valid and apart.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), bytes) };
        Ok(())
    }

    unsafe fn cast_raw(
        &self,
        (to, to_type): (DevicePtr, DType),
        (from, from_type): (DevicePtr, DType),
        elements: usize,
        _: &CpuStream,
    ) -> Result<()> {
        // SAFETY: the caller promised that both ranges are valid and apart; bytes have no alignment.
        let (src, dst) = unsafe {
            (
                slice::from_raw_parts(from.as_ptr(), from_type.bytes(elements)),
                slice::from_raw_parts_mut(to.as_ptr(), to_type.bytes(elements)),
            )
        };
        dtype::convert(from_type, src, to_type, dst);
        Ok(())
    }

    unsafe fn dequantise_raw(
        &self,
        (to, to_type): (DevicePtr, DType),
        from: [DevicePtr; INPUTS],
        recipe: &Recipe,
        _: &CpuStream,
    ) -> Result<()> {
        let lengths = recipe.input_bytes();
        let input = |at: usize| {
            // SAFETY: the caller promised that the recipe's tensors lie there; of those that there are not no byte is looked at.
            unsafe { slice::from_raw_parts(from[at].as_ptr(), lengths[at]) }
        };
        let (inputs, row_bytes) = (std::array::from_fn(input), to_type.bytes(recipe.columns));
        pool()?.deal(recipe.rows.div_ceil(ROWS), |piece| {
            let first = piece * ROWS;
            let bytes = ROWS.min(recipe.rows - first) * row_bytes;
            // SAFETY: the caller promised that the matrix is valid and apart from the others, and these rows are this piece's alone.
            let rows = unsafe { slice::from_raw_parts_mut(to.offset(first * row_bytes).as_ptr(), bytes) };
            recipe.make_rows(inputs, to_type, first, rows);
        });
        Ok(())
    }

    unsafe fn unpack_raw(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        parts: Parts<'_>,
        report: *mut u32,
        _: &CpuStream,
    ) -> Result<()> {
        // SAFETY: the caller promised that both ranges are valid and apart, and where the weights go the device's alignment is more
        // than theirs.
        let (packed, weights) = unsafe {
            (
                slice::from_raw_parts(from.as_ptr(), parts.bytes()),
                slice::from_raw_parts_mut(to.as_ptr().cast::<u16>(), parts.weights),
            )
        };
        if parts.decode(packed, weights).is_err() {
            // SAFETY: the caller promised a word that is only read meanwhile, and by whom may read atomics.
            unsafe { AtomicU32::from_ptr(report) }.store(1, Ordering::Release);
        }
        Ok(())
    }

    fn record(&self, _: &CpuEvent, _: &CpuStream) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: &CpuStream, _: &CpuEvent) -> Result<()> {
        Ok(())
    }

    fn query(&self, _: &CpuEvent) -> Result<bool> {
        Ok(true)
    }

    fn synchronize(&self, _: &CpuEvent) -> Result<()> {
        Ok(())
    }
}
