"""The package beside PyTorch on GPUs. Run it by

    torchrun --nproc-per-node 2 -m pytest host/python/tests/test_cuda.py

Ranks may share one GPU. Then they take turns on it, and times mean nothing. Without a GPU everything is skipped."""

import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or "RANK" not in os.environ:
    pytest.skip("GPUs and torchrun are needed", allow_module_level=True)

import torch.distributed as dist  # noqa: E402

import fused_collective  # noqa: E402
import fused_collective.torch as operators  # noqa: E402
from fused_collective import Communicator, InvalidError, Norm, Outputs, Quant  # noqa: E402
from fused_collective import flashinfer  # noqa: E402

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
GPU = int(os.environ.get("LOCAL_RANK", RANK)) % torch.cuda.device_count()
SHARED = torch.cuda.device_count() < WORLD_SIZE
DEVICE = torch.device("cuda", GPU)
TOKENS, HIDDEN = 16, 4096
#: Launches of a graph, with changed inputs.
REPLAYS = int(os.environ.get("FUSED_COLLECTIVE_REPLAYS", "10000"))


def join(**options):
    options = {"max_hidden": 8192, "max_tokens": 512, "dtype": "bfloat16", "deadline": 30} | options
    return Communicator.from_torch(oversubscribe=SHARED, **options)


@pytest.fixture(scope="module", autouse=True)
def distributed():
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def communicator(distributed):
    communicator = join()
    yield communicator
    torch.cuda.synchronize()
    communicator.leave()


@pytest.fixture(autouse=True)
def together(distributed):
    yield
    dist.barrier()


def tensors(seed=0, tokens=TOKENS, dtype=torch.bfloat16):
    """This rank's input, and residual and weight, which all ranks have alike."""
    generator = torch.Generator().manual_seed(seed * 100 + RANK)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    generator.manual_seed(seed * 100 + 99)
    residual = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    return x, residual, (torch.rand(HIDDEN, generator=generator) + 0.5).to(DEVICE, dtype)


def expected(x, residual, weight, weight_bias=0.0):
    """The sum to the bit, and the norm in float64."""
    inputs = [torch.empty_like(x, device="cpu") for _ in range(WORLD_SIZE)]
    dist.all_gather(inputs, x.cpu())
    total = inputs[0].float()
    for other in inputs[1:]:
        total = total + other.float()
    total = (total + residual.cpu().float()).to(x.dtype)
    wide = total.double()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (weight_bias + weight.cpu().double())
    return total.to(DEVICE), norm.to(DEVICE)


def close(norm, exact):
    torch.testing.assert_close(norm.double(), exact, rtol=2**-7, atol=1e-6)


def synchronized(communicator):
    communicator.synchronize()


def test_ranks_are_on_their_gpus(communicator):
    assert (communicator.rank, communicator.world_size, communicator.device) == (RANK, WORLD_SIZE, GPU)
    assert communicator.query("bfloat16", TOKENS, HIDDEN, norm=True)[0] in ("one_shot", "two_shot")


@pytest.mark.parametrize("mode", ["one_shot", "two_shot"])
@pytest.mark.parametrize("tokens", [1, 3, 64, 600])
def test_sum_and_norm(communicator, mode, tokens):
    x, residual, weight = tensors(tokens, tokens)
    out = communicator.all_reduce(x, residual=residual, norm=Norm(weight, weight_bias=1.0), mode=mode)
    synchronized(communicator)
    total, norm = expected(x, residual, weight, 1.0)
    assert torch.equal(out.residual_out, total)
    close(out.norm_out, norm)


def test_in_place(communicator):
    x, residual, weight = tensors(1)
    apart = communicator.all_reduce(x, residual=residual, norm=weight)
    out = communicator.all_reduce(x, residual=residual, norm=weight, out=Outputs(residual_out=residual, norm_out=x))
    synchronized(communicator)
    assert out.norm_out is x and torch.equal(x, apart.norm_out) and torch.equal(residual, apart.residual_out)


@pytest.mark.parametrize(
    "quant, block",
    [
        (Quant("fp8", scale=1 / 64), None),
        (Quant("fp8_per_token"), None),
        (Quant("fp8_per_group", group=128), 128),
        (Quant("fp8_per_group", group=64, group_scale="float32"), 64),
        (Quant("mxfp8"), 32),
        (Quant("nvfp4", scale=448.0, layout="swizzled_128x4"), None),
        (Quant("mxfp4"), None),
    ],
    ids=lambda it: it.format if isinstance(it, Quant) else "",
)
def test_quantizations(communicator, quant, block):
    x, residual, weight = tensors(2)
    out = communicator.all_reduce(x, residual=residual, norm=weight, quant=quant, keep_norm=True)
    plain = communicator.all_reduce(x, residual=residual, norm=weight)
    synchronized(communicator)
    assert torch.equal(out.norm_out, plain.norm_out)
    codes = [torch.empty_like(out.quant_out.view(torch.uint8), device="cpu") for _ in range(WORLD_SIZE)]
    dist.all_gather(codes, out.quant_out.view(torch.uint8).cpu())
    assert all(torch.equal(one, codes[0]) for one in codes), "all ranks have the same codes"
    if quant.format in ("nvfp4", "mxfp4"):
        return
    scale = quant.scale if quant.format == "fp8" else out.scale_out
    if block:
        scale = scale if scale.dtype == torch.float32 else torch.exp2(scale.float() - 127)
        scale = scale.reshape(TOKENS, -1).repeat_interleave(block, 1)
    torch.testing.assert_close(out.quant_out.float() * scale, out.norm_out.float(), rtol=0.07, atol=0.02)


