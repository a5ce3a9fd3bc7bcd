"""A repository of git and DVC in a folder, by a tester."""

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *command: str, must_end_well: bool = True) -> subprocess.CompletedProcess:
    """A command in the folder; `dvc` is that of this environment."""
    names = {f"GIT_{role}_{what}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | names | {"GIT_CONFIG_GLOBAL": os.devnull}
    words = [sys.executable, "-m", *command] if command[0] == "dvc" else command
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert not must_end_well or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def begin(folder: Path) -> None:
    """An empty repository whose branch is main."""
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, "dvc", "init", "--quiet")


def commit(folder: Path, message: str) -> None:
    """All that git does not ignore."""
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--allow-empty", "--message", message)
