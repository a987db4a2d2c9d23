"""Recipes: reading, overriding, and one clear sentence for every mistake."""

from __future__ import annotations

import pytest
import yaml

from deltatune.train.recipe import (
    Recipe,
    RecipeError,
    apply_override,
    build_recipe,
    load_recipe,
    recipe_schema,
    shipped_recipes,
)

MINIMAL = {
    "model": "some/model",
    "method": {"peft_type": "LORA", "target_modules": "all-linear"},
    "data": {"path": "rows.jsonl"},
}


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def recipe_file(tmp_path, **sections):
    return write(tmp_path, yaml.safe_dump({**MINIMAL, **sections}))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.description) > 20


def test_a_recipe_is_named_after_its_file(tmp_path):
    assert load_recipe(recipe_file(tmp_path)).name == "mine"
    assert load_recipe(recipe_file(tmp_path)).run_dir.as_posix() == "runs/mine"


def test_the_yaml_of_a_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe(
        recipe_file(
            tmp_path,
            data={"path": "a.jsonl", "template": "Message: {text}\nLabel:"},
            train={"learning_rate": "1e-3"},
        )
    )
    for brief in (False, True):
        assert load_recipe(write(tmp_path, recipe.to_yaml(brief=brief))) == recipe


def test_a_whole_yaml_does_not_lean_on_defaults():
    recipe = build_recipe(dict(MINIMAL), "here")
    assert "seed: 42" in recipe.to_yaml()
    assert "seed" not in recipe.to_yaml(brief=True)


@pytest.mark.parametrize("number", ["2e-3", "2.0e-3", "0.002"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, number):
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + f"train: {{learning_rate: {number}}}\n")
    assert load_recipe(path).train.learning_rate == 0.002
    assert load_recipe(path, [f"method.lora_dropout={number}"]).method["lora_dropout"] == 0.002


def test_overrides_take_yaml_values(tmp_path):
    recipe = load_recipe(
        recipe_file(tmp_path),
        [
            "train.max_steps=7",
            "train.logging=[csv, tensorboard]",
            "method.r=16",
            "method.target_modules=[q_proj, v_proj]",
            "data.columns.text=body",
            "data.template='{body}: '",
            "train.lr_scheduler_kwargs.num_cycles=2",
        ],
    )
    assert recipe.train.max_steps == 7
    assert recipe.train.logging == ["csv", "tensorboard"]
    assert recipe.method["r"] == 16
    assert recipe.method["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.data.columns == {"text": "body"}
    assert recipe.train.lr_scheduler_kwargs == {"num_cycles": 2}


def test_the_method_is_named_in_any_case(tmp_path):
    assert load_recipe(recipe_file(tmp_path), ["method.peft_type=lora"]).method["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rte=1", "no such key; did you mean 'train.learning_rate'"),
        ("learning_rate=1", "did you mean 'train.learning_rate'"),
        ("train.max_steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("train.max_steps=[1", "--set train.max_steps line 1: not valid YAML"),
        ("model.name=x", "no such key"),
        ("train.max_steps=0", "train.max_steps = 0: input should be greater than 0"),
        ("train.max_steps=many", "train.max_steps = 'many'"),
        ("train.batch_size=2.5", "train.batch_size = 2.5"),
        ("train.lr_scheduler=lineer", "train.lr_scheduler = 'lineer'"),
        ("method.lora_alhpa=3", "unknown key 'method.lora_alhpa': LORA has no such field; did you mean 'lora_alpha'"),
        ("method.peft_type=lorra", "method.peft_type 'lorra' is not a method; did you mean 'LORA'"),
        ("method.peft_type=", "method.peft_type is missing"),
        ("method.r=0", "r"),
        ("train.eval_strategy=steps", "set train.eval_steps as well"),
        ("train.eval_steps=5", "used only with train.eval_strategy=steps"),
        ("train.save_strategy=steps", "set train.save_steps as well"),
        ("train.early_stopping_patience=2", "needs evaluations"),
        ("train.load_best=true", "needs evaluations"),
        ("task=SEQ_CLS", "task = 'SEQ_CLS'"),
        ("name=a b", "name = 'a b'"),
        ("data.path=", "data.path"),
    ],
)
def test_a_bad_override_is_one_sentence(tmp_path, override, says):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(tmp_path), [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_each_other(tmp_path):
    path = recipe_file(tmp_path)
    for overrides, says in (
        (["train.warmup_steps=3", "train.warmup_ratio=0.1"], "say the same thing"),
        (["train.padding_free=true", "train.group_by_length=true"], "use one"),
        (["train.load_best=true", "train.eval_strategy=epoch", "train.save_strategy=no"], "at every evaluation"),
    ):
        with pytest.raises(RecipeError, match=says):
            load_recipe(path, overrides)


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r"unknown key 'train\.lerning_rate'.*'train\.learning_rate'"):
        load_recipe(recipe_file(tmp_path, train={"lerning_rate": 1}))
    with pytest.raises(RecipeError, match=r"unknown key 'modle'.*'model'"):
        load_recipe(recipe_file(tmp_path, modle="x"))


def test_several_problems_are_counted(tmp_path):
    with pytest.raises(RecipeError, match=r"and 2 more problems"):
        load_recipe(recipe_file(tmp_path, train={"max_steps": -1, "batch_size": 0, "seeed": 1}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "this file holds nothing"),
        ("- a\n- b\n", "this file holds a list"),
        ("model: [\n", r"line 2: not valid YAML"),
        ("model: a\nmodel: b\n", r"line 2: not valid YAML \(key 'model' is written twice\)"),
        ("model: a\n", "method is missing .and 1 more problem"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe(write(tmp_path, text))


def test_a_recipe_that_does_not_exist():
    with pytest.raises(RecipeError, match=r"no recipe is called 'quickstrat'; did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"recipe file nowhere/quickstart.yaml does not exist"):
        load_recipe("nowhere/quickstart.yaml")


def test_an_override_through_a_value_is_refused():
    raw = {"train": 3}
    with pytest.raises(RecipeError, match="train is a int in this recipe, not a mapping"):
        apply_override(raw, "train.max_steps=3")


def test_an_override_in_a_section_that_may_be_left_out():
    raw = {}
    apply_override(raw, "train.merge_aware.start=0.5")
    assert raw == {"train": {"merge_aware": {"start": 0.5}}}


def test_the_schema_describes_every_section():
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert {"TrainSpec", "EvalSpec", "DataSpec", "ReportSpec"} <= set(schema["$defs"])
    assert schema["$defs"]["TrainSpec"]["additionalProperties"] is False


QUANTISED = {"name": "q", "model": "m", "method": {"peft_type": "lora"}, "data": {"path": "sms_spam"}}


def test_a_quantised_base_takes_all_linear_layers():
    made = build_recipe({**QUANTISED, "load_in_4bit": True}, "here")
    assert made.quantization == "4bit"
    assert made.method["target_modules"] == "all-linear"
    own = {"peft_type": "lora", "target_modules": ["q_proj"]}
    assert build_recipe({**QUANTISED, "quantization": "8bit", "method": own}, "here").method == {
        **own,
        "peft_type": "LORA",
    }
    assert "target_modules" not in build_recipe(QUANTISED, "here").method


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"load_in_4bit": True, "quantization": "8bit"}, "load_in_4bit and quantization=8bit contradict each other"),
        ({"train": {"merge_aware": True}}, "train.merge_aware rounds to the base's storage: set quantization"),
    ],
)
def test_contradictions_of_a_quantised_base(more, text):
    with pytest.raises(RecipeError, match=text):
        build_recipe({**QUANTISED, **more}, "here")
