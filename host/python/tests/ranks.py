"""Ranks of a test: processes that each run a function of the test's module."""

import os
import pickle
import subprocess
import sys
import uuid

PROGRAM = """
import importlib, pickle, sys
module, name, rank, world_size, key, arguments = pickle.load(sys.stdin.buffer)
sys.path[:0] = sys.argv[1:]
result = getattr(importlib.import_module(module), name)(rank, world_size, key, *arguments)
sys.stdout.buffer.write(b"\\0result" + pickle.dumps(result))
"""


class Rank:
    """A rank's process."""

    def __init__(self, function, rank, world_size, key, arguments, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, os.path.dirname(os.path.abspath(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | environment,
        )
        message = (function.__module__, function.__name__, rank, world_size, key, arguments)
        self.process.stdin.write(pickle.dumps(message))
        self.process.stdin.close()
        self.process.stdin = None

    def result(self, timeout=120):
        """What the function returned."""
        try:
            output, errors = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, errors.decode()
        return pickle.loads(output.split(b"\0result", 1)[1])


def start(function, *arguments, world_size=2, environment=lambda rank, world_size: {}):
    """Starts ``function(rank, world_size, key, *arguments)`` on each rank."""
    key = f"pytest {uuid.uuid4()}"
    return [
        Rank(function, rank, world_size, key, arguments, environment(rank, world_size)) for rank in range(world_size)
    ]


def run(function, *arguments, **options):
    """What each rank returned."""
    ranks = start(function, *arguments, **options)
    try:
        return [rank.result() for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()
