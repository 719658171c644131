//! The tensors of an operation, as addresses on the device, and the check that they fit it.

use fused_collective_core::{
    dtype::DType,
    fusion::{self, Norm, Operation},
    launch::{Activations, Address, Encoding, Experts, Extras, PostNorm},
    quant::Quantization,
};

use crate::error::{Error, TensorProblem};

/// The alignment of tensors, in bytes.
const ALIGNMENT: u64 = 16;
/// The alignment of a scale, in bytes: it may be one of several in a tensor.
pub(super) const SCALE_ALIGNMENT: u64 = 4;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// Numbers.
    Element(DType),
    /// Codes of a quantization, or its scales: bytes.
    Code,
    /// `i32`: indices of rows.
    Index,
}

/// A contiguous tensor in the memory of this rank's GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTensor {
    /// Its address: a multiple of 16; of [`Tensors::scale`], [`Tensors::expert_index`] and [`Tensors::expert_scales`] of an
    /// element.
    pub address: u64,
    /// Its elements, or its bytes if they are codes.
    pub length: u64,
    /// The type of its elements.
    pub element: TensorType,
}

impl DeviceTensor {
    /// Bytes of the tensor.
    const fn bytes(&self) -> u64 {
        match self.element {
            TensorType::Element(dtype) => self.length.saturating_mul(dtype.bytes()),
            TensorType::Code => self.length,
            TensorType::Index => self.length.saturating_mul(4),
        }
    }
}

/// The tensors that an operation reads and writes on one rank: see [`Operation`] for shapes.
///
/// `norm_out` may be the input's memory, and `residual_out` the residual's, address for address. Any other overlap of what
/// is written with another tensor is an error.
#[derive(Clone, Copy, Debug)]
pub struct Tensors {
    /// This rank's addend, or with experts the shared expert's rows, if there is one.
    pub input: Option<DeviceTensor>,
    /// The residual, if the operation has one: the same on every rank, or this rank's rows.
    pub residual: Option<DeviceTensor>,
    /// The bias of the sum, if the operation has one. It must not change while operations run.
    pub bias: Option<DeviceTensor>,
    /// The weight of the norm of the sum, if the operation has one. It must not change while operations run.
    pub post_gamma: Option<DeviceTensor>,
    /// Any number of rows of this rank's experts, if the operation has experts.
    pub expert_rows: Option<DeviceTensor>,
    /// The row of each expert of each token; less than 0 for an expert on another rank.
    ///
    /// On GPUs nothing checks it: an index past the last row reads memory that is no row.
    pub expert_index: Option<DeviceTensor>,
    /// The scale of each.
    pub expert_scales: Option<DeviceTensor>,
    /// RMSNorm's weight, if the operation has a norm. It must not change while operations run, and is read before the kernel
    /// ahead in the stream has ended.
    pub gamma: Option<DeviceTensor>,
    /// One `f32`: the scale of static FP8 or the global scale of NVFP4. It must not change while operations run,
    /// and is read as early as gamma.
    ///
    /// One that [`Quantization::check_scale`] refuses gives [codes of zero](fused_collective_core::quant::scale::fp8_multiplier).
    /// [`Options::check_scales`](super::Options::check_scales) makes it an error.
    pub scale: Option<DeviceTensor>,
    /// The sum, plus the residual.
    pub residual_out: DeviceTensor,
    /// The norm, if it is written.
    pub norm_out: Option<DeviceTensor>,
    /// The quantized norm, if there is a quantization.
    pub quant_out: Option<DeviceTensor>,
    /// Its scales, if they are written.
    pub scale_out: Option<DeviceTensor>,
}

impl Tensors {
    /// Checks every tensor of rank `rank` of `world_size` against a valid operation.
    ///
    /// # Errors
    /// One that is missing, superfluous, misaligned, or of another length or type than the operation needs; an
    /// operation that there are no kernels for.
    pub(crate) fn check(&self, operation: &Operation, rank: u32, world_size: u32) -> Result<(), Error> {
        self.fit(operation, rank, world_size, ALIGNMENT)
    }

