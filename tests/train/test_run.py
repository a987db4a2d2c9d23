"""Whole runs on a tiny model: what is written, what is refused, and that a killed run resumes exactly."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import make_recipe, save_model, save_rows

from deltatune.train.recipe import build_recipe, load_recipe
from deltatune.train.run import load_result, plan, train
from deltatune.train.rundir import RunDirError, decide, locked
from deltatune.train.trainer import CheckpointSaveError, checkpoint_step, list_checkpoints

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model_dir):
    return make_recipe(tmp_path, model_dir)


def changed(recipe, **sections):
    raw = recipe.model_dump()
    for name, section in sections.items():
        raw[name] = {**raw[name], **section} if isinstance(section, dict) else section
    return build_recipe(raw, "tests")


def run(recipe, **options):
    """The result and what was printed."""
    console = Console(file=StringIO(), width=200)
    result = train(recipe, console=console, **options)
    return result, console.file.getvalue()


def metrics(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    """Whether two weight files hold the same numbers, bit for bit (the order of their headers is random)."""
    weights, others = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)


# ---- one run ----


def test_a_run_leaves_the_adapter_and_its_report(recipe):
    result, printed = run(recipe)
    names = {path.name for path in recipe.run_dir.iterdir()}
    assert {WEIGHTS, "adapter_config.json", "metrics.jsonl", "loss.png", "README.md", "recipe.yaml"} <= names
    assert not {"model.safetensors", "training_args.bin"} & names
    assert result.steps == 12
    assert result.trainable == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert result.adapter_bytes == (recipe.run_dir / WEIGHTS).stat().st_size
    assert result.peak_memory > 10_000_000
    assert result.after["loss"] < result.before["loss"]
    assert {"accuracy", "loss", "examples"} <= result.after.keys()
    assert len(result.samples) == 2
    assert {sample["expected"] for sample in result.samples} == {"yes", "no"}
    assert [row["step"] for row in metrics(recipe)] == [2, 4, 6, 8, 10, 12]
    assert "step 12/12" in printed
    assert load_result(recipe.run_dir).after == result.after
    assert (recipe.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_written_recipe_reproduces_the_run_bit_for_bit(recipe, tmp_path):
    run(recipe)
    again = changed(load_recipe(recipe.run_dir / "recipe.yaml"), output_dir=str(tmp_path / "again"))
    run(again)
    assert same(again.run_dir, recipe.run_dir)


def test_the_adapter_loads_with_the_measured_loss(recipe):
    from deltatune import AutoPeftModelForCausalLM
    from deltatune.train.data import load_examples
    from deltatune.train.evaluate import evaluate
    from deltatune.train.models import load_tokenizer, resolve_model

    result, _ = run(recipe)
    model = AutoPeftModelForCausalLM.from_pretrained(str(recipe.run_dir))
    tokenizer = load_tokenizer(resolve_model(recipe.model))
    found = evaluate(model, tokenizer, load_examples(recipe.data).eval, recipe.data, batch_size=4)
    assert found["loss"] == pytest.approx(result.after["loss"], rel=1e-5)


def test_the_model_card_names_results_sources_and_recipe(recipe):
    result, _ = run(recipe)
    card = (recipe.run_dir / "README.md").read_text()
    assert f"| accuracy | {result.before['accuracy']:.3f} | {result.after['accuracy']:.3f} |" in card
    for part in ("library_name: peft", "loss.png", "peft_type: LORA", "Licences and citations", "peak memory"):
        assert part in card


@pytest.mark.parametrize(
    "train_section",
    [
        {"padding_free": True},
        {"group_by_length": True},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing": 0.1},
        {"precision": "bf16"},
        {"optim": "adamw_8bit"},
        {"optim": "adafactor"},
        {"lr_scheduler": "cosine", "warmup_ratio": 0.25},
        {"epochs": 1.5, "warmup_steps": 2},
    ],
    ids=lambda section: "-".join(section),
)
def test_every_way_of_training_lowers_the_loss(recipe, train_section):
    result, _ = run(changed(recipe, train={**train_section, "learning_rate": 0.005}, eval={"samples": 0}))
    assert result.after["loss"] < result.before["loss"]


def test_packing_trains_fewer_rows_and_lowers_the_loss(recipe):
    packed = changed(recipe, data={"packing": True, "max_length": 256}, train={"max_steps": 12, "batch_size": 1})
    assert plan(packed).rows < 12
    result, _ = run(packed)
    assert result.after["loss"] < result.before["loss"]


def test_checkpointing_and_padding_free_train_the_same_weights(recipe, tmp_path):
    """No dropout, so that recomputing and rearranging draw nothing."""
    still = changed(recipe, method={"lora_dropout": 0.0}, train={"max_steps": 4})
    found = []
    for i, section in enumerate(({}, {"gradient_checkpointing": True}, {"padding_free": True})):
        run(changed(still, output_dir=str(tmp_path / str(i)), train=section))
        found.append(load_file(tmp_path / str(i) / WEIGHTS))
    for other in found[1:]:
        for name, weight in found[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-5)


def test_evaluation_during_training_logs_and_never_changes_the_weights(recipe, tmp_path):
    watched = changed(
        recipe,
        output_dir=str(tmp_path / "watched"),
        train={"eval_strategy": "steps", "eval_steps": 3},
        eval={"generate_during_training": True, "sample_during_training": True},
    )
    run(recipe)
    _, printed = run(watched)
    assert same(watched.run_dir, recipe.run_dir)
    evaluations = [row for row in metrics(watched) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6, 9, 12]
    assert all("eval_accuracy" in row for row in evaluations)
    assert "eval_loss" in printed
    samples = [json.loads(line) for line in (watched.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [3, 3, 6, 6, 9, 9, 12, 12]
    assert samples[0].keys() == {"step", "prompt", "expected", "answer"}


def test_early_stopping_ends_the_run_and_the_best_checkpoint_is_kept(recipe):
    watched = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best": True,
        "save_total_limit": 1,
        "early_stopping_patience": 2,
        "early_stopping_threshold": 100.0,
        "max_steps": 20,
    }
    result, _ = run(changed(recipe, train=watched))
    assert result.steps == 6  # the first evaluation counts as the best, the next two bring no such gain
    by_step = {row["step"]: row["eval_loss"] for row in metrics(recipe) if "eval_loss" in row}
    assert result.best_step == min(by_step, key=by_step.get)
    assert result.after["loss"] == pytest.approx(by_step[result.best_step], rel=1e-5)


def test_csv_and_tensorboard(recipe):
    run(changed(recipe, train={"logging": ["csv", "tensorboard"], "eval_strategy": "epoch"}))
    with (recipe.run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(metrics(recipe)) == 8
    assert float(rows[0]["loss"]) == metrics(recipe)[0]["loss"]
    assert any(row["eval_loss"] for row in rows)
    assert list((recipe.run_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_a_run_without_held_out_examples(recipe):
    result, _ = run(changed(recipe, data={"eval_path": None, "eval_fraction": 0.0}))
    assert result.before == result.after == {}
    assert result.samples == []


def test_whole_copies_of_modules_train_and_are_saved(recipe):
    result, _ = run(changed(recipe, method={"modules_to_save": ["lm_head"]}))
    assert any("lm_head" in key for key in load_file(recipe.run_dir / WEIGHTS))
    assert result.after["loss"] < result.before["loss"]


def test_another_method(recipe, tmp_path):
    biased = save_model(tmp_path / "biased", attention_bias=True)
    raw = {**recipe.model_dump(), "model": str(biased), "method": {"peft_type": "BITFIT"}}
    result, _ = run(build_recipe(raw, "tests"))
    assert all(key.endswith("bias") for key in load_file(recipe.run_dir / WEIGHTS))
    assert result.after["loss"] < result.before["loss"]


PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}


def test_virtual_tokens_train_with_all_logits(recipe):
    prompted = build_recipe({**recipe.model_dump(), "method": PROMPT}, "tests")
    result, _ = run(changed(prompted, train={"learning_rate": 0.1}))
    assert result.trainable == 4 * 32
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize("key", ["data.packing", "train.padding_free"])
def test_virtual_tokens_keep_rows_apart(recipe, key):
    section, name = key.split(".")
    prompted = build_recipe({**recipe.model_dump(), "method": PROMPT}, "tests")
    with pytest.raises(ValueError, match=f"{key} puts several examples .* PROMPT_TUNING .* set {key}=false"):
        run(changed(prompted, **{section: {name: True}}))


# ---- what stops a run ----


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"optim": "adamw_troch"}}, "no optimiser of transformers; did you mean 'adamw_torch'"),
        ({"train": {"optim": "galore_adamw"}}, "which are frozen here: use method FULL with in_place=true"),
        ({"train": {"optim": "lomo"}}, "set train.gradient_accumulation=1"),
        ({"train": {"optim_target_modules": "all-linear"}}, "not adamw_torch; drop it"),
        ({"train": {"optim": "paged_adamw_8bit"}}, "there is no GPU: use adamw_8bit"),
        ({"train": {"logging": ["tensorbord"]}}, "no target 'tensorbord'; did you mean 'tensorboard'"),
        ({"train": {"precision": "fp16"}}, "needs a GPU"),
        ({"data": {"max_length": 5000}}, "5000"),
        ({"method": {"target_modules": ["q_prjo"]}}, "did you mean 'q_proj'"),
        (
            {"train": {"eval_strategy": "epoch", "early_stopping_patience": 1, "metric_for_best": "accuracy"}},
            "set eval.generate_during_training=true",
        ),
        (
            {"data": {"eval_path": None, "eval_fraction": 0.0}, "train": {"eval_strategy": "epoch"}},
            "there are no held-out examples",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence(recipe, sections, says):
    with pytest.raises(ValueError) as caught:
        run(changed(recipe, **sections))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_bitsandbytes_gives_the_install_command(recipe, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ValueError, match=r'needs bitsandbytes.*pip install "deltatune\[quant\]"'):
        run(changed(recipe, train={"optim": "adamw_8bit"}))


def test_a_loss_that_is_no_number_stops_the_run(recipe):
    with pytest.raises(ValueError, match="loss became nan by step .*lower train.learning_rate"):
        run(changed(recipe, train={"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 40}))


def test_several_processes_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        run(recipe)


# ---- the output directory ----


def test_a_finished_run_is_told_and_not_repeated(recipe):
    first, _ = run(recipe)
    stamp = (recipe.run_dir / WEIGHTS).stat().st_mtime_ns
    again, printed = run(recipe)
    assert again.status == "finished"
    assert again.after == first.after
    assert "step" not in printed
    assert (recipe.run_dir / WEIGHTS).stat().st_mtime_ns == stamp
    assert run(recipe, overwrite=True)[0].status == "trained"
    assert (recipe.run_dir / WEIGHTS).stat().st_mtime_ns != stamp


def test_another_run_in_the_directory_is_refused(recipe):
    run(recipe)
    other = changed(recipe, train={"learning_rate": 0.5})
    for options in ({}, {"resume": True}, {"resume": False}):
        with pytest.raises(RunDirError, match=r"holds another run \(its recipe differs in train.learning_rate\)"):
            run(other, **options)
    result, _ = run(other, overwrite=True)
    assert result.status == "trained"


def test_a_run_that_never_began_stands_in_nobodys_way(recipe, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        run(changed(recipe, method={"target_modules": ["q_prjo"]}))
    assert [path.name for path in recipe.run_dir.iterdir()] in ([], [".lock"])  # said before anything is written
    from deltatune.train.run import _Run

    def fail(self):
        raise OSError("the data set moved")

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "measure_before", fail)
        with pytest.raises(OSError, match="moved"):
            run(changed(recipe, train={"learning_rate": 0.5}))
    result, printed = run(recipe)
    assert "broke off before it began" in printed
    assert result.status == "trained"


def test_a_setting_that_a_later_release_adds_makes_no_other_run(recipe):
    run(recipe)
    path = recipe.run_dir / "run.json"
    state = json.loads(path.read_text())
    del state["recipe"]["train"]["padding_free"], state["recipe"]["report"]
    path.write_text(json.dumps(state))
    assert decide(recipe).action == "finished"
    with pytest.raises(RunDirError, match=r"differs in train.padding_free\)"):
        decide(changed(recipe, train={"padding_free": True}))


def test_overwriting_removes_what_the_earlier_run_wrote_and_nothing_else(recipe):
    run(changed(recipe, train={"logging": ["csv"], "save_steps": 2}))
    (recipe.run_dir / "notes.txt").write_text("mine")
    run(changed(recipe, train={"max_steps": 4}), overwrite=True)
    names = {path.name for path in recipe.run_dir.iterdir()}
    assert "notes.txt" in names
    assert "metrics.csv" not in names
    assert [checkpoint_step(path) for path in list_checkpoints(recipe.run_dir)] == [4]


def test_a_longer_run_goes_on_when_asked_to(recipe):
    run(recipe)
    longer = changed(recipe, train={"max_steps": 16})
    with pytest.raises(RunDirError, match="--resume continues it with the new values"):
        run(longer)
    result, printed = run(longer, resume=True)
    assert result.steps == 16
    assert "from checkpoint-12" in printed
    assert [row["step"] for row in metrics(recipe)] == [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize("resume", [None, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_someone_else_are_never_touched(recipe, resume, overwrite):
    recipe.run_dir.mkdir()
    (recipe.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirError, match=r"thesis.tex|contradict"):
        run(recipe, resume=resume, overwrite=overwrite)
    assert [path.name for path in recipe.run_dir.iterdir()] == ["thesis.tex"]


def test_there_must_be_something_to_resume(recipe):
    with pytest.raises(RunDirError, match="no run to resume"):
        run(recipe, resume=True)
    assert not recipe.run_dir.exists()


def test_an_output_directory_that_is_a_file(recipe):
    recipe.run_dir.touch()
    with pytest.raises(RunDirError, match="is a file"):
        run(recipe)


def test_one_process_at_a_time(recipe):
    with locked(recipe.run_dir), pytest.raises(RunDirError, match="another process is training"):
        run(recipe)


def test_unusable_data_leaves_the_earlier_run_alone(recipe, tmp_path):
    run(recipe)
    before = (recipe.run_dir / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        run(changed(recipe, data={"path": str(tmp_path / "nowhere.jsonl")}), overwrite=True)
    assert (recipe.run_dir / WEIGHTS).read_bytes() == before
    assert decide(recipe).action == "finished"


# ---- killed and resumed ----


def _die_at(recipe_yaml, place, step):
    """In another process: train, and die without a word at `step`, between steps or inside a save."""
    from deltatune.train import callbacks, trainer

    recipe = build_recipe(json.loads(recipe_yaml), "tests")
    owner, name = {
        "step": (callbacks.Stopwatch, "on_step_begin"),
        "backward": (callbacks.Stopwatch, "on_pre_optimizer_step"),
        "save": (trainer.AdapterTrainer, "_save_scaler"),
        "report": (callbacks.Stopwatch, "on_train_end"),
    }[place]
    original = getattr(owner, name)

    def die(self, *args, **kwargs):
        state = self.state if place == "save" else args[1]
        if state.global_step >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(owner, name, die)
    torch.set_num_threads(1)
    train(recipe)


@pytest.fixture(scope="module")
def processes():
    """Processes that start in no time: they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "deltatune.train.trainer", "deltatune.train.evaluate"])
    return context


