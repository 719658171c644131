//! Refusals of calls before anything is sent: the next operation is right.

use fused_collective::{
    ErrorKind,
    cpu::{Communicator, ExpertRows, Inputs, Operand, Options, Outputs},
    group::{Bootstrap, BootstrapError, Thread, threads},
};
use fused_collective_core::{
    dtype::bf16,
    fusion::{Experts, Mode, Norm, Operation, Residual, WeightType},
    norm::Weights,
    quant::{Quantization, ScaleLayout},
};

use crate::cases::{Case, PATIENT, group, operation};

#[test]
fn a_whole_residual_is_refused_where_a_share_is_due() {
    let case = Case::<bf16>::new(operation::<bf16>(5, 64), 2, 6);
    let sharded = Operation { residual: Residual::Sharded, ..case.operation };
    group(2, 128, PATIENT, |mut communicator| {
        let inputs = case.tensors(0, Some(Operand::Apart(&case.residual[..])));
        let (mut out, mut norm_out) = (vec![bf16::ZERO; 3 * 64], vec![bf16::ZERO; 5 * 64]);
        let outputs = Outputs {
            residual_out: &mut out,
            norm_out: &mut norm_out,
            quant_out: &mut [],
            scale_out: &mut [],
        };
        let error = communicator.all_reduce(&sharded, inputs, outputs).unwrap_err();
        let rows = if communicator.rank() == 0 { 192 } else { 128 };
        assert_eq!(error.to_string(), format!("residual has length 320, the operation needs {rows}"));
        case.check(&case.run(&mut communicator, Mode::TwoShot).unwrap());
    });
}