    /// Checks every tensor, whatever the backend, at addresses that are multiples of `alignment` and of an element.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(crate) fn fit(
        &self,
        operation: &Operation,
        rank: u32,
        world_size: u32,
        alignment: u64,
    ) -> Result<(), Error> {
        let Operation { quantization, tokens, hidden, .. } = *operation;
        let element = TensorType::Element(operation.dtype);
        let activation = tokens * hidden;
        let rows = operation.residual_rows(rank, world_size) * hidden;
        let values = tokens * quantization.value_bytes_per_row(hidden);
        let quantized = quantization != Quantization::None;
        let scales = supported(operation)?;
        let gamma = |norm: Norm| (hidden, TensorType::Element(norm.gamma.dtype(operation.dtype)));
        let check = |tensor, given, needed: Option<(u64, TensorType)>| {
            let of_element = match needed {
                Some((_, TensorType::Element(dtype))) => dtype.bytes(),
                _ => 1,
            };
            check_aligned(tensor, given, needed, alignment.max(of_element))
        };
        check("input", self.input, operation.reads_input().then_some((activation, element)))?;
        self.check_experts(operation, alignment)?;
        check("residual", self.residual, operation.residual.is_some().then_some((rows, element)))?;
        check("bias", self.bias, operation.bias.then_some((hidden, element)))?;
        check("post_gamma", self.post_gamma, operation.post_norm.map(gamma))?;
        check("gamma", self.gamma, operation.norm.map(gamma))?;
        let scale = quantization.reads_scale().then_some((1, TensorType::Element(DType::F32)));
        check_aligned("scale", self.scale, scale, SCALE_ALIGNMENT)?;
        check("residual_out", Some(self.residual_out), Some((rows, element)))?;
        check("norm_out", self.norm_out, operation.writes_norm().then_some((activation, element)))?;
        check("quant_out", self.quant_out, quantized.then_some((values, TensorType::Code)))?;
        check("scale_out", self.scale_out, scales.map(|bytes| (bytes, TensorType::Code)))?;
        self.check_overlaps()
    }

    /// Checks the experts' tensors.
    fn check_experts(&self, operation: &Operation, alignment: u64) -> Result<(), Error> {
        let Operation { dtype, tokens, hidden, experts, .. } = *operation;
        let element = TensorType::Element(dtype);
        // Any number of rows: whole ones.
        let given = self.expert_rows.map_or(0, |rows| rows.length);
        let rows = experts.map(|_| (given, element));
        check_aligned("expert_rows", self.expert_rows, rows, alignment.max(dtype.bytes()))?;
        if !given.is_multiple_of(hidden) {
            let problem = TensorProblem::Rows { given, hidden };
            return Err(Error::Tensor { tensor: "expert_rows", problem });
        }
        let chosen = |experts: fusion::Experts| tokens * u64::from(experts.top_k);
        let index = experts.map(|experts| (chosen(experts), TensorType::Index));
        check_aligned("expert_index", self.expert_index, index, 4)?;
        let dtype = experts.map_or(dtype, |experts| experts.scales.dtype(dtype));
        let scales = experts.map(|experts| (chosen(experts), TensorType::Element(dtype)));
        check_aligned("expert_scales", self.expert_scales, scales, dtype.bytes())
    }

    /// Checks that what is written is no other tensor's memory, or is in place.
    fn check_overlaps(&self) -> Result<(), Error> {
        let read = [
            ("input", self.input),
            ("expert_rows", self.expert_rows),
            ("expert_index", self.expert_index),
            ("expert_scales", self.expert_scales),
            ("residual", self.residual),
            ("bias", self.bias),
            ("post_gamma", self.post_gamma),
            ("gamma", self.gamma),
            ("scale", self.scale),
        ];
        let written = [
            ("residual_out", Some(self.residual_out)),
            ("norm_out", self.norm_out),
            ("quant_out", self.quant_out),
            ("scale_out", self.scale_out),
        ];
        for (index, &(tensor, output)) in written.iter().enumerate() {
            let Some(output) = output else { continue };
            for &(other, tensor_read) in read.iter().chain(&written[..index]) {
                let Some(other_tensor) = tensor_read else { continue };
                let (address, other_address) = (output.address, other_tensor.address);
                let in_place = address == other_address
                    && matches!((tensor, other), ("norm_out", "input") | ("residual_out", "residual"));
                // Their lengths were checked: they end within 64 bits, or are not there.
                let apart = address.saturating_add(output.bytes()) <= other_address
                    || other_address.saturating_add(other_tensor.bytes()) <= address;
                if !in_place && !apart && output.length > 0 && other_tensor.length > 0 {
                    return Err(Error::Tensor {
                        tensor,
                        problem: TensorProblem::Overlap { address, other, other_address },
                    });
                }
            }
        }
        Ok(())
    }

    /// The activations of a valid operation. A kernel that makes the addend leaves a round's rows of it at `addend`.
    pub(crate) fn activations(&self, operation: &Operation, addend: Address) -> Activations {
        let input = if operation.experts.is_some() { addend } else { address(self.input) };
        let (residual, residual_out) = (address(self.residual), Address(self.residual_out.address));
        let mut activations = Activations::new(input, residual, residual_out, operation.rounding);
        for (is_there, flag) in [
            (operation.bias, Activations::BIAS),
            (operation.post_norm.is_some(), Activations::POST_NORM),
            (operation.experts.is_some(), Activations::EXPERTS),
        ] {
            activations.flags |= if is_there { flag } else { 0 };
        }
        activations
    }

    /// The extras of a valid operation, as kernels take them.
    pub fn extras(&self, operation: &Operation) -> Extras {
        let post_norm = operation.post_norm.map_or(PostNorm::NONE, |norm| PostNorm {
            gamma: address(self.post_gamma),
            inverse_hidden: 1.0 / operation.hidden as f32,
            epsilon: norm.epsilon,
            weight_bias: norm.weight_bias,
            gamma_f32: norm.gamma.is_wider(operation.dtype).into(),
        });
        let experts = operation.experts.map_or(Experts::NONE, |experts| Experts {
            rows: address(self.expert_rows),
            index: address(self.expert_index),
            scales: address(self.expert_scales),
            shared: address(self.input),
            top_k: experts.top_k,
            scales_f32: experts.scales.is_wider(operation.dtype).into(),
        });
        let encoding = Encoding::of(operation.wire);
        Extras { bias: address(self.bias), post_norm, experts, encoding }
    }
}

