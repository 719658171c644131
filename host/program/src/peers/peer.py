"""One rank of a peer: another package's all-reduce, residual add, RMSNorm and quantization, to compare with.

fused-collective starts this program once for each rank, writes requests to its standard input and reads replies from
its standard output, both one JSON object a line (peers/protocol.rs has them). Whatever a package prints goes to standard
error. Every variant is checked against a reference in float64 before it is timed and after, and timed as fused-collective
times its own: on GPUs a CUDA graph of 20 operations, launched twice, of which the second is timed by events; on CPUs
wall-clock time from a barrier. The slowest rank's time is taken by whoever reads the replies.

This file has what all peers share. process.rs appends a file for each peer, and the call of `main`.
"""

import importlib
import json
import math
import os
import sys
import time
from datetime import timedelta

# Only this program writes replies; everything else that prints, at any level, prints to standard error.
REPLIES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

OPERATIONS_PER_GRAPH = 20
# On CPUs a trial is made of as many operations as take about so long, and of at most so many.
TRIAL_US, MAX_OPERATIONS = 500.0, 200
E4M3_MAX = 448.0
# The rest of the operation after an all-reduce, by quantization: the names of its eager form and of its compiled one.
RESTS = {
    "none": ("native_rms_norm", "rmsnorm_native_compiled"),
    "fp8": ("native_rms_norm_native_quant_fp8", "rmsnorm_fp8_quant_native_compiled"),
}


def reply(kind, **fields):
    REPLIES.write(json.dumps({"reply": kind, **fields}) + "\n")
    REPLIES.flush()


class Unavailable(Exception):
    """The peer cannot run here: why, and what would help."""

    def __init__(self, why, remedy=None):
        super().__init__(why)
        self.remedy = remedy


def load(module, package):
    try:
        return importlib.import_module(module)
    except Exception as error:  # A package that is broken, not only one that is missing, may raise anything.
        remedy = f"pip install {package}"
        why = f"{sys.executable} cannot import {module}: {type(error).__name__}: {error}"
        raise Unavailable(why, remedy) from error


class Variant:
    """One way to solve a problem. `run` takes the set of tensors to use and leaves its outputs in it. `compile`, if there is
    one, fills the package's cache of compiled kernels, without the other ranks. `is_coded` if rows cross the links in E4M3, so
    that the sum is not exact."""

    def __init__(self, name, kind, run, compile=None, is_coded=False):
        self.name, self.kind, self.run, self.compile, self.is_coded = name, kind, run, compile, is_coded
        self.max_error, self.sum_error = 0.0, None
        self.trials, self.operations = [], 0
        # On GPUs: what is launched, what it writes to, and the same of a graph whose outputs can be checked.
        self.graph, self.outputs, self.checked = None, [], None


class Tensors:
    """The tensors of one operation. Outputs that a variant does not write are None, as are inputs that the operation lacks.
    With experts, `input` has the rows of a shared one."""

    def __init__(self, input, residual, gamma, post_gamma=None, expert_rows=None, expert_index=None, expert_scales=None):
        self.input, self.residual, self.gamma, self.post_gamma = input, residual, gamma, post_gamma
        self.expert_rows, self.expert_index, self.expert_scales = expert_rows, expert_index, expert_scales
        # The inputs of all-reduces in place, which the next trial needs again: in any memory, and in symmetric memory.
        self.reduced, self.symmetric = input.clone(), None
        # The sum of an all-reduce that writes beside its input.
        self.summed = None
        self.set_outputs(None, None, None, None)

    def copy(self):
        inputs = (self.input, self.residual, self.gamma, self.post_gamma)
        experts = (self.expert_rows, self.expert_index, self.expert_scales)
        return Tensors(*(None if tensor is None else tensor.clone() for tensor in inputs + experts))

    def outputs(self):
        return self.residual_out, self.norm_out, self.quant_out, self.scale_out

    def set_outputs(self, residual_out, norm_out, quant_out, scale_out):
        self.residual_out, self.norm_out = residual_out, norm_out
        self.quant_out, self.scale_out = quant_out, scale_out

    def restore(self):
        self.reduced.copy_(self.input)
        if self.symmetric is not None:
            self.symmetric.copy_(self.input)

    def reset(self):
        self.restore()
        self.set_outputs(None, None, None, None)


