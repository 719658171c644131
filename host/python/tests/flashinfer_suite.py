"""Runs FlashInfer's own tests of its unified call against this package, on two GPUs or more:

    python host/python/tests/flashinfer_suite.py CHECKOUT [--all]

CHECKOUT is a clone of FlashInfer. FlashInfer itself is not needed: a package of its name stands in for it, whose ``comm`` is
``fused_collective.flashinfer``. Without ``--all``, the longer files run for one type or hidden size. Tests of what this package does not have are
left out: the calls from before the unified one, the other back ends by name, the reduction of experts, and groups of other sizes
than 64 and 128. In two files each rank has a residual of its own, which this package does not take; there all get rank 0's. One gives
scales in tiles of 8 x 4 less memory than they have tiles, which this package refuses; there they get more.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

STAND_IN = {
    "flashinfer/__init__.py": "",
    "flashinfer/comm/__init__.py": """
import functools

from fused_collective.flashinfer import *

# FlashInfer rounds the sum before it adds the residual, and some of its tests allow no other rounding.
allreduce_fusion = functools.partial(allreduce_fusion, rounding="after_all_reduce")


def TRTLLMAllReduceFusionWorkspace(tp_size, tp_rank, max_token_num, hidden_dim, dtype):
    return create_allreduce_fusion_workspace("trtllm", tp_size, tp_rank, max_token_num, hidden_dim, dtype)
""",
    "flashinfer/comm/mnnvl.py": """
import torch.distributed as dist


class TorchDistBackend:
    def __init__(self, group=None):
        self._group = group

    def Get_rank(self):
        return dist.get_rank(self._group)

    def Get_size(self):
        return dist.get_world_size(self._group)

    def allgather(self, data):
        told = [None] * self.Get_size()
        dist.all_gather_object(told, data, self._group)
        return told
""",
    "flashinfer/comm/trtllm_mnnvl_ar.py": """
from mpi4py import MPI


def mpi_barrier():
    MPI.COMM_WORLD.barrier()
""",
    "flashinfer/norm.py": """
import torch


def rmsnorm(x, weight, eps, enable_pdl=None):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def gemma_fused_add_rmsnorm(x, residual, weight, eps):
    wide = x.float() + residual.float()
    residual.copy_(wide)
    x.copy_(rmsnorm(wide, 1 + weight.float(), eps))
""",
    "flashinfer/utils.py": """
import functools

import torch


def get_compute_capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def is_confidential_compute():
    return False
""",
    "mpi4py/__init__.py": "",
    "mpi4py/MPI.py": """
import os
import pickle

from torch.distributed import TCPStore


class _World:
    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = TCPStore("127.0.0.1", int(os.environ["STAND_IN_PORT"]), self.size, self.rank == 0)
        self.calls = 0

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def allgather(self, data):
        self.calls += 1
        self.store.set(f"{self.calls} {self.rank}", pickle.dumps(data))
        return [pickle.loads(self.store.get(f"{self.calls} {rank}")) for rank in range(self.size)]

    def bcast(self, data, root):
        return self.allgather(data)[root]

    def barrier(self):
        self.allgather(None)


COMM_WORLD = _World()
""",
}

class File(NamedTuple):
    """A file of FlashInfer's tests."""

    name: str
    #: What to select of it (all, if empty), and what more without ``--all``.
    select: str = ""
    briefly: str = ""
    #: Texts, and what they become.
    changes: tuple[tuple[str, str], ...] = ()
    #: True if a launcher starts its ranks, and not the tests.
    launched: bool = False


FILES = [
    File("test_allreduce_unified_api.py", "auto or multicast_free", "dtype1 and not 2880", launched=True),
    File("test_gemma_ar_fusion.py"),
    File(
        "test_trtllm_allreduce_fusion.py",
        "not True",
        "4096",
        (
            ("residual_in_clone = residual_in.clone()", "dist.broadcast(residual_in, 0); residual_in_clone = residual_in.clone()"),
            ("== comm.QuantizationSFLayout.SWIZZLED_128x4", "!= comm.QuantizationSFLayout.LINEAR"),
        ),
    ),
    File(
        "test_trtllm_allreduce_dynamic_fp8_quant.py",
        briefly="bf16 or graph",
        changes=(
            ("allreduce_ref = allreduce_in.clone()", "residual is None or dist.broadcast(residual, 0); allreduce_ref = allreduce_in.clone()"),
            ("        def run_op() -> None:", "        dist.broadcast(residual, 0)\n\n        def run_op() -> None:"),
        ),
    ),
    File(
        "test_trtllm_allreduce_fusion_group_fp8_quant.py",
        changes=(
            (
                "def _scale_storage_size(",
                "TEST_CASES = [case for case in TEST_CASES if case[2] in (64, 128)]\n\n\ndef _scale_storage_size(",
            ),
        ),
    ),
    File("test_allreduce_fusion_moe_unified_api.py", "finalize", "dtype1"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path, help="a clone of FlashInfer")
    parser.add_argument("--all", action="store_true", help="every hidden size and type of the longer files")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(options.checkout, pathlib.Path(folder), options.all))


def end(*_):
    """Ends the run. `timeout` sends the signal twice, to this process and to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("ended early")


def start(checkout, folder, everything, port, file):
    """Starts the tests of a file, one process or two, which write their log beside it."""
    text = (checkout / "tests" / "comm" / file.name).read_text()
    for old, new in file.changes:
        if old not in text:
            sys.exit(f"{file.name} has no '{old}': it is of another version than this was made for")
        text = text.replace(old, new)
    (folder / file.name).write_text(text)
    selected = [f"({it})" for it in (file.select, "" if everything else file.briefly) if it]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(folder / file.name)]
    command += ["-k", " and ".join(selected)]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    ranks = [{}]
    if file.launched:
        # Not torchrun, whose store outlives a group: every test makes one anew.
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "STAND_IN_PORT": str(port + 1)}
        ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    log = open(folder / f"{file.name}.log", "w+")
    return [
        subprocess.Popen(command, cwd=folder, env=environment | rank, stdout=log, stderr=subprocess.STDOUT) for rank in ranks
    ], log


def run(checkout, folder, everything):
    """Runs all files at the same time, and gives the largest exit status."""
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    helpers = folder / "tests" / "test_helpers"
    helpers.mkdir(parents=True)
    shutil.copy(checkout / "tests" / "test_helpers" / "comm.py", helpers)
    runs = {file.name: start(checkout, folder, everything, 29700 + 2 * at, file) for at, file in enumerate(FILES)}
    worst = 0
    try:
        while runs:
            time.sleep(0.2)
            for name in [name for name, (ranks, _) in runs.items() if all(rank.poll() is not None for rank in ranks)]:
                ranks, log = runs.pop(name)
                status = max(abs(rank.returncode) for rank in ranks)
                worst = max(worst, status)
                report(name, log, status)
    finally:
        for name, (ranks, log) in runs.items():
            for rank in ranks:
                rank.terminate()
            report(name, log, "none: it was ended")
    return worst


def report(name, log, status):
    """Prints how the tests of a file ended, and the end of their log if not well."""
    log.seek(0)
    lines = log.read().splitlines()
    if status != 0:
        print("\n".join(lines[-80:]))
    ends = [line for line in lines if " passed" in line or " failed" in line or " skipped" in line]
    print(f"{name}: status {status}, {ends[-1] if ends else 'no test ended'}", flush=True)


if __name__ == "__main__":
    main()
