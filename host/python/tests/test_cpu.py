"""The package on CPUs, by NumPy and several processes. Neither a GPU nor PyTorch is needed."""

import array
import os
import signal
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy
import pytest

import fused_collective
from fused_collective import Communicator, Experts, InvalidError, Norm, Outputs, Quant
from fused_collective._tensors import describe
from ranks import run, start

TOKENS, HIDDEN = 5, 64
FLOATS = {"float32": numpy.float32, "float16": numpy.float16, "bfloat16": ml_dtypes.bfloat16}


def join(rank, world_size, key, **options):
    options = {"max_hidden": 8192, "deadline": 20} | options
    return Communicator.local(rank=rank, world_size=world_size, key=key, **options)


def inputs(rank, dtype="float32"):
    values = (numpy.arange(TOKENS * HIDDEN).reshape(TOKENS, HIDDEN) * 37 + rank * 11) % 101 / 16.0 - 3.0
    return values.astype(FLOATS[dtype])


def residual_of(dtype="float32"):
    return inputs(7, dtype) / FLOATS[dtype](2)


def weight_of(dtype="float32"):
    return (1 + numpy.arange(HIDDEN) / 128).astype(FLOATS[dtype])


def expected_sum(world_size, dtype):
    total = numpy.zeros((TOKENS, HIDDEN), numpy.float32)
    for rank in range(world_size):
        total = total + inputs(rank, dtype).astype(numpy.float32)
    return (total + residual_of(dtype).astype(numpy.float32)).astype(FLOATS[dtype])


def expected_norm(total, weight):
    wide = total.astype(numpy.float64)
    return wide / numpy.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight.astype(numpy.float64)


