"""What holds for every procedure: three ways give one result, a killed run goes on exactly, the loop changes nothing.

Everything is parametrised over the registry, so a new procedure joins without a change here.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import make_recipe, save_model
from transformers import TrainerCallback

import deltatune.schedules as schedules
from deltatune import AutoPeftModelForCausalLM, ConfigError, PeftModel
from deltatune.train.procedures import ProcedureCallback
from deltatune.train.recipe import build_recipe
from deltatune.train.run import train
from schedule_runs import PROCEDURES, STEPS, Loop, batches, largest_difference, model_for, options_of, weights
from tiny import llama

NAMES = list(PROCEDURES)
#: sums in another order: the largest difference of any weight after 12 steps (they move by up to 0.1); a large epsilon
#: keeps AdamW from making much of gradients that are zero but for rounding
SUMS, EPSILON = 5e-5, 1e-3


def procedure_at(name):
    return None if not options_of(name) else {"name": name, **vars(PROCEDURES[name].example())}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def recipe_for(name, folder, model_dir, **train_section):
    sections = {"gradient_accumulation": 1, "batch_size": 4, "max_steps": STEPS, "save_steps": 4}
    sections |= {"adam_epsilon": EPSILON, **train_section}
    raw = make_recipe(folder, model_dir, train=sections, eval={"before": False, "after": False}).model_dump()
    raw |= {"method": PROCEDURES[name].example_method(), "procedure": procedure_at(name)}
    return build_recipe(raw, "tests")


def test_the_shipped_procedures_are_there():
    assert {"adalora", "full_then_lora", "lisa", "lora_plus", "relora"} <= set(NAMES)


# ---------------------------------------------------------------------- three ways
def parts_of(recipe):
    """(model, trainer's arguments, rows, collator) of a recipe, as its run makes them."""
    from deltatune.train.arguments import training_arguments
    from deltatune.train.data import Collator
    from deltatune.train.models import load_tokenizer, resolve_model
    from deltatune.train.session import attach, load_base, prepare_data

    resolved = resolve_model(recipe.model)
    tokenizer = load_tokenizer(resolved)
    rows = prepare_data(recipe, tokenizer).rows
    model = attach(recipe, load_base(recipe, resolved))
    args = training_arguments(recipe, recipe.run_dir, len(rows))
    return model, args, rows, Collator(tokenizer, pad_to_multiple_of=8)


def by_trainer(recipe, name, folder):
    from transformers import Trainer

    model, args, rows, collator = parts_of(recipe)
    args.output_dir, args.save_strategy = str(folder), "no"
    seen = []

    def collate(chosen):
        seen.append(collator(chosen))
        return {k: v.clone() for k, v in seen[-1].items()}

    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=rows,
        callbacks=[ProcedureCallback(*options_of(name))],
    )
    trainer.train()
    return model, seen[:STEPS]


def by_hand(recipe, name, seen):
    """The plain loop over the batches that the trainer has seen."""
    model, args, _, _ = parts_of(recipe)
    given = options_of(name)
    schedules.mark(model, *given)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=EPSILON, weight_decay=0)
    schedule = schedules.attach(model, optimizer, *given, total_steps=STEPS, seed=args.seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    model.train()
    for batch in seen:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    schedule.finish()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_three_ways_give_one_result(name, tmp_path, model_dir):
    """A plain loop and any Trainer agree to the last digits; the recipe's trainer, which computes fewer logits, too."""
    recipe = recipe_for(name, tmp_path, model_dir)
    tuned, seen = by_trainer(recipe, name, tmp_path / "trainer")
    looped = by_hand(recipe, name, seen)
    assert largest_difference(weights(looped), weights(tuned)) < SUMS
    fresh = parts_of(recipe)[0]
    with torch.no_grad():
        x = torch.randint(3, 200, (2, 11))
        before, wanted = fresh.eval()(input_ids=x).logits, looped.eval()(input_ids=x).logits
    result = train(recipe, console=Console(file=io.StringIO()))
    assert result.status == "trained"
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(recipe.run_dir))
    with torch.no_grad():
        found = loaded(input_ids=x).logits
        moved = (wanted - before).abs().max()
        assert moved > 1e-3  # it has learned something
        assert (found - wanted).abs().max() < 1e-3 * moved
        merged = loaded.merge_and_unload()
        assert (merged(input_ids=x).logits - found).abs().max() < 1e-4 * found.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_has_made_loads_on_the_base_as_it_was(name, tmp_path):
    loop = Loop(name).run()
    loop.schedule.finish()
    if not loop.schedule.save(tmp_path):
        loop.model.save_pretrained(tmp_path)
    base = llama(num_hidden_layers=4, initializer_range=0.1)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    x = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=x).logits, loop.model.eval()(input_ids=x).logits, atol=1e-5)


