//! Plans, token ownership, launch parameters and the layout of the shared region: for any shape there are no
//! overlaps, no gaps and no overflows, and every rank comes to the same result.

use std::collections::{BTreeMap, HashSet};

use fused_collective_core::{
    MAX_HIDDEN, MAX_WORLD_SIZE,
    dtype::{DType, bf16},
    fusion::{Experts, Mode, Norm, Operation, OperationError, PartialSums, Residual, Rounding, WeightType},
    lamport,
    launch::{Activations, Address, Shape},
    pack::Pack,
    plan::{
        Algorithm, Limits, Plan, PlanError, one_shot_bytes, owned_index, owned_token, owned_tokens, owner,
    },
    quant::{GroupScale, Quantization, ScaleLayout},
    wire::WireFormat,
    workspace::{ALIGNMENT, Header, HeaderError, LIBRARY, Layout, LayoutError, MAGIC, SlotRows, VERSION},
};
use proptest::{option, prelude::*};

fn operation(tokens: u64, hidden: u64, dtype: DType, mode: Mode) -> Operation {
    Operation {
        dtype,
        tokens,
        hidden,
        residual: Residual::Replicated,
        norm: Some(Norm::default()),
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode,
    }
}

fn limits(world_size: u32, slot_bytes: u64) -> Limits {
    Limits { world_size, hosts: 1, slot_bytes, compute_units: 132, max_cluster: 8, one_shot_bytes: 1 << 18 }
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL.to_vec())
}

fn modes() -> impl Strategy<Value = Mode> {
    prop::sample::select(vec![Mode::Auto, Mode::OneShot, Mode::TwoShot])
}

fn wires() -> impl Strategy<Value = Option<WireFormat>> {
    option::of(prop::sample::select(&WireFormat::ALL[..]))
}

