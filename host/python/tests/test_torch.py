"""PyTorch's operators and FlashInfer's calls on CPUs: skipped where there is no PyTorch."""

import pytest

torch = pytest.importorskip("torch")

import numpy  # noqa: E402

import fused_collective  # noqa: E402
from fused_collective import Communicator, Experts, InvalidError, Norm, UnsupportedError  # noqa: E402
from ranks import run  # noqa: E402

TOKENS, HIDDEN = 6, 128
QUANTS = {
    "none": {},
    "fp8": {"scale": 1 / 64},
    "fp8_per_token": {},
    "fp8_per_group": {"block": 64, "layout": "deep_gemm"},
    "nvfp4": {"scale": 448.0, "layout": "swizzled_128x4"},
    "mxfp8": {"layout": "swizzled_8x4"},
    "mxfp4": {"layout": "column_major"},
}


def meet(rank, world_size, key):
    """Starts torch.distributed, and joins a group over it."""
    import tempfile

    store = torch.distributed.FileStore(f"{tempfile.gettempdir()}/{key.replace(' ', '-')}", world_size)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    return Communicator.from_torch(max_hidden=HIDDEN, dtype="float32", device="cpu")


def tensors(rank, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    generator.manual_seed(99)
    return x, torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype), torch.rand(HIDDEN, generator=generator).to(dtype)


def same(one, two):
    pairs = [(a, b) for a, b in zip(one, two) if a is not None or b is not None]
    return all(torch.equal(a.view(torch.uint8).flatten(), b.view(torch.uint8).flatten()) for a, b in pairs)


def operators_rank(rank, world_size, key, backend):
    import fused_collective.torch as operators

    communicator = meet(rank, world_size, key)
    group = operators.register(communicator)
    assert operators.register(communicator) == group
    x, residual, weight = tensors(rank)
    seen = 0
    for quant, options in QUANTS.items():
        # Inductor compiles C++ for each.
        if backend == "inductor" and quant not in ("none", "nvfp4"):
            continue
        torch._dynamo.reset()
        options = dict(options)
        scale = options.pop("scale", None)
        scale = None if scale is None else torch.tensor([scale])
        for keep_norm in (False, True) if quant != "none" else (False,):

            def call(x, residual, weight, scale):
                return operators.all_reduce(
                    x * 1, group=group, residual=residual, weight=weight, quant=quant, scale=scale, keep_norm=keep_norm, **options
                )

            eager = call(x, residual, weight, scale)
            mine = fused_collective.Quant(
                quant, scale=scale, layout=options.get("layout", "linear"), group=options.get("block", 128)
            )
            plain = communicator.all_reduce(
                x, residual=residual, norm=weight, quant=None if quant == "none" else mine, keep_norm=keep_norm
            )
            assert same(eager, plain), quant
            if backend:
                compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)(x, residual, weight, scale)
                assert same(eager, compiled), quant
            seen += 1
    out = [torch.empty_like(x), torch.empty_like(x)]
    operators.all_reduce_out(
        x, group=group, residual=residual, weight=weight, residual_out=out[0], norm_out=out[1]
    )
    want = operators.all_reduce(x, group=group, residual=residual, weight=weight)
    assert same(out, want[:2])
    biased = operators.all_reduce(x, group=group, bias=weight)
    assert same(biased[:1], communicator.all_reduce(x, bias=weight)[:1])
    for options in {"wire": "int8"}, {"partial_sums": "element"}:
        found = operators.all_reduce(x, group=group, residual=residual, weight=weight, **options)
        plain = communicator.all_reduce(x, residual=residual, norm=weight, **options)
        # There is one host: no sum crosses between any.
        assert same(found, plain) and same(found[:2], want[:2]) == ("wire" not in options)
        operators.all_reduce_out(
            x, group=group, residual=residual, weight=weight, residual_out=out[0], norm_out=out[1], **options
        )
        assert same(out, found[:2])
    with pytest.raises(InvalidError, match="partial sums"):
        operators.all_reduce(x, group=group, residual=residual, weight=weight, partial_sums="float64")
    own = residual[rank::world_size].contiguous()
    sharded = operators.all_reduce(x, group=group, residual=own, sharded=True, weight=weight)
    assert same((sharded.norm_out, sharded.residual_out), (want.norm_out, want.residual_out[rank::world_size].contiguous()))

    index = torch.stack([torch.arange(TOKENS).flip(0), torch.full((TOKENS,), -1)], 1).int()
    scales = torch.linspace(0.1, 2.0, 2 * TOKENS).reshape(TOKENS, 2)

    def patterns(x, shared):
        experts = Experts(x * 1, index, scales)
        post_norm = Norm(weight, 1e-5, 1.0)
        return operators.all_reduce(
            shared, group=group, residual=residual, weight=weight, post_norm=post_norm, experts=experts
        )

    for shared in (None, x):
        plain = communicator.all_reduce(
            shared, residual=residual, norm=weight, post_norm=Norm(weight, 1e-5, 1.0), experts=Experts(x, index, scales)
        )
        found = patterns(x, shared)
        assert same(found, plain) and not same(found[:1], want[:1])
        operators.all_reduce_out(
            shared, group=group, residual=residual, weight=weight, residual_out=out[0], norm_out=out[1],
            post_norm=Norm(weight, 1e-5, 1.0), experts=Experts(x, index, scales),
        )  # fmt: skip
        assert same(out, plain[:2])
        if backend:
            assert same(torch.compile(patterns, fullgraph=True, backend=backend)(x, shared), plain)

    def in_place(x, residual):
        x, residual = x + 0, residual + 0
        operators.all_reduce_norm_(x, residual, weight, group=group)
        return residual, x

    assert same(in_place(x, residual), want[:2])
    if backend:
        assert same(torch.compile(in_place, fullgraph=True, backend=backend)(x, residual), want[:2])
    with pytest.raises(InvalidError, match="no group 77"):
        operators.all_reduce(x, group=77)
    with pytest.raises(InvalidError, match="not contiguous"):
        operators.all_reduce(x[:, ::2], group=group)
    communicator.leave()
    return seen


