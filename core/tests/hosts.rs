//! Groups of several hosts: their plans, and the sum by hosts, compared with the same sum written out and with the reference.

use fused_collective_core::{
    dtype::{DType, Element, bf16, f16},
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
    norm::Weights,
    plan::{Algorithm, Limits, Plan, PlanError, owner},
    quant::Quantization,
    reference::check_token,
    specification::{Observed, Row, Token},
    wire::WireFormat,
    workspace::SlotRows,
};
use proptest::prelude::*;

const HIDDEN: usize = 144;

fn operation(dtype: DType, residual: Residual, partial_sums: PartialSums) -> Operation {
    Operation {
        dtype,
        tokens: 1,
        hidden: HIDDEN as u64,
        residual,
        norm: Some(Norm::default()),
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums,
        mode: Mode::Auto,
    }
}

fn limits(hosts: u32, ranks_per_host: u32, slot_bytes: u64) -> Limits {
    Limits {
        world_size: hosts * ranks_per_host,
        hosts,
        slot_bytes,
        compute_units: 132,
        max_cluster: 8,
        one_shot_bytes: u64::MAX,
    }
}

const KINDS: [PartialSums; 2] = [PartialSums::F32, PartialSums::Element];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn rounds_cover_every_token_once_and_fit_slot_and_partial_sums(
        tokens in 0u64..100_000,
        blocks in 1u64..=4096,
        dtype in prop::sample::select(DType::ALL.to_vec()),
        sharded: bool,
        partial_sums in prop::sample::select(KINDS.to_vec()),
        (hosts, ranks) in (2u32..=8, 1u32..=16),
        slot_bits in 16u32..40,
    ) {
        let residual = if sharded { Residual::Sharded } else { Residual::Replicated };
        let operation = Operation { tokens, hidden: blocks * 16, ..operation(dtype, residual, partial_sums) };
        let limits = limits(hosts, ranks, 1 << slot_bits);
        let fits = |rows: SlotRows| {
            let gathered = rows.most_owned() * operation.partial_row_bytes() * u64::from(hosts);
            rows.two_shot_bytes().unwrap().max(gathered) <= limits.slot_bytes
        };
        match Plan::new(&operation, &limits) {
            Err(PlanError::Slot { tokens: least, needed, slot_bytes }) => {
                let most = if sharded { u64::from(ranks) } else { 1 };
                prop_assert!(least <= most);
                prop_assert!(needed > slot_bytes && slot_bytes == limits.slot_bytes);
            }
            Err(error) => prop_assert!(false, "{}", error),
            Ok(plan) => {
                let algorithm = if sharded { Algorithm::ShardedHierarchical } else { Algorithm::Hierarchical };
                prop_assert_eq!((plan.algorithm, plan.hosts, plan.ranks_per_host()), (algorithm, hosts, ranks));
                let mut next = 0;
                for round in plan.rounds() {
                    prop_assert_eq!((round.first_token, round.rows.world_size), (next, ranks));
                    prop_assert!(fits(round.rows));
                    prop_assert_eq!(plan.host_bytes(&round), round.rows.most_owned() * operation.partial_row_bytes());
                    prop_assert!(!sharded || owner(round.first_token, ranks) == 0);
                    next += round.rows.tokens;
                }
                prop_assert_eq!(next, tokens);
            }
        }
    }

    /// The rows of a sharded residual lie on each host once.
    #[test]
    fn each_host_holds_every_row_of_a_sharded_residual(tokens in 0u64..1000, ranks in 1u32..=16) {
        let operation =
            Operation { tokens, ..operation(DType::Bf16, Residual::Sharded, PartialSums::F32) };
        let rows = (0..ranks).map(|place| operation.residual_rows(place, ranks));
        prop_assert_eq!(rows.sum::<u64>(), tokens);
    }

    #[test]
    fn the_sum_is_that_of_hosts_in_order_to_the_bit_and_near_the_exact_one(
        (hosts, ranks) in (1usize..=4, 1usize..=4),
        seed: u64,
        partial_sums in prop::sample::select(KINDS.to_vec()),
        residual: bool,
    ) {
        check::<bf16>(hosts, ranks, seed, partial_sums, residual);
        check::<f16>(hosts, ranks, seed, partial_sums, residual);
        check::<f32>(hosts, ranks, seed, partial_sums, residual);
    }
}

