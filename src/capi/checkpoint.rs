//! Checkpoints: opened from a folder, or made of the caller's own table.

use std::{
    ffi::{CString, c_char},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::Arc,
};

use super::{
    ffi::{Failure, Result, c_text, ffi, list, ls_status, path, place, text},
    handles::{HandleTable, Kind},
};
use crate::{
    checkpoint::{Checkpoint, StoredTensor},
    dtype::DType,
    packed::Description,
};

/// Element types. The names are those of the safetensors format; from LS_Q4_0 on, types of quantised weights in blocks, those of GGUF
/// files.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the type of that name")]
pub enum ls_dtype {
    /// Where a type to convert to is asked for: none.
    LS_AS_STORED = 0,
    LS_BOOL = 1,
    LS_U8 = 2,
    LS_I8 = 3,
    LS_F8_E4M3 = 4,
    LS_F8_E5M2 = 5,
    LS_U16 = 6,
    LS_I16 = 7,
    LS_F16 = 8,
    LS_BF16 = 9,
    LS_U32 = 10,
    LS_I32 = 11,
    LS_F32 = 12,
    LS_U64 = 13,
    LS_I64 = 14,
    LS_F64 = 15,
    LS_Q4_0 = 16,
    LS_Q4_1 = 17,
    LS_Q5_0 = 18,
    LS_Q5_1 = 19,
    LS_Q8_0 = 20,
    LS_Q2_K = 21,
    LS_Q3_K = 22,
    LS_Q4_K = 23,
    LS_Q5_K = 24,
    LS_Q6_K = 25,
    LS_IQ4_NL = 26,
    LS_IQ4_XS = 27,
    LS_MXFP4 = 28,
    LS_F8_64 = 29,
    LS_U4_32 = 30,
    LS_U4_128 = 31,
    LS_NF4_64 = 32,
}

/// The type's code.
pub(super) fn code_of(dtype: DType) -> i32 {
    dtype as i32 + 1
}

/// The type of a code.
pub(super) fn dtype_of(code: i32, name: &str) -> Result<DType> {
    let dtype = usize::try_from(code).ok().and_then(|code| DType::all().nth(code.checked_sub(1)?));
    dtype.ok_or_else(|| Failure::invalid(name, format!("{code} is no ls_dtype of a tensor")))
}

/// A checkpoint: a table that says where each tensor lies. Zeroed: none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_checkpoint {
    /// The library's.
    pub id: u64,
}

/// A tensor in a file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_stored_tensor {
    /// Full name, such as "model.layers.0.mlp.up_proj.weight".
    pub name: *const c_char,
    /// The file that holds the bytes.
    pub file: *const c_char,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Dimensions, slowest first.
    pub shape: *const usize,
    /// How many dimensions; 0 for a scalar.
    pub rank: usize,
    /// An ls_dtype.
    pub dtype: i32,
}

struct TensorName {
    name: CString,
    file: Arc<CString>,
    offset: u64,
    dtype: DType,
    shape: Vec<usize>,
}

/// What lies behind a handle: the checkpoint, and its tensors as C sees them, by name.
pub(super) struct OpenCheckpoint {
    pub(super) checkpoint: Checkpoint,
    tensors: Vec<TensorName>,
}

impl OpenCheckpoint {
    /// The tensor called `name`.
    fn tensor(&self, name: &str) -> Result<&TensorName> {
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_bytes().cmp(name.as_bytes()));
        found.map(|index| &self.tensors[index]).map_err(|_| {
            let message = format!("{} has no tensor named {name}", self.checkpoint.source().display());
            Failure::new(ls_status::LS_NO_TENSOR, message)
        })
    }
}

pub(super) static CHECKPOINTS: HandleTable<OpenCheckpoint> = HandleTable::new(Kind::Checkpoint);

fn opened(checkpoint: Checkpoint) -> Result<ls_checkpoint> {
    let mut tensors = Vec::new();
    let mut last: Option<(PathBuf, Arc<CString>)> = None;
    for name in checkpoint.names() {
        let found = checkpoint.describe(name).zip(checkpoint.location(name));
        let ((dtype, shape), (path, offset)) = found.expect("it is one of the names");
        let file = match &last {
            Some((same, file)) if same == path => file.clone(),
            _ => {
                let file = CString::new(path.as_os_str().as_bytes()).expect("a path that was opened has no zero");
                last.insert((path.to_owned(), Arc::new(file))).1.clone()
            }
        };
        tensors.push(TensorName { name: c_text(name)?, file, offset, dtype, shape: shape.to_vec() });
    }
    Ok(ls_checkpoint { id: CHECKPOINTS.open(OpenCheckpoint { checkpoint, tensors }, None)? })
}

impl TensorName {
    fn view(&self) -> ls_stored_tensor {
        ls_stored_tensor {
            name: self.name.as_ptr(),
            file: self.file.as_ptr(),
            offset: self.offset,
            shape: self.shape.as_ptr(),
            rank: self.shape.len(),
            dtype: code_of(self.dtype),
        }
    }
}

/// Opens a Hugging Face folder: model.safetensors, or else model.safetensors.index.json with its shards; or a GGUF file, whose
/// tensors have the folder's names then. Headers are read and checked, no weights. What cannot be read of it is an error for
/// those who ask for such a tensor. Close the checkpoint with ls_checkpoint_close.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_checkpoint_open(folder: *const c_char, checkpoint: *mut ls_checkpoint) -> ls_status {
    ffi(|| {
        let to = place(checkpoint, "checkpoint")?;
        // SAFETY: the caller says that a path ends there, if it is not NULL.
        let folder = unsafe { path(folder, "folder")? };
        let made = opened(Checkpoint::open(folder)?)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(made) };
        Ok(())
    })
}

