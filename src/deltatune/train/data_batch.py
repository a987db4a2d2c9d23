"""Encoded examples as batches: packing, padding, and a look at them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from deltatune.errors import PackingError
from deltatune.train.data_spec import IGNORE, DataError, Encoded

if TYPE_CHECKING:
    from rich.text import Text


def pack(encoded: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Several examples in one row: longest first, each into the fullest row that still has room.

    `position_ids` restart with each example, which is how transformers' models know the examples apart (see
    `check_packing`). The first token of each example is not trained: before it comes another example.

    Raises:
        DataError: an example is longer than `max_length`.
    """
    bins: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (tokens free, index of the bin), sorted
    for row in sorted(encoded, key=len, reverse=True):
        if len(row) > max_length:
            raise DataError(f"{row.source}: the example has {len(row)} tokens, rows are packed to {max_length}")
        at = bisect_left(room, (len(row), -1))
        if at == len(room):
            bins.append([])
            insort(room, (max_length, len(bins) - 1))
            at = bisect_left(room, (len(row), -1))
        free, index = room.pop(at)
        bins[index].append(row)
        insort(room, (free - len(row), index))
    return [_join(rows) for rows in bins]


def _join(rows: list[Encoded]) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for row in rows:
        ids += row.input_ids
        labels += [IGNORE, *row.labels[1:]]
        positions += range(len(row))
    source = rows[0].source + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
    return Encoded(ids, labels, positions, any(row.truncated for row in rows), source)


class Collator:
    """Batches of equal length, padded on the right.

    Plain rows get an `attention_mask`. Packed rows get `position_ids` and no mask, which makes transformers build
    the mask that keeps examples apart; `use_cache=False` goes with them, because with a cache it does not.

    Args:
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.
    """

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int = 8) -> None:
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(i for i in candidates if i is not None)
        self.multiple = pad_to_multiple_of

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """`input_ids`, `labels` and `attention_mask` or `position_ids`, each (rows, length) int64."""
        length = -(-max(len(row) for row in rows) // self.multiple) * self.multiple
        batch: dict[str, Any] = {
            "input_ids": _padded([row.input_ids for row in rows], length, self.pad_id),
            "labels": _padded([row.labels for row in rows], length, IGNORE),
        }
        if all(row.position_ids is None for row in rows):
            batch["attention_mask"] = _padded([[1] * len(row) for row in rows], length, 0)
            return batch
        # Padding is one more "example" of its own; nothing sees it and it is not trained.
        positions = [[*(row.position_ids or range(len(row))), *range(length - len(row))] for row in rows]
        return batch | {"position_ids": torch.tensor(positions), "use_cache": False}


def _padded(rows: list[list[int]], length: int, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def check_packing(model: Any) -> None:
    """Try whether packed examples are kept apart by this model as it stands.

    Not all are: state-space layers carry their state on, some models build their own masks, and virtual tokens of
    prompt methods shift everything. So two short rows are run that differ in their first example only: the
    second must come out the same, and the same as alone.

    Raises:
        PackingError: they are not kept apart.
    """
    device = next(iter(model.parameters())).device
    words = min(model.config.get_text_config().vocab_size, 500)
    one, other, second = [[(7 * i + k) % words for i in range(6)] for k in (1, 3, 5)]
    blocks = [_join([Encoded(first, first), Encoded(second, second)]) for first in (one, other)]

    class _NoPad:
        pad_token_id = eos_token_id = 0

    def logits(row: Encoded) -> torch.Tensor:
        batch = Collator(_NoPad, pad_to_multiple_of=1)([row])
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"}
        out: torch.Tensor = model(**inputs).logits[0, -len(second) :]
        return out.float()

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            first, changed, alone = *map(logits, blocks), logits(Encoded(second, second))
    finally:
        model.train(training)
    scale = float(alone.abs().max()) or 1.0
    if (first - changed).abs().max() > 1e-4 * scale or (first - alone).abs().max() > 0.05 * scale:
        raise PackingError(
            f"packing is not possible with this model ({type(model).__name__}): examples in one row would see each "
            "other; set data.packing to false, or choose another attn_implementation"
        )


def preview(encoded: Sequence[Encoded], tokenizer: Any, n: int = 3, width: int = 600) -> Text:
    """The first `n` rows as the model reads them, trained tokens between ⟦ and ⟧ and in green.

    Args:
        width: longest stretch of text shown whole; the middle of longer ones is left out.
    """
    from rich.text import Text

    text = Text()
    for number, row in enumerate(encoded[:n], 1):
        text.append(f"{'' if number == 1 else chr(10)}{number}. {row.source}", style="bold")
        text.append(f" ({len(row)} tokens, {row.trained} trained)\n", style="dim")
        starts = set() if row.position_ids is None else {i for i, p in enumerate(row.position_ids) if p == 0}
        marks = [(sum(s <= i for s in starts), label != IGNORE) for i, label in enumerate(row.labels)]
        for (_, trained), group in groupby(range(len(row)), key=lambda i: marks[i]):
            part = list(group)
            if part[0] in starts and part[0] > 0:
                text.append("\n── next example in the same row ──\n", style="dim")
            words = _shorten(tokenizer.decode([row.input_ids[i] for i in part]), width)
            text.append(f"⟦{words}⟧" if trained else words, style="green" if trained else "")
        text.append("\n")
    return text


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    half = width // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"