/// Rows of numbers around 0, with few enough digits to meet ties.
fn row<E: Element>(seed: u64, number: usize) -> Vec<E> {
    let mut state = seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 20) as f32 - 8.0
    };
    (0..HIDDEN).map(|_| E::from_f32(next())).collect()
}

fn check<E: Element>(hosts: usize, ranks: usize, seed: u64, partial_sums: PartialSums, residual: bool) {
    let rows: Vec<Vec<E>> = (0..hosts * ranks).map(|rank| row(seed, rank)).collect();
    let inputs: Vec<&[E]> = rows.iter().map(|row| &row[..]).collect();
    let [residual_row, bias, ones] = [row::<E>(seed, 100), row(seed, 101), vec![E::from_f32(1.0); HIDDEN]];
    let operation =
        Operation { bias: true, ..operation(E::DTYPE, Residual::replicated(residual), partial_sums) };
    let token = Token {
        inputs: &inputs,
        hosts: hosts as u32,
        experts: None,
        residual: residual.then_some(&residual_row),
        bias: Some(&bias),
        post_gamma: None,
        gamma: Weights::Element(&ones),
        scale: 1.0,
        index: 0,
    };
    let [mut out, mut norm] = [(); 2].map(|()| vec![E::default(); HIDDEN]);
    let mut computed = Row { residual_out: &mut out, norm: &mut norm, values: &mut [], scales: &mut [] };
    computed.compute(&operation, &token).unwrap();
    for index in 0..HIDDEN {
        let host_sums = rows.chunks(ranks).map(|host| {
            let sum = host.iter().map(|row| row[index].to_f32()).reduce(|sum, x| sum + x).unwrap();
            let rounds = hosts > 1 && partial_sums == PartialSums::Element;
            if rounds { E::from_f32(sum).to_f32() } else { sum }
        });
        let mut sum = host_sums.reduce(|sum, x| sum + x).unwrap() + bias[index].to_f32();
        if residual {
            sum += residual_row[index].to_f32();
        }
        assert_eq!(out[index].to_bits(), E::from_f32(sum).to_bits(), "{hosts} hosts of {ranks}, {index}");
    }
    let observed = Observed { residual_out: &out, norm_out: &norm, values: &[], scales: &[] };
    check_token(&operation, &token, &observed).unwrap();
}

fn compute(inputs: &[&[bf16]], hosts: u32, partial_sums: PartialSums) -> (Operation, Vec<bf16>) {
    let operation = Operation { norm: None, ..operation(DType::Bf16, Residual::None, partial_sums) };
    let mut out = vec![bf16::ZERO; HIDDEN];
    let mut row = Row { residual_out: &mut out, norm: &mut [], values: &mut [], scales: &mut [] };
    row.compute(&operation, &token(inputs, hosts)).unwrap();
    (operation, out)
}

