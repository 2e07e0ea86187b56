"""`hmoe convert`."""

from __future__ import annotations

import pytest
from tiny_checkpoints import add_tokenizer, make_checkpoint, make_text

import hmoe_cli


def test_command_line_end_to_end(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "llama", "llama")
    add_tokenizer(source)
    text = str(make_text(tmp_path / "text.txt"))
    calibration = ["--calibration_text", text, "--calibration_tokens", "512"]
    folders = [str(tmp_path / name) for name in ("llama", "split", "resized", "mixtral", "again")]
    steps = [
        ["dense", *folders[:2], "--num_experts", "4", "--neurons", "coactivation", "--router", "fitted", *calibration],
        ["resize", *folders[1:3], "--sizes", "[40,32,48,24]"],
        ["export", *folders[2:4], "--to", "mixtral"],
        ["moe", *folders[3:5], "--dtype", "bfloat16"],
    ]
    for step in steps:
        assert hmoe_cli.main(["convert", *step]) == 0
        assert "largest logit difference" in capsys.readouterr().out
    assert "hmoe convert export" in (tmp_path / "mixtral" / "README.md").read_text()
    assert hmoe_cli.main(["convert", *steps[0]]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_option_that_is_gone_is_refused_with_the_remedy(capsys):
    with pytest.raises(SystemExit):
        hmoe_cli.main(["convert", "moe", "a", "b", "--max_shard_gb", "1"])
    assert "--max_shard_gb is gone" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["[1,", '"a"', "[]", "[1.5]", "[[1], 2]"])
def test_bad_sizes_on_the_command_line_are_refused(sizes, capsys):
    with pytest.raises(SystemExit):
        hmoe_cli.main(["convert", "dense", "a", "b", "--sizes", sizes])
    assert "--sizes" in capsys.readouterr().err