#[test]
fn a_gamma_of_another_type_is_refused_before_anything_is_sent() {
    let norm = Norm { gamma: WeightType::F32, ..Norm::default() };
    let case = Case::<bf16>::new(Operation { norm: Some(norm), ..operation::<bf16>(4, 64) }, 2, 6);
    let wrong = Case::<bf16>::new(operation::<bf16>(4, 64), 2, 6);
    group(2, 128, PATIENT, |mut communicator| {
        let inputs =
            Inputs { gamma: wrong.gamma(), ..case.tensors(0, Some(Operand::Apart(&case.residual[..]))) };
        let (mut out, mut norm_out) = (vec![bf16::ZERO; 4 * 64], vec![bf16::ZERO; 4 * 64]);
        let outputs = Outputs {
            residual_out: &mut out,
            norm_out: &mut norm_out,
            quant_out: &mut [],
            scale_out: &mut [],
        };
        let error = communicator.all_reduce(&case.operation, inputs, outputs).unwrap_err();
        assert_eq!(
            error.to_string(),
            "gamma holds bfloat16, the operation needs float32 beside the element type"
        );
        // Nothing was sent: the next operation is right.
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

#[test]
fn tensors_that_do_not_fit_the_operation_are_refused_before_anything_is_sent() {
    let case = Case::<bf16>::new(operation::<bf16>(4, 64), 2, 5);
    group(2, 128, PATIENT, |mut communicator| {
        let mut out = vec![bf16::ZERO; 4 * 64];
        let mut short = vec![bf16::ZERO; 4 * 64 - 16];
        let inputs = case.tensors(0, Some(Operand::Apart(&case.residual[..])));
        let (mut nothing, mut none) = ([], []);
        let outputs = Outputs {
            residual_out: &mut out,
            norm_out: &mut short,
            quant_out: &mut nothing,
            scale_out: &mut none,
        };
        let error = communicator.all_reduce(&case.operation, inputs, outputs).unwrap_err();
        assert_eq!(error.to_string(), "norm_out has length 240, the operation needs 256");
        // Nothing was sent: the next operation is right.
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

#[test]
fn a_row_that_no_expert_has_is_refused_by_name_before_anything_is_sent() {
    let experts = Experts { top_k: 3, scales: WeightType::Element, shared: false };
    let case = Case::<bf16>::new(Operation { experts: Some(experts), ..operation::<bf16>(4, 64) }, 2, 5);
    let index = |place: usize, row: i32| {
        let mut index = case.expert_index[0][..12].to_vec();
        index[place] = row;
        index
    };
    let (past, first) = (index(7, 5), index(0, 0));
    group(2, 128, PATIENT, |mut communicator| {
        let mut refused = |inputs: Inputs<'_, bf16>| {
            let (mut out, mut norm_out) = (vec![bf16::ZERO; 4 * 64], vec![bf16::ZERO; 4 * 64]);
            let outputs = Outputs {
                residual_out: &mut out,
                norm_out: &mut norm_out,
                quant_out: &mut [],
                scale_out: &mut [],
            };
            communicator.all_reduce(&case.operation, inputs, outputs).unwrap_err().to_string()
        };
        let whole = case.tensors(0, Some(Operand::Apart(&case.residual[..])));
        let rows = whole.experts.unwrap();
        let with = |experts| Inputs { experts: Some(experts), ..whole };
        assert_eq!(
            refused(with(ExpertRows { index: &past, ..rows })),
            "expert_index has row 5 for token 2: use 0 to 4, or -1 for an expert on another rank"
        );
        assert_eq!(
            refused(with(ExpertRows { rows: &[], index: &first, ..rows })),
            "expert_index has row 0 for token 0: use -1, as there are no rows"
        );
        assert_eq!(
            refused(with(ExpertRows { rows: &rows.rows[1..], ..rows })),
            "expert_rows has length 319, which is not a multiple of the hidden size 64"
        );
        assert_eq!(
            refused(with(ExpertRows { index: &rows.index[1..], ..rows })),
            "expert_index has length 11, the operation needs 12"
        );
        assert_eq!(
            refused(with(ExpertRows { scales: Weights::F32(&case.expert_scales_f32[..12]), ..rows })),
            "expert_scales holds float32 beside the element type, the operation needs bfloat16"
        );
        let input = Operand::Apart(&case.inputs[0][..]);
        assert_eq!(refused(Inputs { input, ..whole }), "input has length 256, the operation needs 0");
        assert_eq!(
            refused(Inputs { input: Operand::InPlace, ..whole }),
            "input is given, and the operation has none"
        );
        assert_eq!(
            refused(Inputs { experts: None, ..whole }),
            "expert_rows is missing: the operation has one"
        );
        // Nothing was sent: the next operation is right.
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

#[test]
fn a_scale_or_a_weight_bias_that_is_not_valid_is_refused_before_anything_is_sent() {
    let fp8 = Operation { quantization: Quantization::Fp8Static, ..operation::<bf16>(4, 64) };
    let nvfp4 = Operation {
        quantization: Quantization::NvFp4 { layout: ScaleLayout::Linear },
        ..operation::<bf16>(4, 64)
    };
    group(2, 128, PATIENT, |mut communicator| {
        for operation in [fp8, nvfp4] {
            for scale in [0.0, -0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                let case = Case::<bf16> { scale, ..Case::new(operation, 2, 8) };
                let error = case.run(&mut communicator, Mode::OneShot).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Invalid);
                assert!(error.to_string().contains("is not valid: use a"), "{error}");
            }
        }
        for bias in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let norm = Some(Norm { weight_bias: bias, ..Norm::default() });
            let case = Case::<bf16>::new(Operation { norm, ..operation::<bf16>(4, 64) }, 2, 8);
            let error = case.run(&mut communicator, Mode::OneShot).unwrap_err();
            assert_eq!(error.to_string(), format!("weight bias {bias} is not valid: use a finite number"));
        }
        // Without a quantization no scale is read.
        let case = Case::<bf16> { scale: f32::NAN, ..Case::new(operation::<bf16>(4, 64), 2, 8) };
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

/// A rank that names its host.
struct OnHost(Thread, &'static str);

impl Bootstrap for OnHost {
    fn rank(&self) -> u32 {
        self.0.rank()
    }

    fn world_size(&self) -> u32 {
        self.0.world_size()
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        self.0.all_gather(bytes)
    }

    fn host(&self) -> Result<Vec<u8>, BootstrapError> {
        Ok(self.1.into())
    }
}

#[test]
fn ranks_of_several_hosts_are_refused_on_every_rank_by_their_names() {
    let ranks = threads(3, PATIENT).into_iter().zip(["a", "a", "b"]);
    let ranks: Vec<_> = ranks
        .map(|(thread, host)| {
            std::thread::spawn(move || {
                let options = Options { max_row_bytes: 128, deadline: PATIENT };
                Communicator::join(&OnHost(thread, host), options).unwrap_err()
            })
        })
        .collect();
    for (rank, (thread, peer)) in (0..).zip(ranks.into_iter().zip([2, 2, 0])) {
        let error = thread.join().unwrap();
        assert_eq!(
            (error.kind(), error.rank(), error.peer()),
            (ErrorKind::Bootstrap, Some(rank), Some(peer))
        );
        assert!(error.to_string().contains("the CPU backend is for ranks of one host"), "{error}");
    }
}
