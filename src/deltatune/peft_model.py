"""PeftModel: the face that people know from Hugging Face peft, over an `AdapterSet`.

The base keeps its own module tree under `base_model.model`; nothing in it is wrapped or renamed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune import status
from deltatune.config import PeftConfig, TaskType
from deltatune.core import fingerprint
from deltatune.core.adapters import AdapterSet, adapters_of, uncollected
from deltatune.core.checkpoint import PREFIX, LoadReport, load_adapter_state, remap
from deltatune.core.composition import Composition, Node, by_rows, channels, per_row
from deltatune.core.files import (
    SAFETENSORS_NAME,
    find_file,
    read_json_metadata,
    read_tensors,
    split_hub_options,
)
from deltatune.core.rounding import Rounding
from deltatune.errors import AdapterNameError, BaseMismatchError, ConfigError, DeltatuneError
from deltatune.inits import loading
from deltatune.state import get_peft_model_state_dict, write_adapter

if TYPE_CHECKING:
    from deltatune.plain_lora import LoraReport

Names = str | Sequence[str] | Composition


class BaseTuner(nn.Module):
    """`PeftModel.base_model`: holds the base as `.model` and offers the verbs that act on its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def adapters(self) -> AdapterSet:
        found = adapters_of(self.model)
        if found is None:
            raise DeltatuneError("this model has no adapters any more; wrap it again with get_peft_model")
        return found

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.adapters.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.adapters.plan.active)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ choosing
    def set_adapter(self, adapter_name: Names, inference_mode: bool | None = None) -> None:
        """Activates one adapter, or several whose changes add up; see `PeftModel.set_adapter`."""
        self.adapters.activate(adapter_name)
        if inference_mode is not None:
            self.adapters.set_requires_grad(self.active_adapters, not inference_mode)

    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        self.adapters.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        self.adapters.delete(adapter_name)

    def disable_adapter_layers(self) -> None:
        """Runs as the plain base until `enable_adapter_layers`; training flags stay as they are."""
        self.adapters.plan.enabled = False
        self.adapters.plan.refresh()

    def enable_adapter_layers(self) -> None:
        self.adapters.plan.enabled = True
        self.adapters.plan.refresh()

    # ------------------------------------------------------------------ making others of them
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> LoraReport:
        """Adds a LoRA that combines adapters of any methods on their ΔW; see `deltatune.combine_adapters`. Adapters
        of one method whose sums stay in it (IA³) give one of that method, unless `combination_type` is given.

        Args:
            svd_full_matrices: accepted for peft's sake; the result is the same.

        Returns:
            per weight and in all, what the ranks that were kept miss; nothing for the exact combinations.
        """
        from deltatune.combine_adapters import add_weighted_adapter

        options = (svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        return add_weighted_adapter(self.adapters, adapters, weights, adapter_name, combination_type, *options)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can write this adapter as a LoRA."""
        from deltatune.convert import supports_lora_conversion

        return supports_lora_conversion(self.model, adapter_name)

    # ------------------------------------------------------------------ merging
    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        into: Literal["dense", "same"] = "dense",
        rounding: Literal["dithered", "nearest"] | None = None,
    ) -> None:
        """Folds adapters (the active ones if none are named) into the base's weights, reversibly.

        Args:
            into: what a weight in few bits becomes: an ordinary one, or one of the same storage (which rounds).
            rounding: how `"same"` rounds; default: as `set_merge_aware` did, else dithered.
        """
        names = adapter_names or self.active_adapters
        self.adapters.merge(names, safe=safe_merge, same=self._same(into, rounding))

    def set_merge_aware(
        self, enabled: bool = True, rounding: Literal["dithered", "nearest"] = "dithered", seed: int = 0
    ) -> None:
        """Makes adapters on quantised weights run, and train, as a merge into the same storage would leave them.

        Args:
            rounding: `"dithered"` lets changes below half a step through, `"nearest"` quantises the sum anew.
            seed: of the dither.
        """
        self.adapters.merge_aware(Rounding(rounding, seed) if enabled else None)

    def unmerge_adapter(self) -> None:
        """Gives the base its own numbers back, bit for bit."""
        if not self.adapters.plan.merged:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)
        self.adapters.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: Literal["dense", "same"] = "dense",
        rounding: Literal["dithered", "nearest"] | None = None,
    ) -> nn.Module:
        """The base with adapters folded into it and no trace of them otherwise.

        Ordinary weights are written over where they stand, without a second copy of the model.

        Args:
            safe_merge: look for numbers that are not finite before anything is changed, which takes that copy.
            into: `"dense"` gives a model of ordinary weights in 16 or 32 bits; `"same"` keeps a quantised base's
                storage and rounds the merged weights to it.
            rounding: how `"same"` rounds; default: as `set_merge_aware` did, else dithered.

        Raises:
            CannotMergeError: an adapter has no equivalent weight.
        """
        from deltatune.stores.dense import dequantize_model, keep_savable

        same = self._same(into, rounding)
        self.adapters.merge(adapter_names or self.active_adapters, safe=safe_merge, same=same, for_good=True)
        base = self.adapters.remove_all()
        if same is None:
            return dequantize_model(base)
        keep_savable(base)
        return base

    def _same(self, into: str, rounding: str | None) -> Rounding | None:
        if into not in ("dense", "same"):
            raise ConfigError(f'into must be "dense" or "same", not {into!r}')
        if into == "dense":
            if rounding is not None:
                raise ConfigError(
                    f'rounding={rounding!r} is for into="same": dense weights are not rounded to few bits'
                )
            return None
        trained = self.adapters.plan.rounding or Rounding()
        return trained if rounding in (None, trained.kind) else Rounding(str(rounding))

    def unload(self) -> nn.Module:
        """The plain base, bit for bit as it was before any adapter.

        Raises:
            ConfigError: a training procedure has changed the base itself.
        """
        self.adapters.check_base()
        self.adapters.unmerge()
        return self.adapters.remove_all()


class PeftModel(nn.Module):
    """A base model with named adapters.

    Args:
        model: any `nn.Module`; its parameters are frozen.
        peft_config: the first adapter's configuration.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters in float32 on a 16-bit base.
        low_cpu_mem_usage: create the adapter without memory, to be filled by loading.

    Raises:
        TargetError, ConfigError: the configuration does not fit the model; nothing has been changed.
    """

    #: what a checkpoint's keys start with
    state_prefix: ClassVar[str] = PREFIX
    #: the inputs that `forward` names in its signature, for callers that inspect it (transformers.Trainer)
    inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        adapters = adapters_of(model) or AdapterSet(model)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        try:
            adapters.add(peft_config, adapter_name, float32=autocast_adapter_dtype, meta=low_cpu_mem_usage)
        except DeltatuneError:
            for p, flag in flags:
                p.requires_grad_(flag)
            raise
        self.base_model = BaseTuner(model)
        self.load_report: LoadReport | None = None
        describe(peft_config, model)
        adapters.activate(adapter_name)
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            self.activation_checkpointing_enable()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.inputs and "forward" not in cls.__dict__:
            cls.forward = _forward_named(cls.inputs)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # ------------------------------------------------------------------ looking
    @property
    def adapters(self) -> AdapterSet:
        return self.base_model.adapters

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.adapters.configs

    @property
    def active_adapter(self) -> str:
        """The first active adapter's name."""
        return self.active_adapters[0] if self.active_adapters else ""

    @property
    def active_adapters(self) -> list[str]:
        return list(self.adapters.plan.active)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {m for c in self.peft_config.values() for m in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.adapters.plan.enabled and self.adapters.plan.active)

    def get_base_model(self) -> nn.Module:
        """The base inside; its adapters stay attached (use `unload` to take them out)."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a trained copy and its original count once."""
        return self.adapters.count()

    def print_trainable_parameters(self) -> None:
        """Prints `trainable params: … || all params: … || trainable%: …`."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {_percent(trainable, total)}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        return status.get_model_status(self)

    # ------------------------------------------------------------------ running
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[Node] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward under the active adapters, or one adapter per batch row.

        Args:
            adapter_names: one name (or composition) per row (`"__base__"` for none); works in training too.
            task_ids: one number per row, for methods with a prompt per task.

        Raises:
            AdapterNameError: an unknown name, or not one name per row.
        """
        if task_ids is not None:
            with self.adapters.plan.carrying(task_ids):
                return PeftModel.forward(self, *args, adapter_names=adapter_names, **kwargs)
        if adapter_names is None and (found := self._rows_of_composition(args, kwargs)) is not None:
            args, kwargs, adapter_names = found
        if adapter_names is None:
            return self._call(args, kwargs)
        batch, positions = _batch_size(args, kwargs)
        if len(adapter_names) != batch:
            raise AdapterNameError(f"adapter_names has {len(adapter_names)} entries for a batch of {batch} rows")
        with self.adapters.plan.call(self.adapters.rows(adapter_names, positions)):
            return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self.base_model.model(*args, **kwargs)
        finally:
            if not torch.compiler.is_compiling():  # what no layer has asked for
                self.adapters.plan.own.ahead.clear()

    def _rows_of_composition(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Node]] | None:
        """(inputs, what each of their rows runs under) where the active composition splits or repeats the batch."""
        plan = self.adapters.plan
        if plan.tree is None or not plan.enabled or not by_rows(plan.tree):
            return None
        batch, _ = _batch_size(args, kwargs)
        copies = len(channels(plan.tree))

        def repeated(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim and value.shape[0] == batch and copies > 1
            return torch.cat([value] * copies) if whole else value

        kwargs = {name: repeated(value) for name, value in kwargs.items()}
        return tuple(map(repeated, args)), kwargs, per_row(plan.tree, batch)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[Node] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; `adapter_names` gives one adapter per input row, also with beams; `task_ids` one
        task per row.

        Rows of one adapter run side by side, so that no layer has to gather them; what is returned is in the order of
        the input. Where something given may depend on that order (images, a cache, a logits processor), it is kept.
        """
        model: Any = self.base_model.model
        plan = self.adapters.plan
        if task_ids is not None:
            with plan.carrying(task_ids):
                return PeftModel.generate(self, *args, adapter_names=adapter_names, **kwargs)
        if adapter_names is None and (found := self._rows_of_composition(args, kwargs)) is not None:
            args, kwargs, adapter_names = found
        if adapter_names is None:
            with plan.steady():
                return model.generate(*args, **kwargs)
        batch, _ = _batch_size(args, kwargs)
        if len(adapter_names) != batch:
            raise AdapterNameError(f"adapter_names has {len(adapter_names)} entries for a batch of {batch} rows")
        config = kwargs.get("generation_config") or model.generation_config
        order = [i for name in dict.fromkeys(adapter_names) for i, own in enumerate(adapter_names) if own == name]
        free = plan.own.tasks is None and _order_is_free(batch, args, kwargs, config)
        if order != list(range(batch)) and free:
            names = [adapter_names[i] for i in order]
            given = {name: _taken(value, order) for name, value in kwargs.items()}
            found = PeftModel.generate(self, *(_taken(v, order) for v in args), adapter_names=names, **given)
            back = sorted(range(batch), key=order.__getitem__)
            return found.unflatten(0, (batch, -1))[back].flatten(0, 1)
        beams = kwargs.get("num_beams", getattr(config, "num_beams", 1)) or 1
        copies = kwargs.get("num_return_sequences", getattr(config, "num_return_sequences", 1)) or 1
        expanded = max(beams, copies)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            # the encoder sees the rows as they are, the decoder each of them `expanded` times in a row
            state = self.adapters.rows(adapter_names, expanded)
        else:
            state = self.adapters.rows([n for n in adapter_names for _ in range(expanded)], 1)
        with plan.call(state), plan.steady():
            return model.generate(*args, **kwargs)

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Runs the body as the plain base. O(1); nothing else changes, training flags included."""
        return self.adapters.disabled()

    # ------------------------------------------------------------------ adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attaches another adapter, of any method. It trains (unless `inference_mode`) but is not active."""
        self.adapters.add(peft_config, adapter_name, float32=autocast_adapter_dtype, meta=low_cpu_mem_usage)
        describe(peft_config, self.base_model.model)

    def set_adapter(self, adapter_name: Names, inference_mode: bool | None = None) -> None:
        """Activates one adapter, several whose changes add up, or a composition (`Stack`, `Fuse`, …).

        Args:
            inference_mode: None leaves what trains alone; True freezes these adapters, False makes them train.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first of the others becomes active."""
        self.adapters.delete(adapter_name)
        if not self.active_adapters and self.peft_config:
            self.adapters.activate(next(iter(self.peft_config)))

    def rename_adapter(self, old: str, new: str) -> None:
        """Gives an adapter another name."""
        self.adapters.rename(old, new)

    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        """Makes adapters train or not, whether they are active or not."""
        self.adapters.set_requires_grad(adapter_names, requires_grad)

    @contextlib.contextmanager
    def drop_layers(self, count: int) -> Generator[None, None, None]:
        """Runs the body without the adapters of the lowest `count` layers (AdapterDrop), of every method."""
        before = self.adapters.plan.dropped
        self.adapters.drop_layers(count)
        try:
            yield
        finally:
            self.adapters.drop_layers(before)

    # ------------------------------------------------------------------ compositions
    def save_composition(
        self, save_directory: str | os.PathLike[str], composition: Node | None = None, **options: Any
    ) -> None:
        """Writes a composition (the active one if none is given) and all its adapters; see `load_composition`."""
        from deltatune.composition_files import save_composition

        save_composition(self, save_directory, composition, **options)

    def load_composition(
        self, directory: str | os.PathLike[str], *, is_trainable: bool = False, activate: bool = True
    ) -> Node:
        """Loads what `save_composition` wrote, adapters that are there already as well, and makes it run."""
        from deltatune.composition_files import load_composition

        return load_composition(self, directory, is_trainable=is_trainable, activate=activate)

    # ------------------------------------------------------------------ checkpointing of activations
    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' own, non-reentrant by default, with blocks recomputed under the adapters they had."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        model: Any = self.base_model.model
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(options, **kwargs)
        else:
            model.gradient_checkpointing_enable(options, **kwargs)
        # frozen embeddings give no gradient to a reentrant checkpoint; a non-reentrant one needs none
        hook = "enable_input_require_grads" if options["use_reentrant"] else "disable_input_require_grads"
        if hasattr(model, "_require_grads_hooks") or options["use_reentrant"]:
            getattr(model, hook)()
        for state in (module.__dict__ for module in model.modules()):
            if (function := state.get("_gradient_checkpointing_func")) is not None:
                state["_gradient_checkpointing_func"] = partial(self.adapters.plan.checkpointed, function)

    def activation_checkpointing_disable(self) -> None:
        """Undoes `activation_checkpointing_enable`."""
        model: Any = self.base_model.model
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()

    def gradient_checkpointing_disable(self) -> None:
        """As `activation_checkpointing_disable`; the name older code uses."""
        self.activation_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As `activation_checkpointing_enable`; the name older code uses."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # ------------------------------------------------------------------ saving
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter as `adapter_config.json` and `adapter_model.safetensors`, atomically.

        The adapter named `default` goes to `save_directory` itself, others to a folder of their name.

        Args:
            selected_adapters: which to write; all by default.
            save_embedding_layers: True writes the base's embeddings too; `"auto"` where they were adapted.
            is_main_process: False only takes part in gathering.
            path_initial_model_for_weight_conversion: if given, adapters that start away from zero (PiSSA, …) are
                written as plain LoRAs, of rank 2r, which need no start. They know their own start, so nothing is
                read from the path.

        Raises:
            ConfigError: an option that would write pickles or needs a method that is not there.
            OSError: nothing was replaced.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle file; only safetensors are written")
        if os.path.isfile(save_directory):
            raise ConfigError(f"{os.fspath(save_directory)!r} is a file; save_pretrained needs a directory")
        names = selected_adapters if selected_adapters is not None else list(self.peft_config)
        self.adapters.check(*names)
        for name in names:
            folder = Path(save_directory) / (name if name != "default" else "")
            if path_initial_model_for_weight_conversion is not None and is_main_process:
                from deltatune.convert import save_as_lora

                save_as_lora(folder, self, adapter_name=name)
                continue
            tensors = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=save_embedding_layers)
            if is_main_process:
                write_adapter(self.adapters, name, folder, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_options: Any,
    ) -> Any:
        """Saves to a temporary folder and uploads it; returns huggingface_hub's `CommitInfo`.

        Raises:
            DeltatuneError: the hub cannot be reached, or refuses.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                return api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    commit_message=commit_message or "Upload adapter",
                    revision=revision,
                    create_pr=create_pr,
                )
            except (OSError, ValueError, RuntimeError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise DeltatuneError(f"could not push to {repo_id!r}: {reason}") from error

    # ------------------------------------------------------------------ loading
    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with a saved adapter, frozen unless `is_trainable`.

        Args:
            model_id: a directory or a hub id. config: instead of the saved configuration.
            key_mapping: regular expression -> replacement, for files whose names changed since.
            strict: an adapter that does not fit, or was trained on another base, is an error; False loads what
                fits and leaves the account in `model.load_report`.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, … for the hub.

        Raises:
            AdapterLoadError: lists every missing, unexpected or mis-shaped key; the model is as before.
        """
        hub, rest = _loading_options(kwargs)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub, **rest)
        else:
            config = copy.copy(config)
        config.inference_mode = not is_trainable
        kind = class_for(config)
        had_adapters = adapters_of(model) is not None
        flags = [(p, p.requires_grad) for p in model.parameters()]
        with loading():
            wrapped = kind(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        try:
            report = wrapped._load(model_id, adapter_name, key_mapping, strict, hub, None)
        except BaseException:
            adapters = wrapped.adapters
            adapters.delete(adapter_name)
            if not had_adapters:
                adapters.remove_all()
            for p, flag in flags:
                p.requires_grad_(flag)
            raise
        wrapped.load_report = report
        wrapped.eval()
        return wrapped

    @uncollected()
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool = True,
        **kwargs: Any,
    ) -> LoadReport:
        """Loads another adapter under a name, or fills the one of that name; see `from_pretrained`."""
        hub, rest = _loading_options(kwargs)
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, **hub, **rest)
            config.inference_mode = not is_trainable
            with loading():
                self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            return self._load(model_id, adapter_name, key_mapping, strict, hub, torch_device)
        except BaseException:
            if new:
                self.adapters.delete(adapter_name)
            raise

    def _load(
        self,
        model_id: str | os.PathLike[str],
        name: str,
        key_mapping: dict[str, str] | None,
        strict: bool,
        hub: dict[str, Any],
        device: str | None,
    ) -> LoadReport:
        tensors, metadata = read_tensors(find_file(model_id, SAFETENSORS_NAME, **hub), device or "cpu")
        saved = read_json_metadata(metadata, fingerprint.METADATA_KEY)
        report = load_adapter_state(self.adapters, name, remap(tensors, key_mapping), strict=strict, keep=True)
        base = self.base_model.model
        different = fingerprint.differences(base, self.adapters.deltas(name), saved) if saved else []
        if different:
            text = f"{os.fspath(model_id)!r} was made for another base: {'; '.join(different)}"
            if strict:
                raise BaseMismatchError(f"{text} (in Python, strict=False loads it all the same)")
            warnings.warn(text, stacklevel=3)
            report.notes += different
        return report