def test_what_cannot_be_is_refused_before_anything_is_sent(communicator):
    x, residual, weight = tensors(3)
    if RANK == 0:
        for match, arguments in [
            ("on the CPU", dict(x=x.cpu())),
            ("not contiguous", dict(x=x[:, ::2])),
            ("has length", dict(x=x, residual=residual[:1])),
            ("overlaps", dict(x=x, residual=residual, norm=weight, out=Outputs(norm_out=residual))),
        ]:
            with pytest.raises(InvalidError, match=match):
                communicator.all_reduce(arguments.pop("x"), **arguments)
    out = communicator.all_reduce(x, residual=residual)
    synchronized(communicator)
    assert torch.equal(out.residual_out, expected(x, residual, weight)[0])


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_operators_compile_in_one_graph(communicator, tokens):
    group = operators.register(communicator)
    x, residual, weight = tensors(4, tokens)

    def layer(x, residual, weight):
        out = operators.all_reduce(x * 2, group=group, residual=residual, weight=weight, quant="fp8_per_token", keep_norm=True)
        return out.norm_out + 1, out.residual_out, out.quant_out.float() * out.scale_out

    def in_place(x, residual, weight):
        x, residual = x * 2, residual + 0
        operators.all_reduce_norm_(x, residual, weight, group=group)
        return x + 1, residual

    eager = layer(x, residual, weight)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)(x, residual, weight)
    mutated = torch.compile(in_place, fullgraph=True, dynamic=True)(x, residual, weight)
    synchronized(communicator)
    for one, other in zip(eager, compiled):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for one, other in zip(eager, mutated):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_reduce_overhead_takes_the_operator_into_its_graph(communicator):
    group = operators.register(communicator)
    x, residual, weight = tensors(5)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def layer(x, residual, weight):
        return operators.all_reduce(x + 0, group=group, residual=residual, weight=weight).norm_out * 1

    for seed in range(6, 10):
        x, residual, _ = tensors(seed)
        norm = layer(x, residual, weight).clone()
        synchronized(communicator)
        close(norm, expected(x, residual, weight)[1])


