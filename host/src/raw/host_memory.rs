//! Operations of the CPU backend on addresses.

use std::{ptr::NonNull, slice};

use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::{Operation, WeightType},
    norm::Weights,
};

use crate::{
    cpu::{Communicator, ExpertRows, Inputs, Operand, Outputs, Plain},
    cuda::{DeviceTensor, Tensors},
    error::Error,
};

/// Runs `operation` on tensors that fit it.
///
/// # Errors
/// As [`Communicator::all_reduce`].
///
/// # Safety
/// The tensors fit the operation, are where they are said to be, and nobody else uses what is written.
pub(super) unsafe fn all_reduce(
    communicator: &mut Communicator,
    operation: &Operation,
    tensors: &Tensors,
) -> Result<(), Error> {
    // SAFETY: passed on as this function's caller vouches for it; each type is the one that the tensors were checked for.
    unsafe {
        match operation.dtype {
            DType::F32 => run::<f32>(communicator, operation, tensors),
            DType::F16 => run::<f16>(communicator, operation, tensors),
            DType::Bf16 => run::<bf16>(communicator, operation, tensors),
        }
    }
}

/// [`all_reduce`] with elements of type `E`, the operation's.
///
/// # Safety
/// As [`all_reduce`].
unsafe fn run<E: Plain>(
    communicator: &mut Communicator,
    operation: &Operation,
    tensors: &Tensors,
) -> Result<(), Error> {
    let is = |output: Option<DeviceTensor>, input: DeviceTensor| {
        output.is_some_and(|output| output.address == input.address && output.length > 0)
    };
    // SAFETY: the tensors have their types, alignments and lengths, as they fit, and addresses that the caller vouches
    // for. What is written overlaps nothing but what is in place, of which no slice is made.
    unsafe {
        let inputs = Inputs {
            input: match tensors.input {
                Some(input) => operand(is(tensors.norm_out, input), input),
                None => Operand::Apart(&[]),
            },
            residual: tensors
                .residual
                .map(|residual| operand(is(Some(tensors.residual_out), residual), residual)),
            bias: tensors.bias.map(|bias| read(Some(bias))),
            post_gamma: operation.post_norm.map(|norm| weights(norm.gamma, tensors.post_gamma)),
            experts: operation.experts.map(|experts| ExpertRows {
                rows: read(tensors.expert_rows),
                index: read(tensors.expert_index),
                scales: weights(experts.scales, tensors.expert_scales),
            }),
            gamma: weights(operation.norm.map_or(WeightType::Element, |norm| norm.gamma), tensors.gamma),
            scale: read(tensors.scale).first().copied().unwrap_or(1.0),
        };
        let outputs = Outputs {
            residual_out: write::<E>(Some(tensors.residual_out)),
            norm_out: write::<E>(tensors.norm_out),
            quant_out: write(tensors.quant_out),
            scale_out: write(tensors.scale_out),
        };
        communicator.all_reduce(operation, inputs, outputs)
    }
}

/// An operand that is in place, or `tensor`.
///
/// # Safety
/// As [`read`], unless it is in place.
unsafe fn operand<'a, E: Plain>(in_place: bool, tensor: DeviceTensor) -> Operand<&'a [E]> {
    if in_place {
        return Operand::InPlace;
    }
    // SAFETY: passed on.
    Operand::Apart(unsafe { read(Some(tensor)) })
}

/// The weights of a tensor, or none.
///
/// # Safety
/// As [`read`], for elements of this type of weights.
unsafe fn weights<'a, E: Plain>(weights: WeightType, tensor: Option<DeviceTensor>) -> Weights<'a, E> {
    // SAFETY: passed on.
    unsafe {
        match weights {
            WeightType::Element => Weights::Element(read(tensor)),
            WeightType::F32 => Weights::F32(read(tensor)),
        }
    }
}

/// The elements of a tensor, or none.
///
/// # Safety
/// The tensor has aligned elements of this type at its address, which nobody writes for as long as the slice lives.
unsafe fn read<'a, T>(tensor: Option<DeviceTensor>) -> &'a [T] {
    let (pointer, length) = place(tensor);
    // SAFETY: `length` elements are there, or the slice is empty and the pointer aligned.
    unsafe { slice::from_raw_parts(pointer, length) }
}

/// As [`read`], to be written.
///
/// # Safety
/// As [`read`], and nobody else reads them either.
unsafe fn write<'a, T>(tensor: Option<DeviceTensor>) -> &'a mut [T] {
    let (pointer, length) = place(tensor);
    // SAFETY: as in `read`, and the elements are this slice's alone.
    unsafe { slice::from_raw_parts_mut(pointer, length) }
}

/// A tensor's address and length. An empty one may be anywhere.
fn place<T>(tensor: Option<DeviceTensor>) -> (*mut T, usize) {
    match tensor {
        Some(tensor) if tensor.length > 0 => {
            (std::ptr::with_exposed_provenance_mut(tensor.address as usize), tensor.length as usize)
        }
        _ => (NonNull::dangling().as_ptr(), 0),
    }
}
