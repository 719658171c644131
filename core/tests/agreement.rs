//! Calls as words and chains: whatever differs between two calls shows, and no words from elsewhere do harm.

use std::collections::HashMap;

use fused_collective_core::{
    agreement::{CALL_WORDS, Call, Chain},
    dtype::DType,
    fusion::{Experts, MAX_TOP_K, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    plan::Algorithm,
    quant::{GroupScale, Quantization, ScaleLayout},
    wire::WireFormat,
};
use proptest::{option, prelude::*};

fn quantizations() -> impl Strategy<Value = Quantization> {
    let layout = prop::sample::select(&ScaleLayout::ALL[..]);
    (layout, 0usize..7, 0usize..3).prop_map(|(layout, kind, group)| match kind {
        0 => Quantization::None,
        1 => Quantization::Fp8Static,
        2 => Quantization::Fp8PerToken,
        3 => Quantization::Fp8PerGroup {
            group: [32, 64, 128][group],
            scales: if layout == ScaleLayout::DeepGemm { GroupScale::F32 } else { GroupScale::Ue8m0 },
            layout,
        },
        4 => Quantization::NvFp4 { layout },
        5 => Quantization::MxFp8 { layout },
        _ => Quantization::MxFp4 { layout },
    })
}

fn weights(wide: bool) -> WeightType {
    if wide { WeightType::F32 } else { WeightType::Element }
}

fn calls() -> impl Strategy<Value = Call> {
    let norm = (0.0f32..1.0, -1.0f32..1.0, any::<bool>()).prop_map(|(epsilon, weight_bias, wide)| Norm {
        epsilon,
        weight_bias,
        gamma: weights(wide),
    });
    let shape =
        (any::<u64>(), any::<u64>(), 0usize..3, option::of(prop::sample::select(&WireFormat::ALL[..])));
    let residual = prop_oneof![Just(Residual::None), Just(Residual::Replicated), Just(Residual::Sharded)];
    let flags = (residual, any::<bool>(), any::<bool>(), 0usize..3, any::<bool>(), any::<bool>());
    let experts = (1..=MAX_TOP_K, any::<bool>(), any::<bool>()).prop_map(|(top_k, wide, shared)| Experts {
        top_k,
        scales: weights(wide),
        shared,
    });
    let norms = (option::of(norm.clone()), option::of(norm), option::of(experts));
    let operation = (shape, flags, norms, quantizations(), 0.0f32..9.0).prop_map(
        |(
            (tokens, hidden, dtype, wire),
            (residual, keep_norm, rounds_sum, algorithm, bias, element_partials),
            (norm, post_norm, experts),
            quantization,
            scale,
        )| {
            let operation = Operation {
                dtype: DType::ALL[dtype],
                tokens,
                hidden,
                residual,
                norm,
                quantization,
                keep_norm,
                rounding: if rounds_sum { Rounding::AfterAllReduce } else { Rounding::Once },
                bias,
                post_norm,
                experts,
                wire,
                partial_sums: if element_partials { PartialSums::Element } else { PartialSums::F32 },
                mode: Mode::Auto,
            };
            let algorithm = match (residual, algorithm) {
                (Residual::Sharded, 2) => Algorithm::ShardedHierarchical,
                (Residual::Sharded, _) => Algorithm::ShardedTwoShot,
                (_, 0) => Algorithm::OneShot,
                (_, 1) => Algorithm::TwoShot,
                _ => Algorithm::Hierarchical,
            };
            Call::operation(&operation, algorithm, Some(scale))
        },
    );
    prop_oneof![
        8 => operation,
        1 => Just(Call::Barrier),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(captured, calls)| Call::Replay { captured, calls }),
    ]
}