# ---------------------------------------------------------------------- killed and resumed
@pytest.mark.parametrize("stop", [3, 6, 7])
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_goes_on_bit_for_bit(name, stop):
    whole = Loop(name).run()
    first = Loop(name).run(stop)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Loop(name).load(torch.load(file, weights_only=True)).run()
    assert [*first.losses, *second.losses] == whole.losses
    assert largest_difference(weights(second.model), weights(whole.model)) == 0
    assert second.schedule.finish() == whole.schedule.finish()


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_recipe_goes_on_bit_for_bit(name, tmp_path, model_dir, monkeypatch):
    console = Console(file=io.StringIO())
    whole = recipe_for(name, tmp_path / "whole", model_dir)
    train(whole, console=console)
    broken = recipe_for(name, tmp_path / "broken", model_dir)

    def die(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(ProcedureCallback, "on_step_end", die)
        with pytest.raises(MemoryError):
            train(broken, console=console)
    assert (broken.run_dir / "checkpoint-4" / "schedule.pt").is_file()
    result = train(broken, console=console)
    weights_of = [load_file(r.run_dir / "adapter_model.safetensors") for r in (whole, broken)]
    assert largest_difference(*weights_of) == 0
    assert result.procedures == json.loads((whole.run_dir / "results.json").read_text())["procedures"]


@pytest.mark.parametrize("name", NAMES)
def test_any_trainer_goes_on_bit_for_bit(name, tmp_path, model_dir):
    """transformers' own Trainer; its checkpoints hold the model its way, and the procedures' state beside it."""
    from transformers import Trainer

    def trainer(folder, stop=None):
        recipe = recipe_for(name, tmp_path, model_dir)
        model, args, rows, collator = parts_of(recipe)
        args.output_dir, args.save_steps, args.save_total_limit = str(folder), 5, None
        made = Trainer(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=rows,
            callbacks=[ProcedureCallback(*options_of(name)), *([StopAt(stop)] if stop else [])],
        )
        return model, made

    whole, made = trainer(tmp_path / "whole")
    made.train()
    with pytest.raises(MemoryError):
        trainer(tmp_path / "broken", stop=7)[1].train()
    again, made = trainer(tmp_path / "broken")
    made.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-5"))
    assert largest_difference(weights(again), weights(whole)) == 0


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise MemoryError("killed")


def test_a_checkpoint_without_the_procedures_state_is_refused(tmp_path, model_dir):
    console = Console(file=io.StringIO())
    recipe = recipe_for("relora", tmp_path, model_dir)
    train(recipe, console=console)
    for left in ("results.json", "checkpoint-12/schedule.pt"):
        (recipe.run_dir / left).unlink()
    with pytest.raises(ConfigError, match="has no schedule.pt, so the procedure cannot go on"):
        train(recipe, console=console)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_says_what_happens_over_time(name, tmp_path, model_dir):
    from deltatune.train.run import plan

    console = Console(file=io.StringIO(), width=200)
    recipe = recipe_for(name, tmp_path, model_dir)
    made = plan(recipe)
    made.show(console)
    assert (f"Procedure: name={name}" in console.file.getvalue()) == bool(options_of(name))
    assert made.trainable == sum(p.numel() for p in marked(recipe, name).parameters() if p.requires_grad)
    if name == "relora":
        with pytest.raises(ConfigError, match="use cycle=3"):
            plan(build_recipe({**recipe.model_dump(), "procedure": {"name": name, "cycle": 400}}, "tests"))


def marked(recipe, name):
    model = parts_of(recipe)[0]
    schedules.mark(model, *options_of(name))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_only_lacks_its_report_is_finished_as_the_others(name, tmp_path, model_dir):
    recipe = recipe_for(name, tmp_path, model_dir)
    console = Console(file=io.StringIO())
    first = train(recipe, console=console)
    before = load_file(recipe.run_dir / "adapter_model.safetensors")
    for left in ("results.json", "adapter_model.safetensors"):
        (recipe.run_dir / left).unlink()
    again = train(recipe, console=console)
    assert again.procedures == first.procedures
    assert largest_difference(load_file(recipe.run_dir / "adapter_model.safetensors"), before) == 0


# ---------------------------------------------------------------------- what the loop does around the step
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_are_one_step(name):
    whole, parts = Loop(name).run(), Loop(name).run(parts=2)
    assert parts.schedule.run.step == STEPS
    assert largest_difference(weights(parts.model), weights(whole.model)) < SUMS


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_activations_change_nothing(name):
    whole, cheap = Loop(name).run(), Loop(name)
    cheap.model.gradient_checkpointing_enable()
    cheap.run()
    assert largest_difference(weights(cheap.model), weights(whole.model)) < SUMS


class Seen(schedules.Schedule):
    """Notes the gradients that a procedure is shown."""

    def before_step(self):
        self.grads = {n: p.grad.clone() for n, p in self.run.root.named_parameters() if p.grad is not None}


class Look(schedules.Procedure):
    name = "look"

    def start(self, run):
        return Seen(run)


def looking(model, optimizer):
    attached = schedules.attach(model, optimizer, Look())
    return attached, attached.schedules["look"]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_scaled_losses_are_seen_unscaled_and_skipped_steps_not_at_all(fused):
    model = model_for("lora_plus")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=fused)
    attached, seen = looking(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model(**batches()[0]).loss.backward()
    wanted = {n: p.grad.clone() for n, p in attached.run.root.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    scaler.scale(model(**batches()[0]).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert attached.run.step == 1
    assert wanted.keys() == seen.grads.keys()
    for key, grad in wanted.items():
        assert torch.allclose(seen.grads[key], grad, atol=1e-7), key
    before = weights(model)
    scaler.scale(model(**batches()[0]).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert attached.run.step == 1  # the scaler skipped this step
    assert largest_difference(weights(model), before) == 0


def test_clipped_gradients_are_seen_as_the_optimiser_uses_them():
    model = model_for("lora_plus")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attached, seen = looking(model, optimizer)
    model(**batches()[0]).loss.backward()
    before = {n: p.detach().clone() for n, p in attached.run.root.named_parameters() if p.requires_grad}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    for name, p in attached.run.root.named_parameters():
        if p.requires_grad:
            assert torch.allclose(before[name] - 0.1 * seen.grads[name], p.detach(), atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_clipping_that_does_not_bite_and_bfloat16_change_little(name):
    whole = Loop(name).run()
    assert largest_difference(weights(Loop(name).run(clip=1e6).model), weights(whole.model)) < SUMS
    mixed = Loop(name).run(autocast=True)
    assert mixed.schedule.run.step == STEPS
    assert abs(mixed.losses[-1] - whole.losses[-1]) < 0.1 * whole.losses[-1]


# ---------------------------------------------------------------------- the contract
def test_parts_of_groups_last_one_step_only():
    loop = Loop("lora_plus")
    groups = loop.optimizer.param_groups
    before = [dict(g) for g in groups]
    loop.run(2)
    assert loop.optimizer.param_groups is groups
    assert [len(g["params"]) for g in groups] == [len(g["params"]) for g in before]


def test_attach_refuses_what_cannot_be():
    model = model_for("lora_plus")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    with pytest.raises(ConfigError, match="no procedure to attach"):
        schedules.attach(model, optimizer)
    with pytest.raises(ConfigError, match="given twice"):
        schedules.attach(model, optimizer, schedules.LoraPlus(), schedules.LoraPlus(4))
    first = schedules.attach(model, optimizer, schedules.LoraPlus())
    with pytest.raises(ConfigError, match="already has procedures"):
        schedules.attach(model, optimizer, schedules.LoraPlus())
    with pytest.raises(ConfigError, match="without a closure"):
        optimizer.step(lambda: 0.0)
    first.finish()
    model(**batches()[0]).loss.backward()
    schedules.attach(model, optimizer, schedules.LoraPlus())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    late = torch.optim.AdamW(trained, lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(late, lambda t: 1.0)
    with pytest.raises(ConfigError, match="make the scheduler after attach"):
        schedules.attach(model, late, schedules.ReLora(cycle=4, restart_warmup=1))


def test_a_checkpoint_of_other_procedures_is_refused():
    state = Loop("lora_plus").run(1).schedule.state_dict()
    with pytest.raises(ConfigError, match=r"with procedures lora_plus, and this run has relora"):
        Loop("relora").schedule.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "re_lora"}, "'re_lora' is no procedure; did you mean 'relora'"),
        ({}, "procedure.name is missing"),
        ({"name": "relora", "cycles": 4}, "unknown key 'procedure.cycles': relora has no such option; did you mean"),
        ({"name": "relora", "cycle": 0}, "cycle must be a whole number of at least 1, not 0"),
        ({"name": "relora", "cycle": 400}, "leaves no restart in a run of 12 steps; use cycle=3"),
        ({"name": "relora", "cycle": 4, "restart_warmup": 4}, "not shorter than cycle=4"),
        ({"name": "lora_plus", "ratio": -1}, "ratio must be a number of at least 0"),
        ({"name": "adalora"}, "use method ADALORA"),
    ],
)
def test_a_recipe_says_what_is_wrong_in_one_sentence(tmp_path, model_dir, options, says):
    raw = recipe_for("relora", tmp_path, model_dir).model_dump()
    with pytest.raises(ValueError) as caught:
        train(build_recipe({**raw, "procedure": options}, "tests"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(schedules.PROCEDURES))
def test_every_procedure_is_on_the_page_with_its_options(name):
    page = (Path(__file__).parents[2] / "docs" / "procedures.md").read_text(encoding="utf-8")
    row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
    missing = [f.name for f in dataclasses.fields(schedules.PROCEDURES[name]) if f"`{f.name}`" not in row]
    assert row
    assert not missing


@pytest.mark.parametrize("name", ["adalora", "lisa", "relora"])
def test_the_best_checkpoint_comes_back_with_its_base(name, tmp_path, model_dir):
    section = {"eval_strategy": "steps", "eval_steps": 4, "load_best": True, "learning_rate": 0.1}
    recipe = recipe_for(name, tmp_path, model_dir, **section)
    recipe = build_recipe({**recipe.model_dump(), "eval": {"before": False, "after": True, "samples": 0}}, "tests")
    result = train(recipe, console=Console(file=io.StringIO()))
    rows = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert measured[result.best_step] == min(measured.values())
    assert result.after["loss"] == pytest.approx(measured[result.best_step], rel=1e-4)
    # the same again where only the report was missing
    before = load_file(recipe.run_dir / "adapter_model.safetensors")
    (recipe.run_dir / "results.json").unlink()
    train(recipe, console=Console(file=io.StringIO()))
    assert largest_difference(load_file(recipe.run_dir / "adapter_model.safetensors"), before) == 0


def test_options_of_a_procedure_can_be_set_on_the_command_line(tmp_path, model_dir):
    from deltatune.train.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_for("lora_plus", tmp_path, model_dir).to_yaml(), encoding="utf-8")
    recipe = load_recipe(path, ["procedure.ratio=3"])
    assert recipe.procedure["ratio"] == 3
    assert load_recipe(path, ["procedure={name: LISA}"]).procedure == {"name": "lisa"}
    with pytest.raises(ValueError, match="no such option; did you mean 'ratio'"):
        load_recipe(path, ["procedure.ration=3"])


@pytest.mark.parametrize("name", ["adalora", "relora"])
def test_the_end_of_a_run_shows_what_the_procedure_tells(name, tmp_path, model_dir):
    from deltatune.train.report import show_result

    console = Console(file=io.StringIO(), width=200)
    recipe = recipe_for(name, tmp_path, model_dir)
    show_result(train(recipe, console=console), console)
    ranks = (
        json.loads((recipe.run_dir / "results.json").read_text())["procedures"].get("adalora", {}).get("ranks", {0: 0})
    )
    shown = {"adalora": f"ranks {min(ranks.values())} to {max(ranks.values())}, budget 16"}
    shown["relora"] = "restarts 2, max rank 12"
    assert shown[name] in console.file.getvalue()
    assert (recipe.run_dir / "ranks.png").is_file() == (name == "adalora")