/// Token counts from none to more than any memory holds.
fn token_counts() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..40, 0u64..100_000, any::<u64>()]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (1..=MAX_WORLD_SIZE, 12u32..50, 1u32..300, 0u32..4, any::<u64>()).prop_map(
        |(world_size, slot_bits, compute_units, cluster_bits, one_shot_bytes)| Limits {
            world_size,
            hosts: 1,
            slot_bytes: 1 << slot_bits,
            compute_units,
            max_cluster: 1 << cluster_bits,
            one_shot_bytes,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn every_token_has_one_owner_and_one_place_with_it(tokens in 0u64..500, world_size in 1..=MAX_WORLD_SIZE) {
        let mut places = HashSet::new();
        for token in 0..tokens {
            let (rank, index) = (owner(token, world_size), owned_index(token, world_size));
            prop_assert!(rank < world_size);
            prop_assert!(index < owned_tokens(tokens, rank, world_size));
            prop_assert_eq!(owned_token(index, rank, world_size), token);
            prop_assert!(places.insert((rank, index)));
        }
        let owned: u64 = (0..world_size).map(|rank| owned_tokens(tokens, rank, world_size)).sum();
        prop_assert_eq!(owned, tokens);
        let counts: Vec<u64> = (0..world_size).map(|rank| owned_tokens(tokens, rank, world_size)).collect();
        prop_assert!(counts[0] - counts[world_size as usize - 1] <= 1, "dealt out evenly: {:?}", counts);
    }

    #[test]
    fn rounds_cover_every_token_once_and_fit_their_slot(
        tokens in 0u64..100_000,
        blocks in 1u64..=MAX_HIDDEN / 16,
        dtype in dtypes(),
        mode in modes(),
        wire in wires(),
        limits in any_limits(),
    ) {
        let operation = Operation { wire, ..operation(tokens, blocks * 16, dtype, mode) };
        prop_assert!(operation.sent_bytes().iter().all(|&bytes| bytes <= operation.row_bytes()));
        match Plan::new(&operation, &limits) {
            Err(PlanError::Slot { tokens, needed, slot_bytes }) => {
                prop_assert_eq!(tokens, 1);
                prop_assert!(needed > slot_bytes && slot_bytes == limits.slot_bytes);
            }
            Err(error) => prop_assert!(false, "{}", error),
            Ok(plan) => {
                let mut next = 0;
                for round in plan.rounds() {
                    prop_assert_eq!(round.first_token, next);
                    prop_assert!(round.rows.tokens > 0);
                    let bytes = match plan.algorithm {
                        Algorithm::OneShot => round.rows.one_shot_bytes(),
                        _ => round.rows.two_shot_bytes(),
                    };
                    prop_assert!(bytes.is_some_and(|bytes| bytes <= limits.slot_bytes));
                    next += round.rows.tokens;
                }
                prop_assert_eq!(next, tokens);
            }
        }
    }

    #[test]
    fn with_a_sharded_residual_a_token_is_its_owners_in_every_round(
        tokens in 0u64..100_000,
        blocks in 1u64..=MAX_HIDDEN / 16,
        dtype in dtypes(),
        wire in wires(),
        limits in any_limits(),
    ) {
        let operation = Operation {
            residual: Residual::Sharded,
            wire,
            ..operation(tokens, blocks * 16, dtype, Mode::Auto)
        };
        let least = u64::from(limits.world_size).min(tokens.max(1));
        let [row_bytes, sum_bytes] = operation.sent_bytes();
        prop_assert_eq!(sum_bytes, operation.row_bytes());
        let smallest = SlotRows { world_size: limits.world_size, tokens: least, row_bytes, sum_bytes };
        match Plan::new(&operation, &limits) {
            Err(error) => {
                let needed = smallest.two_shot_bytes().unwrap();
                let slot_bytes = limits.slot_bytes;
                prop_assert_eq!(error, PlanError::Slot { tokens: least, needed, slot_bytes });
                prop_assert!(needed > slot_bytes);
            }
            Ok(plan) => {
                prop_assert_eq!(plan.algorithm, Algorithm::ShardedTwoShot);
                let mut next = 0;
                for round in plan.rounds() {
                    prop_assert_eq!(round.first_token, next);
                    prop_assert_eq!(owner(round.first_token, limits.world_size), 0);
                    prop_assert!(round.rows.tokens > 0);
                    prop_assert!(round.rows.two_shot_bytes().is_some_and(|bytes| bytes <= limits.slot_bytes));
                    next += round.rows.tokens;
                }
                prop_assert_eq!(next, tokens);
                let rows = |rank| operation.residual_rows(rank, limits.world_size);
                prop_assert_eq!((0..limits.world_size).map(rows).sum::<u64>(), tokens);
            }
        }
    }

    #[test]
    fn every_rank_can_launch_the_cluster_and_every_cluster_of_a_round_finds_units_of_its_own(
        tokens in token_counts(),
        blocks in 1u64..=MAX_HIDDEN / 16,
        dtype in dtypes(),
        mode in modes(),
        limits in any_limits(),
    ) {
        let operation = operation(tokens, blocks * 16, dtype, mode);
        let Ok(plan) = Plan::new(&operation, &limits) else { return Ok(()) };
        let cluster = u64::from(plan.cluster);
        prop_assert!(plan.cluster.is_power_of_two() && plan.cluster <= limits.max_cluster);
        if plan.cluster > 1 {
            prop_assert!(plan.tokens_per_round * cluster <= u64::from(limits.compute_units));
            prop_assert!(plan.row_bytes / Pack::BYTES / cluster >= 32, "a block has less than a warp's work");
        }
    }

    #[test]
    fn every_rank_makes_the_same_plan_however_different_the_ranks_are(
        ranks in prop::collection::vec(any_limits(), 1..=16),
        tokens in 0u64..10_000,
        blocks in 1u64..1024,
        mode in modes(),
    ) {
        let world_size = ranks.len() as u32;
        let ranks: Vec<Limits> = ranks.into_iter().map(|limits| Limits { world_size, ..limits }).collect();
        let agreed = Limits::agree(&ranks).unwrap();
        for rank in &ranks {
            prop_assert!(agreed.slot_bytes <= rank.slot_bytes && agreed.compute_units <= rank.compute_units);
            prop_assert!(agreed.max_cluster <= rank.max_cluster && agreed.one_shot_bytes <= rank.one_shot_bytes);
        }
        let mut reversed = ranks.clone();
        reversed.reverse();
        let operation = operation(tokens, blocks * 16, DType::Bf16, mode);
        prop_assert_eq!(Limits::agree(&reversed), Some(agreed));
        prop_assert_eq!(Plan::new(&operation, &agreed), Plan::new(&operation, &Limits::agree(&reversed).unwrap()));
    }

    #[test]
    fn rows_of_a_slot_neither_overlap_nor_leave_the_slot(
        tokens in 1u64..60,
        blocks in 1u64..64,
        sum_blocks in 1u64..64,
        world_size in 1..=MAX_WORLD_SIZE,
    ) {
        let rows = SlotRows { world_size, tokens, row_bytes: blocks * 32, sum_bytes: sum_blocks * 32 };
        let mut one_shot = BTreeMap::new();
        let mut two_shot = BTreeMap::new();
        for token in 0..tokens {
            for source in 0..world_size {
                prop_assert!(one_shot.insert(rows.one_shot(source, token), rows.row_bytes).is_none());
                if owner(token, world_size) == 0 {
                    let offset = rows.first_hop(source, owned_index(token, world_size));
                    prop_assert!(two_shot.insert(offset, rows.row_bytes).is_none());
                }
            }
            prop_assert!(two_shot.insert(rows.second_hop(token), rows.sum_bytes).is_none());
        }
        for (offsets, bytes) in [(one_shot, rows.one_shot_bytes()), (two_shot, rows.two_shot_bytes())] {
            let ends = offsets.iter().map(|(offset, length)| offset + length);
            let next = offsets.keys().copied().skip(1).chain(bytes);
            prop_assert!(ends.zip(next).all(|(end, next)| end <= next));
        }
    }

    #[test]
    fn slots_lie_in_the_region_one_after_the_other(world_size in 1..=MAX_WORLD_SIZE, slot_bytes in 0u64..1 << 50) {
        let layout = Layout::new(world_size, slot_bytes).unwrap();
        prop_assert!(layout.slot_bytes() >= slot_bytes && layout.slot_bytes() - slot_bytes < ALIGNMENT);
        prop_assert!(layout.control_offset(59) + 64 <= layout.slot_offset(0));
        for slot in 0..lamport::SLOTS {
            prop_assert!(layout.slot_offset(slot).is_multiple_of(ALIGNMENT));
            let next = if slot + 1 < lamport::SLOTS { layout.slot_offset(slot + 1) } else { layout.region_bytes() };
            prop_assert_eq!(layout.slot_offset(slot) + layout.slot_bytes(), next);
        }
        prop_assert_eq!(layout.total_bytes(), layout.region_bytes() * u64::from(world_size));
    }

    #[test]
    fn sizes_that_overflow_are_refused_not_wrapped(
        slot_bytes: u64,
        tokens: u64,
        row_bytes in 1u64..=1 << 18,
        sum_bytes in 1u64..=1 << 18,
    ) {
        let exact = |factors: &[u64]| factors.iter().try_fold(1u128, |product, &f| product.checked_mul(f.into()));
        match Layout::new(16, slot_bytes) {
            Ok(layout) => {
                let slots = u128::from(layout.slot_bytes()) * u128::from(lamport::SLOTS);
                prop_assert!((slots + 4096) * 16 == u128::from(layout.total_bytes()));
            }
            Err(error) => {
                prop_assert_eq!(error, LayoutError::TooLarge { slot_bytes });
                prop_assert!((u128::from(slot_bytes) + 4096) * u128::from(lamport::SLOTS) * 16 + 131_072 > u128::from(u64::MAX));
            }
        }
        let rows = SlotRows { world_size: 16, tokens, row_bytes, sum_bytes };
        let one_shot = exact(&[16, tokens, row_bytes]).and_then(|bytes| u64::try_from(bytes).ok());
        prop_assert_eq!(rows.one_shot_bytes(), one_shot);
        let gathered = exact(&[16, tokens.div_ceil(16), row_bytes]).unwrap();
        let two_shot = u64::try_from(gathered + exact(&[tokens, sum_bytes]).unwrap()).ok();
        prop_assert_eq!(rows.two_shot_bytes(), two_shot);
    }

    #[test]
    fn an_operation_and_the_next_use_different_slots(operation in 0u64..u64::MAX) {
        prop_assert!(lamport::slot(operation) < lamport::SLOTS);
        prop_assert_ne!(lamport::slot(operation), lamport::slot(operation + 1));
    }

    #[test]
    fn a_stripped_pack_is_complete_and_keeps_every_value(words: [u32; 4], at in 0usize..4) {
        let mut words = words;
        for word in [lamport::SENTINEL, words[at]] {
            words[at] = word;
            let pack = Pack(words);
            let stripped = pack.strip();
            prop_assert!(stripped.is_complete());
            for (before, after) in pack.0.into_iter().zip(stripped.0) {
                let both_nan = [before, after].map(|word| f32::from_bits(word).is_nan() && bf16::from_bits(word as u16).is_nan());
                prop_assert!(before == after || (before == lamport::SENTINEL && both_nan == [true; 2]));
            }
            prop_assert_eq!(pack.is_complete(), !words.contains(&lamport::SENTINEL));
        }
    }
}

#[test]
fn the_largest_operation_is_planned_without_overflow() {
    let largest = limits(16, u64::MAX / 64);
    for mode in [Mode::OneShot, Mode::TwoShot] {
        let tokens = u64::MAX / (8 * MAX_HIDDEN);
        let plan = Plan::new(&operation(tokens, MAX_HIDDEN, DType::F32, mode), &largest).unwrap();
        let last = plan.rounds().last().unwrap();
        assert_eq!(last.first_token + last.rows.tokens, tokens);
        let more = operation(tokens + 1, MAX_HIDDEN, DType::F32, mode);
        let refused =
            PlanError::Operation(OperationError::TooLarge { tokens: tokens + 1, hidden: MAX_HIDDEN });
        assert_eq!(Plan::new(&more, &largest), Err(refused));
    }
}

/// The largest round that a launch counts has more rows in a slot than 32 bits count.
#[test]
fn more_rows_of_a_slot_than_32_bits_count_do_not_wrap() {
    let tokens = (1u64 << 31) - 1;
    let rows = SlotRows { world_size: 8, tokens, row_bytes: 32, sum_bytes: 48 };
    let owned = 1u64 << 28;
    assert_eq!(rows.first_hop(7, owned - 1), (8 * owned - 1) * 32);
    assert_eq!(rows.second_hop(tokens - 1), 8 * owned * 32 + (tokens - 1) * 48);
    assert_eq!(rows.one_shot(7, tokens - 1), (8 * tokens - 1) * 32);
}

/// Plans and offsets of more than 2^32 bytes, elements or tokens: in slots, in tensors, in the rows of a sharded residual
/// on each rank, and among scales.
#[test]
fn sizes_and_offsets_beyond_32_bits_do_not_wrap() {
    const WORLD: u32 = 3;
    let (hidden, tokens) = (8192, 5 << 32);
    let layout = ScaleLayout::Swizzled128x4;
    let limits = limits(WORLD, 1 << 40);
    for residual in [Residual::Replicated, Residual::Sharded] {
        let quantization = Quantization::NvFp4 { layout };
        let operation =
            Operation { residual, quantization, ..operation(tokens, hidden, DType::Bf16, Mode::TwoShot) };
        let plan = Plan::new(&operation, &limits).unwrap();
        let row = u128::from(plan.row_bytes);
        let mut next = 0;
        for round in plan.rounds() {
            assert_eq!(round.first_token, next);
            next += round.rows.tokens;
            // The largest slots take rounds of more than 2^32 bytes.
            let (rows, last) = (round.rows, round.rows.tokens - 1);
            let owned = u128::from(rows.tokens.div_ceil(3));
            let hops = u128::from(WORLD) * owned * row;
            assert_eq!(u128::from(rows.second_hop(last)), hops + u128::from(last) * row);
            assert_eq!(u128::from(rows.first_hop(2, 5)), (2 * owned + 5) * row);
            assert_eq!(u128::from(rows.one_shot(2, last)), u128::from(2 * rows.tokens + last) * row);

            let shape = Shape::of_round(&plan, &round, 7).unwrap();
            assert_eq!(shape.operation_token(shape.tokens - 1), round.first_token + last);
            assert_eq!((shape.total_tokens, shape.call, u128::from(shape.row_bytes())), (tokens, 7, row));
            let activations = Activations::new(Address(16), Address(32), Address(48), Rounding::Once);
            let before =
                if residual == Residual::Sharded { round.first_token / 3 * plan.row_bytes } else { 0 };
            let expected = Activations {
                residual: Address(32 + before),
                residual_out: Address(48 + before),
                ..activations
            };
            assert_eq!(activations.of_round(&plan, &round), expected);
        }
        assert_eq!(next, tokens);
        let held: Vec<u64> = (0..WORLD).map(|rank| operation.residual_rows(rank, WORLD)).collect();
        if residual == Residual::Sharded {
            assert_eq!(held.iter().sum::<u64>(), tokens);
        } else {
            assert_eq!(held, [tokens; 3]);
        }
        assert_eq!(u128::from(operation.activation_bytes()), u128::from(tokens) * row);
        let cols = hidden / 16;
        assert_eq!(quantization.scale_bytes(tokens, hidden), Some(tokens * cols));
        // The last tile's last line ends the scales.
        for layout in ScaleLayout::ALL {
            let scales = quantization.with_layout(layout).scales(tokens, hidden).unwrap();
            assert_eq!(scales.offset(tokens - 1, cols - 1), tokens * cols - 1, "{layout}");
            assert_eq!(scales.strides().offset(tokens - 1, cols as u32 - 1), tokens * cols - 1, "{layout}");
        }
    }
}

#[test]
fn a_round_of_more_tokens_than_a_launch_counts_has_no_shape() {
    for (tokens, exists) in [((1 << 31) - 1, true), (1 << 31, false), (u64::from(u32::MAX) + 2, false)] {
        assert_eq!(Shape::of_rows(tokens, 32).is_some(), exists);
        let plan =
            Plan::new(&operation(tokens, 16, DType::Bf16, Mode::OneShot), &limits(2, 1 << 60)).unwrap();
        let rounds: Vec<_> = plan.rounds().collect();
        assert_eq!(rounds.len(), 1);
        assert_eq!(Shape::of_round(&plan, &rounds[0], 0).is_some(), exists);
    }
}

#[test]
fn one_shot_ends_where_its_pushes_take_longer_than_a_hop_more() {
    const HOP: u64 = 350_000;
    assert_eq!([1, 2].map(|ranks| one_shot_bytes(ranks, HOP)), [u64::MAX; 2]);
    for ranks in 3..=MAX_WORLD_SIZE {
        // Bytes that each mode pushes, with the wait of two-shot as bytes.
        let pushed = |bytes: u64| {
            let (others, part) = (u64::from(ranks) - 1, bytes as f64 / f64::from(ranks));
            (others as f64 * bytes as f64, 2.0 * others as f64 * part + HOP as f64)
        };
        let bytes = one_shot_bytes(ranks, HOP);
        let ((one_shot, two_shot), (more, less)) = (pushed(bytes), pushed(bytes + 1));
        assert!(one_shot <= two_shot && more > less, "{ranks} ranks: {bytes} bytes");
    }
}

#[test]
fn auto_takes_one_shot_for_few_bytes_and_two_shot_for_many() {
    let limits = Limits { one_shot_bytes: 16 * 8192 * 2, ..limits(2, 1 << 30) };
    let algorithm =
        |tokens| Plan::new(&operation(tokens, 8192, DType::Bf16, Mode::Auto), &limits).unwrap().algorithm;
    assert_eq!(algorithm(16), Algorithm::OneShot);
    assert_eq!(algorithm(17), Algorithm::TwoShot);
}

#[test]
fn few_tokens_are_spread_over_clusters_and_many_are_not() {
    let cluster = |tokens| {
        Plan::new(&operation(tokens, 8192, DType::Bf16, Mode::OneShot), &limits(2, 1 << 30)).unwrap().cluster
    };
    assert_eq!([1, 16, 17, 33, 34, 66, 67, 2048].map(cluster), [8, 8, 4, 4, 2, 2, 1, 1]);
}

#[test]
fn invalid_operations_are_refused_by_name() {
    let valid = operation(4, 64, DType::Bf16, Mode::Auto);
    let sharded = Operation { residual: Residual::Sharded, ..valid };
    let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Linear };
    let mxfp8 = Quantization::MxFp8 { layout: ScaleLayout::Linear };
    let group =
        |group| Quantization::Fp8PerGroup { group, scales: GroupScale::F32, layout: ScaleLayout::Linear };
    let epsilon = |epsilon| Operation { norm: Some(Norm { epsilon, ..Norm::default() }), ..valid };
    let post_norm = |epsilon, weight_bias| Operation {
        post_norm: Some(Norm { epsilon, weight_bias, ..Norm::default() }),
        ..valid
    };
    let experts = |top_k| Operation {
        experts: Some(Experts { top_k, scales: WeightType::Element, shared: false }),
        ..valid
    };
    let cases = [
        (Operation { norm: None, ..post_norm(0.0, 0.0) }, OperationError::PostNormWithoutNorm),
        (post_norm(-1.0, 0.0), OperationError::Epsilon(-1.0)),
        (post_norm(0.0, f32::INFINITY), OperationError::WeightBias(f32::INFINITY)),
        (experts(0), OperationError::TopK(0)),
        (experts(65), OperationError::TopK(65)),
        (
            Operation { tokens: u64::MAX / 128, hidden: 16, ..experts(64) },
            OperationError::TooLarge { tokens: u64::MAX / 128, hidden: 16 },
        ),
        (Operation { hidden: 0, ..valid }, OperationError::Hidden(0)),
        (Operation { hidden: 40, ..valid }, OperationError::Hidden(40)),
        (Operation { hidden: MAX_HIDDEN + 16, ..valid }, OperationError::Hidden(MAX_HIDDEN + 16)),
        (
            Operation { hidden: 48, quantization: mxfp8, ..valid },
            OperationError::Block { hidden: 48, block: 32 },
        ),
        (Operation { quantization: group(0), ..valid }, OperationError::Group(0)),
        (Operation { quantization: group(48), hidden: 96, ..valid }, OperationError::Group(48)),
        (epsilon(-1.0), OperationError::Epsilon(-1.0)),
        (epsilon(f32::INFINITY), OperationError::Epsilon(f32::INFINITY)),
        (Operation { norm: None, quantization: nvfp4, ..valid }, OperationError::QuantizationWithoutNorm),
        (
            Operation { norm: None, ..sharded },
            OperationError::Sharded("needs a norm, which is the result that all ranks get"),
        ),
        (
            Operation { mode: Mode::OneShot, ..sharded },
            OperationError::Sharded("needs owners of tokens, which one-shot does not have: use two-shot"),
        ),
        (
            Operation {
                quantization: Quantization::Fp8PerGroup {
                    group: 64,
                    scales: GroupScale::F32,
                    layout: ScaleLayout::Swizzled8x4,
                },
                ..valid
            },
            OperationError::Layout(ScaleLayout::Swizzled8x4),
        ),
        (
            Operation { quantization: nvfp4, keep_norm: true, ..sharded },
            OperationError::Sharded(
                "leaves the norm or its quantization on all ranks, not both: do not keep the norm",
            ),
        ),
    ];
    for (operation, error) in cases {
        assert_eq!(operation.validate(), Err(error));
    }
    assert!(matches!(epsilon(f32::NAN).validate(), Err(OperationError::Epsilon(_))));
    assert_eq!(Operation { hidden: MAX_HIDDEN, ..valid }.validate(), Ok(()));
    assert_eq!(Operation { tokens: 0, ..valid }.validate(), Ok(()));
    assert_eq!(post_norm(0.0, 1.0).validate(), Ok(()));
    assert_eq!(experts(64).validate(), Ok(()));
}