/// Takes the caller's own table of `count` tensors, for weights in files of any layout. Tensors must lie inside their files
/// and must not overlap; names must be unique. Everything is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_checkpoint_from_table(
    tensors: *const ls_stored_tensor,
    count: usize,
    checkpoint: *mut ls_checkpoint,
) -> ls_status {
    ffi(|| {
        let to = place(checkpoint, "checkpoint")?;
        // SAFETY: the caller says that so many tensors lie there.
        let table = unsafe { list(tensors, count, "tensors")? }.iter().map(|tensor| {
            // SAFETY: the caller says that name and file are texts and that the shape has so many dimensions; a scalar may have none.
            let (name, file, shape) = unsafe {
                let shape = if tensor.rank == 0 { &[] } else { list(tensor.shape, tensor.rank, "shape")? };
                (text(tensor.name, "name")?, path(tensor.file, "file")?, shape)
            };
            Ok(StoredTensor {
                name: name.to_owned(),
                file: file.into(),
                offset: tensor.offset,
                dtype: dtype_of(tensor.dtype, "dtype")?,
                shape: shape.to_vec(),
            })
        });
        let made = opened(Checkpoint::from_table(table.collect::<Result<Vec<_>>>()?)?)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(made) };
        Ok(())
    })
}

/// Closes a checkpoint. What was made from it stays.
#[unsafe(no_mangle)]
pub extern "C" fn ls_checkpoint_close(checkpoint: ls_checkpoint) -> ls_status {
    ffi(|| CHECKPOINTS.close(checkpoint.id, |_| Ok(())).map(drop))
}

/// How many tensors there are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_checkpoint_tensor_count(checkpoint: ls_checkpoint, count: *mut usize) -> ls_status {
    ffi(|| {
        let to = place(count, "count")?;
        let count = CHECKPOINTS.enter(checkpoint.id)?.tensors.len();
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(count) };
        Ok(())
    })
}

/// Tensor number `index` in the order of names. What `tensor` points to is the checkpoint's, until that is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_checkpoint_tensor_at(
    checkpoint: ls_checkpoint,
    index: usize,
    tensor: *mut ls_stored_tensor,
) -> ls_status {
    ffi(|| {
        let to = place(tensor, "tensor")?;
        let opened = CHECKPOINTS.enter(checkpoint.id)?;
        let count = opened.tensors.len();
        let found = opened.tensors.get(index);
        let found = found.ok_or_else(|| Failure::invalid("index", format!("is {index}, there are {count} tensors")))?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(found.view()) };
        Ok(())
    })
}

/// The tensor called `name`, or LS_NO_TENSOR. What `tensor` points to is the checkpoint's, until that is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_checkpoint_tensor(
    checkpoint: ls_checkpoint,
    name: *const c_char,
    tensor: *mut ls_stored_tensor,
) -> ls_status {
    ffi(|| {
        let to = place(tensor, "tensor")?;
        // SAFETY: the caller says that a text ends there, if it is not NULL.
        let name = unsafe { text(name, "name")? };
        let opened = CHECKPOINTS.enter(checkpoint.id)?;
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(opened.tensor(name)?.view()) };
        Ok(())
    })
}

/// Writes how many bytes a tensor takes in its file: fewer than its type and shape say, if it is packed there; else as many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_checkpoint_stored_bytes(
    checkpoint: ls_checkpoint,
    name: *const c_char,
    bytes: *mut usize,
) -> ls_status {
    ffi(|| {
        let to = place(bytes, "bytes")?;
        // SAFETY: the caller says that a text ends there, if it is not NULL.
        let name = unsafe { text(name, "name")? };
        let opened = CHECKPOINTS.enter(checkpoint.id)?;
        let tensor = opened.tensor(name)?;
        let packed = opened.checkpoint.packing(name).map(Description::bytes);
        let plain = tensor.dtype.bytes_of(&tensor.shape).expect("it was checked when it was opened");
        // SAFETY: the pointer was checked; the caller says that what it points to may be written.
        unsafe { to.write(packed.unwrap_or(plain)) };
        Ok(())
    })
}

/// Bytes of one element of an ls_dtype, or of one block of ls_dtype_block elements; 0 for a number that is none. From any thread.
#[unsafe(no_mangle)]
pub extern "C" fn ls_dtype_size(dtype: i32) -> usize {
    dtype_of(dtype, "dtype").map_or(0, DType::size)
}

/// Elements of one block of an ls_dtype: 1 where each is stored by itself; 0 for a number that is none. From any thread.
#[unsafe(no_mangle)]
pub extern "C" fn ls_dtype_block(dtype: i32) -> usize {
    dtype_of(dtype, "dtype").map_or(0, DType::block_elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_header() {
        for (code, dtype) in (1..).zip(DType::all()) {
            assert_eq!((code_of(dtype), dtype_of(code, "").unwrap()), (code, dtype));
        }
        for (dtype, code) in
            [(DType::F32, ls_dtype::LS_F32), (DType::F64, ls_dtype::LS_F64), (DType::NF4_64, ls_dtype::LS_NF4_64)]
        {
            assert_eq!(code_of(dtype), code as i32);
        }
        assert_eq!((ls_dtype_size(code_of(DType::Q8_0)), ls_dtype_block(code_of(DType::Q8_0))), (34, 32));
        assert_eq!(
            (ls_dtype_size(code_of(DType::F32)), ls_dtype_block(code_of(DType::F32)), ls_dtype_block(33)),
            (4, 1, 0)
        );
        for wrong in [0, -1, 33, i32::MIN, i32::MAX] {
            assert!(dtype_of(wrong, "").is_err());
        }
    }
}