def _loading_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(hub options, overrides of the configuration); options of peft that mean nothing here are refused."""
    if kwargs.pop("ephemeral_gpu_offload", False):
        raise ConfigError("ephemeral_gpu_offload is not supported: adapters are created on their weight's device")
    return split_hub_options(kwargs)


def describe(config: PeftConfig, model: nn.Module) -> None:
    """Fills in where the base came from."""
    if config.base_model_name_or_path is None:
        name = getattr(model, "name_or_path", None) or getattr(model, "_name_or_path", None)
        config.base_model_name_or_path = str(name) if name else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.4f}" if whole else "0"


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """(rows, positions per row) of a model call, from its first tensor input."""
    for key in ("input_ids", "inputs_embeds", "pixel_values", "input_features", "inputs"):
        value = kwargs.get(key)
        if isinstance(value, Tensor):
            return value.shape[0], value.shape[1] if value.ndim > 1 else 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0], value.shape[1] if value.ndim > 1 else 1
    raise ConfigError("adapter_names needs a tensor input whose first axis is the batch; none is given")


#: tensors of `generate` that have one row for each row of the batch
_ROWS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def _order_is_free(batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> bool:
    """Whether `generate` may see the rows in another order: nothing is given but their tokens and plain options."""
    if len(args) > 1 or kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False)):
        return False
    plain = (type(None), bool, int, float, str)
    given = [("inputs", *args)] if args else []
    return all(
        name in _ROWS and len(value) == batch
        if isinstance(value, Tensor)
        else isinstance(value, plain) or value is config
        for name, value in (*given, *kwargs.items())
    )


def _taken(value: Any, order: list[int]) -> Any:
    return value[order] if isinstance(value, Tensor) else value


def _forward_named(inputs: tuple[str, ...]) -> Any:
    """A forward whose signature names the task's inputs, for callers that inspect it."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        given = {k: v for k, v in kwargs.items() if v is not None or k not in inputs}
        return PeftModel.forward(self, *args, **given)

    kind = inspect.Parameter
    names = [kind("self", kind.POSITIONAL_OR_KEYWORD)]
    names += [kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in inputs]
    names.append(kind("kwargs", kind.VAR_KEYWORD))
    forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    forward.__doc__ = PeftModel.forward.__doc__
    return forward


_COMMON = ("input_ids", "attention_mask", "inputs_embeds", "labels")
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


class PeftModelForCausalLM(PeftModel):
    """For decoder language models."""

    inputs = (*_COMMON, *_OUTPUTS)


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoder language models."""

    inputs = (
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
        *_OUTPUTS,
    )


class PeftModelForSequenceClassification(PeftModel):
    """For one label per sequence; the head trains too."""

    inputs = (*_COMMON, *_OUTPUTS)


class PeftModelForTokenClassification(PeftModel):
    """For one label per token; the head trains too."""

    inputs = (*_COMMON, *_OUTPUTS)


class PeftModelForQuestionAnswering(PeftModel):
    """For answer spans; the head trains too."""

    inputs = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_OUTPUTS,
    )


class PeftModelForFeatureExtraction(PeftModel):
    """For hidden states."""

    inputs = ("input_ids", "attention_mask", "inputs_embeds", *_OUTPUTS)


#: task -> the class that `get_peft_model` gives
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The PeftModel class of a configuration's task."""
    return PeftModel if config.task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(config.task_type)]