fn token<'a>(inputs: &'a [&'a [bf16]], hosts: u32) -> Token<'a, bf16> {
    Token {
        inputs,
        hosts,
        experts: None,
        residual: None,
        bias: None,
        post_gamma: None,
        gamma: Weights::Element(&[]),
        scale: 1.0,
        index: 0,
    }
}

/// 1 + 2^-9 and 2^-9 are rounded to 1 and 2^-9 on two hosts of two; in `f32` they keep all.
#[test]
fn partial_sums_in_the_element_type_round_once_a_host() {
    let rows = [1.0, 2f32.powi(-9), 0.0, 2f32.powi(-9)].map(|x| vec![bf16::from_f32(x); HIDDEN]);
    let inputs: Vec<&[bf16]> = rows.iter().map(|row| &row[..]).collect();
    let of = |hosts, kind| compute(&inputs, hosts, kind).1[0].to_f32();
    assert_eq!(of(2, PartialSums::F32), 1.0, "a tie, to even");
    let rows = [1.0, 3.0 * 2f32.powi(-9), 0.0, 2f32.powi(-9)].map(|x| vec![bf16::from_f32(x); HIDDEN]);
    let inputs: Vec<&[bf16]> = rows.iter().map(|row| &row[..]).collect();
    let of = |hosts, kind| compute(&inputs, hosts, kind).1[0].to_f32();
    assert_eq!(of(1, PartialSums::Element), of(1, PartialSums::F32), "nothing crosses in one host");
    assert_eq!(of(2, PartialSums::F32), 1.0 + 2f32.powi(-7));
    assert_eq!(of(2, PartialSums::Element), 1.0 + 2f32.powi(-7));
    let rows = [1.0, 2f32.powi(-9), 2f32.powi(-9), 2f32.powi(-9)].map(|x| vec![bf16::from_f32(x); HIDDEN]);
    let inputs: Vec<&[bf16]> = rows.iter().map(|row| &row[..]).collect();
    let of = |hosts, kind| compute(&inputs, hosts, kind).1[0].to_f32();
    assert_eq!(of(2, PartialSums::F32), 1.0 + 2f32.powi(-7));
    assert_eq!(of(2, PartialSums::Element), 1.0, "1 + 2^-8 is a tie of bf16");
}

/// The reference knows which of the two was asked for.
#[test]
fn the_reference_allows_the_roundings_of_hosts_only_where_they_are_asked_for() {
    let rows = [1.0, 2f32.powi(-9), 2f32.powi(-9), 2f32.powi(-9)].map(|x| vec![bf16::from_f32(x); HIDDEN]);
    let inputs: Vec<&[bf16]> = rows.iter().map(|row| &row[..]).collect();
    let (rounded, out) = compute(&inputs, 2, PartialSums::Element);
    let observed = Observed { residual_out: &out, norm_out: &[], values: &[], scales: &[] };
    check_token(&rounded, &token(&inputs, 2), &observed).unwrap();
    let exact = Operation { partial_sums: PartialSums::F32, ..rounded };
    check_token(&exact, &token(&inputs, 2), &observed).unwrap_err();
}

#[test]
fn what_cannot_cross_hosts_is_an_error_that_names_it() {
    let valid = operation(DType::Bf16, Residual::Replicated, PartialSums::F32);
    let two_hosts = limits(2, 2, 1 << 20);
    assert!(Plan::new(&valid, &two_hosts).is_ok());
    let says = |operation: Operation, limits: Limits, text: &str| {
        let error = Plan::new(&operation, &limits).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    let wire = Operation { wire: Some(WireFormat::Int8), ..valid };
    says(wire, two_hosts, "the wire format int8 does not cross hosts, and the group has 2");
    let one_shot = Operation { mode: Mode::OneShot, ..valid };
    says(one_shot, two_hosts, "one-shot does not cross hosts, and the group has 2: use auto or two-shot");
    let of = |world_size, hosts| Limits { world_size, hosts, ..two_hosts };
    says(valid, of(5, 2), "5 ranks cannot be as many on each of 2 hosts: use a multiple of 2 ranks");
    says(valid, of(4, 0), "the number of hosts must be 1 or more");
    says(valid, of(34, 2), "1 to 16 on each host, and at most 128 together");
    says(valid, of(144, 9), "1 to 16 on each host, and at most 128 together");
    assert!(Plan::new(&valid, &of(128, 8)).is_ok());
    assert!(Plan::new(&valid, &of(16, 16)).is_ok(), "one rank a host");
    assert_eq!(Limits::agree(&[of(4, 2), of(4, 4)]), None);
}
