"""Files of the library `adapters` 1.3 (written by scripts/adapters_fixtures.py): the outputs are that library's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltatune import Fuse, PeftModel
from deltatune.errors import AdapterLoadError, ConfigError
from deltatune.formats.adapters_hub import composition, load_adapter, load_adapter_setup

FOLDER = Path(__file__).parent / "adapters_hub"
CASES = sorted(p.name for p in FOLDER.iterdir() if not p.name.startswith(("base", "fusion")))


def base(kind: str) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(FOLDER / f"base-{kind}")
    model = transformers.AutoModel.from_config(config)
    model.load_state_dict(load_file(FOLDER / f"base-{kind}" / "model.safetensors"))
    return model.eval()


def output(model: torch.nn.Module, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, that library's)."""
    saved = load_file(FOLDER / case / "output.safetensors")
    with torch.no_grad():
        out = model(input_ids=saved["input_ids"], attention_mask=saved["attention_mask"]).last_hidden_state
    real = saved["attention_mask"].bool()
    return out[real], saved["output"][real]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_equal(case, tmp_path):
    kind = case.rpartition("-")[2]
    model = load_adapter(base(kind), FOLDER / case)
    assert model.active_adapters == ["task"]
    got, wanted = output(model, case)
    assert torch.allclose(got, wanted, atol=2e-5)
    plain, _ = output(base(kind), case)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    model.save_pretrained(tmp_path)  # and from here on it is an adapter like any other
    again = PeftModel.from_pretrained(base(kind), tmp_path / "task", adapter_name="task")
    assert torch.allclose(output(again, case)[0], wanted, atol=2e-5)


def test_a_fusion_with_its_adapters():
    model = load_adapter_setup(base("bert"), FOLDER / "fusion-bert")
    assert model.adapters.plan.tree == Fuse("a", "b")
    got, wanted = output(model, "fusion-bert")
    assert torch.allclose(got, wanted, atol=2e-5)


def test_what_is_refused(tmp_path):
    place = shutil.copytree(FOLDER / "seq_bn-bert", tmp_path / "broken")
    tensors = load_file(place / "adapter.safetensors")
    first = next(iter(tensors))
    save_file(
        {k: v for k, v in tensors.items() if k != first} | {"other.weight": torch.zeros(2)},
        place / "adapter.safetensors",
    )
    model = base("bert")
    with pytest.raises(AdapterLoadError, match=r"1 keys are missing.*1 keys are unexpected: other\.weight"):
        load_adapter(model, place)
    assert not hasattr(model, "_deltatune")
    (place / "adapter.safetensors").rename(place / "pytorch_adapter.bin")
    with pytest.raises(AdapterLoadError, match=r"is a pickle, which is not read; convert it once: .*save_file"):
        load_adapter(base("bert"), place)
    with pytest.raises(AdapterLoadError, match=r"has no adapter_config\.json"):
        load_adapter(base("bert"), tmp_path)
    with pytest.raises(ConfigError, match="'MultiTask' of the library adapters is not read"):
        composition({"type": "MultiTask", "children": []})
