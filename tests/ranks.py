"""Two gloo processes on this machine, for tests that run a script under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn


def run_ranks(script: Path, *arguments: str, ranks: int = 2, timeout: float = 500) -> str:
    """What `script` prints in all its ranks; fails with its output if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    # Port 0: the rendezvous takes a free port itself, where one that was looked for first could be gone by then.
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += [str(script), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": _path()}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def _path() -> str:
    """The tests' helpers, and the package that is tested here."""
    import deltatune

    package = Path(deltatune.__file__).parents[1]
    return os.pathsep.join([str(Path(__file__).parent), str(package), os.environ.get("PYTHONPATH", "")])


def leave() -> NoReturn:
    """Ends a rank that did its work.

    Gloo's and FSDP's threads outlive `destroy_process_group`; where the interpreter takes them down, a rank now and
    then ends with "terminate called without an active exception", although everything it had to show was equal.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
