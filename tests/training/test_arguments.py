import json
from dataclasses import fields

import pytest
import yaml

from hmoe.training.arguments import OPTION_TYPES, DataOptions, HMoETrainingArguments, RunOptions, known_fields
from hmoe.training.command import main
from hmoe.training.recipe import parse_arguments


RECIPE = {
    "model": {"preset": "hmoe-0.4b", "model_config": {"hidden_size": 64, "num_hidden_layers": 2}},
    "data": {"dataset": ["a.txt", {"path": "b.txt", "weight": 0.5}]},
    "training": {"learning_rate": 1e-4, "max_steps": 3, "report_to": "none", "use_cpu": True},
}


@pytest.fixture
def recipe(tmp_path):
    def write(content=RECIPE) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def test_sections_and_flat_recipes_say_the_same(recipe):
    nested = parse_arguments(["--config", recipe()])
    flat = {name: value for section in RECIPE.values() for name, value in section.items()}
    assert parse_arguments(["--config", recipe(flat)]) == nested
    assert nested.model.preset == "hmoe-0.4b"
    assert nested.training.learning_rate == 1e-4
    assert json.loads(nested.data.dataset[1]) == {"path": "b.txt", "weight": 0.5}


def test_the_command_line_wins(recipe):
    path = recipe()
    parsed = parse_arguments(
        f"--learning_rate 3e-4 --config {path} --dataset c.txt d.txt --model_config.hidden_size=128 "
        "--model_config.rms_norm_eps 1e-6 --no_average_tokens_across_devices".split()
    )
    assert parsed.training.learning_rate == 3e-4
    assert parsed.data.dataset == ["c.txt", "d.txt"]
    assert parsed.model.model_config == {"hidden_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    assert parsed.training.average_tokens_across_devices is False
    assert parsed.recipe["learning_rate"] == 3e-4
    whole = parse_arguments(["--config", path, "--model_config", '{"hidden_size": 32}'])
    assert whole.model.model_config == {"hidden_size": 32}


def test_later_recipes_win(recipe, tmp_path):
    first = recipe()
    (tmp_path / "more.yaml").write_text("max_steps: 7\nmodel: {model_config: {hidden_size: 32}}\n")
    parsed = parse_arguments(["--config", first, "--config", str(tmp_path / "more.yaml")])
    assert parsed.training.max_steps == 7
    assert parsed.model.model_config == {"hidden_size": 32, "num_hidden_layers": 2}


def test_a_recipe_overrides_the_one_it_extends(recipe, tmp_path):
    recipe()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "twin.yaml").write_text(
        "extends: ../recipe.yaml\nmax_steps: 7\n"
        "model: {preset: null, model_type: hmoe, model_config: {hidden_size: 32}}\n"
    )
    (tmp_path / "grandchild.yaml").write_text("extends: sub/twin.yaml\ntraining: {learning_rate: 1e-3}\n")
    parsed = parse_arguments(["--config", str(tmp_path / "grandchild.yaml")])
    assert (parsed.training.max_steps, parsed.training.learning_rate) == (7, 1e-3)
    assert (parsed.model.preset, parsed.model.model_type) == (None, "hmoe")
    assert parsed.model.model_config == {"hidden_size": 32, "num_hidden_layers": 2}
    assert parsed.data == parse_arguments(["--config", recipe()]).data
    assert "extends" not in parsed.recipe


def test_numbers_with_exponents_are_numbers(recipe):
    text = (
        "preset: hmoe-0.4b\ndataset: [a]\nreport_to: none\nmax_train_tokens: 1e9\nmax_train_flops: 7e19\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
    )
    training = parse_arguments(["--config", recipe(text)]).training
    assert (training.max_train_tokens, training.max_train_flops) == (10**9, 7e19)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", "unknown key `learnin_rate`, did you mean `learning_rate`"),
        ("training: {max_step: 1}", "unknown key `max_step`, did you mean `max_steps`"),
        ("modle: {preset: x}", "unknown key `modle`, did you mean"),
        ("max_steps: 1\ntraining: {max_steps: 2}", "sets `max_steps` twice"),
        ("max_steps: 1\nmax_steps: 2", "key `max_steps` stands twice"),
        ("max_steps: many", "invalid int value: 'many'"),
        ("- a\n- b", "must map keys to values"),
        ("a: [", "not valid YAML"),
        ("preset: a\nmodel_type: b\ndataset: [c]", "exclude each other"),
        ("dataset: [c]", "no model"),
        ("preset: a", "`dataset` is empty"),
        ("preset: a\ndataset: [c]\nmodel_config: 3", "must map keys to values, got 3"),
        ("preset: a\ndataset: [c]\ntask: chat", "argument --task: invalid choice: 'chat'"),
        ("preset: a\ndataset: [c]\nvalidation_fraction: 1.5", r"must be in \[0, 1\)"),
        ("preset: a\ndataset: [c]\nprompt_column: q", "give both"),
        ("preset: a\ndataset: [c]\nmax_train_flops: -1", "must be above 0"),
        ("preset: a\ndataset: [c]\nmax_train_flops: 1e9", "needs to know the number of steps"),
        (
            "preset: a\ndataset: [c]\nrouter_metrics: all",
            "invalid choice: 'all' .choose from 'off', 'brief', 'per_layer'",
        ),
        ("extends: nowhere.yaml", "cannot read recipe '.*nowhere.yaml'"),
        ("extends: recipe.yaml", "recipe.yaml' extends 'recipe.yaml', which extends it"),
        ("extends: [a, b]", "`extends` must name one recipe file, got"),
    ],
)
def test_bad_recipes_say_what_is_wrong(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", recipe(text)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learnin_rate", "1"], "unknown argument `--learnin_rate`, did you mean `learning_rate`"),
        (["--learning", "1"], "unknown argument `--learning`"),
        (["word"], r"unexpected words \['word'\]"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "nowhere.yaml"], "cannot read recipe 'nowhere.yaml'"),
        (["--model_config", "hidden_size=3"], "is not JSON"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(recipe, words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", recipe(), *words])


def test_a_bad_recipe_ends_the_command_with_status_2(recipe, capsys):
    assert main(["--config", recipe("learnin_rate: 1")]) == 2
    assert "did you mean `learning_rate`" in capsys.readouterr().err


def test_help_names_every_field_of_the_project(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for options in (*OPTION_TYPES[:-1], RunOptions):
        for field in fields(options):
            assert f"--{field.name} " in text


def test_help_all_names_the_fields_of_transformers(capsys):
    assert main(["--help_all"]) == 0
    assert "--warmup_steps" in capsys.readouterr().out


def test_field_names_are_unique():
    names = [field.name for options in OPTION_TYPES for field in fields(options) if field.init]
    assert len(names) == len(set(names)) == len(known_fields())


def test_choices_are_checked_without_the_parser_too(tmp_path):
    with pytest.raises(ValueError, match=r"`task` must be one of \['pretrain', 'instruct'\], got 'chat'"):
        DataOptions(dataset=["a.txt"], task="chat")
    with pytest.raises(ValueError, match="`router_metrics` must be one of"):
        HMoETrainingArguments(output_dir=str(tmp_path), router_metrics="all")
