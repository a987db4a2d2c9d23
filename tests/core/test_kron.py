"""Kronecker products run per kind of layer without being formed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.core.ops import kronecker
from deltatune.core.weights import WeightRef


def transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(16, 12)


def scaled() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(20, 16, 0, embed_scale=3.0)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), lambda: torch.randn(4, 3, 12)),
    "linear, two axes": (lambda: nn.Linear(12, 16), lambda: torch.randn(4, 12)),
    "transposed": (transposed, lambda: torch.randn(4, 3, 12)),
    "embedding": (lambda: nn.Embedding(20, 16), lambda: torch.randint(0, 20, (4, 3))),
    "scaled embedding": (scaled, lambda: torch.randint(0, 20, (4, 3))),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding="same"), lambda: torch.randn(4, 8, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, stride=2, dilation=2), lambda: torch.randn(4, 8, 7, 7)),
    "padded": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(4, 8, 5, 5)),
    "groups": (lambda: nn.Conv2d(8, 16, 3, groups=2), lambda: torch.randn(4, 8, 5, 5)),
    "channels last": (
        lambda: nn.Conv2d(8, 16, 3, groups=2).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 16, 2, padding=1), lambda: torch.randn(4, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_equals_the_formed_product(name, rows, m):
    layer, x = LAYERS[name][0](), LAYERS[name][1]()
    ref = WeightRef(layer)
    out, inp = ref.shape
    a, b = torch.randn(4, rows, m), torch.randn(4, out // rows, inp // m)
    formed = torch.stack([ref.apply(x, torch.kron(a[i], b[i]))[i] for i in range(4)])
    assert torch.allclose(ref.kron(x, a[0], b[0])[0], formed[0], atol=1e-4)
    assert torch.allclose(ref.kron_rows(x, a, b), formed, atol=1e-4)
    if ref.bypass and isinstance(layer, (nn.Linear, nn.Conv2d)) and x.ndim > 2:
        assert torch.allclose(ref.kron(x[0], a[0], b[0]), formed[0], atol=1e-4)  # without a batch axis


def test_batched_product():
    a, b = torch.randn(5, 2, 3), torch.randn(5, 4, 6)
    assert torch.equal(kronecker(a, b), torch.stack([torch.kron(x, y) for x, y in zip(a, b, strict=True)]))


def test_rows_of_a_fused_weight():
    layer, x = nn.Linear(12, 16), torch.randn(4, 3, 12)
    ref = WeightRef(layer, rows=slice(4, 12))
    a, b = torch.randn(2, 3), torch.randn(4, 4)
    y = ref.kron(x, a, b)
    assert torch.allclose(y[..., 4:12], x @ torch.kron(a, b).T, atol=1e-5)
    assert not y[..., :4].any()
    assert not y[..., 12:].any()
