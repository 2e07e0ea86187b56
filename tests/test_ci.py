"""`.ci/browser`, in a PATH of stand-ins: it installs Chromium where that is possible and never fails."""

import shutil
import subprocess
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / ".ci" / "browser"
NEEDS_LISTS = """echo "$@" >> "$LOG"
case "$*" in
    *update) : > "$BIN/lists" ;;
    *) [ -e "$BIN/lists" ] && : > "$BIN/chromium" ;;
esac
chmod +x "$BIN/chromium" 2>/dev/null || [ -e "$BIN/lists" ]"""
INSTALLS = 'echo "$@" >> "$LOG"; : > "$BIN/chromium"; chmod +x "$BIN/chromium"'
FAILS = 'echo "$@" >> "$LOG"; exit 100'


@pytest.mark.parametrize(
    ("present", "apt_get", "user", "words", "calls"),
    [
        ("chromium", INSTALLS, 0, "with chromium", []),
        ("google-chrome", INSTALLS, 0, "with google-chrome", []),
        (None, INSTALLS, 0, "installed now", ["install"]),
        (None, NEEDS_LISTS, 0, "installed now", ["install", "update", "install"]),
        (None, FAILS, 0, "skipped, no Chromium: apt-get could not", ["install", "update"]),
        (None, INSTALLS, 1000, "skipped, no Chromium: installing it takes root", []),
        (None, None, 0, "skipped, no Chromium: there is no apt-get", []),
    ],
    ids=["present", "other", "installed", "lists-missing", "unreachable", "no-root", "no-apt"],
)
def test_the_browser_is_installed_where_it_can_be_and_its_lack_is_said(present, apt_get, user, words, calls, tmp_path):
    bash = shutil.which("bash")
    log = tmp_path / "log"

    def command(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!{bash}\n{body}\n")
        (tmp_path / name).chmod(0o755)

    (tmp_path / "chmod").symlink_to(shutil.which("chmod"))
    command("id", f"echo {user}")
    if present:
        command(present, "exit 1")
    if apt_get:
        command("apt-get", apt_get)
    environment = {"PATH": str(tmp_path), "LOG": str(log), "BIN": str(tmp_path)}
    done = subprocess.run([bash, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert words in done.stdout + done.stderr
    asked = log.read_text().splitlines() if log.exists() else []
    assert [next(word for word in ("install", "update") if word in line.split()) for line in asked] == calls