def captured(communicator, x, residual, weight, layers=1):
    """A graph of some layers, and its outputs. Warmed up on another stream, as PyTorch's users do."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            communicator.all_reduce(x, residual=residual, norm=weight)
    torch.cuda.current_stream().wait_stream(stream)
    synchronized(communicator)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(layers):
            out = communicator.all_reduce(x, residual=residual, norm=weight)
    return graph, out, communicator.captured()


def test_replays_with_changed_inputs(communicator):
    x, residual, weight = tensors(10)
    graph, out, capture = captured(communicator, x, residual, weight)
    replays = REPLAYS if not SHARED else min(REPLAYS, 500)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for step in range(replays):
        # Exact in bfloat16, and the same sum on every rank.
        value = float(step % 13 - 6)
        x.fill_(value + RANK)
        residual.fill_(value / 2)
        communicator.replay(capture)
        graph.replay()
        total = WORLD_SIZE * value + WORLD_SIZE * (WORLD_SIZE - 1) / 2 + value / 2
        wrong += (out.residual_out != total).sum()
        if step % 100 == 99:
            synchronized(communicator)
    synchronized(communicator)
    assert wrong.item() == 0


def test_two_communicators_in_a_process(communicator):
    with join() as other:
        x, residual, weight = tensors(11)
        one = communicator.all_reduce(x, residual=residual, norm=weight)
        two = other.all_reduce(one.norm_out, residual=one.residual_out, norm=weight)
        three = communicator.all_reduce(x, residual=residual, norm=weight)
        other.synchronize()
        communicator.synchronize()
        assert torch.equal(one.norm_out, three.norm_out)
        assert torch.equal(two.residual_out, expected(one.norm_out, one.residual_out, weight)[0])
        torch.cuda.synchronize()
        dist.barrier()


PATTERNS = [name for name in vars(flashinfer.AllReduceFusionPattern) if name.startswith("k")]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("use_oneshot", [True, False])
def test_flashinfer_s_patterns(workspace, name, use_oneshot):
    pattern = getattr(flashinfer.AllReduceFusionPattern, name)
    x, residual, weight = tensors(12)
    call = dict(input=x, workspace=workspace, pattern=pattern, residual_in=residual, rms_gamma=weight, use_oneshot=use_oneshot)
    call |= dict(residual_out=torch.empty_like(x), launch_with_pdl=True)
    if "MoEFinalize" in name:
        index = torch.arange(TOKENS, device=DEVICE).flip(0).int().unsqueeze(1)
        call |= dict(input=x.flip(0).contiguous() * 2, expanded_idx_to_permuted_idx=index)
        call |= dict(expert_scale_factor=torch.full((TOKENS, 1), 0.5, device=DEVICE))
    elif "MoE" in name:
        with pytest.raises(NotImplementedError, match="no kernel with"):
            flashinfer.allreduce_fusion(**call)
        return
    if "Packed" in name:
        words = HIDDEN // 128 // 4
        call |= dict(block_quant_group_size=128)
        call |= dict(scale_out=torch.zeros(words, TOKENS, dtype=torch.int32, device=DEVICE).t())
    elif "FP4" in name or "NormFP8" in name or "OutFP8" in name:
        call |= dict(scale_factor=torch.tensor([448.0 if "FP4" in name else 1 / 64], device=DEVICE))
    result = flashinfer.allreduce_fusion(**call)
    synchronized(workspace.communicator)
    total, norm = expected(x, residual, weight)
    if name == "kAllReduce":
        assert torch.equal(result, expected(x, torch.zeros_like(x), weight)[0])
        return
    assert torch.equal(call["residual_out"], total)
    if "Out" in name or name in ("kARResidualRMSNorm", "kMoEFinalizeARResidualRMSNorm"):
        close(result, norm)
    elif name.endswith("NormFP8Quant"):
        torch.testing.assert_close(result.double() / 64, norm, rtol=0.08, atol=0.01)


@pytest.fixture(scope="module")
def workspace(distributed):
    workspace = flashinfer.create_allreduce_fusion_workspace(
        world_size=WORLD_SIZE, rank=RANK, max_token_num=512, hidden_dim=HIDDEN, dtype=torch.bfloat16, oversubscribe=SHARED
    )
    yield workspace
    torch.cuda.synchronize()
    workspace.destroy()


def test_host_time_of_a_call(communicator, capsys):
    """Prints the time; the limit is that of the project's targets, where ranks have a GPU each."""
    group = operators.register(communicator)
    x, residual, weight = tensors(13, 1)
    out = Outputs(torch.empty_like(x), torch.empty_like(x))
    calls = {
        "Communicator.all_reduce": lambda: communicator.all_reduce(x, residual=residual, norm=weight, out=out),
        "torch.ops": lambda: operators.all_reduce_norm_(x, residual, weight, group=group),
    }
    times = {}
    for name, call in calls.items():
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            communicator.check()
            began = time.perf_counter()
            for _ in range(50):
                call()
            best = min(best, (time.perf_counter() - began) / 50)
            x.fill_(1)
            residual.fill_(1)
            synchronized(communicator)
        times[name] = best * 1e6
    if RANK == 0:
        with capsys.disabled():
            print("\nhost time of a call:", ", ".join(f"{name} {time:.1f} us" for name, time in times.items()))
    if not SHARED:
        assert times["torch.ops"] < 12, times


VICTIM = """
import os, signal, sys, time, torch
from fused_collective import Communicator, LostError
rank, gpu, key, shared = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
torch.cuda.set_device(gpu)
communicator = Communicator.local(max_hidden=4096, dtype="bfloat16", device=gpu, rank=rank, world_size=2, key=key,
                                  deadline=60, oversubscribe=shared)
x = torch.ones(4, 4096, dtype=torch.bfloat16, device="cuda")
communicator.all_reduce(x)
communicator.synchronize()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
began = time.monotonic()
try:
    for _ in range(10):
        communicator.all_reduce(x)
        communicator.synchronize()
    sys.exit("nothing was noticed")
except LostError as error:
    assert error.peer == 1, error
    assert time.monotonic() - began < 20, time.monotonic() - began
    torch.cuda.synchronize()
    print("lost", float(x.sum()))
"""


def test_a_killed_rank_is_an_exception_and_the_process_lives():
    """Rank 0 starts two processes of its own. The others pass, and wait at the barrier behind the test."""
    if RANK != 0:
        return
    key = f"victim {os.getpid()}"
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    gpus = [rank % torch.cuda.device_count() for rank in range(2)]
    shared = str(gpus[0] == gpus[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(rank), str(gpus[rank]), key, shared],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output, errors = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 0 and output.startswith("lost 16384"), errors
        assert ranks[1].wait(timeout=30) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()


def test_zz_a_late_rank_is_named_at_the_deadline():
    """Last: its communicator is over afterwards."""
    communicator = join(deadline=2)
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    communicator.all_reduce(x)
    communicator.synchronize()
    dist.barrier()
    if RANK == 0:
        with pytest.raises(fused_collective.Error) as caught:
            communicator.all_reduce(x)
            communicator.synchronize()
        assert caught.value.kind == "timed_out" and caught.value.peer is not None
        with pytest.raises(fused_collective.Error, match="earlier operation failed"):
            communicator.all_reduce(x)
    dist.barrier()
    torch.cuda.synchronize()
