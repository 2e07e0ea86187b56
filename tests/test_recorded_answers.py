"""Figures of `hmoe describe`, parameter counts and command-line options are those of hmoe 0.1.0.

tests/fixtures/make_checkpoints.py says how they were recorded.
"""

import copy
import itertools
import json

import pytest
from recorded import COMMANDS, EXPECTED, command_line_options, counted_parameters, described

import hmoe


DESCRIBED = json.loads((EXPECTED / "described.json").read_text())
PARAMETERS = json.loads((EXPECTED / "parameters.json").read_text())
OPTIONS = json.loads((EXPECTED / "options.json").read_text())

# Estimates of 0.1.0 that left out the query and key norms, and those that count them.
ACTIVATIONS = {"activation_bytes": (129024, 147456), "activation_bytes_checkpointing": (95232, 104448)}
WITH_QK_NORM = "checkpoints/by_layer --batch_size 2"

# "COMMAND OPTION" of what is refused now, with a remedy.
REMOVED_OPTIONS = {f"convert {conversion} --max_shard_gb" for conversion in ("moe", "dense", "resize", "export")}


def assert_same_figures(found, expected, place: str = "") -> None:
    """Whole numbers exactly; others but for the order in which their terms were added."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            assert_same_figures(found[name], value, f"{place}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected)):
            assert_same_figures(one, other, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12), place
    else:
        assert found == expected and type(found) is type(expected), place


@pytest.mark.parametrize("arguments", DESCRIBED)
def test_describe_gives_the_recorded_figures(arguments):
    expected = copy.deepcopy(DESCRIBED[arguments])
    if arguments == WITH_QK_NORM:
        for side, (name, (old, new)) in itertools.product(("model", "twin"), ACTIVATIONS.items()):
            assert expected[side][name] == old
            expected[side][name] = new
    assert_same_figures(described(arguments), expected)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_recorded_parameter_counts(preset):
    assert_same_figures(counted_parameters(preset), PARAMETERS[preset])


def test_every_preset_is_recorded():
    assert PARAMETERS.keys() == set(hmoe.PRESETS)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_lost_or_changes_its_default(command):
    today = {f"{command} {name}": option for name, option in command_line_options(command).items()}
    recorded = {name: option for name, option in OPTIONS.items() if name.split()[0] == command}
    assert recorded
    lost = recorded.keys() - today.keys() - REMOVED_OPTIONS
    assert not lost
    for name in recorded.keys() & today.keys() - REMOVED_OPTIONS:
        old, new = recorded[name], today[name]
        assert new["default"] == old["default"], name
        for kind in ("flags", "choices"):
            assert set(new[kind] or []) >= set(old[kind] or []), name
