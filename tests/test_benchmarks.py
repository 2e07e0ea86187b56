"""The benchmarks run at their smallest, say what they measured, and notice what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as library_logging


FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY_LAYER = ["--hidden", "32", "--total", "256", "--rounds", "2"]
TINY_MODEL = ["--hidden_size", "64", "--layers", "1", "--width", "32", "--vocabulary", "64", "--rounds", "1"]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other by name; the number of threads they set is undone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> dict:
    content = json.loads(path.read_text())
    assert content["environment"].keys() >= {"cpu", "cores", "threads", "torch", "transformers", "commit"}
    assert content["rows"]
    return content


def is_spread(value: dict[str, float]) -> bool:
    return 0 < value["low"] <= value["median"] <= value["high"]


def test_contenders_of_a_round_all_run_once_and_ratios_are_within_rounds():
    import timing

    calls: list[str] = []
    samples = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5, min_sample_seconds=0
    )
    assert [sorted(calls[4:][i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5  # after two warm-up calls each
    assert {len(values) for values in samples.values()} == {5}
    ratios = timing.ratios({"a": [1.0, 2.0, 40.0], "b": [2.0, 4.0, 80.0]}, "b")
    assert ratios["a"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert timing.speedups({"a": [1.0], "b": [2.0]}, "b")["a"]["median"] == 2.0


def test_slow_contenders_rest_after_the_first_rounds(monkeypatch: pytest.MonkeyPatch):
    import timing

    seconds = {"fast": 1.0, "medium": 2.0, "slow": 11.0}
    monkeypatch.setattr(timing, "_seconds", lambda call, repetitions: seconds[call()])
    samples = timing.interleave({name: lambda name=name: name for name in seconds}, 7)
    rounds = {name: len(values) for name, values in samples.items()}
    assert rounds == {"fast": 7, "medium": 7, "slow": timing.MIN_ROUNDS}
    assert timing.ratios(samples, "fast")["slow"]["median"] == 11.0


def test_saved_bytes_counts_whole_storages_once_and_no_parameters():
    import timing

    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8)
    # A product keeps both factors: the weight is a parameter, and two rows of x keep all of x.
    assert timing.saved_bytes(lambda: (x[:2] @ weight, x[2:] @ weight), [weight]) == x.untyped_storage().nbytes()


def test_peak_bytes_sees_what_a_call_allocates():
    import timing

    assert 60 * 2**20 < timing.peak_bytes(_make_allocation, 64) < 96 * 2**20


def _make_allocation(mebibytes: int):
    return lambda: torch.ones(1), lambda: torch.ones(mebibytes * 2**18)


def test_experts(tmp_path: Path):
    import experts

    arguments = ["--experts", "4", "--tokens", "1", "1024", "--sizes", "hybrid", "--no_memory", *TINY_LAYER]
    arguments += ["--contenders", *experts.HMOE, *experts.MIXTRAL, "module_list", "dense", "--routing", "zipf"]
    experts.main([*arguments, "--json", str(tmp_path / "experts.json")])
    rows = [row for row in read(tmp_path / "experts.json")["rows"] if "skipped" not in row]
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert {row["contender"] for row in rows} >= {
        *experts.HMOE,
        *experts.MIXTRAL,
        "module_list",
        "dense",
        "read",
        "copy",
    }
    for row in rows:
        assert is_spread(row["ratio"]) and is_spread(row["ratio_to_stock"])
        assert row["contender"] in experts.BANDWIDTH or is_spread(row["cost_per_flop"])
        assert row["tokens"] > 1 or row["backward"] or is_spread(row["ratio_to_read"])
        assert not row["backward"] or row["saved_mib"] > 0


@pytest.mark.parametrize("routing", ["uniform", "random", "zipf"])
def test_routings_of_the_experts_benchmark_give_a_token_distinct_experts(routing: str):
    import experts

    point = experts.Point(experts=8, tokens=12, routing=routing)
    for index in experts.make_routing(point, 3, torch.Generator().manual_seed(0)):
        assert (index[:, 0] != index[:, 1]).all() and index.max() < 8
        assert routing != "uniform" or torch.bincount(index.flatten(), minlength=8).eq(3).all()


def test_contenders_of_a_point_compute_the_same_flops_with_even_routing():
    import experts

    for point in (experts.Point(experts=8, tokens=16), experts.Point(experts=64, tokens=1, backward=False)):
        comparison = experts.Comparison(point)
        flops = [comparison.gflops(name) for name in ("hmoe eager", "mixtral eager", "module_list", "dense")]
        assert max(flops) == pytest.approx(min(flops), rel=0.02)


def test_growth(tmp_path: Path):
    import growth

    arguments = ["--experts", "2", "4", "--tokens", "1", "8", "--spreads", "1", "8", "--batch", "8", "--mean", "32"]
    growth.main([*arguments, *TINY_LAYER, "--json", str(tmp_path / "growth.json")])
    rows = read(tmp_path / "growth.json")["rows"]
    assert {row["against"] for row in rows} == {"experts", "tokens", "spread"}
    assert all(is_spread(row["ratio"]) for row in rows)


def test_quiet_logs_end_as_they_were_found():
    import timing

    def found() -> tuple[int, int, bool]:
        return (
            logging.getLogger("hmoe").level,
            library_logging.get_verbosity(),
            library_logging.is_progress_bar_enabled(),
        )

    before = found()
    with pytest.raises(RuntimeError, match="in between"), timing.quiet_logs():
        assert found() == (logging.ERROR, logging.ERROR, False)
        raise RuntimeError("in between")
    assert found() == before


def test_train_step(tmp_path: Path):
    import train_step

    arguments = ["--length", "8", "--batch", "1", "--block", "1", "--data_seconds", "0.01"]
    train_step.main([*TINY_MODEL, *arguments, "--json", str(tmp_path / "train_step.json")])
    content = read(tmp_path / "train_step.json")
    rows = {row["contender"]: row for row in content["rows"]}
    assert rows.keys() == {"hmoe", "mixtral grouped_mm", "mixtral batched_mm", "mixtral eager", "llama"}
    assert all(is_spread(row["speed_to_stock"]) for row in rows.values())
    assert rows["hmoe"]["million_parameters"] == rows["mixtral eager"]["million_parameters"]
    assert rows["llama"]["million_activated"] == pytest.approx(rows["hmoe"]["million_activated"], rel=0.05)
    assert [row["contender"] for row in content["trainers"]] == ["Trainer", "HMoETrainer", "data"]


def test_generate(tmp_path: Path):
    import generate

    arguments = ["--prompt_tokens", "4", "--new_tokens", "3", "--batches", "2"]
    generate.main([*TINY_MODEL, *arguments, "--json", str(tmp_path / "generate.json")])
    content = read(tmp_path / "generate.json")
    assert {(row["stage"], row["batch"]) for row in content["rows"]} == {("prefill", 2), ("decode", 2)}
    assert all(is_spread(row["speed_to_stock"]) and row["tokens_per_second"] > 0 for row in content["rows"])
    assert {row["contender"] for row in content["loading"]} == {"hmoe", "mixtral", "llama"}


def test_twins_send_the_same_tokens_to_the_same_experts():
    import twins

    scale = twins.Scale(hidden=64, layers=2, width=32, vocabulary=64, length=16)
    seen = []
    for family in ("hmoe", "mixtral"):
        model = twins.make_model(family, scale)
        twins.BalancedRouting(model)
        chosen: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, inputs, chosen=chosen: chosen.append(inputs[1]))
        for _ in range(2):
            model(torch.zeros(1, 16, dtype=torch.long))
        seen.append(torch.stack(chosen))
    assert torch.equal(*seen)
    assert torch.bincount(seen[0].flatten()).eq(seen[0].numel() // 8).all()


def test_soak_finds_no_mismatch(tmp_path: Path):
    import soak

    assert soak.main(["--shapes", "60", "--json", str(tmp_path / "soak.json")]) == 0
    row = read(tmp_path / "soak.json")["rows"][0]
    assert row["checked"]["shapes"] == 60 and row["mismatches"] == 0


@pytest.mark.parametrize("damage", ["value", "nan", "missing row"])
def test_soak_names_backend_tensor_and_seed_of_a_mismatch(damage: str, monkeypatch, capsys):
    import soak

    correct = soak.HMoEExperts.forward

    def damaged(self, *inputs):
        output = correct(self, *inputs)
        if self.config._experts_implementation != "eager" or not output.numel():
            return output
        if damage == "missing row":
            return torch.cat([torch.zeros_like(output[:1]), output[1:]])
        return output * (1.001 if damage == "value" else torch.nan)

    monkeypatch.setattr(soak.HMoEExperts, "forward", damaged)
    seed = next(s for s in range(100) if soak.Shape.draw(s).routing == "even" and soak.Shape.draw(s).tokens > 2)
    assert soak.Shape.draw(seed).dtype != torch.bfloat16
    assert soak.main(["--shapes", "1", "--seed", str(seed)]) == 1
    printed = capsys.readouterr().out
    assert f"seed {seed}: eager: output" in printed and "grouped_mm:" not in printed


def test_report_replaces_tables_and_keeps_the_prose(tmp_path: Path):
    import experts
    import report

    names = [name for name, *_ in report.TABLES]
    blocks = [f"About {name}.\n<!-- BEGIN {name} -->\nold\n<!-- END {name} -->\n" for name in names]
    page = tmp_path / "page.md"
    page.write_text("\n".join(blocks))
    arguments = ["--experts", "8", "--tokens", "1", "--no_memory", *TINY_LAYER]
    experts.main([*arguments, "--json", str(tmp_path / "experts.json")])
    for _ in range(2):
        report.main(["--folder", str(tmp_path), "--page", str(page), "--images", str(tmp_path)])
    text = page.read_text()
    assert all(f"About {name}." in text for name in names)
    assert "time / reading weights" in text and text.count("old") == len(
        [t for t in report.TABLES if t[1] not in (None, "experts")]
    )
    assert (tmp_path / "performance-experts.png").stat().st_size > 0


def test_page_has_a_place_for_every_table_and_picture():
    import report

    page = (FOLDER.parent / "docs" / "performance.md").read_text()
    assert all(page.count(f"<!-- BEGIN {name} -->\n") == 1 for name, *_ in report.TABLES)
    assert all(page.count(f"(images/performance-{name}.png)") == 1 for name, *_ in report.PICTURES)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("experts", ["--experts", "7"], "must be a multiple of 2, got 7"),
        ("experts", ["--experts", "0"], "must be a positive integer, got '0'"),
        ("experts", ["--dtype", "int8"], "invalid choice: 'int8'"),
        ("growth", ["--seconds", "-1"], "must be a positive number, got '-1'"),
        ("growth", ["--experts", "3"], "must be a multiple of 2, got 3"),
        ("train_step", ["--hidden_size", "100"], "--hidden_size must be a multiple of 64"),
        ("generate", ["--new_tokens", "1"], "--new_tokens must be at least 2"),
        ("generate", ["--width", "9"], "--width must be a multiple of 8"),
        ("soak", ["--minutes", "nan"], "must be a positive number, got 'nan'"),
    ],
)
def test_bad_options_are_refused_with_their_value(script: str, arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as refused:
        __import__(script).main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_report_without_results_says_what_to_run(tmp_path: Path):
    import report

    with pytest.raises(SystemExit, match="make benchmark"):
        report.main(["--folder", str(tmp_path)])


@pytest.mark.parametrize("script", ["experts", "growth", "train_step", "generate", "soak", "report"])
def test_every_script_has_help(script: str, capsys):
    with pytest.raises(SystemExit) as done:
        __import__(script).main(["--help"])
    assert done.value.code == 0 and f"python benchmarks/{script}.py" in capsys.readouterr().out
