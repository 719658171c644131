//! What a kernel must not do, done once each: the emulator says so, and where.

use std::{iter, mem::MaybeUninit, time::Duration};

use fused_collective_emulator::{Geometry, Grid, Memory, Module};

const ONE_WARP: Geometry = Geometry { blocks: 1, cluster: 1, threads: 32 };
const TWO_WARPS: Geometry = Geometry { blocks: 1, cluster: 1, threads: 64 };
const CLUSTER: Geometry = Geometry { blocks: 2, cluster: 2, threads: 32 };

/// The line that a body starts in.
const FIRST_LINE: usize = 10;

fn kernel(body: &str) -> String {
    format!(
        ".version 8.6
.target sm_90
.address_size 64
.visible .entry kernel(
\t.param .align 8 .b8 kernel_param_0[8]
)
{{
\t.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
\tmov.u32 %r1, %tid.x; ld.param.b64 %rd1, [kernel_param_0];
{body}
\tret;
}}
"
    )
}

/// Runs a body whose parameter is the address of four words, 11, 12, 13, 14; returns them as they are then.
fn run(body: &str, geometry: Geometry, seed: u64) -> Result<[u32; 4], String> {
    let module = Module::parse(&kernel(body)).unwrap();
    let entry = module.entry("kernel").unwrap().map_err(|error| error.to_string())?;
    let mut words = Box::new([11u32, 12, 13, 14]);
    let start = (&raw mut *words).expose_provenance() as u64;
    let parameter = start.to_ne_bytes().map(MaybeUninit::new);
    // SAFETY: the words live, and the grid is alone with them.
    let memory = unsafe { Memory::new(iter::once(start..start + 16).collect()) };
    let timeout = Duration::from_secs(2);
    let grid = Grid { entry: &entry, geometry, parameter: &parameter, memory: &memory, seed, timeout };
    // SAFETY: the parameter is initialized.
    unsafe { grid.run() }.map_err(|fault| fault.to_string())?;
    // SAFETY: as above; read anew, as the grid wrote them by address.
    Ok(unsafe { (&raw const *words).read_volatile() })
}

/// Holds that every order of threads ends in a fault at the body's line `line` that says `what`.
#[track_caller]
fn assert_fault(body: &str, geometry: Geometry, line: usize, what: &str) {
    for seed in 0..50 {
        let fault = run(body, geometry, seed).expect_err("a fault");
        let place = format!("kernel, line {},", FIRST_LINE + line);
        assert!(fault.starts_with(&place) && fault.contains(what), "{fault}");
    }
}

/// Holds that some order of threads ends in a fault that says `what`, and no other.
#[track_caller]
fn assert_found(body: &str, geometry: Geometry, what: &str) {
    let faults: Vec<String> = (0..50).filter_map(|seed| run(body, geometry, seed).err()).collect();
    assert!(!faults.is_empty() && faults.iter().all(|fault| fault.contains(what)), "{faults:?}");
}

const SHARED: &str =
    ".shared .align 16 .b8 array[272]; mov.u32 %r2, array; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3;";

#[test]
fn what_is_right_runs_to_its_end() {
    let sum_of_lanes = "cvt.rn.f32.u32 %r2, %r1;
shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1; add.rn.f32 %r2, %r2, %r3;
shfl.sync.bfly.b32 %r3, %r2, 8, 31, -1; add.rn.f32 %r2, %r2, %r3;
shfl.sync.bfly.b32 %r3, %r2, 4, 31, -1; add.rn.f32 %r2, %r2, %r3;
shfl.sync.bfly.b32 %r3, %r2, 2, 31, -1; add.rn.f32 %r2, %r2, %r3;
shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; add.rn.f32 %r2, %r2, %r3;
setp.ne.b32 %p1, %r1, 5;
@%p1 bra $end;
st.global.u32 [%rd1+4], %r2;
$end:";
    let through_memory = format!(
        "{SHARED} st.shared.f32 [%r4], %r1; barrier.sync 0;
xor.b32 %r5, %r3, 252; add.s32 %r5, %r2, %r5; ld.shared.f32 %r6, [%r5];
setp.ne.b32 %p1, %r1, 0; @!%p1 st.global.u32 [%rd1+8], %r6;"
    );
    for seed in 0..50 {
        assert_eq!(run(sum_of_lanes, ONE_WARP, seed).unwrap(), [11, 496f32.to_bits(), 13, 14]);
        assert_eq!(run(&through_memory, TWO_WARPS, seed).unwrap(), [11, 12, 63, 14]);
    }
}

