//! The benchmark's kernels, run by the host's threads.

use fused_collective_bench::{
    digest,
    kernels::{self, audit, convert, eager},
    launch::{Audit, Conversions, Digest, EagerStep},
    table::EagerKernel,
};
use fused_collective_core::{
    dtype::{Element, bf16, f16},
    quant::{e2m1, e4m3},
};
use fused_collective_device::simt::host::{Launch, launch};
use fused_collective_device_tests::{self as support, Buffer, Random};

const SMALL: Launch = Launch { blocks: 2, cluster: 1, threads: 32 };

fn eager_steps<E: Element>(seed: u64) {
    support::eager_steps::<E>(&mut Random(seed), |kernel, step, buffers| {
        let kernel: unsafe fn(&EagerStep) = match kernel {
            EagerKernel::ToF32 => eager::to_f32::<E>,
            EagerKernel::Add => eager::add,
            EagerKernel::Round => eager::round::<E>,
            EagerKernel::Square => eager::square,
            EagerKernel::MeanRsqrt => eager::mean_rsqrt,
            EagerKernel::ScaleRows => eager::scale_rows,
            EagerKernel::MulWeight => eager::mul_weight::<E>,
            EagerKernel::MulInverse => eager::mul_inverse,
            EagerKernel::Clamp => eager::clamp,
            EagerKernel::ToFp8 => eager::to_fp8,
        };
        // SAFETY: the tensors have the types and the shapes that the steps ask for.
        launch(SMALL, || unsafe { kernel(step) });
        buffers.iter().for_each(|buffer| buffer.assert_guards());
    });
}

#[test]
fn eager_steps_are_right_in_every_type() {
    eager_steps::<f32>(29);
    eager_steps::<f16>(30);
    eager_steps::<bf16>(31);
}

#[test]
fn conversions_are_stored_in_order() {
    // Round 448, the largest E4M3 number, and round zero, where the count of bits wraps.
    for first in [448f32.to_bits() - 500, 0u32.wrapping_sub(500), 1.5f32.to_bits()] {
        let (bytes, halves) = (Buffer::new(1000, 0), Buffer::new(500, 0));
        let e4m3 = Conversions { out: bytes.address(), first, count: 1000 };
        let e2m1 = Conversions { out: halves.address(), ..e4m3 };
        // SAFETY: the memory holds the codes of as many patterns.
        launch(SMALL, || unsafe {
            convert::encode_e4m3(&e4m3);
            convert::encode_e2m1(&e2m1);
        });
        let (bytes, halves) = (bytes.get::<u8>(), halves.get::<u8>());
        for index in 0..1000 {
            let value = f32::from_bits(first.wrapping_add(index as u32));
            assert_eq!(bytes[index], e4m3::encode(value));
            assert_eq!(e2m1::unpack(halves[index / 2])[index % 2], e2m1::encode(value));
        }
    }
}

#[test]
fn a_digest_is_that_of_the_cpu() {
    let words: Vec<u32> = (0..1000).map(|index| index * index).collect();
    let threads = 2 * 32;
    let (memory, sums) = (Buffer::of(&words), Buffer::new(threads * 8, 1));
    for packs in [0, 1, 63, 64, 250] {
        let params = Digest { bytes: memory.address(), sums: sums.address(), packs };
        // SAFETY: the parameters are as their documentation says.
        launch(SMALL, || unsafe { kernels::digest(&params) });
        let found = sums.get::<u64>().into_iter().fold(0, u64::wrapping_add);
        assert_eq!(found, digest::of(0, &memory.get::<u8>()[..packs as usize * 16]), "{packs} packs");
    }
}

#[test]
fn the_audit_finds_what_is_wrong_and_writes_over_it() {
    let words: Vec<u32> = (0..1000).collect();
    let (actual, expected, found) = (Buffer::of(&words), Buffer::of(&words), Buffer::of(&[0u32]));
    let run = || {
        let params = Audit {
            actual: actual.address(),
            expected: expected.address(),
            found: found.address(),
            packs: 250,
            poison: 7,
            reserved: 0,
        };
        // SAFETY: the parameters are as their documentation says.
        launch(SMALL, || unsafe { audit(&params) });
    };
    run();
    assert_eq!(found.get::<u32>(), [0]);
    assert!(actual.get::<u32>().iter().all(|word| *word == 7));
    run();
    assert_ne!(found.get::<u32>(), [0]);
}
