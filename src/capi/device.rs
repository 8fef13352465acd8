//! Devices and streams.

use std::ffi::{CString, c_char, c_void};

use super::{
    any::{Any, AnyDevice, AnyStream},
    checkpoint::code_of,
    ffi::{Result, c_text, ffi, ls_status, place},
    handles::{HandleTable, Kind},
};
use crate::{
    device::{Cpu, Cuda, Device},
    error::Error,
    kernels::Kernels,
};

/// Where layers arrive and kernels run. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_device {
    /// The library's.
    pub id: u64,
}

/// A queue of a device's work that runs in order. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_stream {
    /// The library's.
    pub id: u64,
}

/// The types that a device's kernels compute with.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_precision {
    /// ls_dtype of activations, but for those that are always F32.
    pub activation: i32,
    /// ls_dtype of the KV cache.
    pub cache: i32,
    /// ls_dtype that weights must have, to be converted on arrival; LS_AS_STORED if F32, F16 and BF16 will do.
    pub weight: i32,
}

pub(super) struct OpenDevice {
    pub(super) device: AnyDevice,
    description: CString,
}

/// A stream and its device.
pub(super) struct Queue {
    pub(super) device: AnyDevice,
    pub(super) stream: AnyStream,
}

pub(super) static DEVICES: HandleTable<OpenDevice> = HandleTable::new(Kind::Device);
pub(super) static STREAMS: HandleTable<Queue> = HandleTable::new(Kind::Stream);

fn opened(device: AnyDevice) -> Result<ls_device> {
    let description = c_text(&device.describe())?;
    Ok(ls_device { id: DEVICES.open(OpenDevice { device, description }, None)? })
}

/// The CPU as a device: its memory is RAM, and a stream runs each piece of work in the thread that enqueues it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_device_cpu(device: *mut ls_device) -> ls_status {
    ffi(|| {
        let to = place(device, "device")?;
        let made = opened(Any::Cpu(Cpu))?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(made) };
        Ok(())
    })
}

/// GPU number `ordinal`, counted from 0 as CUDA_VISIBLE_DEVICES leaves them. It becomes this thread's current device.
/// LS_UNSUPPORTED in a library built without CUDA, LS_CUDA where there is no driver or no such GPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_device_cuda(ordinal: u32, device: *mut ls_device) -> ls_status {
    ffi(|| {
        let to = place(device, "device")?;
        let made = opened(Any::Cuda(Cuda::new(ordinal)?))?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(made) };
        Ok(())
    })
}

/// Closes a device. What was made on it stays.
#[unsafe(no_mangle)]
pub extern "C" fn ls_device_close(device: ls_device) -> ls_status {
    ffi(|| DEVICES.close(device.id, |_| Ok(())).map(drop))
}

/// One line for people: what device this is. The text is the device's, until that is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_device_describe(device: ls_device, description: *mut *const c_char) -> ls_status {
    ffi(|| {
        let to = place(description, "description")?;
        let description = DEVICES.enter(device.id)?.description.as_ptr();
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(description) };
        Ok(())
    })
}

/// The types that the device's kernels compute with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_device_precision(device: ls_device, precision: *mut ls_precision) -> ls_status {
    ffi(|| {
        let to = place(precision, "precision")?;
        let found = DEVICES.enter(device.id)?.device.precision();
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe {
            to.write(ls_precision {
                activation: code_of(found.activation),
                cache: code_of(found.cache),
                weight: found.weight.map_or(0, code_of),
            });
        }
        Ok(())
    })
}

/// Whether ls_attention computes heads of `size` elements on the device: LS_KERNEL if not, and ls_last_error says which it does.
#[unsafe(no_mangle)]
pub extern "C" fn ls_device_check_head_size(device: ls_device, size: usize) -> ls_status {
    ffi(|| Ok(DEVICES.enter(device.id)?.device.check_head_size(size)?))
}

