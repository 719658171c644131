"""A Llama-shaped decoder, tensor-parallel over the ranks of one host, with the end of each half layer done in three ways:

- ``nccl``: NCCL's all-reduce, then residual, RMSNorm (and FP8 quantization) in one compiled function;
- ``flashinfer``: FlashInfer's fused call, where the package is;
- ``fused``: this package's.

Everything else is the same: the same random weights, the same attention over the same key-value cache. Decode runs in a CUDA graph,
at several batch sizes; a prefill of one sequence runs eagerly. It prints tokens per second, and how far the logits are from those of
``nccl``. In ``fp8``, linear layers take E4M3 activations and weights with one scale each.

    torchrun --nproc-per-node 2 host/python/examples/llama_tensor_parallel.py --hidden 8192 --layers 8

Ranks may share a GPU, for trying it: NCCL and FlashInfer cannot, and are left out with the reason; gloo takes NCCL's place for the
logits to compare with.
"""

import argparse
import functools
import math
import os
import statistics
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_collective
from fused_collective import flashinfer as ours

EPSILON = 1e-5
HEAD = 128
FP8_MAX = 448.0
#: What switches NVLink multicast off in NCCL, PyTorch and NVSHMEM: who sets one of them wants none of it.
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=8192, help="hidden size, a multiple of 128 times the ranks (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="layers (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, help="columns of the MLP (default: 3.5 times the hidden size)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the output layer (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache of each sequence at decode (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="batch sizes of decode (default: 1 8 64 256)")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prefill (default: %(default)s)")
    parser.add_argument("--types", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"], help="types of linear layers (default: both)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each way, of which the median counts (default: %(default)s)")
    parser.add_argument("--flashinfer-backend", default="trtllm", help="FlashInfer's workspace (default: %(default)s)")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node N")
    for name in ("hidden", "layers", "vocabulary", "context", "prefill", "steps", "turns"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not valid: use 1 or more")
    world_size = int(os.environ["WORLD_SIZE"])
    if options.hidden % (HEAD * world_size):
        parser.error(f"--hidden {options.hidden} is not valid: use a multiple of {HEAD * world_size}")
    options.intermediate = options.intermediate or options.hidden * 7 // 2 // (128 * world_size) * 128 * world_size
    return options


class Linear:
    """A layer's columns or rows on this rank, in bfloat16 or in E4M3 with one scale."""

    def __init__(self, inputs, outputs, fp8, generator, device):
        weight = torch.randn(outputs, inputs, generator=generator, device=device, dtype=torch.bfloat16) * inputs**-0.5
        self.fp8 = fp8
        if fp8:
            self.scale = (weight.abs().amax().float() / FP8_MAX).reshape(1)
            weight = (weight.float() / self.scale).to(torch.float8_e4m3fn)
        self.weight = weight

    def __call__(self, x, scale=None):
        if not self.fp8:
            return F.linear(x, self.weight)
        if x.dtype != torch.float8_e4m3fn:
            x = quantize(x, scale)
        return torch._scaled_mm(x, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)


@torch.compile(dynamic=False)
def quantize(x, scale):
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


@torch.compile(dynamic=False)
def silu_and_multiply(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Layer:
    def __init__(self, options, rank, world_size, fp8, device, number):
        hidden, self.heads = options.hidden, options.hidden // HEAD // world_size
        # This rank's part of each weight: another one on each rank. Norms are alike.
        generator = torch.Generator(device).manual_seed(1000 * number + rank)
        width, columns = self.heads * HEAD, options.intermediate // world_size
        self.qkv = Linear(hidden, 3 * width, fp8, generator, device)
        self.out = Linear(width, hidden, fp8, generator, device)
        self.gate_up = Linear(hidden, 2 * columns, fp8, generator, device)
        self.down = Linear(columns, hidden, fp8, generator, device)
        generator = torch.Generator(device).manual_seed(7 + number)
        self.norms = [1 + 0.1 * torch.randn(hidden, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)]
        self.scale = torch.full((1,), 1 / 32, device=device)

    def attention(self, normed, cache):
        tokens = normed.shape[0]
        q, k, v = self.qkv(normed, self.scale).view(tokens, 3, self.heads, HEAD).unbind(1)
        if cache is None:
            mixed = F.scaled_dot_product_attention(*(it.transpose(0, 1)[None] for it in (q, k, v)), is_causal=True)
            mixed = mixed[0].transpose(0, 1)
        else:
            keys, values = cache
            keys[:, :, -1], values[:, :, -1] = k, v
            mixed = F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]
        return self.out(mixed.reshape(tokens, -1).contiguous(), self.scale)

    def mlp(self, normed):
        return self.down(silu_and_multiply(self.gate_up(normed, self.scale)), self.scale)


class Nccl:
    """The all-reduce of torch.distributed, and one compiled function."""

    name = "nccl"

    def __init__(self, fp8, compiled):
        def rest(x, residual, weight, scale):
            residual = x + residual
            wide = residual.float()
            normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * weight.float()).to(x.dtype)
            return (quantize(normed, scale) if fp8 else normed), residual

        self.rest = torch.compile(rest, dynamic=False) if compiled else rest

    def __call__(self, x, residual, weight, scale):
        dist.all_reduce(x)
        return self.rest(x, residual, weight, scale)


class Fused:
    """A fused call, by FlashInfer's names: of this package, or of FlashInfer."""

    def __init__(self, name, module, workspace, fp8, **options):
        self.name, self.call, self.workspace, self.options = name, module.allreduce_fusion, workspace, options
        patterns = module.AllReduceFusionPattern
        self.fp8, self.pattern = fp8, patterns.kARResidualRMSNormFP8Quant if fp8 else patterns.kARResidualRMSNorm

    def __call__(self, x, residual, weight, scale):
        residual_out = torch.empty_like(residual)
        out = torch.empty_like(x, dtype=torch.float8_e4m3fn if self.fp8 else x.dtype)
        self.call(
            input=x,
            workspace=self.workspace,
            pattern=self.pattern,
            launch_with_pdl=True,
            residual_in=residual,
            residual_out=residual_out,
            rms_gamma=weight,
            rms_eps=EPSILON,
            scale_factor=scale if self.fp8 else None,
            **{"quant_out" if self.fp8 else "norm_out": out},
            **self.options,
        )
        return out, residual_out


def forward(layers, head, x, caches, end):
    """The logits of ``x``, ``[tokens, hidden]``."""
    residual, weight = x, layers[0].norms[0]
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * weight.float()).to(x.dtype)
    if layers[0].qkv.fp8:
        normed = quantize(normed, layers[0].scale)
    for number, layer in enumerate(layers):
        cache = None if caches is None else caches[number]
        normed, residual = end(layer.attention(normed, cache), residual, layer.norms[1], layer.scale)
        following = layers[(number + 1) % len(layers)]
        normed, residual = end(layer.mlp(normed), residual, following.norms[0], layer.scale)
    if normed.dtype == torch.float8_e4m3fn:
        normed = (normed.float() * layers[0].scale).bfloat16()
    return F.linear(normed, head)