#[test]
fn blocks_of_a_cluster_send_to_each_other() {
    for seed in 0..50 {
        assert_eq!(run(&sending("", ""), CLUSTER, seed).unwrap()[3], 100 + 1);
    }
}

/// Thread 0 of each block sends 100 and the block's rank to the other block, and block 0 stores what it gets.
fn sending(before_wait: &str, instead_of_wait: &str) -> String {
    let wait = "$again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0; @!%p2 bra $again;";
    let wait = if instead_of_wait.is_empty() { wait } else { instead_of_wait };
    format!(
        "{SHARED} add.s32 %r5, %r2, 264;
setp.ne.b32 %p1, %r1, 0;
@!%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
barrier.cluster.arrive.relaxed; barrier.cluster.wait;
@%p1 bra $end;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 4;
{{ .reg .b32 rank, other, at, counter; mov.u32 rank, %cluster_ctarank; xor.b32 other, rank, 1; add.s32 rank, rank, 100;
mapa.shared::cluster.u32 at, %r2, other; mapa.shared::cluster.u32 counter, %r5, other;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], rank, [counter]; }}
{before_wait}
{wait}
ld.shared.f32 %r6, [%r2];
mov.u32 %r7, %cluster_ctarank; setp.eq.b32 %p3, %r7, 0; @%p3 st.global.u32 [%rd1+12], %r6;
$end:"
    )
}

#[test]
fn what_was_sent_is_not_read_before_it_is_there() {
    let faults: Vec<String> =
        (0..50).filter_map(|seed| run(&sending("", "mov.b32 %r6, 0;"), CLUSTER, seed).err()).collect();
    let known = ["has not waited", "nobody has written", "which ended before"];
    assert!(!faults.is_empty() && faults.iter().all(|fault| known.iter().any(|known| fault.contains(known))));
}

#[test]
fn a_block_does_not_end_before_what_is_sent_to_it() {
    assert_found(&sending("ret;", ""), CLUSTER, "which ended before it arrived");
    let to_nobody = sending("", "").replace("xor.b32 other, rank, 1;", "mov.b32 other, 2;");
    assert_fault(&to_nobody, CLUSTER, 7, "no block 2 in a cluster of 2");
    let not_mapped = sending("", "").replace("mapa.shared::cluster.u32 at, %r2, other;", "mov.b32 at, %r2;");
    assert_fault(&not_mapped, CLUSTER, 8, "in no block's memory");
}

#[test]
fn memory_outside_the_allocations_is_named() {
    assert_fault("ld.global.u32 %r2, [%rd1+16];", ONE_WARP, 0, "none of the tensors");
    assert_fault("\nst.global.v4.u32 [%rd1+-16], {%r1, %r1, %r1, %r1};", ONE_WARP, 1, "none of the tensors");
    assert_fault("st.b16 [%rd1+1], %rs1;", ONE_WARP, 0, "not aligned");
    assert_fault("ld.global.v2.u32 {%r2, %r3}, [%rd1+4];", ONE_WARP, 0, "not aligned");
}

#[test]
fn shared_memory_outside_the_array_is_named() {
    assert_fault(&format!("{SHARED} st.shared.f32 [%r4+272], %r1;"), ONE_WARP, 0, "outside 272 bytes");
    assert_fault(&format!("{SHARED} st.shared.f32 [%r4+2], %r1;"), ONE_WARP, 0, "not aligned");
}

#[test]
fn shared_memory_that_nobody_has_written_is_not_read() {
    assert_fault(&format!("{SHARED} ld.shared.f32 %r5, [%r4];"), ONE_WARP, 0, "nobody has written");
}

