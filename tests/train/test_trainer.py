"""The trainer for adapters: the loss it trains on, what a checkpoint holds, and what a failed save leaves."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_recipe
from torch.nn.functional import cross_entropy

from deltatune import LoraConfig, get_peft_model
from deltatune.train.arguments import training_arguments
from deltatune.train.data import Collator, Encoded
from deltatune.train.trainer import (
    AdapterTrainer,
    CheckpointSaveError,
    EpochLengthSampler,
    FlatCollator,
    checkpoint_step,
    list_checkpoints,
)
from small_runs import small_model, small_tokenizer

ROWS = [
    Encoded([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]),
    Encoded([11, 12, 13], [-100, 12, 13]),
    Encoded([21, 22, 23, 24, 25, 26, 27], [-100] * 5 + [26, 27]),
    Encoded([31, 32, 33, 34], [-100, -100, 33, 34]),
]


def tuned(**options):
    """A tiny model whose adapter is not at zero."""
    model = get_peft_model(small_model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def make_trainer(tmp_path, model=None, rows=ROWS, flat=False, **sections):
    sections.setdefault("train", {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 4, "save_steps": 2})
    options = sections.pop("options", {})
    recipe = make_recipe(tmp_path, Path("unused"), **sections)
    collator = Collator(small_tokenizer())
    return AdapterTrainer(
        model=model or tuned(),
        args=training_arguments(recipe, tmp_path / "run", len(rows)),
        data_collator=FlatCollator(collator) if flat else collator,
        train_dataset=rows,
        label_smoothing=recipe.train.label_smoothing,
        **options,
    )


def loss_of(trainer, rows=ROWS, **kwargs):
    trainer.model.eval()
    return trainer.compute_loss(trainer.model, trainer.data_collator(rows), **kwargs)


def direct_loss(model, rows=ROWS, smoothing=0.0, count=None):
    """The mean loss of the trained tokens, from all logits, one row at a time."""
    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        total = total + cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
        tokens += int((targets != -100).sum())
    return total / (count or tokens)


# ---- the loss ----


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [None, 20])
def test_the_loss_is_that_of_the_rows_alone(tmp_path, flat, smoothing, count):
    train = {"label_smoothing": smoothing, "max_steps": 1}
    trainer = make_trainer(tmp_path, flat=flat, train=train)
    assert trainer.selects
    given = None if count is None else torch.tensor(count)
    found = loss_of(trainer, num_items_in_batch=given)
    torch.testing.assert_close(found, direct_loss(trainer.model, smoothing=smoothing, count=count))


def test_logits_are_computed_at_trained_positions_only(tmp_path):
    trainer = make_trainer(tmp_path)
    _, outputs = loss_of(trainer, return_outputs=True)
    targets = {i for row in ROWS for i, label in enumerate(row.labels[1:]) if label != -100}
    assert outputs.logits.shape[1] == len(targets) < 7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_model_without_chosen_positions_takes_the_usual_way(tmp_path, smoothing):
    trainer = make_trainer(tmp_path, train={"label_smoothing": smoothing, "max_steps": 1})
    trainer.selects = False
    torch.testing.assert_close(loss_of(trainer), direct_loss(trainer.model, smoothing=smoothing))


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """Rows have different numbers of trained tokens, so a mean of means would be wrong."""
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        train = {
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "max_steps": 3,
            "save_strategy": "no",
            "save_steps": None,
            "optim": "sgd",
        }
        trainer = make_trainer(tmp_path / str(batch_size), tuned(), train=train)
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for others in weights[1:]:
        for name, weight in others.items():
            torch.testing.assert_close(weight, weights[0][name], rtol=1e-4, atol=1e-6)


# ---- order of the data ----


def test_the_length_grouped_order_depends_on_seed_and_epoch_only():
    lengths = [3, 9, 4, 8, 5, 7, 6, 2] * 4
    sampler, other = EpochLengthSampler(4, lengths, seed=1), EpochLengthSampler(4, lengths, seed=2)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first
    assert sorted(first) == list(range(32))
    assert list(other) != first
    sampler.set_epoch(1)
    assert list(sampler) != first


# ---- checkpoints ----


def test_a_checkpoint_holds_the_adapter_and_never_the_base(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    saved = list_checkpoints(tmp_path / "run")
    assert [checkpoint_step(path) for path in saved] == [2, 4]
    names = {path.name for path in saved[0].iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    assert {"rng_state.pth", "trainer_state.json"} <= names
    assert not {"model.safetensors", "training_args.bin", "tokenizer.json", "pytorch_model.bin"} & names
    assert all("lora_" in key for key in load_file(saved[0] / "adapter_model.safetensors"))


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.0])
    train = {
        "batch_size": 4,
        "gradient_accumulation": 1,
        "max_steps": 5,
        "save_steps": 1,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best": True,
    }
    options = {"evaluator": lambda model: {"loss": next(losses)}, "eval_dataset": ROWS}
    trainer = make_trainer(tmp_path, train=train, options=options)
    kept = {}
    original = trainer._write_checkpoint

    def remember(directory):
        original(directory)
        kept[trainer.state.global_step] = load_file(directory / "adapter_model.safetensors")

    trainer._write_checkpoint = remember
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert 2 in [checkpoint_step(path) for path in list_checkpoints(tmp_path / "run")]
    for name, weight in kept[2].items():
        here = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(here, weight), name


def test_evaluation_leaves_the_random_state_alone(tmp_path):
    options = {"evaluator": lambda model: {"loss": float(torch.rand(()))}, "eval_dataset": ROWS}
    trainer = make_trainer(tmp_path, options=options)
    trainer.model.train()
    state = torch.random.get_rng_state()
    assert 0 <= trainer.evaluate()["eval_loss"] <= 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.model.training


@pytest.mark.parametrize("what", ["adapter", "optimizer", "state"])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch, what):
    trainer = make_trainer(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_later(*args, **kwargs):
        if trainer.state.global_step >= 4:
            raise full
        return originals[what](*args, **kwargs)

    originals = {
        "adapter": trainer._save,
        "optimizer": trainer._save_optimizer_and_scheduler,
        "state": trainer._save_rng_state,
    }
    names = {"adapter": "_save", "optimizer": "_save_optimizer_and_scheduler", "state": "_save_rng_state"}
    monkeypatch.setattr(trainer, names[what], fail_later)
    with pytest.raises(CheckpointSaveError) as caught:
        trainer.train()
    text = str(caught.value)
    assert "could not write" in text
    assert "No space left on device" in text
    assert "checkpoint-2 is intact" in text
    assert "--resume" in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")


def test_a_write_error_of_a_library_is_said_the_same_way(tmp_path, monkeypatch):
    """torch.save raises RuntimeError when the disk is full, safetensors an error of its own."""
    trainer = make_trainer(tmp_path)

    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(CheckpointSaveError, match="no earlier checkpoint exists: make room, then start again"):
        trainer.train()
    assert list_checkpoints(tmp_path / "run") == []


def test_resuming_refuses_a_damaged_checkpoint(tmp_path):
    make_trainer(tmp_path).train()
    weights = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        make_trainer(tmp_path, train={"max_steps": 6}).train(resume_from_checkpoint=str(weights.parent))


def test_directories_that_are_no_checkpoints_are_not_taken_for_one(tmp_path):
    for name in ("checkpoint-3", "checkpoint-12", "checkpoint-x", "checkpoint-", ".checkpoint-20.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-30").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-12"]


def test_what_checkpoints_leave_out_is_known() -> None:
    from deltatune import LoraConfig, PromptEncoderConfig, get_peft_model
    from deltatune.train.trainer import unsaved
    from tiny import llama

    assert unsaved(get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", bias="all"))) == []
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    names = unsaved(get_peft_model(llama(), config))
    assert names
    assert all("prompt_encoder" in name for name in names)
