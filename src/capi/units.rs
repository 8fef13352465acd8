//! Units by the caller's names, and how what they name is stored.

use std::ffi::c_char;

use super::{
    checkpoint::dtype_of,
    ffi::{Failure, Result, list, text},
    options::choose,
};
use crate::{
    checkpoint::{Checkpoint, Quantisation},
    plan::{Arrival, ArrivalOp, Tier, Unit},
};

/// A tensor of a unit.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_unit_tensor {
    /// The name under which it is found in the layer; unique in the unit.
    pub name: *const c_char,
    /// The checkpoint's name for it.
    pub stored: *const c_char,
    /// The ls_dtype that it is converted to on arrival (F32, F16, BF16, F8_E4M3 or blocks to F32 or BF16), or LS_AS_STORED.
    pub dtype: i32,
    /// Of a weight that may be quantised, as the quantization_config in the folder's config.json says: its rows, such as 11008 of
    /// "model.layers.0.mlp.up_proj.weight". It is then found in whatever tensors hold it, and arrives as one matrix of F32 or BF16;
    /// with LS_AS_STORED and the CPU device, of the type of blocks that holds the same numbers. 0: only the tensor of this name will do.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
}

/// Tensors that travel together, and are handed over as one layer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_unit {
    /// For messages.
    pub name: *const c_char,
    /// Its tensors.
    pub tensors: *const ls_unit_tensor,
    /// How many.
    pub count: usize,
    /// An ls_tier.
    pub tier: i32,
}

/// A unit by the names that the caller gave.
pub(super) struct NamedUnit {
    /// With a plain tensor for each.
    unit: Unit,
    /// Rows and columns of each that may be quantised.
    matrices: Vec<Option<[usize; 2]>>,
}

impl ls_unit {
    /// # Safety
    /// It points to what the header says.
    pub(super) unsafe fn read(&self) -> Result<NamedUnit> {
        // SAFETY: the caller says that a text ends there, if it is not NULL.
        let mut named = unsafe { NamedUnit::read(text(self.name, "name of a unit")?, self.tensors, self.count)? };
        named.unit.set_tier(choose(self.tier, &Tier::ALL, "tier")?);
        Ok(named)
    }
}

impl NamedUnit {
    /// # Safety
    /// The tensors point to what the header says.
    unsafe fn read(name: &str, tensors: *const ls_unit_tensor, count: usize) -> Result<Self> {
        let (mut unit, mut matrices) = (Unit::new(name), Vec::new());
        // SAFETY: the caller promised that so many tensors lie there.
        for tensor in unsafe { list(tensors, count, "tensors")? } {
            // SAFETY: the caller says that a text ends there, if it is not NULL.
            let (output, input) = unsafe { (text(tensor.name, "name")?, text(tensor.stored, "stored")?) };
            let op = match tensor.dtype {
                0 => ArrivalOp::Keep,
                code => ArrivalOp::To(dtype_of(code, "dtype")?),
            };
            unit.add(Arrival { output: output.to_owned(), inputs: vec![input.to_owned()], op });
            matrices.push(match [tensor.rows, tensor.columns] {
                [0, 0] => None,
                shape if shape.contains(&0) => {
                    let cause = format!("of {input} are {shape:?}: both are 0, or neither is");
                    return Err(Failure::invalid("rows and columns", cause));
                }
                shape => Some(shape),
            });
        }
        Ok(Self { unit, matrices })
    }

    /// The units with each matrix as the checkpoint has it.
    pub(super) fn found_in(checkpoint: &Checkpoint, units: &[Self]) -> Result<Vec<Unit>> {
        let quantised = units.iter().any(|named| named.matrices.iter().any(Option::is_some));
        let quantisation = if quantised { Quantisation::of(checkpoint.source())? } else { None };
        let found = |(arrival, matrix): (&Arrival, &Option<[usize; 2]>)| -> Result<Arrival> {
            let (Some(how), Some(shape)) = (quantisation, *matrix) else { return Ok(arrival.clone()) };
            let Some(mut made) = how.arrival(checkpoint, &arrival.output, &arrival.inputs[0], shape)? else {
                return Ok(arrival.clone());
            };
            if let (ArrivalOp::Dequantise { to, .. }, ArrivalOp::To(dtype)) = (&mut made.op, arrival.op) {
                *to = Some(dtype);
            }
            Ok(made)
        };
        let unit = |named: &Self| -> Result<Unit> {
            let mut unit = Unit::new(named.unit.name());
            for tensor in named.unit.arrivals().iter().zip(&named.matrices) {
                unit.add(found(tensor)?);
            }
            unit.set_tier(named.unit.tier());
            Ok(unit)
        };
        units.iter().map(unit).collect()
    }
}

/// A unit of tensors that are stored by themselves.
///
/// # Safety
/// They point to what the header says.
pub(super) unsafe fn statics(tensors: *const ls_unit_tensor, count: usize) -> Result<Unit> {
    // SAFETY: the caller promised that.
    let NamedUnit { unit, matrices } = unsafe { NamedUnit::read("the static tensors", tensors, count)? };
    match matrices.iter().position(Option::is_some) {
        Some(at) => {
            let cause =
                format!("of {} are not 0: what is quantised is streamed, in a unit", unit.arrivals()[at].inputs[0]);
            Err(Failure::invalid("rows and columns", cause))
        }
        None => Ok(unit),
    }
}