@pytest.mark.parametrize("backend", ["", "aot_eager", "inductor"])
def test_operators_give_the_communicator_s_bits(backend):
    if backend == "inductor" and not __import__("shutil").which("c++"):
        pytest.skip("inductor on CPUs needs a C++ compiler")
    expected = 3 if backend == "inductor" else 13
    assert run(operators_rank, backend) == [expected, expected]


def test_fake_outputs_have_the_sizes_of_the_operation():
    from fused_collective import _native
    from fused_collective.torch import _scale_bytes

    layouts = ("linear", "column_major", "deep_gemm", "swizzled_128x4", "swizzled_8x4")
    checked = 0
    for quant, block, scale in [("nvfp4", 0, ""), ("mxfp8", 0, ""), ("mxfp4", 0, ""), ("fp8_per_group", 32, "ue8m0"),
                                ("fp8_per_group", 128, "float32")]:  # fmt: skip
        for layout in layouts:
            for tokens in (1, 4, 127, 130):
                fields = {"group": block, "group_scale": scale} if block else {}
                try:
                    plan = _native.Operation(
                        "bfloat16", tokens, 384, norm=True, quantization=quant, layout=layout, **fields
                    )
                except InvalidError:
                    assert scale == "float32" and layout.startswith("swizzled")
                    continue
                assert _scale_bytes(quant, layout, block, scale, tokens, 384) == plan.scale_bytes, (quant, layout, tokens)
                checked += 1
    assert checked == 92