class Problem:
    """What is computed: the inputs of every rank, and the reference."""

    def __init__(self, peer, request):
        torch = peer.torch
        self.peer, self.torch, self.device = peer, torch, peer.device
        self.tokens, self.hidden = request["num_tokens"], request["hidden_dim"]
        self.dtype = getattr(torch, request["dtype"])
        self.has_residual, self.quant_mode = request["use_residual"], request["quant_mode"]
        self.epsilon, self.scale = request["epsilon"], request["scale"]
        # None without a norm of the sum; without experts.
        self.post_weight_bias, self.top_k = request["post_weight_bias"], request["top_k"]
        self.scale_tensor = torch.tensor([self.scale], dtype=torch.float32, device=self.device)
        self.inverse_scale = 1.0 / self.scale_tensor
        self.seed = request["seed"]
        post_gamma = None if self.post_weight_bias is None else self.post_gamma()
        experts = self.experts(peer.rank) if self.top_k else ()
        first = Tensors(self.input(peer.rank), self.residual(), self.gamma(), post_gamma, *experts)
        self.sets = [first]
        if request["cache_bytes"]:
            # What every variant moves at least: its input and one output.
            bytes_of_a_set = 2 * self.tokens * self.hidden * first.input.element_size()
            most = OPERATIONS_PER_GRAPH if self.device.type == "cuda" else MAX_OPERATIONS
            count = min(most, 1 + math.ceil(2 * request["cache_bytes"] / bytes_of_a_set))
            self.sets += [first.copy() for _ in range(count - 1)]
            self.flush = torch.empty(2 * request["cache_bytes"], dtype=torch.uint8, device=self.device)

    def random(self, stream, *shape):
        """Uniform with mean 0 and variance 1, the same on every rank."""
        generator = self.torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + stream)
        uniform = self.torch.rand(*shape, generator=generator, device=self.device)
        return ((uniform * 2 - 1) * math.sqrt(3)).to(self.dtype)

    def input(self, rank):
        return self.random(2 + rank, self.tokens, self.hidden)

    def residual(self):
        return self.random(0, self.tokens, self.hidden) if self.has_residual else None

    def gamma(self):
        return self.random(1, self.hidden)

    def post_gamma(self):
        return self.random(1000, self.hidden)

    def experts(self, rank):
        """The rows of a rank's experts, `[tokens * top_k, hidden]`; for each expert of a token its row, or -1 where it is on
        another rank; and its scale. Experts are dealt out as `inputs.rs` deals them."""
        torch, chosen, world_size = self.torch, self.tokens * self.top_k, self.peer.world_size
        place = torch.arange(chosen, device=self.device)
        token = place // self.top_k
        is_here = torch.where(token % 16 == 15, token // 16, place + token) % world_size == rank
        # No two experts have the same row: the factor is a prime.
        index = torch.where(is_here, (place * 1_000_000_007 + rank) % chosen, -1)
        rows, scales = self.random(2000 + rank, chosen, self.hidden), self.random(3000 + rank, self.tokens, self.top_k)
        return rows, index.reshape(self.tokens, self.top_k).int(), scales

    def addend(self, rank):
        """A rank's addend and the sum of the magnitudes that it is made of, in float64."""
        shared = self.input(rank).double()
        addend, magnitude = shared, shared.abs()
        if self.top_k:
            rows, index, scales = self.experts(rank)
            for expert in range(self.top_k):
                row = rows[index[:, expert].clamp(min=0).long()].double() * scales[:, expert, None].double()
                row[index[:, expert] < 0] = 0.0
                addend, magnitude = addend + row, magnitude + row.abs()
        return addend, magnitude

    def check(self, variant):
        """The largest error of any output, in units in the last place of its type; or why the variant is wrong.

        Each output is held to what comes before it as the variant has it. Sums may be rounded after each addend, so their
        unit is that of the addends' magnitudes together.
        """
        torch, found, world_size = self.torch, self.sets[0], self.peer.world_size
        addends, magnitudes = zip(*(self.addend(rank) for rank in range(world_size)))
        total, magnitude = sum(addends), sum(magnitudes)
        # Each addend, and of an expert's row the product and the sum.
        roundings = world_size + 2 * (self.top_k or 0)
        # The sum of squares is in float32: of up to 65536 addends, in whatever order.
        of_norm = 64.0 if self.dtype == torch.float32 else 2.0
        if self.post_weight_bias is not None:
            factor = torch.rsqrt(total.square().mean(-1, keepdim=True) + self.epsilon)
            factor = factor * (self.post_weight_bias + self.post_gamma().double())
            total, magnitude = total * factor, magnitude * factor.abs()
            # The factor may double a rounding, in units of what it makes.
            roundings = 2 * roundings + 2 * of_norm
        exact = total
        if self.has_residual:
            residual = self.residual().double()
            total, magnitude, roundings = total + residual, magnitude + residual.abs(), roundings + 1
        if variant.is_coded:
            errors = self.coded_error(found.residual_out.double() - (total - exact), exact, magnitude)
            before = variant.sum_error or errors
            variant.sum_error = {name: max(error, before[name]) for name, error in errors.items()}
            results = []
        else:
            results = [self.error("residual_out", found.residual_out, total, magnitude, self.dtype, 0.5 * roundings)]
        row = found.residual_out.double()
        norm = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + self.epsilon) * self.gamma().double()
        if self.quant_mode == "none":
            results.append(self.error("norm_out", found.norm_out, norm, norm.abs(), self.dtype, of_norm))
        elif self.quant_mode == "fp4":
            results.append(self.fp4_error(found, norm))
        else:
            scales = self.fp8_scales(found, norm)
            target = (norm.reshape(self.tokens, scales.shape[1], -1) / scales[..., None]).reshape(norm.shape)
            target = target.clamp(-E4M3_MAX, E4M3_MAX)
            results.append(self.error("quant_out", found.quant_out, target, target.abs(), torch.float8_e4m3fn, 1.0))
        return max(results)

    def rest(self):
        """The steps after the all-reduce: from the sum and `rest_inputs` to the norm or its codes, and `residual_out`."""
        torch, dtype, epsilon, post_weight_bias = self.torch, self.dtype, self.epsilon, self.post_weight_bias

        def normalized(row, gamma, weight_bias):
            row = row.float()
            row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + epsilon)
            return (row * (weight_bias + gamma.float())).to(dtype)

        def rms_norm(summed, residual, gamma, post_gamma, inverse_scale):
            if post_gamma is not None:
                summed = normalized(summed, post_gamma, post_weight_bias)
            if residual is not None:
                summed = (summed.float() + residual.float()).to(dtype)
            return normalized(summed, gamma, 0.0), summed

        def rms_norm_fp8(summed, residual, gamma, post_gamma, inverse_scale):
            norm, summed = rms_norm(summed, residual, gamma, post_gamma, inverse_scale)
            scaled = norm.float() * inverse_scale
            return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), summed

        return rms_norm if self.quant_mode == "none" else rms_norm_fp8

    def rest_inputs(self, tensors):
        return tensors.residual, tensors.gamma, tensors.post_gamma, self.inverse_scale

    def keep(self, tensors, outputs):
        """Leaves what `rest` returned in the set."""
        out, tensors.residual_out = outputs
        tensors.norm_out, tensors.quant_out = (out, None) if self.quant_mode == "none" else (None, out)

    def compiled(self, *functions):
        """The functions compiled for this problem alone: those of the problem before are forgotten."""
        self.torch._dynamo.reset()
        return [self.torch.compile(function, fullgraph=True, dynamic=False) for function in functions]

    def coded_error(self, found, exact, magnitude):
        """The error of a sum whose rows crossed the links in E4M3, once as addends and once as a sum: its root mean square and
        the largest of any element, relative to the root mean square of the exact row."""
        errors = (found - exact).abs()
        # Half of E4M3's last place, twice, and a little for numbers that E4M3 loses and for the rounding of `residual_out`.
        allowed = magnitude * (2.2 / 16) + magnitude.amax(-1, keepdim=True) * 2.0**-8
        wrong = ~(errors <= allowed)  # NaN is wrong.
        if wrong.any():
            place = [int(index) for index in wrong.nonzero()[0]]
            raise AssertionError(
                f"residual_out: {int(wrong.sum())} of {errors.numel()} elements are off by more than E4M3 explains, the first "
                f"at {place} by {float(errors[tuple(place)]):.3g}"
            )
        row = exact.square().mean(-1, keepdim=True).sqrt().clamp(min=2.0**-100)
        return {"rms": float((errors / row).square().mean().sqrt()), "largest": float((errors / row).max())}

    def fp8_scales(self, found, norm):
        """The scales of FP8 codes as numbers, `[tokens, blocks]`. Those that were stored must be near the largest magnitude of
        their elements divided by E4M3's largest number: a power of two within one step, a float within 1%."""
        torch, rows = self.torch, self.tokens
        if self.quant_mode == "fp8":
            return torch.full((rows, 1), self.scale, dtype=torch.float64, device=self.device)
        blocks = {"fp8_per_token": 1, "fp8_group128": self.hidden // 128, "mxfp8": self.hidden // 32}[self.quant_mode]
        if self.quant_mode == "fp8_per_token":
            scales = found.scale_out.double()
        else:
            if self.quant_mode == "fp8_group128":
                # Words of four adjacent columns, column-major.
                codes = found.scale_out.contiguous().view(torch.uint8).reshape(rows, -1)[:, :blocks]
            else:
                codes = found.scale_out.flatten()[self.places_128x4(blocks)]
            scales = torch.exp2(codes.double() - 127)
        exact = norm.reshape(rows, blocks, -1).abs().amax(-1) / E4M3_MAX
        within = 1.01 if self.quant_mode == "fp8_per_token" else 2.01
        wrong = ~((scales <= exact * within) & (scales * 1.01 >= exact)) & (exact > 2.0**-100)
        if wrong.any():
            place = [int(index) for index in wrong.nonzero()[0]]
            raise AssertionError(f"scale_out: {float(scales[tuple(place)]):.3g} at {place}, not {float(exact[tuple(place)]):.3g}")
        return scales

    def places_128x4(self, columns):
        """Places of the scales of `[tokens, columns]` blocks in the layout of 128 x 4 tiles."""
        torch = self.torch
        row = torch.arange(self.tokens, device=self.device)[:, None]
        column = torch.arange(columns, device=self.device)[None, :]
        tile = row // 128 * ((columns + 3) // 4) + column // 4
        return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4

    def error(self, name, found, expected, magnitude, dtype, allowed):
        torch = self.torch
        digits, least = {
            torch.float32: (23, -126),
            torch.float16: (10, -14),
            torch.bfloat16: (7, -126),
            torch.float8_e4m3fn: (3, -6),
        }[dtype]
        exponent = torch.frexp(magnitude.clamp(min=2.0**least)).exponent.double() - 1
        return self.largest(name, (found.double() - expected).abs() / torch.exp2(exponent - digits), allowed)

    def fp4_error(self, found, norm):
        """Of NVFP4 in units of E2M1 under the block scale that was stored; scales in the layout of 128 x 4 tiles."""
        torch = self.torch
        columns = self.hidden // 16
        codes = found.scale_out.view(torch.uint8).flatten()[self.places_128x4(columns)]
        scales = codes.view(torch.float8_e4m3fn).double() / self.scale
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64, device=self.device)
        values = torch.cat([values, -values])
        packed = found.quant_out.view(torch.uint8).reshape(self.tokens, -1).long()
        decoded = torch.stack([values[packed & 15], values[packed >> 4]], dim=-1).reshape(self.tokens, columns, 16)
        target = norm.reshape(self.tokens, columns, 16) / scales[..., None]
        target = torch.where(scales[..., None] == 0, decoded, target).clamp(-6.0, 6.0)
        exponent = torch.frexp(target.abs().clamp(min=1.0)).exponent.double() - 1
        return self.largest("quant_out", (decoded - target).abs() / torch.exp2(exponent - 1), 1.0)

    def largest(self, name, errors, allowed):
        wrong = ~(errors <= allowed)  # NaN is wrong.
        count = int(wrong.sum())
        if count:
            place = [int(index) for index in wrong.nonzero()[0]]
            raise AssertionError(
                f"{name}: {count} of {errors.numel()} elements are off by more than {allowed} ulp, the first at {place} "
                f"by {float(errors[tuple(place)]):.3g}"
            )
        return float(errors.max())


