"""L9: two gloo ranks under FSDP2 give what one process gives, for every method that adapts a linear layer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from laws import KINDS, METHOD_NAMES, refusal

LINEAR = next(k for k in KINDS if k.name == "linear")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(parallel, tmp_path):
    methods = [m for m in METHOD_NAMES if refusal(m, LINEAR) is None]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(port), str(script), parallel, str(tmp_path), *methods]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.count("equal") == len(methods)
