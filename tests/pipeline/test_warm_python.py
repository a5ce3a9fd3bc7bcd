"""A `python` that forks: to a script and its caller it is like the other. (Ctrl-C: test_reproduce.py.)"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from regvit.pipeline.warm_python import warm_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is the plain python")
SAYS = """
import atexit, json, os, sys
atexit.register(print, "at exit")
print(json.dumps([sys.argv, os.getcwd(), os.environ["KEY"], __name__, sys.stdin.read(), "colorsys" in sys.modules]))
"""


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    with warm_python(["colorsys"], ["json.tool"]) as folder:
        yield folder


def run(programs: Path, *command: str, folder: Path, **more: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "KEY": "value"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **more)


def test_a_script_sees_its_arguments_environment_streams_and_folder_and_what_is_imported_already(programs, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/says.py").write_text(SAYS)
    done = run(programs, "python", "own/says.py", "a", "b c", folder=tmp_path, input="typed")
    seen = f'[["own/says.py", "a", "b c"], "{tmp_path}", "value", "__main__", "typed", true]'
    assert (done.stdout, done.stderr, done.returncode) == (f"{seen}\nat exit\n", "", 0)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('what is wrong')", 1, "what is wrong\n"),
        ("import missing", 1, "ModuleNotFoundError: No module named 'missing'\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("import os; os.kill(os.getpid(), 9)", 1, "ends.py: its process was killed\n"),
    ],
)
def test_it_ends_as_the_script_does(programs, tmp_path, code, status, said):
    (tmp_path / "ends.py").write_text(code)
    done = run(programs, "python", "ends.py", folder=tmp_path)
    assert done.returncode == status and done.stderr.endswith(said)


def test_each_script_imports_what_lies_beside_it_as_it_now_stands(programs, tmp_path):
    (tmp_path / "shows.py").write_text("import beside; print(beside.VALUE)")
    for value in ("1", "22"):
        (tmp_path / "beside.py").write_text(f"VALUE = {value}\n")
        assert run(programs, "python", "shows.py", folder=tmp_path).stdout == f"{value}\n"


def test_modules_named_as_programs_run_and_the_rest_is_the_plain_python(programs, tmp_path):
    assert run(programs, "json.tool", "--compact", folder=tmp_path, input="[ 1 ]").stdout == "[1]\n"
    plain = run(programs, "python", "-c", "import sys; print('colorsys' in sys.modules)", folder=tmp_path)
    assert plain.stdout == "False\n"


def test_where_nobody_forks_any_more_it_is_the_plain_python(tmp_path):
    (tmp_path / "shows.py").write_text("import sys; print('colorsys' in sys.modules)")
    with warm_python(["colorsys"]) as folder:
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("python", "call.py"):
            (copy / name).write_text(
                (folder / name).read_text().replace(str(folder / "call.py"), str(copy / "call.py"))
            )
        (copy / "python").chmod(0o755)
    assert run(copy, "python", "shows.py", folder=tmp_path).stdout == "False\n"