/// The device memory, in bytes, that kernels take at most for themselves on each stream that was prepared; on the CPU device RAM,
/// whatever the number of streams.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_device_scratch_bytes(device: ls_device, bytes: *mut usize) -> ls_status {
    ffi(|| {
        let to = place(bytes, "bytes")?;
        let found = DEVICES.enter(device.id)?.device.scratch_bytes();
        // SAFETY: `to` is neither NULL nor misaligned, and the header asks that a size_t may be written there.
        unsafe { to.write(found) };
        Ok(())
    })
}

/// A new stream of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_stream_open(device: ls_device, stream: *mut ls_stream) -> ls_status {
    ffi(|| {
        let to = place(stream, "stream")?;
        let device = DEVICES.enter(device.id)?.device.clone();
        device.bind_thread()?;
        let made = STREAMS.open(Queue { stream: device.stream()?, device }, None)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(ls_stream { id: made }) };
        Ok(())
    })
}

/// # Safety
/// The stream exists until what is returned is dropped.
unsafe fn borrowed(device: &AnyDevice, stream: *mut c_void) -> Result<AnyStream> {
    #[cfg(feature = "cuda")]
    if let Any::Cuda(cuda) = device {
        cuda.bind_thread()?;
        // SAFETY: the caller says that the stream is one of this device, and is not destroyed before its handle is closed.
        return Ok(Any::Cuda(unsafe { cuda.stream_from_raw(stream)? }));
    }
    let _ = stream;
    let what = format!("a CUDA stream on {}", device.describe());
    Err(Error::Unsupported { what, remedy: "use ls_stream_open".into() }.into())
}

/// The cudaStream_t of a stream that has one.
fn raw_of(queue: &Queue) -> Result<*mut c_void> {
    #[cfg(feature = "cuda")]
    if let Any::Cuda(stream) = &queue.stream {
        return Ok(stream.as_ptr());
    }
    let what = format!("a CUDA stream of {}", queue.device.describe());
    Err(Error::Unsupported { what, remedy: "it has none".into() }.into())
}

/// The caller's own stream of a CUDA device: `cuda_stream` is a cudaStream_t (the legacy default stream is written
/// cudaStreamLegacy). It stays the caller's, and must exist until this handle is closed. LS_UNSUPPORTED for a device without
/// such streams, for cudaStreamPerThread, and for a stream that is capturing a graph.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_stream_from_cuda(
    device: ls_device,
    cuda_stream: *mut c_void,
    stream: *mut ls_stream,
) -> ls_status {
    ffi(|| {
        let to = place(stream, "stream")?;
        // Its address is a number to us, and may be odd.
        place(cuda_stream.cast::<u8>(), "cuda_stream")?;
        let device = DEVICES.enter(device.id)?.device.clone();
        // SAFETY: the caller says that the stream is one of this device, and is not destroyed before its handle is closed.
        let made = unsafe { borrowed(&device, cuda_stream)? };
        let made = STREAMS.open(Queue { stream: made, device }, None)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(ls_stream { id: made }) };
        Ok(())
    })
}

/// Closes a stream. Work that is on it is finished; a caller's own stream is left as it is.
#[unsafe(no_mangle)]
pub extern "C" fn ls_stream_close(stream: ls_stream) -> ls_status {
    ffi(|| STREAMS.close(stream.id, |_| Ok(())).map(drop))
}

/// Waits until all work that was enqueued on the stream is done.
#[unsafe(no_mangle)]
pub extern "C" fn ls_stream_synchronize(stream: ls_stream) -> ls_status {
    ffi(|| {
        let queue = STREAMS.enter_lent(stream.id)?;
        queue.device.bind_thread()?;
        Ok(queue.device.drain(&queue.stream)?)
    })
}

/// The cudaStream_t behind a stream of a CUDA device, for the caller's own kernels; LS_UNSUPPORTED on others. It lives until
/// the stream is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_stream_to_cuda(stream: ls_stream, cuda_stream: *mut *mut c_void) -> ls_status {
    ffi(|| {
        let to = place(cuda_stream, "cuda_stream")?;
        let raw = raw_of(&*STREAMS.enter_lent(stream.id)?)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(raw) };
        Ok(())
    })
}
