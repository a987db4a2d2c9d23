"""`deltatune train`: recipe, flags and --set together; what is printed; errors in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deltatune.cli.train import build
from small_runs import ROWS, write_rows

FAST = ("--max-steps", "2", "--batch-size", "2", "--set", "eval.batch_size=4", "--set", "report.plot=false")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "messages.jsonl", ROWS)


@pytest.fixture
def recipe(tmp_path, world, rows):
    raw = {
        "model": str(world / "base"),
        "method": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"},
        "data": {"path": str(rows), "eval_path": str(rows), "template": "Message: {text}\nLabel:", "limit": 4},
        "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 0.01, "save_strategy": "no"},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


# ---- what recipe, flags and --set make together ----


def test_flags_alone_make_a_recipe(rows):
    flags = {"model": "m", "data": [str(rows)], "method": "lora", "method.r": 8, "train.learning_rate": 1e-3}
    made = build(None, {**flags, "output_dir": "runs/x"}, ["train.seed=1"])
    assert made.method == {"peft_type": "LORA", "target_modules": "all-linear", "r": 8}
    assert (made.model, made.data.path, made.train.learning_rate, made.train.seed) == ("m", str(rows), 1e-3, 1)
    assert made.run_dir == Path("runs/x")
    assert made.name == "messages"


@pytest.mark.parametrize(("flags", "wanted"), [({}, "--model and --data"), ({"model": "m"}, "--data")])
def test_flags_alone_must_say_what_to_train(flags, wanted):
    with pytest.raises(ValueError, match=f"or {wanted} as well"):
        build(None, flags, [])


def test_set_comes_after_flags(recipe):
    made = build(str(recipe), {"train.learning_rate": 0.5, "method.r": 2}, ["train.learning_rate=0.25"])
    assert (made.train.learning_rate, made.method["r"]) == (0.25, 2)


def test_another_data_set_brings_nothing_of_the_old_one_and_makes_another_run(tmp_path):
    (tmp_path / "banking10").mkdir()
    data = str(tmp_path / "banking10" / "train.jsonl")
    made = build("quickstart", {"data": [data], "eval_data": ["test.jsonl"]}, [])
    shipped = build("quickstart", {}, [])
    assert shipped.data.template is not None
    assert made.data.template is None
    assert (made.data.path, made.data.eval_path) == (data, "test.jsonl")
    assert made.data.max_length == shipped.data.max_length
    assert made.train == shipped.train
    assert made.run_dir == Path("runs/quickstart-banking10")


def test_epochs_replace_the_steps_of_the_recipe(recipe):
    assert build(str(recipe), {"train.epochs": 2.0}, []).train.max_steps is None
    both = build(str(recipe), {"train.epochs": 2.0, "train.max_steps": 3}, [])
    assert (both.train.epochs, both.train.max_steps) == (2.0, 3)


def test_another_method_keeps_only_where_it_goes(recipe):
    made = build(str(recipe), {"method": "loha"}, [])
    assert made.method == {"peft_type": "LOHA", "target_modules": "all-linear"}
    assert build(str(recipe), {"method": "Lora"}, []).method["r"] == 4
    elsewhere = build(str(recipe), {"method": "prefix_tuning"}, ["method.num_virtual_tokens=4"])
    assert elsewhere.method == {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}


def test_an_unknown_method_names_the_nearest(recipe):
    with pytest.raises(ValueError, match="'LORA'"):
        build(str(recipe), {"method": "lorra"}, [])


# ---- the command ----


def test_a_run_prints_the_table_the_examples_and_what_is_next(cli, recipe, tmp_path):
    done = cli("train", recipe)
    assert done.code == 0, done.err
    for part in ("6 held-out examples", "before", "after", "accuracy", "trainable parameters", "peak memory"):
        assert part in done.out
    assert "expected" in done.out
    assert f"deltatune chat {tmp_path}/run" in done.out
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    again = cli("train", recipe)
    assert again.code == 0
    assert "This run is finished" in again.out
    assert "6 held-out examples" in again.out


def test_flags_run(cli, world, rows, tmp_path):
    arguments = ("--model", world / "base", "--data", rows, "--eval-data", rows, "--method", "lora", "--r", 2)
    place = ("--lr", "1e-3", "--target-modules", "q_proj,v_proj", "--output-dir", tmp_path / "flags")
    done = cli("train", *arguments, *place, *FAST)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "flags" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (2, ["q_proj", "v_proj"])


def test_generate_asks_in_the_form_that_the_columns_made(cli, world, rows, tmp_path):
    """The recipe names no template; the run made one, and later questions are put the same way."""
    run = tmp_path / "run"
    flags = ("--model", world / "base", "--data", rows, "--set", "eval.after=false", "--set", "eval.before=false")
    assert cli("train", *flags, "-o", run, *FAST).code == 0
    asked = cli("generate", run, "see you", "-n", "2")
    assert r"the run's template 'Text: {text}\nLabel:'" in asked.err, asked.err
    (run / "run.json").unlink()
    assert "as it is" in cli("generate", run, "see you", "-n", "2").err


def test_json_is_all_that_goes_to_standard_output(cli, recipe):
    done = cli("train", recipe, "--json")
    result = json.loads(done.out)
    assert result["steps"] == 4
    assert result["after"]["examples"] == 6
    assert "Training 4 steps" in done.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(cli, recipe, tmp_path):
    done = cli("train", recipe, "--dry-run")
    assert done.code == 0, done.err
    for part in ("all-linear", "⟦ spam<|im_end|>⟧", "estimated peak", "nothing is trained or written"):
        assert part in done.out
    assert not (tmp_path / "run").exists()
    values = json.loads(cli("train", recipe, "--dry-run", "--json").out)
    assert values["steps"] == 4
    assert values["patterns"][0]["pattern"] == "all-linear"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quickstrat",), "did you mean 'quickstart'"),
        (("--set", "train.lr=1"), "a recipe has no such key"),
        (("--set", "data.path=nowhere.jsonl"), "nowhere.jsonl"),
        (("--target-modules", "q_prjo"), "q_proj"),
        (("--resume",), "there is no run to resume"),
        (("--resume", "--overwrite"), "contradict each other"),
        (("--r", "0"), "r"),
    ],
)
def test_errors_are_one_red_sentence(cli, recipe, arguments, says):
    first = () if arguments[0] == "quickstrat" else (recipe,)
    done = cli("train", *first, *arguments)
    assert done.code == 1
    assert done.err.startswith("Error: ")
    assert says in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(cli, recipe):
    from deltatune.cli.app import run

    with pytest.raises(ValueError, match="no run to resume"):
        run(["train", str(recipe), "--resume", "--debug"])


def test_another_run_in_the_directory_is_refused(cli, recipe):
    assert cli("train", recipe).code == 0
    done = cli("train", recipe, "--lr", "0.5")
    assert done.code == 1
    assert "holds another run (its recipe differs in train.learning_rate)" in done.err
    assert cli("train", recipe, "--lr", "0.5", "--overwrite").code == 0


def test_an_interrupt_ends_with_its_own_status(cli, recipe, monkeypatch):
    from deltatune.train.callbacks import Stopwatch

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stopwatch, "on_step_begin", interrupt)
    done = cli("train", recipe)
    assert done.code == 130
    assert "Stopped after step 0" in done.out


def test_warnings_are_one_line_for_people(cli, recipe, monkeypatch):
    import warnings

    from deltatune.train import run

    def warn(*args, **kwargs):
        warnings.simplefilter("default", UserWarning)  # the tests' own filter makes them errors
        warnings.warn("the name\nis old", UserWarning, stacklevel=1)
        warnings.warn("for programmers", FutureWarning, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(run, "train", warn)
    assert cli("train", recipe).err == "Note: the name is old\nError: enough\n"


def test_help_comes_without_torch():
    """Help must be quick: nothing heavy is imported before a command runs."""
    script = (
        "import sys\nfrom deltatune.cli.app import build_app\nbuild_app()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_has_examples(cli):
    for verb in ("train", "eval", "generate", "chat", "merge", "inspect", "recipes", "env"):
        assert f"deltatune {verb}" in cli(verb, "--help").out


def test_the_version(cli):
    from deltatune import __version__

    assert cli("--version").out.strip() == f"deltatune {__version__}"


def test_threads_wait_passively_before_torch_is_loaded():
    script = "import os, deltatune.cli; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={})
    assert done.stdout.strip() == "PASSIVE"
