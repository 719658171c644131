//! The peers' Python program, part by part, beside packages that are made of a few lines: their names, calls and versions
//! are those of the real ones. A test runs Python without packages.

use std::{fs, process::Command};

/// Loads the peers' program as a module, which starts nothing, and makes what every test needs.
const SETUP: &str = r#"
import sys, threading, types
from types import SimpleNamespace
from unittest.mock import MagicMock

folder = sys.argv[1]
source = "\n\n".join(open(f"{folder}/{name}.py").read() for name in ("peer", "torch_peer", "flashinfer_peer"))
peers = types.ModuleType("peers")
exec(compile(source, "peers", "exec"), peers.__dict__)

class DType(str):
    itemsize = 2

BF16, F32 = DType("bfloat16"), DType("float32")

def module(name, source="", **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    exec(source, made.__dict__)
    sys.modules[name] = made
    return made

REQUEST = {"oneshot": True, "coded": False}

def problem(quant_mode="none", tokens=128, dtype=BF16, torch=None, top_k=None, post_weight_bias=None):
    made = peers.Problem.__new__(peers.Problem)
    made.__dict__.update(
        quant_mode=quant_mode, tokens=tokens, hidden=8192, dtype=dtype, has_residual=True, epsilon=1e-6,
        scale_tensor="scale", inverse_scale="inverse scale", sets=[MagicMock(residual_out=None, summed=None)],
        torch=torch or MagicMock(), top_k=top_k, post_weight_bias=post_weight_bias,
    )
    return made

def peer(kind, multicast=True, agree=lambda well: well):
    """A peer of rank 1 of 2 on GPUs, which have multicast."""
    made = kind.__new__(kind)
    made.rank, made.world_size, made.workspaces = 1, 2, {}
    made.start = {"max_tokens": 2048, "hidden_dim": 8192, "multicast": multicast}
    made.torch, made.dist, made.hosts = MagicMock(), MagicMock(), "hosts"
    made.torch.float32, made.torch.bfloat16 = F32, BF16
    made.torch.cuda.device_count.return_value = 2
    made.torch.cuda.get_device_capability.return_value = (9, 0)
    made.device = SimpleNamespace(type="cuda", index=1)
    made.all_agree = agree
    return made

def symmetric_memory(**content):
    memory = MagicMock(**content)
    sys.modules["torch"] = sys.modules["torch.distributed"] = MagicMock()
    sys.modules["torch.distributed._symmetric_memory"] = memory
    return memory

def flashinfer(release):
    """FlashInfer's unified call as of a release: what it was asked for comes into the lists that are returned."""
    created, called = [], []
    def create(**options):
        created.append(options)
        handles = ["handle"] if options["use_symm_dev_mem"] else []
        return (["pointers"], "tensor", *([handles] if handles else []), {"metadata": 1})
    module("flashinfer", __version__=release)
    module("flashinfer.comm.trtllm_ar", get_trtllm_comm_module=MagicMock(), MAX_COMM_SIZE=2147483647 & ~((1 << 21) - 1))
    module("flashinfer.comm.mnnvl", TorchDistBackend=lambda group: ("backend", group))
    strategy = SimpleNamespace(select_strategy=lambda *problem: SimpleNamespace(name="TWOSHOT"))
    over_multicast = module(
        "flashinfer.comm.trtllm_mnnvl_ar", get_trtllm_mnnvl_comm_module=MagicMock(), MNNVLAllreduceFusionStrategy=strategy
    )
    if release != "0.6.6":
        over_multicast.MNNVLQuantType = object
    fusion = module(
        "flashinfer.comm.allreduce",
        '''
def create_allreduce_fusion_workspace(
    backend, world_size, rank, max_token_num, hidden_dim, dtype, comm_backend, force_oneshot_support=False
):
    if backend == "mnnvl":
        created.append({"backend": backend, "force_oneshot_support": force_oneshot_support, "group": comm_backend})
        return types.SimpleNamespace(backend=backend)
    made = trtllm_create_ipc_workspace_for_all_reduce_fusion(
        tp_rank=rank, tp_size=world_size, max_token_num=max_token_num, hidden_dim=hidden_dim, comm_backend=comm_backend,
        create_metadata=True, use_fp32_lamport=False, use_symm_dev_mem=True,
    )
    return types.SimpleNamespace(backend=backend, workspace_tensor=made[1], mem_handles=made[2], metadata=made[3])

def call(workspace, pattern, use_oneshot, **rest):
    called.append((workspace.backend, pattern, use_oneshot))
    asked.update(rest)

if release == "0.6.6":
    def allreduce_fusion(*, workspace, pattern, use_oneshot, **rest):
        call(workspace, pattern, use_oneshot, **rest)
else:
    def allreduce_fusion(*, workspace, pattern, use_oneshot, expanded_idx_to_permuted_idx=None, **rest):
        call(workspace, pattern, use_oneshot, index=expanded_idx_to_permuted_idx, **rest)
''',
        release=release, asked=(asked := {}), types=types, created=created, called=called, trtllm_create_ipc_workspace_for_all_reduce_fusion=create,
    )
    patterns = SimpleNamespace(
        kARResidualRMSNorm=1, kARResidualRMSNormFP8Quant=2, kARResidualRMSNormFP4Quant=3, kMoEFinalizeARResidualRMSNorm=7
    )
    comm = module("flashinfer.comm", AllReduceFusionPattern=patterns, QuantizationSFLayout=MagicMock())
    comm.create_allreduce_fusion_workspace = fusion.create_allreduce_fusion_workspace
    comm.allreduce_fusion, comm.asked = fusion.allreduce_fusion, asked
    return comm, created, called

def names(variants):
    return [variant.name for variant in variants]

def raised(act):
    try:
        act()
    except Exception as error:
        return str(error)
"#;

/// Runs the setup and `body` in Python.
#[track_caller]
fn python(body: &str) {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("test.py");
    fs::write(&script, format!("{SETUP}\n{body}")).unwrap();
    let peers = concat!(env!("CARGO_MANIFEST_DIR"), "/../host/program/src/peers");
    let output = Command::new("python3").arg(&script).arg(peers).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[test]
fn kernels_are_compiled_on_rank_0_before_any_other_rank() {
    python(
        r#"
def ranks(work, count=3):
    """What each rank raised, and the order in which ranks began and ended."""
    log, votes, barrier, errors = [], [None] * count, threading.Barrier(count), [None] * count
    def run(rank):
        def agree(well):
            votes[rank] = well
            barrier.wait()
            answer = all(votes)
            barrier.wait()
            return answer
        own = peer(peers.Torch, agree=agree)
        own.rank = rank
        def logged():
            log.append(("begin", rank))
            work(rank)
            log.append(("end", rank))
        errors[rank] = raised(lambda: own.rank_0_first(logged))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for act in threading.Thread.start, threading.Thread.join:
        for thread in threads:
            act(thread)
    return errors, log

errors, log = ranks(lambda rank: None)
assert errors == [None] * 3, errors
assert log[:2] == [("begin", 0), ("end", 0)] and len(log) == 6, log

def fail(failing):
    def work(rank):
        if rank == failing:
            raise RuntimeError("no compiler")
    return work

# An error of one rank is one of all, so that none goes on to wait for another; after rank 0's no other begins.
other = "its kernels were not compiled on another rank"
errors, log = ranks(fail(0))
assert errors == ["no compiler", other, other] and log == [("begin", 0)], (errors, log)
errors, log = ranks(fail(2))
assert errors == [other, other, "no compiler"], errors
"#,
    );
}

#[test]
fn torch_has_symmetric_memory_s_all_reduces_each_with_the_compiled_rest() {
    python(
        r#"
memory = symmetric_memory()
for quant_mode, eager, compiled in [
    ("none", "native_rms_norm", "rmsnorm_native_compiled"),
    ("fp8", "native_rms_norm_native_quant_fp8", "rmsnorm_fp8_quant_native_compiled"),
]:
    own, notes = peer(peers.Torch), []
    variants = list(own.variants(problem(quant_mode, torch=own.torch), REQUEST, notes))
    assert names(variants) == [
        f"torch_standard_allreduce_{eager}",
        f"torch_standard_allreduce_{compiled}",
        f"torch_standard_symm_oneshot_allreduce_{compiled}",
        f"torch_standard_symm_twoshot_allreduce_{compiled}",
    ], names(variants)
    assert notes == [] and [bool(variant.compile) for variant in variants] == [False, True, True, True]
    # Every set has memory of its own that all ranks have met in.
    tensors = MagicMock()
    own.torch.compile.return_value.return_value = "out", "sum"
    for variant, operator in zip(variants[2:], ["one_shot_all_reduce", "two_shot_all_reduce_"]):
        variant.run(tensors)
        getattr(own.torch.ops.symm_mem, operator).assert_called_once_with(
            tensors.symmetric, "sum", own.dist.group.WORLD.group_name
        )
        assert (tensors.norm_out if quant_mode == "none" else tensors.quant_out, tensors.residual_out) == ("out", "sum")
assert memory.rendezvous.call_count == 2
variants = list(peer(peers.Torch).variants(problem(), REQUEST | {"oneshot": False}, []))
assert names(variants)[2:] == ["torch_standard_symm_twoshot_allreduce_rmsnorm_native_compiled"]
"#,
    );
}

#[test]
fn torch_makes_the_addend_of_experts_before_each_all_reduce() {
    python(
        r#"
symmetric_memory()
own = peer(peers.Torch)
case = problem(torch=own.torch, top_k=8)
own.torch.compile.side_effect = lambda function, **options: ("compiled", function.__name__)
variants = list(own.variants(case, REQUEST, []))
assert len(variants) == 4
log = []
def logged(name, result):
    return lambda *inputs: log.append((name, inputs[0])) or result
own.torch.compile.side_effect = lambda function, **options: logged(
    f"compiled {function.__name__}", ("out", "sum") if function.__name__ == "rms_norm" else None
)
own.combine = logged("combine", None)
own.combine.__name__ = "combine"
case.rest = lambda: rest
rest = logged("rest", ("out", "sum"))
rest.__name__ = "rms_norm"
own.dist.all_reduce = logged("all_reduce", None)
own.torch.ops.symm_mem.one_shot_all_reduce = logged("one-shot", "summed")
eager, compiled, one_shot, _ = own.variants(case, REQUEST, [])
tensors = SimpleNamespace(reduced="reduced", symmetric="symmetric", **{name: name for name in (
    "input", "expert_rows", "expert_index", "expert_scales", "residual", "gamma", "post_gamma"
)})
for variant, expected in [
    (eager, [("combine", "reduced"), ("all_reduce", "reduced"), ("rest", "reduced")]),
    (compiled, [("compiled combine", "reduced"), ("all_reduce", "reduced"), ("compiled rms_norm", "reduced")]),
    (one_shot, [("compiled combine", "symmetric"), ("one-shot", "symmetric"), ("compiled rms_norm", "summed")]),
]:
    log.clear()
    variant.run(tensors)
    assert log == expected, log
    assert (tensors.norm_out, tensors.residual_out) == ("out", "sum")
"#,
    );
}

#[test]
fn without_symmetric_memory_torch_s_other_variants_are_left_with_a_note() {
    python(
        r#"
symmetric_memory(rendezvous=MagicMock(side_effect=RuntimeError("no peer access\nsome frame")))
notes, own = [], problem()
variants = list(peer(peers.Torch).variants(own, REQUEST, notes))
assert len(variants) == 2 and own.sets[0].symmetric is None
start = "torch_standard_symm_* were not measured: no symmetric memory: "
assert notes == [start + "RuntimeError: no peer access"], notes

symmetric_memory()
notes = []
assert len(list(peer(peers.Torch, agree=lambda well: False).variants(own, REQUEST, notes))) == 2
assert notes == [start + "it failed on another rank"], notes
"#,
    );
}

#[test]
fn flashinfer_s_unified_call_is_made_in_memory_without_ties_to_multicast() {
    python(
        r#"
for release in "0.6.6", "0.7.4":
    for quant_mode, suffix, pattern in [("none", "", 1), ("fp8", "_fp8_quant", 2)]:
        own = peer(peers.FlashInfer, multicast=False)
        own.comm, created, called = flashinfer(release)
        original = sys.modules["flashinfer.comm.allreduce"].trtllm_create_ipc_workspace_for_all_reduce_fusion
        notes, case = [], problem(quant_mode)
        variants = list(own.variants(case, REQUEST, notes))
        start = f"flashinfer_trtllm_fused_allreduce_rmsnorm{suffix}"
        assert names(variants) == [f"{start}_oneshot", f"{start}_twoshot"]
        # Nothing is made before it is this variant's turn: kernels come first, on one rank.
        assert created == [] and all(variant.compile for variant in variants)
        for variant in variants:
            variant.run(case.sets[0])
        assert called == [("trtllm", pattern, True), ("trtllm", pattern, False)], called
        assert [options["use_symm_dev_mem"] for options in created] == [False], created
        [workspace] = own.workspaces.values()
        assert (workspace.workspace_tensor, workspace.mem_handles, workspace.metadata) == ("tensor", [], {"metadata": 1})
        assert sys.modules["flashinfer.comm.allreduce"].trtllm_create_ipc_workspace_for_all_reduce_fusion is original
"#,
    );
}

#[test]
fn flashinfer_s_last_step_of_experts_is_called_where_its_release_has_it() {
    python(
        r#"
name = "flashinfer_trtllm_fused_moe_finalize_allreduce_rmsnorm_oneshot"

def moe(release="0.7.4", request=REQUEST, **options):
    own, notes = peer(peers.FlashInfer, multicast=False), []
    own.comm, _, called = flashinfer(release)
    case = problem(top_k=8, **options)
    variants = list(own.variants(case, request, notes))
    for variant in variants:
        variant.run(case.sets[0])
    return names(variants), notes, called, own.comm.asked, case.sets[0]

found, notes, called, asked, tensors = moe()
assert (found, notes, called) == ([name], [], [("trtllm", 7, True)])
assert asked["input"] is tensors.expert_rows and asked["index"] is tensors.expert_index
assert asked["expert_scale_factor"] is tensors.expert_scales and asked["shared_expert_output"] is tensors.input
# Its kernel has one hop.
assert moe(request=REQUEST | {"oneshot": False})[:3] == ([], [], [])
for options, why in [
    ({"release": "0.6.6"}, "flashinfer 0.6.6's allreduce_fusion has no such pattern"),
    ({"quant_mode": "fp8"}, "it has no quantization to fp8"),
    ({"tokens": 1 << 15}, "it numbers elements in 32 bits, and the experts' rows have more"),
]:
    assert moe(**options)[:3] == ([], [f"{name} was not measured: {why}"], [])

own, notes = peer(peers.FlashInfer), []
assert list(own.variants(problem(post_weight_bias=1.0), REQUEST, notes)) == []
assert notes == ["flashinfer has no kernel with a norm of the sum"]
"#,
    );
}

#[test]
fn outputs_are_poisoned_whatever_their_strides() {
    python(
        r#"
class Words:
    """A tensor that is stored by columns: words of four scales, of which PyTorch makes no view as bytes."""
    dtype = "int32"
    filled = None

    def view(self, dtype):
        raise RuntimeError("self.stride(-1) must be 1 to view Int as Byte (different element sizes)")

    def fill_(self, value):
        self.filled = value

own, words, codes = peer(peers.FlashInfer), Words(), MagicMock()
own.torch.int32 = "int32"
own.poison((codes, None, words))
assert words.filled == -1
codes.view.assert_called_once_with(own.torch.uint8)
codes.view.return_value.fill_.assert_called_once_with(0xFF)
"#,
    );
}

#[test]
fn flashinfer_s_sums_in_fewer_bits_are_measured_where_such_are_asked_for() {
    python(
        r#"
start = "flashinfer_standard_quantized_allreduce"

def coded(all_reduce=MagicMock(), agree=lambda well: well, **options):
    own, notes = peer(peers.FlashInfer, multicast=False, agree=agree), []
    own.comm, _, _ = flashinfer("0.7.4")
    module("flashinfer.comm.quantized_allreduce", **({"quantized_all_reduce": all_reduce} if all_reduce else {}))
    case = problem(torch=own.torch, **options)
    case.torch.compile.return_value.return_value = "out", "sum"
    variants = [it for it in own.variants(case, REQUEST | {"coded": True}, notes) if it.is_coded]
    return variants, [note for note in notes if note.startswith(start)], case.sets[0], own

all_reduce = MagicMock()
[variant], notes, tensors, own = coded(all_reduce)
assert variant.name == f"{start}_rmsnorm_native_compiled" and variant.kind == "standard" and notes == []
variant.run(tensors)
all_reduce.assert_called_once_with(tensors.input, own.dist.group.WORLD, output=tensors.summed)
assert tensors.summed is own.torch.empty_like.return_value
assert (tensors.norm_out, tensors.residual_out) == ("out", "sum")
for options, why in [
    ({"quant_mode": "mxfp8"}, "the compiled steps have no quantization to mxfp8"),
    ({"dtype": F32}, "it takes bfloat16 only"),
    ({"all_reduce": None}, "flashinfer 0.7.4: AttributeError: "),
]:
    found, [note], _, _ = coded(**options)
    assert found == [] and note.startswith(f"{start} was not measured: {why}"), note
found, [note], _, _ = coded(agree=lambda well: False)
assert found == [] and note == f"{start} was not measured: it failed on another rank"
found, [note], _, _ = coded(top_k=8)
assert found == [] and note == f"{start} was not measured: it is measured with the pattern all-reduce-norm only"
own = peer(peers.FlashInfer, multicast=False)
own.comm, _, _ = flashinfer("0.7.4")
assert not any(variant.is_coded for variant in own.variants(problem(), REQUEST, []))
"#,
    );
}

#[test]
fn a_workspace_that_failed_is_not_tried_again() {
    python(
        r#"
own = peer(peers.FlashInfer)
own.comm, created, _ = flashinfer("0.7.4")
own.make_workspace = MagicMock(side_effect=RuntimeError("no memory"))
for _ in range(2):
    assert raised(lambda: own.workspace("trtllm", BF16)) == "no memory"
assert own.make_workspace.call_count == 1
"#,
    );
}

#[test]
fn flashinfer_s_kernels_over_multicast_run_where_gpus_have_it_and_it_is_not_switched_off() {
    python(
        r#"
start = "flashinfer_mnnvl_fused_allreduce_rmsnorm"

def mnnvl(release="0.7.4", multicast=True, supported=True, index=1, quant_mode="none"):
    memory = symmetric_memory()
    memory._SymmetricMemory.has_multicast_support.return_value = supported
    own = peer(peers.FlashInfer, multicast)
    own.comm, created, called = flashinfer(release)
    own.device.index = index
    notes, case = [], problem(quant_mode)
    variants = [it for it in own.variants(case, REQUEST, notes) if "mnnvl" in it.name]
    for variant in variants:
        variant.run(case.sets[0])
    return names(variants), notes, created, called, memory

found, notes, created, called, _ = mnnvl()
assert found == [f"{start}_oneshot", f"{start}_twoshot"] and notes == []
assert called == [("mnnvl", 1, True), ("mnnvl", 1, False)]
assert len(created) == 1 and created[0]["force_oneshot_support"]

# An old release chooses the mode by itself, and only that one has a time.
found, notes, _, _, _ = mnnvl("0.6.6")
assert found == [f"{start}_twoshot"]
assert notes == [f"{start}_oneshot was not measured: this release takes twoshot here"], notes

# Switched off: the GPU is not even asked.
found, notes, created, _, memory = mnnvl(multicast=False)
off = "NCCL_NVLS_ENABLE=0, TORCH_SYMM_MEM_DISABLE_MULTICAST=1 or NVSHMEM_DISABLE_NVLS=1"
assert notes == [f"{start}_* were not measured: NVLink multicast is switched off ({off})"], notes
assert found == created == [] and not memory._SymmetricMemory.has_multicast_support.called

for options, why in [
    ({"supported": False}, "PyTorch finds no NVLink multicast"),
    ({"index": 0}, "a rank's GPU has another number than the rank"),
]:
    found, notes, created, _, _ = mnnvl(**options)
    assert found == created == [] and notes == [f"{start}_* were not measured: {why}"], notes

# As in vLLM's benchmark, without quantization only.
assert mnnvl(quant_mode="fp8")[:3] == ([], [], [])
"#,
    );
}

#[test]
fn a_flashinfer_without_the_unified_call_is_named_with_the_remedy() {
    python(
        r#"
module("flashinfer", __version__="0.5.3")
module("flashinfer.comm")
peers.Peer.__init__ = lambda self, request: None
try:
    peers.FlashInfer({"device": "cuda"})
except peers.Unavailable as error:
    assert str(error) == "flashinfer 0.5.3 has no allreduce_fusion: use 0.6.6 or later", error
    assert error.remedy == "pip install --upgrade flashinfer-python"
else:
    raise AssertionError("it was taken")
"#,
    );
}