def slowest(seconds):
    times = torch.tensor([seconds], dtype=torch.float64)
    everyone = [torch.empty_like(times) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, times, group=GLOO)
    return max(time.item() for time in everyone)


def prepare(run, in_graph):
    """Makes a step of a run that is warmed up, in a graph or not. A step returns the logits."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier(group=GLOO)
    if not in_graph:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()

    def step():
        graph.replay()
        return logits

    return step


def measure(step, steps):
    """Logits, and seconds of a step on the slowest rank."""
    step()
    torch.cuda.synchronize()
    dist.barrier(group=GLOO)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(steps):
        logits = step()
    ended.record()
    torch.cuda.synchronize()
    return logits.float().clone(), slowest(began.elapsed_time(ended) / 1e3 / steps)


def ends(options, fp8, rank, world_size, shared, workspaces):
    """The ways to end a half layer, by name; a text where one is missing."""
    found = {}
    if shared:
        found["nccl"] = "ranks share a GPU, which NCCL cannot do"
    else:
        found["nccl"] = Nccl(fp8, compiled=True)
    try:
        if shared:
            raise RuntimeError("ranks share a GPU, which FlashInfer cannot do")
        if any(os.environ.get(name) == value for name, value in MULTICAST_OFF.items()):
            if options.flashinfer_backend != "trtllm":
                raise RuntimeError(f"its back end {options.flashinfer_backend} needs NVLink multicast, which the environment switches off")
            # FlashInfer has no variable for it but this one, by which it makes its workspace without multicast. Releases before that
            # have none, and what they would do is not tried.
            os.environ["FLASHINFER_CONFIDENTIAL_COMPUTE"] = "1"
            import flashinfer.utils

            if not hasattr(flashinfer.utils, "is_confidential_compute"):
                raise RuntimeError("the environment switches NVLink multicast off, and this release cannot be told: use 0.7.4")
        import flashinfer.comm as theirs

        if "flashinfer" not in workspaces:
            workspaces["flashinfer"] = theirs.create_allreduce_fusion_workspace(
                backend=options.flashinfer_backend,
                world_size=world_size,
                rank=rank,
                max_token_num=max([*options.batches, options.prefill]),
                hidden_dim=options.hidden,
                dtype=torch.bfloat16,
            )
        found["flashinfer"] = Fused("flashinfer", theirs, workspaces["flashinfer"], fp8, fp32_acc=True)
    except Exception as error:
        found["flashinfer"] = str(error).split("\n")[0] or type(error).__name__
    if "fused" not in workspaces:
        workspaces["fused"] = ours.create_allreduce_fusion_workspace(
            max_token_num=max([*options.batches, options.prefill]),
            hidden_dim=options.hidden,
            dtype=torch.bfloat16,
            group=GLOO,
            oversubscribe=shared,
        )
    found["fused"] = Fused("fused", ours, workspaces["fused"], fp8)
    return found


class Gloo(Nccl):
    """The reference where NCCL cannot run: gloo's all-reduce through the host."""

    def __call__(self, x, residual, weight, scale):
        host = x.float().cpu()
        dist.all_reduce(host, group=GLOO)
        return self.rest(host.to(x.device, x.dtype), residual, weight, scale)


