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
        if problem.quant_mode not in RESTS:
            notes.append(f"the compiled steps have no quantization to {problem.quant_mode}: no row of torch")
            return
        rest = problem.rest()
        compiled_rest, compiled_combine = problem.compiled(rest, self.combine)

        def all_reduce(tensors):
            self.dist.all_reduce(tensors.reduced)
            return tensors.reduced

        def steps(addend_of, combine, all_reduce, rest):
            def run(tensors):
                if problem.top_k:
                    combine(addend_of(tensors), *self.expert_inputs(tensors))
                problem.keep(tensors, rest(all_reduce(tensors), *problem.rest_inputs(tensors)))
            return run

        def compile_alone():
            first = problem.sets[0]
            if problem.top_k:
                compiled_combine(first.reduced, *self.expert_inputs(first))
            compiled_rest(first.reduced, *problem.rest_inputs(first))

        reduced = lambda tensors: tensors.reduced
        eager_name, compiled_name = RESTS[problem.quant_mode]
        start = "torch_standard"
        eager = steps(reduced, self.combine, all_reduce, rest)
        yield Variant(f"{start}_allreduce_{eager_name}", "standard", eager)
        compiled = steps(reduced, compiled_combine, all_reduce, compiled_rest)
        yield Variant(f"{start}_allreduce_{compiled_name}", "standard", compiled, compile_alone)
        if self.device.type == "cuda":
            symmetric = lambda tensors: tensors.symmetric
            for mode, all_reduce in self.symmetric_all_reduces(problem, request, notes):
                name = f"{start}_symm_{mode}_allreduce_{compiled_name}"
                compiled = steps(symmetric, compiled_combine, all_reduce, compiled_rest)
                yield Variant(name, "standard", compiled, compile_alone)

    def expert_inputs(self, tensors):
        return tensors.input, tensors.expert_rows, tensors.expert_index, tensors.expert_scales

    def combine(self, addend, shared, rows, index, scales):
        """A rank's addend: the weighted rows of a token's experts, and the row of the shared one."""
        chosen = rows[index.clamp(min=0)].float() * scales[..., None].float()
        chosen = chosen.masked_fill((index < 0)[..., None], 0.0)
        addend.copy_((chosen.sum(1) + shared.float()).to(addend.dtype))

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
