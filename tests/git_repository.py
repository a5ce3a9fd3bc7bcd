"""Commands in a repository that a test makes: git knows who commits, and nothing of the user's own settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DVC = (sys.executable, "-m", "dvc")


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command in the folder; it must end well, unless `check` is False."""
    names = {f"GIT_{role}_{what}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | names | {"GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def begin(folder: Path) -> None:
    """A repository with a main branch and DVC, which is set up as here: it reports nothing and looks for no update."""
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--allow-empty", "--message", message)
