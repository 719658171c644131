//! Every entry point of the benchmark's, but for those that measure links, for every kind of GPU.

use fused_collective_bench::{
    digest,
    launch::{Audit, Conversions, Digest},
    table::{PROBES, Probe, eager_module},
};
use fused_collective_core::{
    dtype::{Element, bf16, f16},
    quant::{e2m1, e4m3},
};
use fused_collective_device::simt::host::Launch;
use fused_collective_device_tests::{Buffer, POISON, Random, bytes_of, eager_steps};

use crate::{Compiled, gpus_of};

const SMALL: Launch = Launch { blocks: 2, cluster: 1, threads: 64 };

/// Runs a kernel that accesses `buffers`.
fn run_on<P>(compiled: &Compiled, name: &str, params: &P, buffers: &[&Buffer]) {
    let ranges = buffers.iter().map(|buffer| buffer.range()).collect();
    compiled.run(0, SMALL, name, &bytes_of(params), ranges);
}

fn eager_steps_are_right<E: Element>(seed: u64) {
    let module = eager_module(E::DTYPE);
    for gpu in gpus_of(module) {
        let compiled = Compiled::read(gpu, module, seed);
        eager_steps::<E>(&mut Random(seed), |kernel, step, buffers| {
            run_on(&compiled, kernel.name(), step, &buffers);
        });
        compiled.assert_all_ran(|name| name.ends_with("_streamed"));
    }
}

#[test]
fn eager_steps_are_right_in_every_type() {
    eager_steps_are_right::<f32>(11);
    eager_steps_are_right::<f16>(12);
    eager_steps_are_right::<bf16>(13);
}

fn audits_are_right(compiled: &Compiled) {
    let [actual, expected] = [(); 2].map(|()| Buffer::new(100 * 16, 1));
    let words = actual.get::<u32>();

    let found = Buffer::new(16, 0);
    let audit = |expected: &Buffer| Audit {
        actual: actual.address(),
        expected: expected.address(),
        found: found.address(),
        packs: 100,
        poison: POISON,
        reserved: 0,
    };
    let same = Buffer::of(&words);
    run_on(compiled, Probe::AuditOutputs.name(), &audit(&same), &[&actual, &same, &found]);
    assert_eq!(found.get::<u32>()[0], 0);
    assert!(actual.get::<u32>().iter().all(|word| *word == POISON));
    run_on(compiled, Probe::AuditOutputs.name(), &audit(&expected), &[&actual, &expected, &found]);
    assert!((1..=100).contains(&found.get::<u32>()[0]));
}

fn digests_are_right(compiled: &Compiled) {
    let memory = Buffer::of(&(0..4000u32).map(|index| index * index).collect::<Vec<_>>());
    let sums = Buffer::new(2 * 64 * 8, 1);
    for packs in [0, 1, 127, 1000] {
        let params = Digest { bytes: memory.address(), sums: sums.address(), packs };
        run_on(compiled, Probe::Digest.name(), &params, &[&memory, &sums]);
        let found = sums.get::<u64>().into_iter().fold(0, u64::wrapping_add);
        assert_eq!(found, digest::of(0, &memory.get::<u8>()[..packs as usize * 16]), "{packs} packs");
    }
}

/// Shows the order only where a GPU has instructions for a conversion: the emulator does those as `core` does.
/// Random ranges of numbers, those around the largest, and those where the count of bits wraps.
fn conversions_are_right(random: &mut Random, compiled: &Compiled) {
    let edges = [448f32.to_bits() - 500, 0u32.wrapping_sub(500), 1.5f32.to_bits(), 6f32.to_bits() - 500];
    let firsts: Vec<u32> = edges.into_iter().chain((0..60).map(|_| random.bits() as u32)).collect();
    for first in firsts {
        let (bytes, halves) = (Buffer::new(1000, 0), Buffer::new(500, 0));
        let e4m3 = Conversions { out: bytes.address(), first, count: 1000 };
        run_on(compiled, Probe::EncodeE4m3.name(), &e4m3, &[&bytes]);
        let e2m1 = Conversions { out: halves.address(), ..e4m3 };
        run_on(compiled, Probe::EncodeE2m1.name(), &e2m1, &[&halves]);
        let (bytes, halves) = (bytes.get::<u8>(), halves.get::<u8>());
        for index in 0..1000 {
            let value = f32::from_bits(first.wrapping_add(index as u32));
            assert_eq!(bytes[index], e4m3::encode(value), "{value:e}");
            assert_eq!(e2m1::unpack(halves[index / 2])[index % 2], e2m1::encode(value), "{value:e}");
        }
    }
}

#[test]
fn audits_digests_and_conversions_are_right() {
    for gpu in gpus_of(PROBES) {
        let compiled = Compiled::read(gpu, PROBES, 14);
        audits_are_right(&compiled);
        digests_are_right(&compiled);
        conversions_are_right(&mut Random(14), &compiled);
        compiled.assert_all_ran(|name| name.starts_with("links_"));
    }
}