def flashinfer_rank(rank, world_size, key):
    from fused_collective.flashinfer import (
        AllReduceFusionPattern,
        QuantizationSFLayout,
        allreduce_fusion,
        create_allreduce_fusion_workspace,
    )

    communicator = meet(rank, world_size, key)
    workspace = create_allreduce_fusion_workspace(
        world_size=world_size, rank=rank, max_token_num=8, hidden_dim=HIDDEN, dtype=torch.bfloat16, device="cpu"
    )
    assert workspace.is_buffer_size_sufficient(world_size, 8, HIDDEN, torch.bfloat16)
    assert not workspace.is_buffer_size_sufficient(world_size, 9, HIDDEN, torch.bfloat16)
    assert not workspace.is_buffer_size_sufficient(world_size + 1, 8, HIDDEN, torch.bfloat16)
    x, residual, weight = tensors(rank)
    patterns = {name: value for name, value in vars(AllReduceFusionPattern).items() if name.startswith("k")}
    want = communicator.all_reduce(x, residual=residual, norm=fused_collective.Norm(weight, weight_bias=1.0))
    seen = []
    for name, pattern in patterns.items():
        arguments = dict(input=x, workspace=workspace, pattern=pattern, residual_in=residual, rms_gamma=weight)
        arguments |= dict(residual_out=torch.empty_like(x), weight_bias=1.0, use_oneshot=pattern % 2 == 0)
        if name == "kMoEReductionARResidualRMSNorm":
            with pytest.raises(NotImplementedError, match="no kernel with"):
                allreduce_fusion(**arguments)
            continue
        if "MoEFinalize" in name:
            with pytest.raises(InvalidError, match="expanded_idx_to_permuted_idx is needed"):
                allreduce_fusion(**arguments)
            # Two experts: one has the row that is the input elsewhere, the other is on no rank.
            index = torch.stack([torch.arange(TOKENS).flip(0), torch.full((TOKENS,), -1)], 1).int()
            arguments |= dict(input=x.flip(0).contiguous() * 2, expanded_idx_to_permuted_idx=index)
            arguments["expert_scale_factor"] = torch.full((TOKENS, 2), 0.5)
        if name == "kAllReduce":
            sums = [torch.empty_like(x) for _ in range(world_size)]
            torch.distributed.all_gather(sums, x)
            exact = sum(it.float() for it in sums).to(x.dtype)
            assert torch.equal(allreduce_fusion(input=x, workspace=workspace, pattern=pattern), exact)
            seen.append(name)
            continue
        if "Packed" in name:
            with pytest.raises(InvalidError, match="block_quant_group_size is needed"):
                allreduce_fusion(**arguments)
            arguments["block_quant_group_size"] = 64
            arguments["scale_out"] = torch.zeros(1, 8, dtype=torch.int32).t()[:TOKENS]
            arguments["quant_out"] = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            # Memory as FlashInfer's tests make it: of scales without the last column's padding, of codes with room for more.
            tight, roomy = torch.empty_strided((TOKENS, 1), (1, 8), dtype=torch.int32), torch.empty_like(x)
            assert tight.untyped_storage().nbytes() < 8 * 4
            allreduce_fusion(**arguments | dict(scale_out=tight, quant_out=roomy))
        elif "FP4" in name or name.endswith("NormFP8Quant") or name.endswith("OutFP8Quant"):
            with pytest.raises(InvalidError, match="scale_factor is needed"):
                allreduce_fusion(**arguments)
            arguments["scale_factor"] = torch.tensor([448.0]) if "FP4" in name else 1 / 64
        if "MX" in name:
            arguments["layout_code"] = QuantizationSFLayout.LINEAR
            arguments["scale_out"] = torch.zeros(TOKENS, HIDDEN // 32, dtype=torch.uint8)
        result = allreduce_fusion(**arguments)
        if "Packed" in name:
            assert torch.equal(tight, arguments["scale_out"])
            assert torch.equal(roomy.view(torch.uint8).flatten()[: x.numel()], arguments["quant_out"].view(torch.uint8).flatten())
        assert torch.equal(arguments["residual_out"], want.residual_out), name
        if "Out" in name or name in ("kARResidualRMSNorm", "kMoEFinalizeARResidualRMSNorm"):
            assert torch.equal(result, want.norm_out), name
            if "MoE" in name:
                arguments["shared_expert_output"] = x
                more = communicator.all_reduce(x * 2, residual=residual)
                allreduce_fusion(**arguments)
                assert torch.equal(arguments["residual_out"], more.residual_out)
        elif "FP4" in name:
            assert result.shape == (TOKENS, HIDDEN // 2)
        else:
            scales = arguments.get("scale_out")
            if "Packed" in name:
                codes = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(TOKENS, -1)[:, : HIDDEN // 64]
                factor = torch.exp2(codes.float() - 127).repeat_interleave(64, 1)
            elif "MX" in name:
                factor = torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
            elif "Dynamic" in name:
                factor = want.norm_out.float().abs().amax(1, keepdim=True) / 448
            else:
                factor = 1 / 64
            decoded = result.float() * factor
            torch.testing.assert_close(decoded, want.norm_out.float(), rtol=0.07, atol=0.05)
        seen.append(name)
    twice = communicator.all_reduce(x, residual=residual, norm=weight, rounding="after_all_reduce")
    arguments = dict(input=x, workspace=workspace, pattern=AllReduceFusionPattern.kARResidualRMSNorm, rounding="after_all_reduce")
    arguments |= dict(residual_in=residual, rms_gamma=weight, residual_out=torch.empty_like(x))
    assert torch.equal(allreduce_fusion(**arguments), twice.norm_out) and torch.equal(arguments["residual_out"], twice.residual_out)
    assert not torch.equal(twice.residual_out, want.residual_out)
    with pytest.raises(InvalidError, match="pattern 40"):
        allreduce_fusion(input=x, workspace=workspace, pattern=40)
    workspace.destroy()
    workspace.destroy()
    with pytest.raises(InvalidError, match="destroyed"):
        allreduce_fusion(input=x, workspace=workspace, pattern=0)
    communicator.leave()
    return len(seen)


def test_flashinfer_s_patterns_give_this_library_s_bits():
    assert run(flashinfer_rank) == [14, 14]


def comm_backend_rank(rank, world_size, key):
    from fused_collective.flashinfer import allreduce_fusion, create_allreduce_fusion_workspace

    meet(rank, world_size, key).leave()

    class Backend:
        """FlashInfer's interface of a communication backend, as far as a workspace needs it."""

        def Get_rank(self):
            return rank

        def Get_size(self):
            return world_size

        def allgather(self, data):
            told = [None] * world_size
            torch.distributed.all_gather_object(told, data)
            return tuple(told)

    options = dict(max_token_num=8, hidden_dim=HIDDEN, dtype=torch.float32, comm_backend=Backend(), device="cpu")
    with pytest.raises(InvalidError, match="world_size is 5"):
        create_allreduce_fusion_workspace(world_size=5, rank=rank, **options)
    workspace = create_allreduce_fusion_workspace(world_size=world_size, rank=rank, **options)
    result = allreduce_fusion(torch.full((1, HIDDEN), 1.0 + rank), workspace, 0)
    workspace.destroy()
    return result[0, 0].item()


def test_a_workspace_meets_over_a_communication_backend():
    assert run(comm_backend_rank) == [3.0, 3.0]


def other_thread_rank(rank, world_size, key):
    communicator = meet(rank, world_size, key)
    x = torch.ones(1, HIDDEN)
    sums = [communicator.all_reduce(x).residual_out[0, 0].item() for _ in range(50)]
    assert isinstance(communicator.all_reduce(numpy.ones((1, HIDDEN), numpy.float32)).residual_out, numpy.ndarray)
    communicator.leave()
    return set(sums)


def test_results_are_of_the_library_of_the_input():
    assert run(other_thread_rank) == [{2.0}, {2.0}]


def test_a_pattern_that_is_missing_is_an_error_that_engines_know():
    assert issubclass(UnsupportedError, NotImplementedError)