def main():
    global GLOO
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    shared = gpus < world_size
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % gpus)
    torch.cuda.set_device(device)
    # One of each compiled function for each number of tokens.
    torch._dynamo.config.recompile_limit = 64
    dist.init_process_group("gloo" if shared else "nccl", device_id=None if shared else device)
    GLOO = dist.new_group(backend="gloo")
    say = print if rank == 0 else lambda *_: None
    say(
        f"{world_size} ranks on {min(gpus, world_size)} x {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, "
        f"fused-collective {fused_collective.__version__}; hidden {options.hidden}, {options.layers} layers, "
        f"MLP {options.intermediate}, context {options.context}"
    )
    workspaces = {}
    say("\n| linear layers | step | all-reduce and norm | tokens/s | ms | speedup | logits differ by |\n| --- | --- | --- | ---: | ---: | ---: | ---: |")
    notes = []
    for kind in options.types:
        fp8 = kind == "fp8"
        if fp8 and torch.cuda.get_device_capability() < (8, 9):
            notes.append("fp8 needs compute capability 8.9")
            continue
        layers = [Layer(options, rank, world_size, fp8, device, number) for number in range(options.layers)]
        generator = torch.Generator(device).manual_seed(1)
        head = torch.randn(options.vocabulary, options.hidden, generator=generator, device=device, dtype=torch.bfloat16)
        head *= options.hidden**-0.5
        found = ends(options, fp8, rank, world_size, shared, workspaces)
        for batch in [*options.batches, 0]:
            tokens = batch or options.prefill
            generator = torch.Generator(device).manual_seed(tokens)
            x = torch.randn(tokens, options.hidden, generator=generator, device=device, dtype=torch.bfloat16)
            caches = None
            if batch:
                shape = (2, batch, layers[0].heads, options.context, HEAD)
                # As many as memory has room for: layers share them, since their values mean nothing.
                room = torch.cuda.mem_get_info()[0] // 2 // (2 * math.prod(shape))
                made = [
                    torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
                    for _ in range(max(1, min(len(layers), room)))
                ]
                caches = [made[number % len(made)] for number in range(len(layers))]
                del made
            with torch.inference_mode():
                reference = base = None
                if shared:
                    reference = forward(layers, head, x, caches, Gloo(fp8, compiled=False)).float()
                prepared = {}
                for name, end in found.items():
                    if isinstance(end, str):
                        if (note := f"{name} ({kind}): {end}") not in notes:
                            notes.append(note)
                        continue
                    prepared[name] = prepare(functools.partial(forward, layers, head, x, caches, end), bool(batch))
                # In turns: what a GPU gives to matrix products changes while it gets warm.
                found_logits, times = {}, {name: [] for name in prepared}
                for _ in range(options.turns):
                    for name, run in prepared.items():
                        found_logits[name], seconds = measure(run, options.steps)
                        times[name].append(seconds)
                workspaces["fused"].communicator.synchronize()
                del prepared, run
                for name, logits in found_logits.items():
                    seconds = statistics.median(times[name])
                    reference, base = logits if reference is None else reference, base or seconds
                    differ = ((logits - reference).norm() / reference.norm()).item()
                    step = f"decode, batch {batch}" if batch else f"prefill, {tokens} tokens"
                    say(
                        f"| {kind} | {step} | {name} | {tokens / seconds:,.0f} | {seconds * 1e3:.3f} | {base / seconds:.2f}x | {differ:.2e} |"
                    )
            del caches, x
        del layers, head
        torch.cuda.empty_cache()
    if notes:
        say("\nnot measured: " + "; ".join(notes))
    if shared:
        say("\nranks share a GPU: times mean nothing, logits do")
    workspaces["fused"].destroy()
    if "flashinfer" in workspaces:
        workspaces["flashinfer"].destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