#[test]
fn shared_memory_is_not_accessed_out_of_order() {
    let read_early = format!(
        "{SHARED} st.shared.f32 [%r4], %r1; xor.b32 %r5, %r3, 252; add.s32 %r5, %r2, %r5; ld.shared.f32 %r6, [%r5];"
    );
    let faults: Vec<String> = (0..50).filter_map(|seed| run(&read_early, TWO_WARPS, seed).err()).collect();
    let known = ["before this load", "nobody has written", "before this store"];
    assert!(faults.len() == 50 && faults.iter().all(|fault| known.iter().any(|known| fault.contains(known))));
    // A barrier of the warp orders nothing between warps, and within one it is enough.
    let by_warp = read_early.replace("xor.b32", "bar.warp.sync -1; xor.b32");
    let faults: Vec<String> = (0..50).filter_map(|seed| run(&by_warp, TWO_WARPS, seed).err()).collect();
    assert!(faults.len() == 50 && faults.iter().all(|fault| known.iter().any(|known| fault.contains(known))));
    let in_warp = by_warp.replace("252", "124");
    assert!((0..50).all(|seed| run(&in_warp, TWO_WARPS, seed).is_ok()));
    // A shuffle orders nothing.
    assert_found(
        &in_warp.replace("bar.warp.sync -1;", "shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;"),
        ONE_WARP,
        "before this load",
    );
    assert_fault(&format!("{SHARED} st.shared.f32 [%r2], %r1;"), ONE_WARP, 0, "before this one");
    let overwritten = read_early.replace("xor.b32", "barrier.sync 0; xor.b32") + " st.shared.f32 [%r4], %r1;";
    assert_found(&overwritten, TWO_WARPS, "before this");
}

#[test]
fn a_barrier_needs_all_threads_of_the_block() {
    let some = "setp.gt.u32 %p1, %r1, 40; @%p1 bra $end; barrier.sync 0; $end:";
    let faults: Vec<String> = (0..50).filter_map(|seed| run(some, TWO_WARPS, seed).err()).collect();
    assert!(faults.len() == 50 && faults.iter().all(|fault| fault.contains("barrier")), "{faults:?}");
    let of_two_kinds = "setp.gt.u32 %p1, %r1, 40;
@%p1 barrier.sync 0;
@!%p1 barrier.red.or.pred %p2, 0, %p1;";
    assert_found(of_two_kinds, TWO_WARPS, "two kinds");
}

#[test]
fn a_shuffle_needs_all_lanes_of_its_mask() {
    let some = "setp.eq.b32 %p1, %r1, 7; @%p1 bra $end; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; $end:";
    assert_found(some, ONE_WARP, "does not shuffle");
    let others = "setp.gt.u32 %p1, %r1, 15; @%p1 ret; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -65536;";
    assert_fault(others, ONE_WARP, 0, "not in its own mask");
    let outside = "setp.gt.u32 %p1, %r1, 15; @%p1 ret; shfl.sync.bfly.b32 %r3, %r1, 16, 31, 65535;";
    assert_fault(outside, ONE_WARP, 0, "does not shuffle");
    let apart = "setp.gt.u32 %p1, %r1, 15;
@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
@!%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;";
    assert_found(apart, ONE_WARP, "different instructions");
}

#[test]
fn masks_that_cross_end_in_a_fault() {
    let crossed = "setp.gt.u32 %p1, %r1, 15; selp.b32 %r2, -1, 131071, %p1; bar.warp.sync %r2;";
    assert_found(crossed, ONE_WARP, "waits for threads that do not come");
}

#[test]
fn nothing_is_accessed_before_the_grid_s_wait() {
    assert_fault(
        "ld.global.u32 %r2, [%rd1]; griddepcontrol.wait;",
        ONE_WARP,
        0,
        "before griddepcontrol.wait",
    );
    assert!(run("ld.global.nc.u32 %r2, [%rd1]; griddepcontrol.wait;", ONE_WARP, 1).is_ok());
}

