//! Layers: taken, looked into, released; and whole passes by callback.

use std::ffi::{c_char, c_void};

use super::{
    any::AnyDevice,
    checkpoint::{code_of, dtype_of},
    device::{STREAMS, ls_stream},
    ffi::{Failure, Result, callback, ffi, ls_status, place, text},
    handles::Kind,
    streamer::{STREAMERS, Streamer, ls_streamer},
};
use crate::{
    device::{DevicePtr, Shape, TensorMut, TensorRef},
    dtype::DType,
    pipeline::LayerToken,
};

/// A unit on the device. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_layer {
    /// The library's.
    pub id: u64,
}

/// A tensor in device memory, row-major and without gaps.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_tensor {
    /// Device memory, on the CPU device RAM. What the library hands out begins on a boundary of 256 bytes; on the CPU device, where
    /// layers are used where they were read to, it is aligned for its type. Kernels take what is.
    pub data: *mut c_void,
    /// An ls_dtype.
    pub dtype: i32,
    /// How many dimensions, at most 8; 0 for a scalar.
    pub rank: u32,
    /// Dimensions, slowest first; those from `rank` on are not looked at.
    pub shape: [usize; 8],
}

impl ls_tensor {
    pub(super) fn view(tensor: TensorRef<'_, AnyDevice>) -> Self {
        let mut shape = [1; 8];
        shape[..tensor.shape().len()].copy_from_slice(tensor.shape());
        let (dtype, rank) = (code_of(tensor.dtype()), tensor.shape().len() as u32);
        Self { data: tensor.ptr().as_ptr().cast(), dtype, rank, shape }
    }

    /// Its type and dimensions, of which the bytes can be addressed.
    fn kind(&self, name: &str) -> Result<(DType, &[usize])> {
        let dtype = dtype_of(self.dtype, name)?;
        let shape = self.shape.get(..self.rank as usize);
        let shape = shape.ok_or_else(|| Failure::invalid(name, format!("its rank is {}, at most 8", self.rank)))?;
        if dtype.bytes_of(shape).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(Failure::invalid(
                name,
                format!("{dtype} {shape:?} is more than can be addressed, or no whole blocks"),
            ));
        }
        Ok((dtype, shape))
    }

    /// What a kernel is given.
    ///
    /// # Safety
    /// The memory is there, and nothing that is not ordered against the kernel's stream writes it meanwhile.
    pub(super) unsafe fn write<'a>(&self, name: &str) -> Result<TensorMut<'a, AnyDevice>> {
        let (dtype, shape) = self.kind(name)?;
        let data = place(self.data.cast::<u8>(), name)?.as_ptr();
        if data.addr() % dtype.align() != 0 {
            return Err(Failure::invalid(name, format!("its memory is not aligned for {dtype}")));
        }
        // SAFETY: the caller promised that the memory is there; type, length and alignment were checked above.
        Ok(unsafe { TensorMut::from_raw(DevicePtr::new(data), dtype, Shape::new(shape)?) })
    }

    /// The same for reading.
    ///
    /// # Safety
    /// As [`write`](Self::write).
    pub(super) unsafe fn read<'a>(&self, name: &str) -> Result<TensorRef<'a, AnyDevice>> {
        // SAFETY: the caller promised the same of reading as `write` asks.
        let tensor = unsafe { self.write(name)? };
        // SAFETY: the same memory, and the view for writing is gone.
        Ok(unsafe { TensorRef::from_raw(tensor.ptr(), tensor.dtype(), Shape::new(tensor.shape())?) })
    }
}

/// How many bytes a tensor has: the product of its dimensions, divided by ls_dtype_block, times ls_dtype_size. LS_INVALID where that is no tensor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_tensor_bytes(tensor: *const ls_tensor, bytes: *mut usize) -> ls_status {
    ffi(|| {
        let (tensor, to) = (place(tensor, "tensor")?, place(bytes, "bytes")?);
        // SAFETY: the caller says that a tensor lies there; its own fields alone are read.
        let (dtype, shape) = unsafe { tensor.as_ref().kind("tensor")? };
        // SAFETY: it is not NULL, and the caller says that it may be written.
        unsafe { to.write(dtype.bytes(shape.iter().product())) };
        Ok(())
    })
}

