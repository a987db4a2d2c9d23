"""Examples from files, hub data sets and built-in sets, as tokens ready to train on.

`load_examples` reads and understands, `encode` tokenises and marks what is trained, `pack` and `Collator` make
batches, `preview` shows them. The parts live in the `data_*` modules; this is their one entrance.
"""

from __future__ import annotations

from deltatune.errors import PackingError
from deltatune.train.data_batch import Collator, check_packing, pack, preview
from deltatune.train.data_encode import check_max_length, describe_encoded, encode, encode_prompt, split_texts
from deltatune.train.data_load import load_examples
from deltatune.train.data_spec import (
    IGNORE,
    DataError,
    DataSpec,
    Encoded,
    Example,
    Examples,
    NoTrainedTokens,
)

__all__ = [
    "IGNORE",
    "Collator",
    "DataError",
    "DataSpec",
    "Encoded",
    "Example",
    "Examples",
    "NoTrainedTokens",
    "PackingError",
    "check_max_length",
    "check_packing",
    "describe_encoded",
    "encode",
    "encode_prompt",
    "load_examples",
    "pack",
    "preview",
    "split_texts",
]