/// Thread 0 stores a word and then a flag; thread 33, of another warp, waits for the flag and copies the word.
fn passing_on(store_of_the_flag: &str) -> String {
    format!(
        "setp.eq.b32 %p1, %r1, 0; setp.ne.b32 %p2, %r1, 33; mov.b32 %r2, 77;
@%p1 st.relaxed.sys.global.u32 [%rd1], %r2;
@%p1 {store_of_the_flag} [%rd1+4], %r2;
@%p2 bra $end;
$again: ld.relaxed.sys.global.u32 %r3, [%rd1+4]; setp.ne.b32 %p3, %r3, 77; @%p3 bra $again;
ld.relaxed.sys.global.u32 %r4, [%rd1]; st.global.u32 [%rd1+8], %r4;
$end:"
    )
}

#[test]
fn stores_overtake_each_other_unless_they_are_ordered() {
    let outcomes = |flag: &str| -> Vec<u32> {
        (0..200).map(|seed| run(&passing_on(flag), TWO_WARPS, seed).unwrap()[2]).collect()
    };
    let relaxed = outcomes("st.relaxed.sys.global.u32");
    assert!(relaxed.contains(&77) && relaxed.contains(&11), "{relaxed:?}");
    assert!(outcomes("st.release.sys.global.u32").iter().all(|word| *word == 77));
}

#[test]
fn global_memory_is_not_accessed_out_of_order() {
    let all_store = "st.global.u32 [%rd1], %r1;";
    assert_fault(all_store, ONE_WARP, 0, "nothing orders the store");
    assert!(run(&all_store.replace("global", "relaxed.sys.global"), ONE_WARP, 1).is_ok());
    let one_stores = "setp.eq.b32 %p1, %r1, 3; @%p1 st.global.u32 [%rd1], %r1; ld.global.u32 %r2, [%rd1];";
    assert_found(one_stores, TWO_WARPS, "nothing orders the");
    let ordered = one_stores.replace("ld.global", "barrier.sync 0; ld.global");
    assert!((0..50).all(|seed| run(&ordered, TWO_WARPS, seed).is_ok()));
    let by_warp = one_stores.replace("ld.global", "bar.warp.sync -1; ld.global");
    assert!((0..50).all(|seed| run(&by_warp, ONE_WARP, seed).is_ok()));
    assert_found(&by_warp, TWO_WARPS, "nothing orders the");
    // Bytes of one word are each a thread's own.
    let bytes =
        "setp.gt.u32 %p1, %r1, 15; cvt.u64.u32 %rd2, %r1; add.s64 %rd2, %rd1, %rd2; cvt.u16.u32 %rs1, %r1;
@!%p1 st.b8 [%rd2], %rs1;";
    assert_eq!(run(bytes, ONE_WARP, 1).unwrap()[1], 0x0706_0504);
    let twice = format!("{bytes} xor.b64 %rd2, %rd2, 1; @!%p1 st.b8 [%rd2], %rs1;");
    assert_found(&twice, ONE_WARP, "nothing orders the store");
}

/// Thread 1 stores a word, and thread 0 releases a flag for it, after something that they do together.
fn released_by_another(together: &str) -> String {
    passing_on("st.release.sys.global.u32").replace(
        "@%p1 st.relaxed.sys.global.u32 [%rd1], %r2;",
        &format!("setp.eq.b32 %p4, %r1, 1; @%p4 st.relaxed.sys.global.u32 [%rd1], %r2; {together}"),
    )
}

#[test]
fn a_release_is_for_what_is_ordered_before_it() {
    let outcomes = |together: &str| -> Vec<u32> {
        (0..200).map(|seed| run(&released_by_another(together), TWO_WARPS, seed).unwrap()[2]).collect()
    };
    assert!(outcomes("shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;").contains(&11));
    assert!(outcomes("bar.warp.sync -1;").iter().all(|word| *word == 77));
    assert!(outcomes("barrier.sync 0;").iter().all(|word| *word == 77));
}