/// Called by ls_run_pass for each layer in order. It enqueues its work on the stream that ls_run_pass was given, and returns
/// 0; anything else ends the pass with LS_CALLBACK. `layer` is released when it returns.
///
/// In it ls_layer_index, ls_layer_check_cancelled, ls_layer_tensor, ls_layer_tensor_at, ls_streamer_unit and its kin,
/// ls_streamer_stats, kernels on the stream and ls_cancel may be called; any other call on the streamer returns LS_BUSY. Neither
/// longjmp nor an exception may leave it.
pub type ls_layer_fn = Option<unsafe extern "C" fn(user: *mut c_void, layer: ls_layer) -> i32>;

/// Waits until the next unit is on its way to the device and orders `stream` after its arrival; the thread does not wait for
/// the device. On the CPU device it has arrived when this returns. After a pass's last unit comes the first of the next pass.
/// Up to n_gpu layers may be held at once, and released in any order. Allocates nothing.
///
/// LS_READ if the unit could not be read: every unit before it was handed over, and the error stays until ls_rewind.
/// LS_LAYERS_HELD if n_gpu are held already. LS_CANCELLED after ls_cancel, until ls_rewind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_next_layer(streamer: ls_streamer, stream: ls_stream, layer: *mut ls_layer) -> ls_status {
    ffi(|| {
        let to = place(layer, "layer")?;
        let streamer = STREAMERS.enter(streamer.id)?;
        let queue = STREAMS.enter_lent(stream.id)?;
        let number = streamer.take(&queue)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(ls_layer { id: Kind::Layer.id(streamer.index(), number) }) };
        Ok(())
    })
}

/// Gives a layer back: its memory is filled again once the work now on `stream`, which need not be the one that it was taken
/// with, is done. Allocates nothing.
#[unsafe(no_mangle)]
pub extern "C" fn ls_release_layer(layer: ls_layer, stream: ls_stream) -> ls_status {
    ffi(|| {
        let (index, number) = Kind::Layer.parts(layer.id)?;
        let streamer = STREAMERS.enter_at(index, false).map_err(of_layer)?;
        let queue = STREAMS.enter_lent(stream.id)?;
        streamer.give_back(number, &queue)
    })
}

/// A layer whose streamer was closed was released before.
#[cold]
fn of_layer(failure: Failure) -> Failure {
    if failure.status == ls_status::LS_CLOSED { Kind::Layer.closed() } else { failure }
}

/// Looks at a layer that is held.
fn look<R>(layer: ls_layer, look: impl FnOnce(&Streamer, &LayerToken) -> Result<R>) -> Result<R> {
    let (index, number) = Kind::Layer.parts(layer.id)?;
    let streamer = STREAMERS.enter_at(index, true).map_err(of_layer)?;
    streamer.with_layer(number, |token| look(&streamer, token))
}

/// A layer's tensor by its number, which the layer has.
fn tensor_at(streamer: &Streamer, token: &LayerToken, index: usize) -> Result<ls_tensor> {
    // SAFETY: the token is this streamer's; the header says on which stream and how long the tensor may be used.
    Ok(ls_tensor::view(unsafe { streamer.streamer.token_tensor_at(token, index)? }))
}

/// The layer's number in the pass, from 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_layer_index(layer: ls_layer, index: *mut usize) -> ls_status {
    ffi(|| {
        let to = place(index, "index")?;
        let unit = look(layer, |_, token| Ok(token.index()))?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(unit) };
        Ok(())
    })
}

/// LS_CANCELLED if the layer's pass was cancelled, for work on a layer that takes long: nothing else ends it early.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_layer_check_cancelled(layer: ls_layer) -> ls_status {
    ffi(|| look(layer, |streamer, _| Ok(streamer.streamer.check_cancelled()?)))
}