def norm_rank(rank, world_size, key, dtype):
    with join(rank, world_size, key) as communicator:
        assert (communicator.rank, communicator.world_size, communicator.device) == (rank, world_size, None)
        out = communicator.all_reduce(inputs(rank, dtype), residual=residual_of(dtype), norm=weight_of(dtype))
        assert out.quant_out is None and out.scale_out is None
        return out.residual_out.astype(numpy.float32), out.norm_out.astype(numpy.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sum_and_its_norm(dtype, world_size):
    results = run(norm_rank, dtype, world_size=world_size)
    total = expected_sum(world_size, dtype)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for residual_out, norm_out in results:
        assert (residual_out == total.astype(numpy.float32)).all()
        numpy.testing.assert_allclose(norm_out, expected_norm(total, weight_of(dtype)), rtol=tolerance, atol=tolerance)
        assert (norm_out == results[0][1]).all(), "all ranks have the same bits"


def post_norm_rank(rank, world_size, key, dtype):
    with join(rank, world_size, key) as communicator:
        post_norm = Norm(weight_of(), epsilon=1e-6, weight_bias=1.0)
        arguments = dict(residual=residual_of(dtype), norm=weight_of(dtype), rounding="after_all_reduce")
        out = communicator.all_reduce(inputs(rank, dtype), post_norm=post_norm, **arguments)
        # The same in three operations.
        total = communicator.all_reduce(inputs(rank, dtype)).residual_out
        normed = expected_norm(total, 1 + weight_of()).astype(FLOATS[dtype]).astype(numpy.float32)
        added = (normed + residual_of(dtype).astype(numpy.float32)).astype(FLOATS[dtype])
        return [it.astype(numpy.float32) for it in (out.residual_out, added, out.norm_out)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_post_norm_normalizes_the_sum_before_the_residual_is_added(dtype):
    (residual_out, added, norm_out), (_, _, other) = run(post_norm_rank, dtype)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    numpy.testing.assert_allclose(residual_out, added, rtol=tolerance, atol=tolerance)
    assert (residual_out == added).mean() > (0.99 if dtype != "float32" else 0.3)
    expected = expected_norm(residual_out, weight_of(dtype))
    numpy.testing.assert_allclose(norm_out, expected, rtol=tolerance, atol=tolerance)
    assert (norm_out == other).all(), "all ranks have the same bits"


def wire_rank(rank, world_size, key):
    x = numpy.random.default_rng(rank).standard_normal((TOKENS, 1024)).astype(numpy.float32)
    with join(rank, world_size, key) as communicator:
        def total(wire):
            return communicator.all_reduce(x, wire=wire, mode="one_shot").residual_out

        return [total(wire) for wire in (None, "int8", "int4")]


def test_rows_of_fewer_bits_between_ranks_cost_accuracy_and_give_all_ranks_the_same_bits():
    first, second = run(wire_rank)
    for one, other in zip(first, second):
        assert (one == other).all()
    exact, int8, int4 = first
    rms = lambda rows: numpy.sqrt((rows.astype(numpy.float64) ** 2).mean())  # noqa: E731
    assert 0.004 < rms(int8 - exact) / rms(exact) < 0.006
    assert 0.07 < rms(int4 - exact) / rms(exact) < 0.1


def experts_rank(rank, world_size, key, dtype):
    float32 = numpy.float32
    rows = (numpy.arange(7 * HIDDEN).reshape(7, HIDDEN) * 29 + rank * 5) % 67 / 16.0 - 2.0
    rows = rows.astype(FLOATS[dtype])
    index = (numpy.arange(TOKENS * 3).reshape(TOKENS, 3) * 5 + rank) % 8 - 1
    index = index.astype(numpy.int32)
    scales = ((numpy.arange(TOKENS * 3).reshape(TOKENS, 3) + 1) / 8).astype(float32)
    experts = Experts(rows, index, scales)
    addend = numpy.zeros((TOKENS, HIDDEN), float32)
    for token, expert in numpy.ndindex(index.shape):
        if index[token, expert] >= 0:
            addend[token] += scales[token, expert] * rows[index[token, expert]].astype(float32)
    results = []
    with join(rank, world_size, key) as communicator:
        for shared in (None, inputs(rank, dtype)):
            own = addend if shared is None else addend + shared.astype(float32)
            got = communicator.all_reduce(shared, experts=experts, norm=weight_of(dtype))
            want = communicator.all_reduce(own.astype(FLOATS[dtype]), norm=weight_of(dtype))
            results.append((got.residual_out == want.residual_out).all() and (got.norm_out == want.norm_out).all())
        # In the shared expert's memory.
        place = inputs(rank, dtype)
        communicator.all_reduce(place, experts=experts, norm=weight_of(dtype), out=Outputs(norm_out=place))
        results.append((place == got.norm_out).all())
        if rank == 0:
            for match, change in (
                ("expert_index has row 7 for token 0: use 0 to 6", dict(index=numpy.full_like(index, 7))),
                ("expert_scales has length 5", dict(scales=scales[:, 0].copy())),
                ("expert_index holds codes, the operation needs int32", dict(index=index.astype(numpy.int64))),
            ):
                wrong = Experts(**(dict(rows=rows, index=index, scales=scales) | change))
                with pytest.raises(InvalidError, match=match):
                    communicator.all_reduce(experts=wrong)
        return [bool(it) for it in results]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_addend_is_made_of_experts_rows(dtype):
    # All numbers here have few digits: each sum is exact until it is rounded.
    assert run(experts_rank, dtype) == [[True] * 3] * 2


def quantized_rank(rank, world_size, key, quant):
    with join(rank, world_size, key) as communicator:
        arguments = dict(residual=residual_of(), norm=Norm(weight_of(), weight_bias=1.0))
        out = communicator.all_reduce(inputs(rank), quant=quant, keep_norm=True, **arguments)
        plain = communicator.all_reduce(inputs(rank), **arguments)
        assert (out.norm_out == plain.norm_out).all()
        return out.norm_out, out.quant_out, out.scale_out


def fp4(codes):
    table = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return numpy.stack([table[codes & 15], table[codes >> 4]], -1).reshape(codes.shape[0], -1)


def decoded(quant, codes, scales):
    if quant.format == "fp8":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(float) * quant.scale
    if quant.format == "fp8_per_token":
        assert scales.shape == (TOKENS, 1) and scales.dtype == numpy.float32
        return codes.view(ml_dtypes.float8_e4m3fn).astype(float) * scales
    if quant.format == "nvfp4":
        factors = scales.view(ml_dtypes.float8_e4m3fn).astype(float) / quant.scale
        return fp4(codes) * factors.reshape(TOKENS, -1).repeat(16, 1)
    block = {"fp8_per_group": quant.group, "mxfp8": 32, "mxfp4": 32}[quant.format]
    factors = scales if scales.dtype == numpy.float32 else numpy.exp2(scales.astype(float) - 127)
    values = fp4(codes) if quant.format == "mxfp4" else codes.view(ml_dtypes.float8_e4m3fn).astype(float)
    return values * factors.reshape(TOKENS, -1).repeat(block, 1)


@pytest.mark.parametrize(
    "quant, within",
    [
        (Quant("fp8", scale=1 / 64), 0.07),
        (Quant("fp8_per_token"), 0.07),
        (Quant("fp8_per_group", group=32), 0.07),
        (Quant("fp8_per_group", group=64, group_scale="float32"), 0.07),
        (Quant("nvfp4", scale=448.0), 0.3),
        (Quant("mxfp8"), 0.07),
        (Quant("mxfp4"), 0.4),
    ],
    ids=lambda it: it.format + str(it.group_scale) if isinstance(it, Quant) else "",
)
def test_codes_and_scales_stand_for_the_norm(quant, within):
    for norm, codes, scales in run(quantized_rank, quant):
        error = numpy.abs(decoded(quant, codes, scales) - norm)
        assert (error <= within * numpy.abs(norm) + within * numpy.abs(norm).max() / 4).all()
        assert numpy.abs(decoded(quant, codes, scales)).max() > 1


def bias_rank(rank, world_size, key):
    with join(rank, world_size, key) as communicator:
        bias = weight_of() * numpy.float32(3)
        biased = communicator.all_reduce(inputs(rank), bias=bias).residual_out
        plain = communicator.all_reduce(inputs(rank)).residual_out
        return bool((biased == plain + bias).all())


def test_a_bias_is_added_once():
    assert run(bias_rank) == [True, True]


def in_place_rank(rank, world_size, key):
    with join(rank, world_size, key) as communicator:
        x, residual, weight = inputs(rank), residual_of(), weight_of()
        apart = communicator.all_reduce(x, residual=residual, norm=weight)
        out = communicator.all_reduce(
            x, residual=residual, norm=weight, out=Outputs(residual_out=residual, norm_out=x)
        )
        assert out.norm_out is x and out.residual_out is residual
        with pytest.raises(InvalidError, match="overlaps"):
            communicator.all_reduce(x, residual=residual, norm=weight, out=Outputs(norm_out=residual))
        return bool((x == apart.norm_out).all() and (residual == apart.residual_out).all())


def test_outputs_may_be_the_inputs():
    assert run(in_place_rank) == [True, True]


def sharded_rank(rank, world_size, key):
    with join(rank, world_size, key) as communicator:
        residual, weight = residual_of(), weight_of()
        whole = communicator.all_reduce(inputs(rank), residual=residual, norm=weight)
        own = numpy.ascontiguousarray(residual[rank::world_size])
        out = communicator.all_reduce(inputs(rank), residual=own, sharded=True, norm=weight)
        assert (out.norm_out == whole.norm_out).all()
        return bool((out.residual_out == whole.residual_out[rank::world_size]).all())


def test_a_sharded_residual_gives_the_same_norm():
    assert run(sharded_rank) == [True, True]


def libraries_rank(rank, world_size, key):
    class DLPack:
        """An array that has nothing but DLPack."""

        def __init__(self, of):
            self.of = of

        def __dlpack__(self, **options):
            return self.of.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.of.__dlpack_device__()

    with join(rank, world_size, key) as communicator:
        values = array.array("f", [rank + 1.0] * HIDDEN)
        out = bytearray(4 * HIDDEN)
        view = memoryview(out).cast("f")
        communicator.all_reduce(values, out=Outputs(residual_out=view))
        sums = [view[0], view[HIDDEN - 1]]
        dlpack = numpy.zeros(HIDDEN, numpy.float32)
        communicator.all_reduce(DLPack(numpy.asarray(values)), out=Outputs(residual_out=DLPack(dlpack)))
        bits = numpy.full((1, HIDDEN), 0x3F80, numpy.uint16)
        bits = communicator.all_reduce(bits, dtype="bfloat16").residual_out
        return [*sums, float(dlpack[3]), hex(bits[0, 5])]


def test_tensors_of_other_libraries_are_taken_where_they_are():
    assert run(libraries_rank) == [[3.0, 3.0, 3.0, "0x4000"]] * 2


def refused_rank(rank, world_size, key):
    refused = []

    def refuse(match, *arguments, **keywords):
        with pytest.raises(InvalidError, match=match) as caught:
            communicator.all_reduce(*arguments, **keywords)
        assert isinstance(caught.value, ValueError) and caught.value.kind == "invalid"
        refused.append(match)

    with join(rank, world_size, key) as communicator:
        x = inputs(rank)
        if rank == 0:
            refuse("is a list", [1.0])
            refuse("float64", x.astype(numpy.float64))
            refuse("not contiguous", x[:, ::2])
            refuse("hidden size 63", x[:, :63].copy())
            refuse("residual has length", x, residual=x[:1].copy())
            refuse("quantization \"fp7\" is not valid: use none, fp8", x, norm=weight_of(), quant="fp7")
            refuse("needs a norm", x, quant="fp8_per_token")
            refuse("scale is missing", x, norm=weight_of(), quant="fp8")
            refuse("scale", x, norm=weight_of(), quant=Quant("fp8", scale=0.0))
            refuse("mode \"three\" is not valid", x, mode="three")
            refuse("wire \"fp8\" is not valid: use int8, int4", x, wire="fp8")
            refuse("the type of partial sums \"f16\" is not valid: use float32, element", x, partial_sums="f16")
            read_only = x.copy()
            read_only.flags.writeable = False
            refuse("residual_out is read-only", x, out=Outputs(residual_out=read_only))
            refuse("a stream is given", x, stream=1)
            refuse("a post-norm needs a norm after it", x, post_norm=weight_of())
            refuse("x is missing", None)
        return communicator.all_reduce(x).residual_out.sum(), len(refused)


def test_what_cannot_be_is_refused_by_name_and_the_group_goes_on():
    (first, refused), (second, _) = run(refused_rank)
    assert first == second and refused == 16


def late_rank(rank, world_size, key):
    communicator = join(rank, world_size, key, deadline=0.5)
    if rank == 1:
        time.sleep(1.5)
        return None
    caught = []
    for _ in range(2):
        try:
            communicator.all_reduce(inputs(rank))
        except fused_collective.Error as error:
            caught.append((type(error).__name__, error.kind, error.rank, error.peer, isinstance(error, TimeoutError)))
    return caught


def test_a_rank_that_does_not_come_is_named_at_the_deadline():
    assert run(late_rank)[0] == [("TimedOutError", "timed_out", 0, 1, True)] * 2


def killed_rank(rank, world_size, key):
    communicator = join(rank, world_size, key, deadline=60)
    communicator.all_reduce(inputs(rank))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        communicator.all_reduce(inputs(rank))
    except fused_collective.LostError as error:
        return error.peer, time.monotonic() - began
    return None


def test_a_killed_rank_is_an_exception_at_once():
    ranks = start(killed_rank)
    peer, seconds = ranks[0].result()
    assert peer == 1 and seconds < 5
    ranks[1].process.wait()


def mismatch_rank(rank, world_size, key):
    communicator = join(rank, world_size, key)
    try:
        communicator.all_reduce(inputs(rank)[: rank + 1])
    except fused_collective.MismatchError as error:
        return error.peer
    return None


def test_ranks_that_call_different_things_both_know():
    assert run(mismatch_rank) == [1, 0]


def abort_rank(rank, world_size, key):
    communicator = join(rank, world_size, key, deadline=60)
    if rank == 1:
        time.sleep(30)
        return None
    # Other threads run while this one waits.
    threading.Timer(0.3, communicator.abort).start()
    try:
        communicator.all_reduce(inputs(rank))
    except fused_collective.AbortedError as error:
        return error.kind
    return None


def test_another_thread_ends_a_wait():
    ranks = start(abort_rank)
    assert ranks[0].result() == "aborted"
    ranks[1].process.kill()


def interrupted_rank(rank, world_size, key, where):
    if where == "join" and rank == 1:
        return None
    # Who starts the tests in the background may have them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        communicator = join(rank, world_size, key, deadline=40)
        if rank == 1:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(2)
            return None
        communicator.all_reduce(inputs(rank))
    except KeyboardInterrupt:
        return time.monotonic() - began
    return None


@pytest.mark.parametrize("where", ["join", "all_reduce"])
def test_ctrl_c_ends_a_wait(where):
    ranks = start(interrupted_rank, where)
    try:
        assert ranks[0].result() < 10
    finally:
        ranks[1].process.kill()


def forked_rank(rank, world_size, key):
    with join(rank, world_size, key) as communicator:
        communicator.all_reduce(inputs(rank))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                communicator.all_reduce(inputs(rank))
            except InvalidError as error:
                status = 0 if "another process" in str(error) else 2
            del communicator
            os._exit(status)
        _, status = os.waitpid(child, 0)
        # What the child's end does to its copy is no concern of the group's.
        return status, float(communicator.all_reduce(inputs(rank)).residual_out[0, 0])


def test_a_child_of_a_fork_is_refused_and_leaves_the_group_as_it_is():
    (status, first), (other, second) = run(forked_rank)
    assert (status, other) == (0, 0) and first == second


def two_groups_rank(rank, world_size, key):
    with join(rank, world_size, key) as first, join(rank, world_size, key) as second:
        one = first.all_reduce(inputs(rank)).residual_out
        two = second.all_reduce(inputs(rank + 2)).residual_out
        return float(one[0, 1]), float(two[0, 1])


def test_a_process_may_be_in_two_groups():
    results = run(two_groups_rank)
    assert results[0] == results[1] and results[0][0] != results[0][1]


def launched_rank(rank, world_size, key):
    with Communicator.local(max_hidden=HIDDEN, deadline=20) as communicator:
        return communicator.rank, float(communicator.all_reduce(inputs(communicator.rank)).residual_out[1, 1])


def test_ranks_of_a_launcher_find_each_other():
    def variables(rank, world_size):
        port = str(20000 + os.getpid() % 20000)
        return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}

    (first, one), (second, two) = run(launched_rank, environment=variables)
    assert (first, second) == (0, 1) and one == two


def test_without_a_launcher_the_text_says_what_to_do():
    variables = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    assert not any(name in os.environ for name in variables)
    with pytest.raises(InvalidError, match="torchrun"):
        Communicator.local(max_hidden=64)
    with pytest.raises(InvalidError, match="given together"):
        Communicator.local(max_hidden=64, rank=0)
    with pytest.raises(InvalidError, match="deadline 0"):
        Communicator.local(max_hidden=64, rank=0, world_size=2, key="x", deadline=0)
    with pytest.raises(InvalidError, match="device 'tpu'"):
        Communicator.local(max_hidden=64, device="tpu")


def test_a_rank_that_does_not_join_is_the_error_s_peer():
    with pytest.raises(fused_collective.BootstrapError, match="rank 1") as caught:
        Communicator.local(max_hidden=64, rank=0, world_size=2, key=f"alone {os.getpid()}", deadline=0.3)
    assert caught.value.peer == 1 and isinstance(caught.value, ConnectionError)


def test_importing_needs_neither_torch_nor_a_gpu():
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "import fused_collective; print(fused_collective.__version__)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == fused_collective.__version__


def test_read_only_buffers_may_be_read():
    tensor = describe(bytes(range(8)), "x")
    assert (tensor.shape, tensor.dtype, tensor.read_only, tensor.bytes) == ((8,), "uint8", True, 8)
