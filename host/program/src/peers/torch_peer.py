class Torch(Peer):
    """torch.distributed's all-reduce, then eager steps, or one compiled function. On GPUs also the all-reduces of PyTorch's
    symmetric memory, each with the compiled function."""

    def backend(self):
        return "nccl" if self.device.type == "cuda" else "gloo"

    def about(self):
        how = "gloo, {} threads a rank".format(self.torch.get_num_threads())
        if self.device.type == "cuda":
            how = "NCCL " + ".".join(map(str, self.torch.cuda.nccl.version()))
        return f"torch {self.torch.__version__}, {how}"

    def variants(self, problem, request, notes):
        torch, dist, dtype, epsilon = self.torch, self.dist, problem.dtype, problem.epsilon

        def rms_norm(summed, residual, gamma, inverse_scale):
            if residual is not None:
                summed = (summed.float() + residual.float()).to(dtype)
            row = summed.float()
            row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + epsilon)
            return (row * gamma.float()).to(dtype), summed

        def rms_norm_fp8(summed, residual, gamma, inverse_scale):
            norm, summed = rms_norm(summed, residual, gamma, inverse_scale)
            scaled = norm.float() * inverse_scale
            return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), summed

        def all_reduce(tensors):
            dist.all_reduce(tensors.reduced)
            return tensors.reduced

        def after(all_reduce, function):
            def run(tensors):
                summed = all_reduce(tensors)
                out, tensors.residual_out = function(
                    summed, tensors.residual, tensors.gamma, problem.inverse_scale
                )
                if problem.quant_mode == "none":
                    tensors.norm_out = out
                else:
                    tensors.quant_out = out
            return run

        if problem.quant_mode not in ("none", "fp8"):
            notes.append(f"the compiled steps have no quantization to {problem.quant_mode}: no row of torch")
            return
        function, eager_name, compiled_name = {
            "none": (rms_norm, "native_rms_norm", "rmsnorm_native_compiled"),
            "fp8": (rms_norm_fp8, "native_rms_norm_native_quant_fp8", "rmsnorm_fp8_quant_native_compiled"),
        }[problem.quant_mode]
        # One shape at a time: the compiled function is that of this problem alone.
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=False)

        def compile_alone():
            first = problem.sets[0]
            compiled(first.reduced, first.residual, first.gamma, problem.inverse_scale)

        start = "torch_standard"
        yield Variant(f"{start}_allreduce_{eager_name}", "standard", after(all_reduce, function))
        yield Variant(f"{start}_allreduce_{compiled_name}", "standard", after(all_reduce, compiled), compile_alone)
        if self.device.type == "cuda":
            for mode, all_reduce in self.symmetric_all_reduces(problem, request, notes):
                name = f"{start}_symm_{mode}_allreduce_{compiled_name}"
                yield Variant(name, "standard", after(all_reduce, compiled), compile_alone)

    def symmetric_all_reduces(self, problem, request, notes):
        """The all-reduces of symmetric memory, by mode; none, with a note, where it cannot be made."""
        torch, group, error = self.torch, self.dist.group.WORLD, None
        try:
            symmetric_memory = importlib.import_module("torch.distributed._symmetric_memory")
            for tensors in problem.sets:
                tensors.symmetric = symmetric_memory.empty(
                    tensors.input.shape, dtype=tensors.input.dtype, device=self.device
                )
                symmetric_memory.rendezvous(tensors.symmetric, group.group_name)
        except Exception as failed:
            error = failed
        if not self.all_agree(error is None):
            why = f"{type(error).__name__}: {first_line(error)}" if error else "it failed on another rank"
            notes.append(f"torch_standard_symm_* were not measured: no symmetric memory: {why}")
            for tensors in problem.sets:
                tensors.symmetric = None
            return []
        ops, name = torch.ops.symm_mem, group.group_name
        one_shot = lambda tensors: ops.one_shot_all_reduce(tensors.symmetric, "sum", name)
        two_shot = lambda tensors: ops.two_shot_all_reduce_(tensors.symmetric, "sum", name)
        return [("oneshot", one_shot), ("twoshot", two_shot)] if request["oneshot"] else [("twoshot", two_shot)]