/// The layer's tensor called `name`, or LS_NO_TENSOR. Its memory is the library's: to be read, by work on the layer's stream,
/// until the layer is released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_layer_tensor(layer: ls_layer, name: *const c_char, tensor: *mut ls_tensor) -> ls_status {
    ffi(|| {
        let to = place(tensor, "tensor")?;
        // SAFETY: the caller says that a text ends there, if it is not NULL.
        let name = unsafe { text(name, "name")? };
        let found = look(layer, |streamer, token| {
            let index = streamer.streamer.plan().units[token.index()].find(name)?;
            tensor_at(streamer, token, index)
        })?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(found) };
        Ok(())
    })
}

/// The same by the number that ls_streamer_tensor_index found.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_layer_tensor_at(layer: ls_layer, index: usize, tensor: *mut ls_tensor) -> ls_status {
    ffi(|| {
        let to = place(tensor, "tensor")?;
        let found = look(layer, |streamer, token| {
            let tensors = streamer.streamer.plan().units[token.index()].tensors.len();
            if index >= tensors {
                return Err(Failure::invalid("index", format!("is {index}, the layer has {tensors} tensors")));
            }
            tensor_at(streamer, token, index)
        })?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(found) };
        Ok(())
    })
}

/// Runs one pass: `layer_fn` is called with `user` for each unit in order. A pass that was begun before is abandoned. After an
/// error the next pass starts afresh at the first unit. The thread never waits for the device.
///
/// LS_CALLBACK if `layer_fn` returned anything but 0, LS_LAYERS_HELD if layers are held; else as ls_next_layer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_run_pass(
    streamer: ls_streamer,
    stream: ls_stream,
    layer_fn: ls_layer_fn,
    user: *mut c_void,
) -> ls_status {
    ffi(|| {
        let layer_fn = callback(layer_fn, "layer_fn")?;
        let streamer = STREAMERS.enter(streamer.id)?;
        // Not one that is lent already: only one pass can take it back.
        let queue = STREAMS.enter(stream.id)?;
        streamer.run_pass(&queue, |number| {
            let layer = ls_layer { id: Kind::Layer.id(streamer.index(), number) };
            // SAFETY: the caller's own function, with what it asked for.
            match queue.lend(|| streamer.lend(|| unsafe { layer_fn(user, layer) })) {
                0 => Ok(()),
                returned => Err(Failure::new(ls_status::LS_CALLBACK, format!("layer_fn returned {returned}"))),
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::checkpoint::ls_dtype;

    #[test]
    fn a_tensor_of_blocks_has_the_bytes_of_its_blocks_and_lies_anywhere() {
        let mut memory = [0u8; 80];
        let mut tensor = |dtype: ls_dtype, columns: usize| {
            let data = memory[1..].as_mut_ptr().cast();
            ls_tensor { data, dtype: dtype as i32, rank: 2, shape: [2, columns, 1, 1, 1, 1, 1, 1] }
        };
        let mut bytes = 0;
        let blocks = tensor(ls_dtype::LS_Q8_0, 32);
        // SAFETY: the tensor and the number are there.
        let said =
            unsafe { [ls_tensor_bytes(&blocks, &mut bytes), ls_tensor_bytes(&tensor(ls_dtype::LS_Q8_0, 33), &mut 0)] };
        assert_eq!((said, bytes), ([ls_status::LS_OK, ls_status::LS_INVALID], 68));
        // SAFETY: so many bytes lie there, which nobody else uses.
        let written = unsafe { blocks.write("x").map(|tensor| tensor.bytes()) };
        assert!(written.is_ok_and(|bytes| bytes == 68));
        // SAFETY: as above.
        let written = unsafe { tensor(ls_dtype::LS_F32, 9).write("x").map(|tensor| tensor.bytes()) };
        assert!(written.is_err(), "F32 at an odd address");
    }
}