class Peer:
    """What all peers have in common: the ranks, and how an operation is timed."""

    def __init__(self, request):
        self.rank, self.world_size = request["rank"], request["world_size"]
        self.start = request
        self.torch = load("torch", "torch")
        if request["device"] == "cuda":
            if not self.torch.cuda.is_available():
                why = "torch finds no GPU: it was built without CUDA, or for a later driver"
                raise Unavailable(why, "pip install torch")
            self.torch.cuda.set_device(request["local_rank"])
            self.device = self.torch.device("cuda", request["local_rank"])
        else:
            self.device = self.torch.device("cpu")
            threads = max(1, len(os.sched_getaffinity(0)) // self.world_size)
            self.torch.set_num_threads(threads)
        self.dist = importlib.import_module("torch.distributed")
        self.timeout = timedelta(seconds=request["timeout_seconds"])
        self.store = None
        if self.rank == 0:
            # On a port that is free; the other ranks are told which.
            self.store = self.dist.TCPStore("127.0.0.1", 0, self.world_size, True, self.timeout, False)

    def port(self):
        return self.store.port if self.store else None

    def join(self, port):
        store = self.store or self.dist.TCPStore("127.0.0.1", port, self.world_size, False, self.timeout)
        # All ranks are on this host, whose name may resolve to nothing.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.dist.init_process_group(
            self.backend(), store=store, rank=self.rank, world_size=self.world_size, timeout=self.timeout
        )
        self.hosts = self.dist.new_group(backend="gloo", timeout=self.timeout)
        self.dist.barrier(self.hosts)

    def backend(self):
        return "gloo"

    def measure(self, request):
        problem = Problem(self, request)
        notes, order, failed, entrants = [], [], {}, []
        for variant in self.variants(problem, request, notes):
            reply("working", on=variant.name)
            order.append(variant.name)
            for tensors in problem.sets:
                tensors.reset()
            try:
                self.prepare(problem, variant)
            except Exception as error:  # Whatever a package raises is its answer to this problem.
                notes.append(f"{variant.name} was not measured: {type(error).__name__}: {first_line(error)}")
                # Ranks that fail in different ways would wait for each other: they are told apart here, at once.
                self.all_agree(False)
                continue
            if not self.all_agree(True):
                notes.append(f"{variant.name} was not measured: it failed on another rank")
                continue
            try:
                variant.max_error = problem.check(variant)
            except AssertionError as wrong:
                failed[variant.name] = {"variant": variant.name, "kind": variant.kind, "failed": str(wrong)}
            if self.all_agree(variant.name not in failed):
                entrants.append(variant)
            else:
                other = {"variant": variant.name, "kind": variant.kind, "failed": "it is wrong on another rank"}
                failed.setdefault(variant.name, other)
        for trial in range(request["warmup"] + request["trials"]):
            for variant in entrants:
                elapsed = self.trial(problem, variant)
                if trial >= request["warmup"]:
                    variant.trials.append(elapsed)
        timed = {}
        for variant in entrants:
            wrong = self.check_timed(problem, variant)
            # Graphs hold on to communicators, which must outlive them.
            variant.graph = variant.checked = None
            if wrong:
                failed[variant.name] = {"variant": variant.name, "kind": variant.kind, "failed": wrong}
                continue
            timed[variant.name] = {
                "variant": variant.name,
                "kind": variant.kind,
                "max_error_ulp": variant.max_error,
                "sum_error": variant.sum_error,
                "operations_per_trial": variant.operations,
                "times_us": variant.trials,
            }
        rows = timed | failed
        del problem, entrants
        if self.device.type == "cuda":
            # Other processes share the GPU.
            self.torch.cuda.empty_cache()
        return {"rows": [rows[name] for name in order if name in rows], "notes": notes}

    def check_timed(self, problem, variant):
        """Runs the variant once more, into poisoned outputs: why it is wrong after its trials, or None."""
        reply("working", on=f"{variant.name}, after its trials")
        self.run_timed(problem, variant)
        wrong = None
        try:
            variant.max_error = max(variant.max_error, problem.check(variant))
        except AssertionError as error:
            wrong = f"after its trials: {error}"
        return wrong if self.all_agree(not wrong) else wrong or "after its trials it is wrong on another rank"

    def poison(self, outputs):
        """Fills outputs with bytes of ones, which are NaN as elements. Words that are stored by columns have no view as bytes."""
        for output in outputs:
            if output is None:
                continue
            if output.dtype == self.torch.int32:
                output.fill_(-1)
            else:
                output.view(self.torch.uint8).fill_(0xFF)

    def run_timed(self, problem, variant):
        if self.device.type == "cpu":
            self.poison(problem.sets[0].outputs())
            problem.sets[0].reset()
            variant.run(problem.sets[0])
            return
        graph, outputs = variant.checked
        self.poison(outputs)
        # An output may be the input that was reduced in place.
        for tensors in problem.sets:
            tensors.restore()
        self.torch.cuda.synchronize()
        self.dist.barrier(self.hosts)
        graph.replay()
        self.torch.cuda.synchronize()
        problem.sets[0].set_outputs(*outputs)

    def all_agree(self, well):
        answer = self.torch.tensor([int(well)])
        self.dist.all_reduce(answer, op=self.dist.ReduceOp.MIN, group=self.hosts)
        return bool(answer.item())

    def rank_0_first(self, work):
        """Does `work` on rank 0, then on the other ranks: they find in the cache what they would else write at once. An error
        of any rank is one on all."""
        for mine in (self.rank == 0, self.rank != 0):
            error = None
            try:
                if mine:
                    work()
            except Exception as failed:
                error = failed
            if not self.all_agree(error is None):
                raise error or RuntimeError("its kernels were not compiled on another rank")
            reply("working", on="kernels")

    def prepare(self, problem, variant):
        """Runs the variant once, for its outputs to be checked, and then makes it ready to be timed."""
        torch = self.torch
        if variant.compile:
            self.rank_0_first(variant.compile)
        if self.device.type == "cpu":
            variant.run(problem.sets[0])
            return
        # What is set up at first use is set up before the capture, on a stream that is not the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for tensors in problem.sets[1:] + problem.sets[:1]:
                variant.run(tensors)
        stream.synchronize()
        checked = [None if output is None else output.clone() for output in problem.sets[0].outputs()]
        first = problem.sets[0]
        in_place = [tensor for tensor in (first.reduced, first.symmetric) if tensor is not None]
        is_in_place = not all(torch.equal(tensor, first.input) for tensor in in_place)

        def capture(operations):
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog, for one) do as they like meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for index in range(operations):
                    variant.run(problem.sets[index % len(problem.sets)])
            # The graph writes there, whatever other variants do with the sets.
            return graph, [tensors.outputs() for tensors in problem.sets]

        variant.graph, variant.outputs = capture(OPERATIONS_PER_GRAPH)
        variant.operations = OPERATIONS_PER_GRAPH
        # Operations in place feed on each other: only the first one's results are those of the input.
        graph, outputs = capture(1) if is_in_place else (variant.graph, variant.outputs)
        variant.checked = graph, outputs[0]
        # What was captured has not run: what is checked is what ran before.
        problem.sets[0].set_outputs(*checked)

    def trial(self, problem, variant):
        """Microseconds per operation on this rank."""
        for tensors in problem.sets:
            tensors.restore()
        if self.device.type == "cuda":
            return self.trial_on_gpu(problem, variant)
        if not variant.operations:
            once = self.torch.tensor([self.time_on_cpu(problem, variant, 1)])
            self.dist.all_reduce(once, op=self.dist.ReduceOp.MAX, group=self.hosts)
            variant.operations = int(min(max(TRIAL_US / once.item(), 1.0), MAX_OPERATIONS))
            for tensors in problem.sets:
                tensors.restore()
        return self.time_on_cpu(problem, variant, variant.operations)

    def time_on_cpu(self, problem, variant, operations):
        if len(problem.sets) > 1:
            problem.flush.fill_(1)
        self.dist.barrier(self.hosts)
        begin = time.perf_counter()
        for index in range(operations):
            variant.run(problem.sets[index % len(problem.sets)])
        return (time.perf_counter() - begin) * 1e6 / operations

    def trial_on_gpu(self, problem, variant):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        self.dist.barrier(self.hosts)
        # The first launch hides what launching takes, and brings the ranks to the same point.
        variant.graph.replay()
        if len(problem.sets) > 1:
            problem.flush.fill_(1)
        begin.record()
        variant.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / OPERATIONS_PER_GRAPH


def first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def main():
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("request")
        if kind == "start":
            try:
                peer = {"torch": Torch, "flashinfer": FlashInfer}[request["peer"]](request)
            except Unavailable as error:
                reply("unavailable", why=first_line(error), remedy=error.remedy)
                continue
            reply("started", port=peer.port())
        elif kind == "join":
            peer.join(request["port"])
            reply("joined", about=peer.about())
        elif kind == "measure":
            reply("measured", **peer.measure(request))
    # Nothing is left to do that is worth waiting for: packages' destructors have hung before.
    REPLIES.flush()
    os._exit(0)