/// Checks that there are kernels for a valid operation. Returns the bytes of its scales, if it writes any.
///
/// # Errors
/// [`Error::Unsupported`].
pub(super) fn supported(operation: &Operation) -> Result<Option<u64>, Error> {
    let Operation { quantization, tokens, hidden, .. } = *operation;
    let Some(scales) = quantization.scales(tokens, hidden) else { return Ok(None) };
    let bytes = scales.bytes().ok_or(Error::Unsupported("scales of more bytes than 64 bits count"))?;
    Ok(Some(bytes))
}

/// A tensor's address; null if there is none.
pub(super) fn address(tensor: Option<DeviceTensor>) -> Address {
    tensor.map_or(Address::NULL, |tensor| Address(tensor.address))
}

/// Checks one tensor against the length and type that it should have, if it should be there.
///
/// # Errors
/// [`Error::Tensor`].
pub(super) fn check(
    tensor: &'static str,
    given: Option<DeviceTensor>,
    needed: Option<(u64, TensorType)>,
) -> Result<(), Error> {
    check_aligned(tensor, given, needed, ALIGNMENT)
}

/// [`check`] of a tensor of another alignment.
///
/// # Errors
/// [`Error::Tensor`].
fn check_aligned(
    tensor: &'static str,
    given: Option<DeviceTensor>,
    needed: Option<(u64, TensorType)>,
    alignment: u64,
) -> Result<(), Error> {
    let problem = match (given, needed) {
        (None, None) => return Ok(()),
        (None, Some(_)) => TensorProblem::Missing,
        (Some(_), None) => TensorProblem::Superfluous,
        (Some(DeviceTensor { address, length, element }), Some((needed_length, needed))) => {
            if element != needed {
                TensorProblem::Type { given: name(element), needed: name(needed) }
            } else if length != needed_length {
                TensorProblem::Length { given: length, needed: needed_length }
            } else if length > 0 && (address == 0 || !address.is_multiple_of(alignment)) {
                TensorProblem::Misaligned { address, alignment }
            } else {
                return Ok(());
            }
        }
    };
    Err(Error::Tensor { tensor, problem })
}