#[test]
fn a_thread_sees_its_own_stores_and_what_a_barrier_orders() {
    let own = "setp.ne.b32 %p1, %r1, 0; @%p1 ret;
mov.b32 %r2, 5; st.global.u32 [%rd1], %r2; mov.b32 %r2, 6; st.global.u32 [%rd1], %r2;
ld.global.u32 %r3, [%rd1]; st.global.u32 [%rd1+4], %r3;";
    let by_barrier = "setp.ne.b32 %p1, %r1, 40; setp.ne.b32 %p2, %r1, 3; mov.b32 %r2, 9;
@!%p1 st.global.u32 [%rd1], %r2; barrier.sync 0;
ld.global.u32 %r3, [%rd1]; @!%p2 st.global.u32 [%rd1+4], %r3;";
    for seed in 0..100 {
        assert_eq!(run(own, ONE_WARP, seed).unwrap(), [6, 6, 13, 14]);
        assert_eq!(run(by_barrier, TWO_WARPS, seed).unwrap(), [9, 9, 13, 14]);
    }
}

#[test]
fn a_grid_that_does_not_end_is_ended() {
    let fault = run("$again: bra $again;", ONE_WARP, 1).unwrap_err();
    assert!(fault.contains("still running after 2s"), "{fault}");
}

#[test]
fn what_the_emulator_does_not_know_is_named_with_its_line() {
    let what = |body: &str| run(body, ONE_WARP, 0).unwrap_err();
    assert_eq!(what("\nadd.cc.s32 %r1, %r1, %r1;"), "line 11: the emulator does not know `add.cc.s32`");
    assert_eq!(what("add.s32 %r1, %r1, %r9;"), "line 10: `%r9` is no register");
    assert_eq!(what("bra $nowhere;"), "line 10: `$nowhere` is no label");
    assert_eq!(what("ld.const.b32 %r1, [%rd1];"), "line 10: the emulator does not know `ld.const.b32`");
}

const LOCAL: &str = ".local .align 8 .b8 __local_depot0[16]; .reg .b64 %SP; .reg .b64 %SPL;
mov.b64 %SPL, __local_depot0; cvta.local.u64 %SP, %SPL;";

#[test]
fn local_memory_is_each_thread_s_own_by_both_of_its_addresses() {
    // Each lane stores its number; lane 5 reads it back a barrier later, by bytes and with its sign.
    let own = format!(
        "{LOCAL} neg.s32 %r2, %r1; st.local.b32 [%SPL+8], %r2; st.b32 [%SP+12], %r1; bar.warp.sync -1;
setp.ne.b32 %p1, %r1, 5;
@%p1 bra $end;
ld.b32 %r3, [%SP+8]; st.global.u32 [%rd1], %r3;
ld.local.b32 %r3, [%SPL+12]; st.global.u32 [%rd1+4], %r3;
ld.local.s8 %rs1, [%SPL+8]; cvt.u32.u16 %r3, %rs1; st.global.u32 [%rd1+8], %r3;
ld.local.v2.b16 {{%rs1, %rs2}}, [%SPL+12]; cvt.u32.u16 %r3, %rs2; st.global.u32 [%rd1+12], %r3;
$end:"
    );
    for seed in 0..20 {
        assert_eq!(run(&own, ONE_WARP, seed), Ok([-5i32 as u32, 5, 0xfffb, 0]));
    }
}

#[test]
fn local_memory_that_is_none_or_not_aligned_is_a_fault() {
    let access = |instruction: &str| format!("{LOCAL}\n{instruction}");
    assert_fault(&access("st.local.b32 [%SPL+16], %r1;"), ONE_WARP, 2, "outside local memory");
    assert_fault(&access("ld.b64 %rd2, [%SP+12];"), ONE_WARP, 2, "not aligned");
    assert_fault(&access("ld.local.b32 %r2, [%rd1];"), ONE_WARP, 2, "outside local memory");
    assert_fault(&access("ld.global.u32 %r2, [%SP];"), ONE_WARP, 2, "none of the tensors");
}

#[test]
fn a_call_and_a_trap_are_faults_that_say_so() {
    let call = "{ // callseq 0, 0
.param .b64 param0;
st.param.b64 [param0], %rd1;
call.uni panic_fmt, (param0);
}";
    assert_fault(call, ONE_WARP, 3, "calls panic_fmt");
    assert_fault("trap; exit;", ONE_WARP, 0, "traps");
}
