"""Memory of QLoRA on a Llama-shaped model, term by term, from its shape alone (arXiv 2305.14314).

    n = L (2 h² + 2 h k + 3 h f)        weights of linear layers; h hidden, k key-value width, f feed-forward, L blocks
    p = L r (…)                         Σ over the linear layers of r (in + out)

    codes        n / 2                                       4 bits a weight
    constants    n / 64 + 4 n / (64 · 256) + 4 · 7 L         8-bit scale per 64, 32-bit one per 256 of those, a mean
    rest         2 (V h · (1 if tied else 2) + (2 L + 1) h)  embeddings, output layer and norms in 16 bits
    adapter      a p,  gradients a p,  optimizer 8 p         a bytes a number; two float32 moments
    activations  2 L b t h                                   the input of every block, kept (checkpointing)
               + b t (20 h + 8 f + 8 k)                      one block, computed again, with what its backward needs
               + u m                                         the largest layer unpacked, m weights, u bytes each
               or b t V · 12, if that is more                logits in 16 and 32 bits, and their gradients

`estimate_memory` counts a step of any model on fake tensors; this is what can be checked by hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    feed_forward: int
    blocks: int
    vocabulary: int = 32_000
    heads: int = 1
    kv_heads: int = 1
    tied: bool = False

    @property
    def kv(self) -> int:
        """Width of keys and of values."""
        return self.hidden * self.kv_heads // self.heads

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one block."""
        h, k, f = self.hidden, self.kv, self.feed_forward
        return [(h, h), (h, k), (h, k), (h, h), (h, f), (h, f), (f, h)]


#: the shapes of the first Llama
LLAMAS = {
    "7B": Shape(4096, 11008, 32),
    "13B": Shape(5120, 13824, 40),
    "33B": Shape(6656, 17920, 60),
    "65B": Shape(8192, 22016, 80),
}


def terms(
    shape: Shape,
    *,
    r: int = 64,
    rows: int = 1,
    length: int = 512,
    trained: int | None = None,
    adapter_bytes: int = 2,
    state_bytes: int = 8,
    unpacked_bytes: float = 2,
) -> dict[str, int]:
    """Bytes of every term.

    Args:
        r: rank, on all linear layers. rows, length: of a batch.
        trained: positions whose logits are computed; default: all.
        adapter_bytes: of a number of the adapter. state_bytes: of the optimiser's state per number.
        unpacked_bytes: of a weight while its layer is unpacked: 2 in bitsandbytes' kernels on a GPU, 12 in plain
            PyTorch, which unpacks by way of float32 and whole-number indices.
    """
    h, f, k, blocks = shape.hidden, shape.feed_forward, shape.kv, shape.blocks
    n = blocks * sum(i * o for i, o in shape.layers)
    p = blocks * r * sum(i + o for i, o in shape.layers)
    tokens = rows * length
    logits = (rows * trained if trained is not None else tokens) * shape.vocabulary * 12
    largest = max(i * o for i, o in shape.layers)
    block = int(tokens * (20 * h + 8 * f + 8 * k) + unpacked_bytes * largest)
    return {
        "codes": n // 2,
        "constants": n // 64 + 4 * n // (64 * 256) + 4 * len(shape.layers) * blocks,
        "rest": 2 * (shape.vocabulary * h * (1 if shape.tied else 2) + (2 * blocks + 1) * h),
        "adapter": adapter_bytes * p,
        "gradients": adapter_bytes * p,
        "optimizer": state_bytes * p,
        "activations": 2 * blocks * tokens * h + max(block, logits),
    }
