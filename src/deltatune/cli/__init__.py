"""The `deltatune` command."""

from __future__ import annotations

import os

# Read once by the OpenMP runtime when torch is loaded: threads that wait by spinning make two of them several
# times slower than one as soon as anything else runs on the machine. It must be set before `import torch`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point of the console script."""
    from deltatune.cli.app import run

    run()