fn name(element: TensorType) -> &'static str {
    match element {
        TensorType::Element(dtype) => dtype.name(),
        TensorType::Code => "codes",
        TensorType::Index => "int32",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use fused_collective_core::{
        fusion::{Experts, Mode, PartialSums, Residual, Rounding, WeightType},
        quant::ScaleLayout,
    };

    use super::*;

    const OPERATION: Operation = Operation {
        dtype: DType::Bf16,
        tokens: 2,
        hidden: 64,
        residual: Residual::None,
        norm: None,
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    };

    /// A tensor at an address of its own.
    fn of(length: u64, element: TensorType) -> DeviceTensor {
        static NEXT: AtomicU64 = AtomicU64::new(4096);
        DeviceTensor { address: NEXT.fetch_add(4096, Ordering::Relaxed), length, element }
    }

    fn activation() -> DeviceTensor {
        of(128, TensorType::Element(DType::Bf16))
    }

    fn tensors() -> Tensors {
        Tensors {
            input: Some(activation()),
            residual: None,
            bias: None,
            post_gamma: None,
            expert_rows: None,
            expert_index: None,
            expert_scales: None,
            gamma: None,
            scale: None,
            residual_out: activation(),
            norm_out: None,
            quant_out: None,
            scale_out: None,
        }
    }

    fn why(tensors: &Tensors, operation: &Operation) -> String {
        tensors.check(operation, 0, 2).unwrap_err().to_string()
    }

    #[test]
    fn tensors_that_fit_are_accepted() {
        assert!(tensors().check(&OPERATION, 0, 2).is_ok());
        let fp4 = Operation {
            residual: Residual::Replicated,
            norm: Some(Norm::default()),
            quantization: Quantization::NvFp4 { layout: ScaleLayout::Linear },
            ..OPERATION
        };
        let tensors = Tensors {
            residual: Some(activation()),
            gamma: Some(of(64, TensorType::Element(DType::Bf16))),
            scale: Some(of(1, TensorType::Element(DType::F32))),
            quant_out: Some(of(64, TensorType::Code)),
            scale_out: Some(of(8, TensorType::Code)),
            ..tensors()
        };
        assert!(tensors.check(&fp4, 0, 2).is_ok());
        // A layer's scale among those of others.
        let scale_at = |address| Tensors {
            scale: Some(DeviceTensor { address, ..of(1, TensorType::Element(DType::F32)) }),
            ..tensors
        };
        assert!(scale_at(1 << 20 | 12).check(&fp4, 0, 2).is_ok());
        assert_eq!(
            why(&scale_at(1 << 20 | 6), &fp4),
            "scale is at 0x100006, which is not a multiple of 4 above 0"
        );
        let missing = Tensors { scale_out: None, ..tensors };
        assert_eq!(why(&missing, &fp4), "scale_out is missing: the operation has one");
    }

    #[test]
    fn each_mistake_is_named_before_anything_is_launched() {
        let short = Tensors { input: Some(of(127, TensorType::Element(DType::Bf16))), ..tensors() };
        assert_eq!(why(&short, &OPERATION), "input has length 127, the operation needs 128");
        let half = Tensors { residual_out: of(128, TensorType::Element(DType::F16)), ..tensors() };
        assert_eq!(why(&half, &OPERATION), "residual_out holds float16, the operation needs bfloat16");
        let odd = Tensors { input: Some(DeviceTensor { address: 8, ..activation() }), ..tensors() };
        assert_eq!(why(&odd, &OPERATION), "input is at 0x8, which is not a multiple of 16 above 0");
        let extra = Tensors { residual: Some(activation()), ..tensors() };
        assert_eq!(why(&extra, &OPERATION), "residual is given, and the operation has none");
    }

    #[test]
    fn gamma_is_of_the_type_that_the_operation_says() {
        let of_type = |gamma| Operation { norm: Some(Norm { gamma, ..Norm::default() }), ..OPERATION };
        let tensors = |dtype| {
            let gamma = Some(of(64, TensorType::Element(dtype)));
            Tensors { gamma, norm_out: Some(activation()), ..tensors() }
        };
        assert!(tensors(DType::F32).check(&of_type(WeightType::F32), 0, 2).is_ok());
        assert_eq!(
            why(&tensors(DType::F32), &of_type(WeightType::Element)),
            "gamma holds float32, the operation needs bfloat16"
        );
        assert_eq!(
            why(&tensors(DType::Bf16), &of_type(WeightType::F32)),
            "gamma holds bfloat16, the operation needs float32"
        );
    }

    #[test]
    fn experts_and_a_post_norm_need_their_tensors_and_kernels_are_told_of_them() {
        let experts = Experts { top_k: 3, scales: WeightType::F32, shared: false };
        let operation = Operation {
            norm: Some(Norm::default()),
            post_norm: Some(Norm { epsilon: 0.5, weight_bias: 1.0, gamma: WeightType::F32 }),
            experts: Some(experts),
            ..OPERATION
        };
        let [element, wide] = [DType::Bf16, DType::F32].map(TensorType::Element);
        let tensors = Tensors {
            input: None,
            post_gamma: Some(of(64, wide)),
            expert_rows: Some(of(5 * 64, element)),
            expert_index: Some(of(6, TensorType::Index)),
            expert_scales: Some(of(6, wide)),
            gamma: Some(of(64, element)),
            norm_out: Some(activation()),
            ..tensors()
        };
        assert!(tensors.check(&operation, 0, 2).is_ok());
        let (activations, extras) =
            (tensors.activations(&operation, Address(4096)), tensors.extras(&operation));
        let address = |tensor: Option<DeviceTensor>| tensor.unwrap().address;
        let rows = address(tensors.expert_rows);
        assert_eq!(activations.flags, Activations::POST_NORM | Activations::EXPERTS);
        assert_eq!((activations.input, extras.experts.rows.0), (Address(4096), rows));
        assert_eq!((extras.experts.top_k, extras.experts.scales_f32), (3, 1));
        assert_eq!((extras.experts.shared, extras.bias), (Address::NULL, Address::NULL));
        assert_eq!(extras.post_norm.gamma.0, address(tensors.post_gamma));
        assert_eq!((extras.post_norm.inverse_hidden, extras.post_norm.gamma_f32), (1.0 / 64.0, 1));
        // No rows, perhaps at no address: experts all the same.
        let none = Some(DeviceTensor { address: 0, length: 0, element });
        let empty = Tensors { expert_rows: none, ..tensors };
        assert!(empty.check(&operation, 0, 2).is_ok());
        assert!(empty.activations(&operation, Address::NULL).has(Activations::EXPERTS));

        let index_at = |address| Some(DeviceTensor { address, ..tensors.expert_index.unwrap() });
        let shared = Operation { experts: Some(Experts { shared: true, ..experts }), ..operation };
        let cases = [
            (Tensors { input: Some(activation()), ..tensors }, "input is given, and the operation has none"),
            (Tensors { post_gamma: None, ..tensors }, "post_gamma is missing: the operation has one"),
            (Tensors { expert_rows: None, ..tensors }, "expert_rows is missing: the operation has one"),
            (
                Tensors { expert_rows: Some(of(100, element)), ..tensors },
                "expert_rows has length 100, which is not a multiple of the hidden size 64",
            ),
            (
                Tensors { expert_index: Some(of(6, wide)), ..tensors },
                "expert_index holds float32, the operation needs int32",
            ),
            (
                Tensors { expert_index: index_at(4098), ..tensors },
                "expert_index is at 0x1002, which is not a multiple of 4 above 0",
            ),
            (
                Tensors { expert_scales: Some(of(5, wide)), ..tensors },
                "expert_scales has length 5, the operation needs 6",
            ),
        ];
        for (tensors, error) in cases {
            assert_eq!(why(&tensors, &operation), error);
        }
        assert_eq!(why(&tensors, &shared), "input is missing: the operation has one");
        assert_eq!(
            why(&tensors, &Operation { experts: None, ..shared }),
            "input is missing: the operation has one"
        );
        // The norm may take the place of the shared expert's rows, and of no expert's.
        let own = |rows| Tensors { input: Some(activation()), expert_rows: rows, ..tensors };
        let in_place = own(tensors.expert_rows);
        assert!(Tensors { norm_out: in_place.input, ..in_place }.check(&shared, 0, 2).is_ok());
        let rows = Some(activation());
        assert!(why(&Tensors { norm_out: rows, ..own(rows) }, &shared).contains("overlaps expert_rows"));
    }

    #[test]
    fn outputs_are_in_place_address_for_address_or_overlap_nothing() {
        let operation =
            Operation { residual: Residual::Replicated, norm: Some(Norm::default()), ..OPERATION };
        let input = activation();
        let apart = Tensors {
            input: Some(input),
            residual: Some(activation()),
            gamma: Some(of(64, TensorType::Element(DType::Bf16))),
            norm_out: Some(activation()),
            ..tensors()
        };
        let in_place = Tensors { norm_out: apart.input, residual_out: apart.residual.unwrap(), ..apart };
        assert!(apart.check(&operation, 0, 2).is_ok() && in_place.check(&operation, 0, 2).is_ok());
        // A bfloat16 activation has 256 bytes.
        let at =
            |tensor: DeviceTensor, bytes: u64| DeviceTensor { address: tensor.address + bytes, ..tensor };
        let beside = Tensors { norm_out: Some(at(input, 256)), ..apart };
        assert!(beside.check(&operation, 0, 2).is_ok());
        let wrong = [
            Tensors { norm_out: Some(at(input, 240)), ..apart },
            Tensors { residual_out: at(apart.residual.unwrap(), 16), ..apart },
            Tensors { norm_out: apart.residual, ..apart },
            Tensors { residual_out: input, ..apart },
            Tensors {
                residual_out: apart.gamma.map(|gamma| DeviceTensor { length: 128, ..gamma }).unwrap(),
                ..apart
            },
            Tensors { norm_out: Some(apart.residual_out), ..apart },
            // Two are the input's memory, and one of them is read later.
            Tensors { norm_out: apart.input, residual: apart.input, ..apart },
        ];
        for tensors in wrong {
            let error = tensors.check(&operation, 0, 2).unwrap_err();
            assert!(matches!(error, Error::Tensor { problem: TensorProblem::Overlap { .. }, .. }), "{error}");
        }
        let shifted = Tensors { norm_out: Some(at(input, 16)), ..apart };
        let (input, norm_out) = (input.address, input.address + 16);
        assert_eq!(
            why(&shifted, &operation),
            format!(
                "norm_out is at {norm_out:#x} and overlaps input at {input:#x}: norm_out may be the input, and \
                 residual_out the residual, address for address"
            )
        );
    }
}