#[test]
fn limits_that_no_group_can_have_are_refused() {
    let operation = operation(1, 64, DType::Bf16, Mode::Auto);
    let good = limits(2, 1 << 20);
    let bad = [
        Limits { world_size: 0, ..good },
        Limits { world_size: 17, ..good },
        Limits { compute_units: 0, ..good },
        Limits { max_cluster: 3, ..good },
        Limits { max_cluster: 0, ..good },
    ];
    for limits in bad {
        assert!(matches!(Plan::new(&operation, &limits), Err(PlanError::Limits(_))), "{limits:?}");
    }
    assert_eq!(Limits::agree(&[]), None);
    assert_eq!(Limits::agree(&[good, Limits { world_size: 3, ..good }]), None);
}

#[test]
fn a_header_is_checked_field_by_field() {
    let header = Header { world_size: 4, rank: 2, slot_bytes: 1 << 20 };
    assert_eq!(header.check(header.to_words()), Ok(()));
    let with = |index: usize, value| {
        let mut words = header.to_words();
        words[index] = value;
        header.check(words)
    };
    assert_eq!(with(0, 0), Err(HeaderError::Magic(0)));
    assert_eq!(with(1, VERSION + 1), Err(HeaderError::Version(VERSION + 1)));
    let fields = [
        (2, "world size", 4),
        (3, "rank", 2),
        (4, "slot size", 1 << 20),
        (5, "slot count", lamport::SLOTS),
        (6, "library version", LIBRARY),
    ];
    for (index, field, expected) in fields {
        assert_eq!(with(index, 9), Err(HeaderError::Mismatch { field, found: 9, expected }));
    }
    assert_eq!(MAGIC.to_le_bytes(), *b"FUSEDCOL");
    let [.., high, low] = [LIBRARY >> 32, LIBRARY >> 16 & 0xffff, LIBRARY & 0xffff];
    assert_eq!(format!("{}.{high}.{low}", LIBRARY >> 32), env!("CARGO_PKG_VERSION"));
}

proptest! {
    /// Whatever a peer wrote in its header, it is taken without a panic, and only the right words pass.
    #[test]
    fn any_header_words_are_checked_without_a_panic(words: [u64; 8], index in 0usize..8) {
        let header = Header { world_size: 4, rank: 2, slot_bytes: 1 << 20 };
        prop_assert!(header.check(words).is_err());
        let mut one = header.to_words();
        one[index] = words[index];
        let same = one[..7] == header.to_words()[..7];
        prop_assert_eq!(header.check(one).is_ok(), same);
        if let Err(error) = header.check(one) {
            prop_assert!(error.to_string().contains("region"));
        }
    }
}
