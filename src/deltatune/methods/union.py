"""Several methods as one adapter: one name, one file, trained and chosen together.

MAM, mix-and-match (arXiv 2110.04366): a short prefix at every self-attention and the scaled parallel adapter beside
every feed-forward part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from deltatune.config import PeftConfig, StructuredConfig, TargetedConfig, register
from deltatune.core.adapters import Modules, adapters_of
from deltatune.core.bank import Bank
from deltatune.core.copies import ModuleCopy
from deltatune.core.edits import Edit
from deltatune.core.sites import Site
from deltatune.errors import ConfigError


@register
@dataclass
class UnionConfig(StructuredConfig):
    """The edits of several configurations under one adapter's name.

    Args:
        configs: configurations, or what their `to_dict` gives. Each has its own targets; a head of the task is copied
            once. `roles` are those of every one of them that has none of its own.

    Raises:
        ConfigError: none is given, one has no edits of its own, or two put tensors of one name at one place.
    """

    configs: list[Any] = field(default_factory=list)

    method: ClassVar[str] = "UNION"
    usage: ClassVar[str] = """
        from deltatune import BitFitConfig, LoraConfig, UnionConfig, get_peft_model

        config = UnionConfig(configs=[LoraConfig(target_modules=["q_proj", "v_proj"]), BitFitConfig()])
        model = get_peft_model(base, config)
    """
    summary: ClassVar[str] = "several methods as one adapter"
    starts_as_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.configs:
            self.configs = list(self.parts_by_default())
        if not self.configs:
            raise ConfigError(f"{type(self).__name__} needs configs, the configurations to unite")
        if self.target_modules is not None:
            raise ConfigError("target_modules means nothing for a union; give it to the configurations in it")
        self.parts = [c if isinstance(c, PeftConfig) else PeftConfig.from_dict(c) for c in self.configs]
        for part in self.parts:
            if not isinstance(part, TargetedConfig):
                raise ConfigError(f"{type(part).__name__} gives no edits, so it cannot be in a union")
            if isinstance(part, StructuredConfig) and not part.roles:
                part.roles = self.roles

    def parts_by_default(self) -> Sequence[TargetedConfig]:
        """What a named union consists of."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "configs": [part.to_json() for part in self.parts]}

    @classmethod
    def example(cls, **fields: Any) -> UnionConfig:
        from deltatune.methods.bitfit import BitFitConfig
        from deltatune.methods.lora import LoraConfig

        targets = fields.pop("target_modules", None)
        return cls(**{"configs": [LoraConfig(target_modules=targets, r=4), BitFitConfig()], **fields})

    def sites(self, model: nn.Module) -> list[Site]:
        return []

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        adapters = adapters_of(model)
        assert adapters is not None, "an adapter set is made before any adapter"
        copied = {site.path for site, edits in made if any(isinstance(e, ModuleCopy) for e in edits)}
        found: list[tuple[Site, list[Edit]]] = []
        modules = Modules(model)
        for part in self.parts:
            assert isinstance(part, TargetedConfig)
            if part.prepare(model) is not None:
                raise ConfigError(f"{type(part).__name__} changes the base first, so it cannot be in a union")
            bank, edits = adapters.build(part, modules)
            found += [(Site("", None), [bank])] if bank is not None else []
            for site, own in edits:
                if any(isinstance(e, ModuleCopy) for e in own):
                    if site.path in copied:
                        continue
                    copied.add(site.path)
                found.append((site, own))
        _check_names(found)
        return found


def _check_names(found: Sequence[tuple[Site, list[Edit]]]) -> None:
    taken: set[tuple[str, str, str | None]] = set()
    for site, edits in found:
        for slot in (slot for edit in edits if not isinstance(edit, Bank) for slot in edit.slots):
            key = (site.home or site.path, f"{slot.name}_{site.tag}", slot.leaf)
            if key in taken:
                raise ConfigError(
                    f"two parts of a union both have {slot.name!r} at {key[0]!r}; give them different target_modules"
                )
            taken.add(key)


@register
@dataclass
class MAMConfig(UnionConfig):
    """Mix-and-match: prefix and scaled parallel adapter.

    Args:
        num_virtual_tokens, encoder_hidden_size: of the prefix, which a network computes in training.
        reduction_factor, scaling: of the parallel adapter.
    """

    num_virtual_tokens: int = 30
    encoder_hidden_size: int = 800
    reduction_factor: float = 2
    scaling: float = 4.0

    method: ClassVar[str] = "MAM"
    summary: ClassVar[str] = "a short prefix and a parallel adapter"
    paper: ClassVar[str] = "arXiv 2110.04366"

    def parts_by_default(self) -> Sequence[TargetedConfig]:
        from deltatune.methods.bottleneck import ParallelConfig
        from deltatune.methods.prefix_tuning import PrefixTuningConfig

        prefix = PrefixTuningConfig(
            task_type=self.task_type,
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=True,
            encoder_hidden_size=self.encoder_hidden_size,
        )
        return prefix, ParallelConfig(reduction_factor=self.reduction_factor, scaling=self.scaling)

    @classmethod
    def example(cls, **fields: Any) -> MAMConfig:
        return cls(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
