"""One way to any base model: `resolve_model` finds it, `load_tokenizer` and `load_model` load it."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from deltatune.errors import hint
from deltatune.train.fetch import cache_dir
from deltatune.train.resolve import ModelError, ResolvedModel, in_hub_cache, resolve_model

__all__ = ["ModelError", "ResolvedModel", "cache_dir", "load_model", "load_tokenizer", "resolve_model"]
log = logging.getLogger(__name__)

#: Task → the transformers class that builds a model for it.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
LABELLED = ("SEQ_CLS", "TOKEN_CLS")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTIZATIONS = {"4bit": "nf4", "nf4": "nf4", "fp4": "fp4", "8bit": "int8", "int8": "int8", "native": "native"}
#: what a checkpoint says it is quantised with -> the package that reads it, how to install that
BACKENDS = {
    "bitsandbytes": ("bitsandbytes", '"deltatune[quant]"'),
    "torchao": ("torchao", '"deltatune[quant]"'),
    "gptq": ("gptqmodel", "gptqmodel --no-build-isolation"),
    "awq": ("gptqmodel", "gptqmodel --no-build-isolation"),
    "hqq": ("hqq", "hqq"),
}


def load_tokenizer(resolved: ResolvedModel) -> Any:
    """The model's tokenizer, padding on the right, with a pad token and the model's length limit.

    Raises:
        ModelError: the model has none.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = _pretrained(AutoTokenizer, resolved)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"the tokenizer of {resolved.name} cannot be loaded: {_first_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {resolved.name} has neither a pad token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.model_max_length > 10**9:  # transformers' way to say "unknown"
        config = _pretrained(AutoConfig, resolved).get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        tokenizer.model_max_length = positions if positions else tokenizer.model_max_length
    return tokenizer


def load_model(
    resolved: ResolvedModel,
    *,
    task: str = "CAUSAL_LM",
    dtype: str = "auto",
    num_labels: int | None = None,
    quantization: str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> Any:
    """The base model, from safetensors only.

    Args:
        dtype: `auto` is the checkpoint's own type on an accelerator and float32 on a CPU, where 16-bit
            arithmetic is slow and trains worse.
        num_labels: size of a classification head; required by those tasks, refused by the others.
        quantization: `4bit` (NF4), `fp4` or `8bit`, through bitsandbytes; `native` is NF4 in plain PyTorch,
            for any device.

    Raises:
        ModelError: an unknown option, or a model that cannot be loaded for this task.
    """
    import transformers
    from safetensors import SafetensorError

    from deltatune.stores import settle

    builder = getattr(transformers, TASKS[_task(task, num_labels)])
    options: dict[str, Any] = {"dtype": _dtype(dtype), "use_safetensors": True}
    if num_labels is not None:
        options["num_labels"] = num_labels
    check_backend(resolved)
    kind = _quantization(quantization) if quantization is not None else None
    if kind not in (None, "native"):
        options["quantization_config"] = _bitsandbytes(str(kind), options["dtype"])
    if device_map is not None:
        options["device_map"] = device_map
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        model = _pretrained(builder, resolved, **options)
        if kind == "native":
            from deltatune.stores.nf4_layer import quantize_model

            quantize_model(model)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"{resolved.name} cannot be loaded as {builder.__name__}: {_first_line(error)}") from error
    settle(model, still=True)  # a run that is resumed does not measure its base again, and must have the same one
    return model


def _pretrained(builder: Any, resolved: ResolvedModel, **options: Any) -> Any:
    """`from_pretrained`, without asking the hub about files that are in its local cache already.

    Asking takes seconds a file, and half a minute where there is no network.
    """
    options["revision"] = resolved.revision
    if resolved.kind == "hub" and in_hub_cache(resolved.path, resolved.revision):
        try:
            return builder.from_pretrained(resolved.path, local_files_only=True, **options)
        except OSError:
            log.info("the local copy of %s is not complete", resolved.path)
    return builder.from_pretrained(resolved.path, **options)


# ---- options ----


def _task(task: str, num_labels: int | None) -> str:
    name = str(getattr(task, "value", task))
    if name not in TASKS:
        raise ModelError(f"unknown task {name!r}; known: {', '.join(TASKS)}{hint(name, TASKS)}")
    if num_labels is not None and name not in LABELLED:
        raise ModelError(f"num_labels has no meaning for the task {name}")
    if num_labels is None and name in LABELLED:
        raise ModelError(f"the task {name} needs num_labels")
    return name


def _dtype(name: str) -> Any:
    import torch

    if name == "auto":
        on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
        return torch.float32 if on_cpu else "auto"
    full = DTYPES.get(name, name)
    if full not in DTYPES.values():
        known = ["auto", *DTYPES.values(), *DTYPES]
        raise ModelError(f"unknown dtype {name!r}; known: {', '.join(known)}{hint(name, known)}")
    return getattr(torch, full)


def _quantization(name: str) -> str:
    """The storage that a quantisation's name stands for."""
    if name not in QUANTIZATIONS:
        raise ModelError(f"unknown quantization {name!r}; known: {', '.join(QUANTIZATIONS)}{hint(name, QUANTIZATIONS)}")
    kind = QUANTIZATIONS[name]
    if kind != "native" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'quantization {name} needs bitsandbytes; run: pip install "deltatune[quant]", or use native NF4'
        )
    return kind


def _bitsandbytes(kind: str, dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=True,
    )


def check_backend(resolved: ResolvedModel) -> None:
    """A checkpoint that is quantised already needs the package that reads it.

    Raises:
        ModelError: that package is not installed; says how to install it.
    """
    method = quantised_by(resolved)
    package, install = BACKENDS.get(str(method), ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise ModelError(f"{resolved.name} is quantised by {method}, which needs {package}; run: pip install {install}")


def quantised_by(resolved: ResolvedModel) -> str | None:
    """What the files of a model are quantised by, as their configuration says; None for ordinary weights."""
    from transformers import AutoConfig

    config = getattr(_pretrained(AutoConfig, resolved), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
