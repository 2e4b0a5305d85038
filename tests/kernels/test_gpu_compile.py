"""The kernels of a step pass Triton's compiler, which refuses what its interpreter forgives."""

import os
import subprocess
import sys

import pytest


def test_the_kernels_of_a_step_compile_for_an_h100(repository):
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(repository)}
    command = [sys.executable, str(repository / "tests/kernels/compile_steps.py")]
    run = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    search, back = ("write", "search"), ("read_backward", "write_backward")
    sequence = ("lstm", *search, "read", *back, "lstm_backward")
    step = (*search, "mix", "scan", "follow", "read", *back)
    assert run.stdout.splitlines() == [f"{name}_kernel True" for name in (*sequence, *step)]