def kill_at(processes, recipe, place, step):
    process = processes.Process(target=_die_at, args=(recipe.model_dump_json(), place, step))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (recipe.run_dir / "results.json").exists()


HARD = {  # everything that has a state: dropout, noise, a schedule, uneven epochs, an evaluation that saves the best
    "neftune_noise_alpha": 5.0,
    "lr_scheduler": "cosine",
    "warmup_steps": 3,
    "batch_size": 3,
    "epochs": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best": True,
    "early_stopping_patience": 30,
}


@pytest.mark.parametrize("grouped", [False, True], ids=["shuffled", "by length"])
def test_killed_runs_resume_to_the_same_weights(processes, recipe, tmp_path, grouped):
    hard = changed(recipe, train={**HARD, "group_by_length": grouped}, data={"limit": 23})
    unbroken = changed(hard, output_dir=str(tmp_path / "unbroken"))
    expected, _ = run(unbroken)
    points = random.Random(7 if grouped else 8)
    for place, low, high in (("step", 3, 5), ("backward", 6, 8), ("save", 9, 10), ("report", 0, 1)):
        kill_at(processes, hard, place, points.randint(low, high))
    result, printed = run(hard)
    assert "Continuing the run" in printed
    assert result.steps == expected.steps == 12
    assert same(hard.run_dir, unbroken.run_dir)
    assert same(hard.run_dir / "checkpoint-12", unbroken.run_dir / "checkpoint-12")
    assert result.after["loss"] == expected.after["loss"]
    timing = {"epoch", "eval_seconds"}
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in metrics(r)] for r in (hard, unbroken)]
    assert rows[0] == rows[1]
    assert not list(hard.run_dir.glob(".*partial"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(processes, recipe):
    kill_at(processes, recipe, "step", 1)
    result, printed = run(recipe)
    assert "broke off before its first checkpoint" in printed
    assert result.steps == 12


def test_a_run_that_filled_the_disk_goes_on_where_it_was(recipe, tmp_path, monkeypatch):
    from deltatune.train.trainer import AdapterTrainer

    unbroken = changed(recipe, output_dir=str(tmp_path / "unbroken"))
    run(unbroken)

    def full(self, directory):
        if self.state.global_step == 8:
            raise OSError(28, "No space left on device")
        return original(self, directory)

    original = AdapterTrainer._write_checkpoint
    monkeypatch.setattr(AdapterTrainer, "_write_checkpoint", full)
    with pytest.raises(CheckpointSaveError, match="No space left on device; checkpoint-4 is intact"):
        run(recipe)
    monkeypatch.undo()
    result, printed = run(recipe, resume=True)
    assert "from checkpoint-4" in printed
    assert result.steps == 12
    assert same(recipe.run_dir, unbroken.run_dir)


def test_a_full_disk_at_the_very_end_loses_nothing(recipe, monkeypatch):
    from deltatune.train.trainer import AdapterTrainer

    def full(self, output_dir=None, state_dict=None):
        if output_dir == str(recipe.run_dir):
            raise OSError(28, "No space left on device")
        original(self, output_dir, state_dict)

    original = AdapterTrainer._save
    monkeypatch.setattr(AdapterTrainer, "_save", full)
    with pytest.raises(
        CheckpointSaveError, match=f"could not write .*{WEIGHTS}: No space left.*checkpoint-12 is intact"
    ):
        run(recipe)
    monkeypatch.undo()
    result, printed = run(recipe)
    assert "from checkpoint-12" in printed
    assert "step" not in printed
    assert result.steps == 12


def test_an_interrupted_run_says_how_to_go_on(recipe, monkeypatch):
    from deltatune.train.callbacks import Stopwatch

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stopwatch, "on_step_begin", interrupt)
    console = Console(file=StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, console=console)
    assert "Stopped after step 6; the same command goes on" in console.file.getvalue()
    monkeypatch.undo()
    assert "from checkpoint-4" in run(recipe)[1]


# ---- the plan ----


def test_the_plan_says_what_the_run_then_does(recipe):
    made = plan(recipe)
    assert not recipe.run_dir.exists()
    result, _ = run(recipe)
    assert (made.trainable, made.total, made.steps) == (result.trainable, result.total, result.steps)
    assert [(p.pattern, len(p.modules)) for p in made.patterns] == [("q_proj", 2), ("v_proj", 2)]
    assert sum(p.parameters for p in made.patterns) == made.trainable
    assert made.trained_tokens < made.tokens
    assert "⟦" in made.preview_text
    assert plan(recipe).action == "finished"
    text = json.dumps(made.to_json())
    assert json.loads(text)["memory"]["total"] == made.memory.total


def test_the_plan_counts_what_a_real_step_works_with(recipe, model_dir):
    """The count on fake tensors against the same count on real ones."""
    from transformers import AutoModelForCausalLM

    from deltatune.train.memory import working_bytes
    from deltatune.train.session import attach

    memory = plan(recipe).memory
    model = attach(recipe, AutoModelForCausalLM.from_pretrained(model_dir))
    real = working_bytes(model, memory.rows, memory.length, 4, None)
    # Fake tensors always get an attention mask, a fifth of all in a model this small, and the plain path.
    assert real <= memory.working < 1.5 * real
    assert memory.base == sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    assert memory.adapter == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert memory.optimizer == 2 * memory.adapter
    less = plan(changed(recipe, train={"gradient_checkpointing": True})).memory
    assert less.working < memory.working
    whole = plan(changed(recipe, data={"train_on_prompt": True})).memory
    assert whole.working > memory.working  # more logits


def test_live_bytes_are_counted_while_they_live():
    from deltatune.train.memory import _LiveBytes

    weight = torch.ones(100)
    with _LiveBytes([weight]) as live:
        first = weight + 1  # 400 bytes
        view = first.view(10, 10)
        del first
        second = view * 2
        assert (live.now, live.peak) == (800, 800)
        del second
        assert (live.now, live.peak) == (400, 800)
        del view
        assert live.now == 0


def test_the_plan_shows_tied_weights(recipe, tmp_path):
    save_model(tmp_path / "tied", tie_word_embeddings=True)
    made = plan(changed(recipe, model=str(tmp_path / "tied"), method={"target_modules": ["q_proj", "lm_head"]}))
    assert ("lm_head.weight", "model.embed_tokens.weight") in [tuple(pair) for pair in made.tied]
    console = Console(file=StringIO(), width=200)
    made.show(console)
    shown = console.file.getvalue()
    for part in ("Tied: lm_head.weight", "q_proj", "estimated peak", "⟦", "nothing is trained"):
        assert part in shown


def test_rows_for_tests_are_as_the_recipe_reads_them(tmp_path):
    """Guards the other tests: both labels, several lengths."""
    rows = [json.loads(line) for line in save_rows(tmp_path / "rows.jsonl", 24).read_text().splitlines()]
    assert {row["label"] for row in rows} == {"yes", "no"}
    assert len({len(row["text"].split()) for row in rows}) >= 4
