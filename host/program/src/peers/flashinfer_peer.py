import inspect

# The pattern of each quantization. Those from releases before their own are missing in the package.
PATTERNS = {
    "none": "kARResidualRMSNorm",
    "fp8": "kARResidualRMSNormFP8Quant",
    "fp4": "kARResidualRMSNormFP4Quant",
    "fp8_per_token": "kARResidualRMSNormDynamicFP8Quant",
    "fp8_group128": "kARResidualRMSNormPerTokenGroupFP8PackedQuant",
    "mxfp8": "kARResidualRMSNormMXFP8Quant",
}


CODED = "flashinfer_standard_quantized_allreduce"


class FlashInfer(Peer):
    """FlashInfer's fused all-reduce: its kernels of TensorRT-LLM and, where NVLink multicast may be used, those over it
    (mnnvl)."""

    def __init__(self, request):
        if request["device"] != "cuda":
            raise Unavailable("flashinfer has kernels for GPUs only: use --backend cuda")
        super().__init__(request)
        self.comm = load("flashinfer.comm", "flashinfer-python")
        if not hasattr(self.comm, "create_allreduce_fusion_workspace"):
            why = f"flashinfer {self.version()} has no allreduce_fusion: use 0.6.6 or later"
            raise Unavailable(why, "pip install --upgrade flashinfer-python")
        self.workspaces = {}

    def version(self):
        return importlib.import_module("flashinfer").__version__

    def about(self):
        return f"flashinfer {self.version()}, its trtllm workspace in plain memory"

    def part(self, name):
        return importlib.import_module(f"flashinfer.comm.{name}")

    def workspace(self, backend, dtype):
        """Memory of all ranks for the largest problem, made at first use. What failed once fails again, without another try."""
        key = backend, dtype if backend == "mnnvl" else dtype == self.torch.float32
        if key not in self.workspaces:
            try:
                self.workspaces[key] = self.make_workspace(backend, dtype)
            except Exception as error:
                self.workspaces[key] = error
        made = self.workspaces[key]
        if isinstance(made, Exception):
            raise made
        return made

    def make_workspace(self, backend, dtype):
        tokens, hidden = self.start["max_tokens"], self.start["hidden_dim"]
        options = dict(
            backend=backend,
            world_size=self.world_size,
            rank=self.rank,
            max_token_num=tokens,
            hidden_dim=hidden,
            dtype=dtype,
            comm_backend=self.part("mnnvl").TorchDistBackend(group=self.dist.group.WORLD),
        )
        if backend == "mnnvl":
            # One-shot past the package's own threshold needs a larger buffer, which it limits to 32 bits.
            one_shot_bytes = tokens * hidden * self.world_size * dtype.itemsize
            options["force_oneshot_support"] = one_shot_bytes < 1 << 32
            return self.comm.create_allreduce_fusion_workspace(**options)
        if dtype == self.torch.float32:
            # Some releases reckon one of the buffers in 16-bit elements.
            options["max_token_num"] *= 2
        return self.in_plain_memory(lambda: self.comm.create_allreduce_fusion_workspace(**options))

    def in_plain_memory(self, make):
        """Makes a trtllm workspace in memory without ties to multicast. The package's own choice refuses GPUs without it,
        though the kernels make no use of it, and takes a rank for its GPU's ordinal."""
        module, name = self.part("allreduce"), "trtllm_create_ipc_workspace_for_all_reduce_fusion"
        create = getattr(module, name)

        def create_in_plain_memory(**options):
            symmetric = options.get("use_symm_dev_mem")
            made = create(**options | {"use_symm_dev_mem": False})
            # With symmetric memory there are handles ahead of the last item.
            return (*made[:-1], [], made[-1]) if symmetric else made

        setattr(module, name, create_in_plain_memory)
        try:
            return make()
        finally:
            setattr(module, name, create)

    def mnnvl_hindrance(self):
        """The reason why the kernels over multicast are not used, the same on all ranks. Attributes are asked for, and nothing
        is made: where multicast does not work, trying it may do harm."""
        if not self.start["multicast"]:
            variables = "NCCL_NVLS_ENABLE=0, TORCH_SYMM_MEM_DISABLE_MULTICAST=1 or NVSHMEM_DISABLE_NVLS=1"
            return f"NVLink multicast is switched off ({variables})"
        try:
            symmetric_memory = importlib.import_module("torch.distributed._symmetric_memory")
            has_multicast = symmetric_memory._SymmetricMemory.has_multicast_support
            own = has_multicast(symmetric_memory.DeviceType.CUDA, self.device.index)
        except Exception:
            own = False
        if not self.all_agree(own):
            return "PyTorch finds no NVLink multicast"
        # Some releases take a rank for its GPU's number.
        gpus = min(self.torch.cuda.device_count(), self.world_size)
        if not self.all_agree(self.rank % gpus == self.device.index):
            return "a rank's GPU has another number than the rank"
        return None

    def variants(self, problem, request, notes):
        modes = ["oneshot", "twoshot"] if request["oneshot"] else ["twoshot"]
        if request["coded"] and (problem.top_k or problem.post_weight_bias is not None):
            notes.append(f"{CODED} was not measured: it is measured with the pattern all-reduce-norm only")
        if problem.post_weight_bias is not None:
            notes.append("flashinfer has no kernel with a norm of the sum")
        elif problem.top_k:
            yield from self.moe(problem, modes, notes)
        else:
            yield from self.trtllm(problem, modes, notes)
            # As in vLLM's benchmark, the kernels over multicast are measured without quantization.
            if problem.quant_mode == "none":
                yield from self.mnnvl(problem, modes, notes)
            if request["coded"]:
                yield from self.coded(problem, notes)

    def trtllm(self, problem, modes, notes):
        torch, rows = self.torch, problem.tokens
        quantization = "" if problem.quant_mode == "none" else f"_{problem.quant_mode}_quant"
        start = f"flashinfer_trtllm_fused_allreduce_rmsnorm{quantization}"
        if not hasattr(self.comm.AllReduceFusionPattern, PATTERNS.get(problem.quant_mode, "")):
            notes.append(f"{start}_* were not measured: flashinfer {self.version()} has no such kernel")
            return
        if problem.quant_mode == "fp4" and torch.cuda.get_device_capability() < (10, 0):
            notes.append(f"{start}_* were not measured: FlashInfer's FP4 kernels need compute capability 10.0")
            return
        module = self.part("trtllm_ar")
        compile = module.get_trtllm_comm_module
        most = getattr(module, "MAX_COMM_SIZE", 1 << 31)
        for mode in modes:
            # Past this size the package would run two-shot instead, without a word.
            bytes_of_one_shot = rows * problem.hidden * max(2, problem.dtype.itemsize) * self.world_size
            if mode == "oneshot" and bytes_of_one_shot > most:
                notes.append(f"{start}_oneshot was not measured: the problem is larger than its workspace may be")
            elif mode == "twoshot" and rows <= self.world_size:
                notes.append(f"{start}_twoshot was not measured: it takes more tokens than ranks")
            else:
                yield Variant(f"{start}_{mode}", "fused", self.runner(problem, "trtllm", mode), compile)

    def moe(self, problem, modes, notes):
        """MoE's last step, which is a kernel of one hop, without quantization."""
        name = "flashinfer_trtllm_fused_moe_finalize_allreduce_rmsnorm_oneshot"
        takes = inspect.signature(self.comm.allreduce_fusion).parameters
        if problem.quant_mode != "none":
            notes.append(f"{name} was not measured: it has no quantization to {problem.quant_mode}")
        elif "expanded_idx_to_permuted_idx" not in takes:
            notes.append(f"{name} was not measured: flashinfer {self.version()}'s allreduce_fusion has no such pattern")
        elif problem.tokens * problem.top_k * problem.hidden >= 1 << 31:
            notes.append(f"{name} was not measured: it numbers elements in 32 bits, and the experts' rows have more")
        elif "oneshot" in modes:
            compile = self.part("trtllm_ar").get_trtllm_comm_module
            yield Variant(name, "fused", self.runner(problem, "trtllm", "oneshot"), compile)

    def coded(self, problem, notes):
        """The all-reduce in FP8, and the rest in one compiled function."""
        torch, hindrance = self.torch, None
        if problem.quant_mode not in RESTS:
            hindrance = f"the compiled steps have no quantization to {problem.quant_mode}"
        elif problem.dtype != torch.bfloat16:
            hindrance = "it takes bfloat16 only"
        else:
            try:
                all_reduce = self.part("quantized_allreduce").quantized_all_reduce
            except Exception as error:
                hindrance = f"flashinfer {self.version()}: {type(error).__name__}: {first_line(error)}"
        # A rank that yields it alone would wait for the others.
        if not self.all_agree(hindrance is None):
            notes.append(f"{CODED} was not measured: {hindrance or 'it failed on another rank'}")
            return
        name = f"{CODED}_{RESTS[problem.quant_mode][1]}"
        (rest,) = problem.compiled(problem.rest())

        def run(tensors):
            if tensors.summed is None:
                tensors.summed = torch.empty_like(tensors.input)
            all_reduce(tensors.input, self.dist.group.WORLD, output=tensors.summed)
            problem.keep(tensors, rest(tensors.summed, *problem.rest_inputs(tensors)))

        def compile_alone():
            rest(problem.sets[0].reduced, *problem.rest_inputs(problem.sets[0]))

        yield Variant(name, "standard", run, compile_alone, is_coded=True)

    def mnnvl(self, problem, modes, notes):
        start = "flashinfer_mnnvl_fused_allreduce_rmsnorm"
        hindrance = self.mnnvl_hindrance()
        if hindrance:
            notes.append(f"{start}_* were not measured: {hindrance}")
            return
        module = self.part("trtllm_mnnvl_ar")
        for mode in modes:
            # Releases before 0.6.13, which have no quantization there, choose the mode by themselves.
            if not hasattr(module, "MNNVLQuantType"):
                strategy = module.MNNVLAllreduceFusionStrategy
                chosen = strategy.select_strategy(self.world_size, problem.tokens, problem.hidden, problem.dtype)
                if mode != chosen.name.lower():
                    notes.append(f"{start}_{mode} was not measured: this release takes {chosen.name.lower()} here")
                    continue
            run = self.runner(problem, "mnnvl", mode)
            yield Variant(f"{start}_{mode}", "fused", run, module.get_trtllm_mnnvl_comm_module)

    def runner(self, problem, backend, mode):
        torch, comm = self.torch, self.comm
        name = "kMoEFinalizeARResidualRMSNorm" if problem.top_k else PATTERNS[problem.quant_mode]
        pattern = getattr(comm.AllReduceFusionPattern, name)
        # What only some kernels take, so that older releases are not asked for it.
        options = {}
        if problem.quant_mode in ("fp8", "fp4"):
            options["scale_factor"] = problem.scale_tensor
        if problem.quant_mode in ("fp4", "mxfp8"):
            options["layout_code"] = comm.QuantizationSFLayout.SWIZZLED_128x4
        if problem.quant_mode == "fp8_group128":
            options["block_quant_group_size"] = 128
        # The kernels have no version without a residual: vLLM gives them zeros.
        zeros = None if problem.has_residual else torch.zeros_like(problem.sets[0].input)
        rows, columns = problem.tokens, problem.hidden

        def run(tensors):
            input, experts = tensors.input, {}
            if problem.top_k:
                input = tensors.expert_rows
                experts["expanded_idx_to_permuted_idx"] = tensors.expert_index
                experts["expert_scale_factor"] = tensors.expert_scales
                experts["shared_expert_output"] = tensors.input
            if tensors.residual_out is None:
                tensors.residual_out = torch.empty_like(tensors.input)
                if problem.quant_mode == "none":
                    tensors.norm_out = torch.empty_like(tensors.input)
                elif problem.quant_mode == "fp4":
                    size = comm.compute_fp4_swizzled_layout_sf_size(rows, columns // 16)
                    tensors.quant_out = torch.empty(rows, columns // 2, dtype=torch.uint8, device=self.device)
                    tensors.scale_out = torch.zeros(size, dtype=torch.uint8, device=self.device)
                else:
                    tensors.quant_out = torch.empty_like(tensors.input, dtype=torch.float8_e4m3fn)
                    tensors.scale_out = self.scales(problem)
            comm.allreduce_fusion(
                input=input,
                workspace=self.workspace(backend, problem.dtype),
                pattern=pattern,
                launch_with_pdl=torch.cuda.get_device_capability() >= (9, 0),
                residual_in=tensors.residual if problem.has_residual else zeros,
                residual_out=tensors.residual_out,
                norm_out=tensors.norm_out,
                quant_out=tensors.quant_out,
                scale_out=tensors.scale_out,
                rms_gamma=tensors.gamma,
                rms_eps=problem.epsilon,
                use_oneshot=mode == "oneshot",
                fp32_acc=True,
                **options,
                **experts,
            )
        return run

    def scales(self, problem):
        """Room for the scales of a quantization to FP8; `Problem.fp8_scales` reads them."""
        torch, rows, columns = self.torch, problem.tokens, problem.hidden
        if problem.quant_mode == "fp8_per_token":
            return torch.empty(rows, 1, dtype=torch.float32, device=self.device)
        if problem.quant_mode == "fp8_group128":
            words, aligned = (columns // 128 + 3) // 4, (rows + 3) // 4 * 4
            return torch.zeros(words, aligned, dtype=torch.int32, device=self.device).t()[:rows]
        if problem.quant_mode == "mxfp8":
            size = (rows + 127) // 128 * 128 * ((columns // 32 + 3) // 4 * 4)
            return torch.zeros(size, dtype=torch.uint8, device=self.device)
        return None
