"""deltatune: parameter-efficient fine-tuning of transformers, every method behind one API.

The names are loaded when they are first used, so that `import deltatune` costs nothing beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltatune.version import __version__

#: public name -> the module that has it
_WHERE: dict[str, str] = {
    **dict.fromkeys(
        ["PeftConfig", "PeftType", "TargetedConfig", "TaskType", "get_peft_config", "register"], "deltatune.config"
    ),
    **dict.fromkeys(
        [
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
        ],
        "deltatune.peft_model",
    ),
    **dict.fromkeys(
        [
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ],
        "deltatune.auto",
    ),
    **dict.fromkeys(["get_peft_model", "inject_adapter_in_model"], "deltatune.mapping"),
    "dequantize_model": "deltatune.stores.dense",
    "prepare_model_for_kbit_training": "deltatune.kbit",
    "quantize_and_adapt": "deltatune.quantised_start",
    "quantize_model": "deltatune.stores.nf4_layer",
    **dict.fromkeys(["convert_to_lora", "save_as_lora"], "deltatune.convert"),
    **dict.fromkeys(["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"], "deltatune.state"),
    **dict.fromkeys(["get_layer_status", "get_model_status"], "deltatune.status"),
    **dict.fromkeys(
        ["AdapterLoadError", "BaseMismatchError", "CannotMergeError", "ConfigError", "DeltatuneError", "TargetError"],
        "deltatune.errors",
    ),
    **dict.fromkeys(["CordaConfig", "preprocess_corda"], "deltatune.inits.corda"),
    **dict.fromkeys(["get_eva_state_dict", "initialize_lora_eva_weights"], "deltatune.inits.eva_peft"),
    **dict.fromkeys(["LoftQConfig", "loftq_weights"], "deltatune.inits.loftq"),
    **dict.fromkeys(["LoraGAConfig", "preprocess_loraga"], "deltatune.inits.lora_ga"),
    **dict.fromkeys(["Average", "BatchSplit", "Fuse", "Parallel", "Split", "Stack"], "deltatune.core.composition"),
    "AdaLoraConfig": "deltatune.methods.adalora",
    "AdaMixConfig": "deltatune.methods.adamix",
    "AdaptionPromptConfig": "deltatune.methods.adaption_prompt",
    "BitFitConfig": "deltatune.methods.bitfit",
    "BottleneckConfig": "deltatune.methods.bottleneck",
    "HoulsbyConfig": "deltatune.methods.bottleneck",
    "ParallelConfig": "deltatune.methods.bottleneck",
    "PfeifferConfig": "deltatune.methods.bottleneck",
    "DiffPruningConfig": "deltatune.methods.diff_pruning",
    "EvaConfig": "deltatune.inits.eva",
    "FarConfig": "deltatune.methods.far",
    "FishMaskConfig": "deltatune.methods.fish_mask",
    "CompacterConfig": "deltatune.methods.compacter",
    "CompacterPlusPlusConfig": "deltatune.methods.compacter",
    "FullConfig": "deltatune.methods.full",
    "FusionConfig": "deltatune.methods.fusion",
    "HiraConfig": "deltatune.methods.hira",
    "IA3Config": "deltatune.methods.ia3",
    "IntrinsicPromptConfig": "deltatune.methods.intrinsic_prompt",
    "LNTuningConfig": "deltatune.methods.ln_tuning",
    "KronaConfig": "deltatune.methods.krona",
    "DiReftConfig": "deltatune.methods.reft",
    "LadderConfig": "deltatune.methods.ladder",
    "LoReftConfig": "deltatune.methods.reft",
    "LoHaConfig": "deltatune.methods.loha",
    "LoKrConfig": "deltatune.methods.lokr",
    "LoraConfig": "deltatune.methods.lora",
    "LoraDropConfig": "deltatune.methods.lora_drop",
    "LoraDropoutConfig": "deltatune.methods.lora_dropout",
    "LoraFAConfig": "deltatune.methods.lora_fa",
    "MultitaskPromptTuningConfig": "deltatune.methods.multitask_prompt",
    "MultitaskPromptTuningInit": "deltatune.methods.multitask_prompt",
    "PTuningV2Config": "deltatune.methods.p_tuning_v2",
    "PrefixTuningConfig": "deltatune.methods.prefix_tuning",
    "PromptEncoderConfig": "deltatune.methods.p_tuning",
    "PromptEncoderReparameterizationType": "deltatune.methods.p_tuning",
    "PromptTuningConfig": "deltatune.methods.prompt_tuning",
    "PromptTuningInit": "deltatune.methods.prompt_tuning",
    "S4Config": "deltatune.methods.s4",
    "SaidConfig": "deltatune.methods.said",
    "ShiraConfig": "deltatune.methods.shira",
    "SparseAdapterConfig": "deltatune.methods.sparse_adapter",
    "TrainableTokensConfig": "deltatune.methods.trainable_tokens",
    "MAMConfig": "deltatune.methods.union",
    "UnionConfig": "deltatune.methods.union",
    "UniPELTConfig": "deltatune.methods.unipelt",
    "GatedLoraConfig": "deltatune.methods.unipelt",
    "GatedPrefixConfig": "deltatune.methods.unipelt",
    "VeraConfig": "deltatune.methods.vera",
    "initialize_kv_prefix_from_past_key_values": "deltatune.methods.prefix_tuning",
    "initialize_kv_prefix_from_text": "deltatune.methods.prefix_tuning",
    "plan_targets": "deltatune.core.sites",
    "prepare_init": "deltatune.inits.data",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'deltatune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from deltatune.auto import AutoPeftModel as AutoPeftModel
    from deltatune.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from deltatune.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from deltatune.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from deltatune.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from deltatune.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from deltatune.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from deltatune.config import PeftConfig as PeftConfig
    from deltatune.config import PeftType as PeftType
    from deltatune.config import TargetedConfig as TargetedConfig
    from deltatune.config import TaskType as TaskType
    from deltatune.config import get_peft_config as get_peft_config
    from deltatune.config import register as register
    from deltatune.convert import convert_to_lora as convert_to_lora
    from deltatune.convert import save_as_lora as save_as_lora
    from deltatune.core.composition import Average as Average
    from deltatune.core.composition import BatchSplit as BatchSplit
    from deltatune.core.composition import Fuse as Fuse
    from deltatune.core.composition import Parallel as Parallel
    from deltatune.core.composition import Split as Split
    from deltatune.core.composition import Stack as Stack
    from deltatune.core.sites import plan_targets as plan_targets
    from deltatune.errors import AdapterLoadError as AdapterLoadError
    from deltatune.errors import BaseMismatchError as BaseMismatchError
    from deltatune.errors import CannotMergeError as CannotMergeError
    from deltatune.errors import ConfigError as ConfigError
    from deltatune.errors import DeltatuneError as DeltatuneError
    from deltatune.errors import TargetError as TargetError
    from deltatune.inits.corda import CordaConfig as CordaConfig
    from deltatune.inits.corda import preprocess_corda as preprocess_corda
    from deltatune.inits.data import prepare_init as prepare_init
    from deltatune.inits.eva import EvaConfig as EvaConfig
    from deltatune.inits.eva_peft import get_eva_state_dict as get_eva_state_dict
    from deltatune.inits.eva_peft import initialize_lora_eva_weights as initialize_lora_eva_weights
    from deltatune.inits.loftq import LoftQConfig as LoftQConfig
    from deltatune.inits.loftq import loftq_weights as loftq_weights
    from deltatune.inits.lora_ga import LoraGAConfig as LoraGAConfig
    from deltatune.inits.lora_ga import preprocess_loraga as preprocess_loraga
    from deltatune.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from deltatune.mapping import get_peft_model as get_peft_model
    from deltatune.mapping import inject_adapter_in_model as inject_adapter_in_model
    from deltatune.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from deltatune.methods.adamix import AdaMixConfig as AdaMixConfig
    from deltatune.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from deltatune.methods.bitfit import BitFitConfig as BitFitConfig
    from deltatune.methods.bottleneck import BottleneckConfig as BottleneckConfig
    from deltatune.methods.bottleneck import HoulsbyConfig as HoulsbyConfig
    from deltatune.methods.bottleneck import ParallelConfig as ParallelConfig
    from deltatune.methods.bottleneck import PfeifferConfig as PfeifferConfig
    from deltatune.methods.compacter import CompacterConfig as CompacterConfig
    from deltatune.methods.compacter import CompacterPlusPlusConfig as CompacterPlusPlusConfig
    from deltatune.methods.diff_pruning import DiffPruningConfig as DiffPruningConfig
    from deltatune.methods.far import FarConfig as FarConfig
    from deltatune.methods.fish_mask import FishMaskConfig as FishMaskConfig
    from deltatune.methods.full import FullConfig as FullConfig
    from deltatune.methods.fusion import FusionConfig as FusionConfig
    from deltatune.methods.hira import HiraConfig as HiraConfig
    from deltatune.methods.ia3 import IA3Config as IA3Config
    from deltatune.methods.intrinsic_prompt import IntrinsicPromptConfig as IntrinsicPromptConfig
    from deltatune.methods.krona import KronaConfig as KronaConfig
    from deltatune.methods.ladder import LadderConfig as LadderConfig
    from deltatune.methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from deltatune.methods.loha import LoHaConfig as LoHaConfig
    from deltatune.methods.lokr import LoKrConfig as LoKrConfig
    from deltatune.methods.lora import LoraConfig as LoraConfig
    from deltatune.methods.lora_drop import LoraDropConfig as LoraDropConfig
    from deltatune.methods.lora_dropout import LoraDropoutConfig as LoraDropoutConfig
    from deltatune.methods.lora_fa import LoraFAConfig as LoraFAConfig
    from deltatune.methods.multitask_prompt import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from deltatune.methods.multitask_prompt import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from deltatune.methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from deltatune.methods.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from deltatune.methods.p_tuning_v2 import PTuningV2Config as PTuningV2Config
    from deltatune.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from deltatune.methods.prefix_tuning import (
        initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
    )
    from deltatune.methods.prefix_tuning import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
    from deltatune.methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from deltatune.methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from deltatune.methods.reft import DiReftConfig as DiReftConfig
    from deltatune.methods.reft import LoReftConfig as LoReftConfig
    from deltatune.methods.s4 import S4Config as S4Config
    from deltatune.methods.said import SaidConfig as SaidConfig
    from deltatune.methods.shira import ShiraConfig as ShiraConfig
    from deltatune.methods.sparse_adapter import SparseAdapterConfig as SparseAdapterConfig
    from deltatune.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from deltatune.methods.union import MAMConfig as MAMConfig
    from deltatune.methods.union import UnionConfig as UnionConfig
    from deltatune.methods.unipelt import GatedLoraConfig as GatedLoraConfig
    from deltatune.methods.unipelt import GatedPrefixConfig as GatedPrefixConfig
    from deltatune.methods.unipelt import UniPELTConfig as UniPELTConfig
    from deltatune.methods.vera import VeraConfig as VeraConfig
    from deltatune.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from deltatune.peft_model import PeftModel as PeftModel
    from deltatune.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
    from deltatune.peft_model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from deltatune.peft_model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from deltatune.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from deltatune.peft_model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from deltatune.peft_model import PeftModelForTokenClassification as PeftModelForTokenClassification
    from deltatune.quantised_start import quantize_and_adapt as quantize_and_adapt
    from deltatune.state import get_peft_model_state_dict as get_peft_model_state_dict
    from deltatune.state import load_peft_weights as load_peft_weights
    from deltatune.state import set_peft_model_state_dict as set_peft_model_state_dict
    from deltatune.status import get_layer_status as get_layer_status
    from deltatune.status import get_model_status as get_model_status
    from deltatune.stores.dense import dequantize_model as dequantize_model
    from deltatune.stores.nf4_layer import quantize_model as quantize_model
