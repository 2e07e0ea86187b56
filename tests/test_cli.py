"""The `hmoe` command itself: its help, and how it reports what goes wrong."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import hmoe_cli
from hmoe.errors import CommandError, did_you_mean


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


def test_the_help_of_all_commands_waits_for_neither_torch_nor_transformers():
    code = (
        "import sys, hmoe_cli; hmoe_cli.main(['--help']); "
        "sys.exit(len({'torch', 'transformers', 'datasets', 'numpy', 'hmoe'} & set(sys.modules)))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in hmoe_cli.COMMANDS)


@pytest.mark.parametrize(
    ("module", "command"), [("hmoe", "--version"), ("hmoe.conversion", "moe nosuch/at/all t"), ("hmoe.training", "x")]
)
def test_the_modules_of_a_command_are_the_command(module, command, capsys):
    prefix = {"hmoe": [], "hmoe.conversion": ["convert"], "hmoe.training": ["train"]}[module]
    status = hmoe_cli.main([*prefix, *command.split()])
    done = run("-m", module, *command.split())
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1:]) == (
        status,
        *(lambda printed: (printed.out, printed.err.splitlines()[-1:]))(capsys.readouterr()),
    )


def test_an_unknown_command_is_answered_with_the_nearest_and_the_list(capsys):
    assert hmoe_cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "no command 'trian', did you mean 'train'?" in error and "usage: hmoe COMMAND" in error


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` makes `hmoe describe` raise it."""

    def fail(error: BaseException) -> None:
        def main(argv):
            raise error

        monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(main=main))
        monkeypatch.setitem(hmoe_cli.COMMANDS, "describe", ("failing", ""))

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("`x`=3 is too large"), "hmoe describe: `x`=3 is too large\n"),
        (FileNotFoundError("no file a.txt"), "hmoe describe: no file a.txt\n"),
        (CommandError("the logits differ"), "hmoe describe: the logits differ\n"),
        (
            ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.tasks"),
            "hmoe describe: No module named 'lm_eval': pip install 'hmoe[eval]'\n",
        ),
        (ImportError("needs scikit-learn"), "hmoe describe: needs scikit-learn\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(failing, capsys, error, message):
    failing(error)
    assert hmoe_cli.main(["describe"]) == 2
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback_and_a_mistake_shows_it_on_request(failing, capsys, monkeypatch):
    failing(KeyError("weight"))
    with pytest.raises(KeyError):
        hmoe_cli.main(["describe"])
    failing(ValueError("too large"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    assert hmoe_cli.main(["describe"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    code = (
        "import sys, types, hmoe_cli; "
        "sys.modules['many'] = types.SimpleNamespace(main=lambda argv: print('line\\n' * 100_000) or 0); "
        "hmoe_cli.COMMANDS['many'] = ('many', ''); sys.exit(hmoe_cli.main(['many']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_nearest_names_are_hints_only_where_they_are_near():
    assert did_you_mean("learnin_rate", ["seed", "learning_rate"]) == ", did you mean `learning_rate`?"
    assert did_you_mean("x", ["seed", "learning_rate"], otherwise=".") == "."
