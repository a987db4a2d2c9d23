"""Triton's kernels: when they run, and in processes of their own, what they compute and for which GPUs they compile."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deltatune import kernels
from deltatune.errors import ConfigError
from deltatune.kernels import gpu

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(*command: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "DELTATUNE_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**clean, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_numbers_under_the_interpreter():
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rs")
    said = run("-m", "pytest", *options, str(HERE / "triton_cases.py"), TRITON_INTERPRET="1")
    assert "100%" in said


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    said = run(str(HERE / "triton_compile.py"), TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1")
    assert said.count("shared memory") == 6


def test_importing_and_using_the_default_never_imports_triton():
    run(
        "-c",
        "import sys, torch, deltatune; before = 'triton' in sys.modules;"
        "from deltatune import LoraConfig, get_peft_model;"
        "m = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=['0']));"
        "m(torch.randn(2, 4)).sum().backward(); assert ('triton' in sys.modules) == before",
    )


@needs_no_gpu
@needs_triton
@pytest.mark.parametrize("mode", ["triton", "measure"])
def test_without_a_gpu_the_modes_are_refused(mode):
    with pytest.raises(ConfigError, match="CUDA device, and none is here"), kernels.use(mode):
        pass
    assert kernels.mode() == "fused"


@pytest.mark.parametrize("mode", ["triton", "measure"])
def test_without_triton_the_modes_are_refused(mode, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "deltatune\[triton\]"'), kernels.use(mode):
        pass


@needs_triton
@needs_no_gpu
def test_an_unusable_mode_in_the_environment_is_refused_at_once():
    with pytest.raises(AssertionError, match="none is here"):
        run("-c", "from deltatune import kernels", DELTATUNE_KERNELS="triton")


def test_the_faster_way_is_measured_once_per_size_and_remembered(monkeypatch):
    """The clock and the GPU are stand-ins: what is seen here is what is asked, remembered and hidden."""
    asked, hooks = [], []

    def seconds(run, device):
        run()
        return 2.0 if len(asked) % 2 else 1.0

    def way(name):
        def call(x):
            asked.append(name)
            return x * 2

        return call

    monkeypatch.setattr(gpu, "_seconds", {})
    monkeypatch.setattr(gpu, "seconds", seconds)
    monkeypatch.setattr(kernels, "_mode", "measure")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(hooks.append, lambda t: t):  # as around a checkpointed block
        assert gpu.faster(("kind", 4), way("plain"), way("own"), x)  # 2 seconds, then 1
    assert asked == ["plain", "own"]
    assert not hooks
    assert x.grad is None
    assert gpu.faster(("kind", 4), way("plain"), way("own"), x)
    assert asked == ["plain", "own"]
    with torch.no_grad():
        assert gpu.faster(("kind", 4), way("plain"), way("own"), x)
    monkeypatch.setattr(gpu, "seconds", lambda run, device: 1.0)
    assert not gpu.faster(("kind", 8), way("plain"), way("own"), x)
    kinds = [key[-1] for key in gpu.measured()]
    assert kinds == ["training", "inference", "training"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not gpu.faster(("kind", 16), way("plain"), way("own"), x)
    assert len(gpu.measured()) == 3


def test_sizes_share_a_measurement_by_powers_of_two():
    assert [gpu.bucket(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]