proptest! {
    #[test]
    fn a_call_is_read_back_from_its_words(call in calls()) {
        prop_assert_eq!(Call::from_words(&call.to_words()), Some(call));
    }

    #[test]
    fn calls_that_differ_have_other_words_and_chains(a in calls(), b in calls()) {
        prop_assert_eq!(a == b, a.to_words() == b.to_words());
        prop_assert_eq!(a == b, Chain::default().then(&a) == Chain::default().then(&b));
    }

    #[test]
    fn any_words_are_taken_without_a_panic_and_are_one_call_at_most(words: [u64; CALL_WORDS]) {
        if let Some(call) = Call::from_words(&words) {
            prop_assert_eq!(call.to_words(), words);
        }
    }

    /// Random words are hardly ever a call: change one bit of those that are.
    #[test]
    fn words_with_a_bit_changed_are_another_call_or_none(call in calls(), word in 0..CALL_WORDS, bit in 0u32..64) {
        let mut words = call.to_words();
        words[word] ^= 1u64 << bit;
        if let Some(other) = Call::from_words(&words) {
            prop_assert_eq!(other.to_words(), words);
            prop_assert_ne!(Chain::default().then(&other), Chain::default().then(&call));
            // It reads as something, whatever it is.
            prop_assert!(!other.to_string().is_empty());
        }
    }

    #[test]
    fn calls_in_another_order_have_another_chain(a in calls(), b in calls()) {
        let (ab, ba) = (Chain::default().then(&a).then(&b), Chain::default().then(&b).then(&a));
        prop_assert_eq!(a == b, ab == ba);
    }
}

#[test]
fn chains_of_like_calls_do_not_meet() {
    let mut seen = HashMap::new();
    for tokens in 0..2000 {
        let operation = Operation {
            dtype: DType::Bf16,
            tokens,
            hidden: 64,
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
            mode: Mode::Auto,
        };
        let mut chain = Chain::default();
        for length in 1..20 {
            chain = chain.then(&Call::operation(&operation, Algorithm::OneShot, None));
            assert_eq!(seen.insert(chain.digest(), (tokens, length)), None);
        }
    }
}

#[test]
fn a_call_names_what_ranks_can_differ_in() {
    let operation = Operation {
        dtype: DType::Bf16,
        tokens: 17,
        hidden: 4096,
        residual: Residual::Replicated,
        norm: Some(Norm { weight_bias: 1.0, ..Norm::default() }),
        quantization: Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 },
        keep_norm: true,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    };
    let named = |operation, scale| Call::operation(&operation, Algorithm::TwoShot, scale).to_string();
    assert_eq!(
        named(operation, Some(448.0)),
        "two-shot, 17 tokens of 4096 bfloat16, residual, norm (epsilon 1e-6, weight bias 1), nvfp4, swizzled 128x4 scales, \
         scale 4.48e2, norm kept"
    );
    let sharded = Operation { residual: Residual::Sharded, ..operation };
    assert!(
        named(sharded, None).starts_with("two-shot, 17 tokens of 4096 bfloat16, sharded residual, norm"),
        "{}",
        named(sharded, None)
    );
    let experts = Experts { top_k: 8, scales: WeightType::F32, shared: true };
    let post_norm = Some(Norm { gamma: WeightType::F32, ..Norm::default() });
    let combined = Operation { experts: Some(experts), post_norm, bias: true, ..operation };
    assert!(
        named(combined, None).contains(
            " bfloat16, top 8 experts with float32 scales and a shared one, bias, post-norm (epsilon 1e-6, float32 gamma), \
             residual, norm"
        ),
        "{}",
        named(combined, None)
    );
    let rounded = Operation { rounding: Rounding::AfterAllReduce, ..operation };
    assert!(
        named(rounded, None).contains(" bfloat16, residual, sum rounded, norm"),
        "{}",
        named(rounded, None)
    );
    let narrow = Operation { wire: Some(WireFormat::Int4), ..operation };
    assert!(
        named(narrow, None).contains(" of 4096 bfloat16 sent as int4, residual, norm"),
        "{}",
        named(narrow, None)
    );
    let halved = Operation { partial_sums: PartialSums::Element, ..operation };
    let across = Call::operation(&halved, Algorithm::Hierarchical, None).to_string();
    assert!(across.contains(" of 4096 bfloat16, partial sums in the element type, residual"), "{across}");
    // Nothing crosses between hosts in a group of one.
    assert_eq!(named(halved, None), named(operation, None));
    // A scale that nothing reads is no part of the call, and neither is a rounding.
    let alone =
        Operation { residual: Residual::None, norm: None, quantization: Quantization::None, ..operation };
    let rounded = Operation { rounding: Rounding::AfterAllReduce, ..alone };
    assert_eq!(named(alone, Some(448.0)), named(rounded, None));
    // Graphs of as many operations differ in what they hold.
    let replay = |captured| Call::Replay { captured, calls: 20 }.to_string();
    assert_eq!(replay(0xabc), "a replay of 20 captured operations, digest 0000000000000abc");
    assert_ne!(replay(1), replay(2));
}
