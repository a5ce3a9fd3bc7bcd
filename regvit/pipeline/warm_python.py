"""A `python` whose start takes a tenth of a second: scripts run in forks of one process that has imported the large packages.

Importing torch and timm takes a stage some four seconds, in a small run longer than its work. `warm_python` gives a folder to
put first in PATH, with a `python` that hands script, arguments, environment, streams and working directory to that process,
which forks. Nothing of this library is imported before the fork, so that each script runs the code as it then stands.

Run as a script it is the process that forks; it imports nothing before it is first asked.
"""

import atexit
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

LARGE = ("torch", "timm", "zarr", "pandas", "sklearn.linear_model", "scipy.ndimage", "matplotlib.figure")
BEGUN = b"+"
# What stands in for `python`: it waits for the fork, and passes on how it ended. Ctrl-C reaches the fork by itself.
CALLER = """
import json, os, signal, socket, sys
python, path = {python!r}, {path!r}
signal.signal(signal.SIGINT, signal.SIG_IGN)
caller = socket.socket(socket.AF_UNIX)
try:
    caller.connect(path)
    socket.send_fds(caller, [json.dumps([python, os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()], [0, 1, 2])
    begun = caller.recv(1)
except OSError:
    begun = b""
if not begun:  # nobody forks: as without all this
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.execv(python, [python, *sys.argv[1:]])
ended = caller.recv(1)
if not ended:
    sys.exit(f"{{' '.join(sys.argv[1:])}}: its process was killed")
sys.exit(ended[0])
"""


@contextmanager
def warm_python(modules: Sequence[str] = LARGE, programs: Sequence[str] = ()) -> Iterator[Path]:
    """A folder with a `python` as described; it ends with the block. On Linux: elsewhere a fork is not safe, it is empty.

    Args:
        modules: what is imported before the first fork.
        programs: modules that run as programs of their own names too, such as `dvc`.
    """
    with tempfile.TemporaryDirectory(prefix="python") as made:
        folder = Path(made)
        if sys.platform != "linux":
            yield folder
            return
        path = folder / "socket"
        (folder / "call.py").write_text(CALLER.format(python=sys.executable, path=str(path)))
        run = f"exec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(folder / 'call.py'))}"
        cold = (
            f'case "$1" in -m) ;; -*|"") exec {shlex.quote(sys.executable)} "$@" ;; esac\n'  # `python -c` and the like
        )
        for name in ("python", *programs):
            words = f"{cold}{run}" if name == "python" else f"{run} -m {name}"
            (folder / name).write_text(f'#!/bin/sh\n{words} "$@"\n')
            (folder / name).chmod(0o755)
        command = [sys.executable, "-P", __file__, str(path), *modules]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            server.stdout.readline()  # it listens
            try:
                yield folder
            finally:
                server.terminate()


ending: list = []  # in a fork: who is told, and with what status it ends


def _tell() -> None:
    """The last thing that a fork does; without taking down, module by module, what it never needed."""
    if ending:
        caller, status = ending
        sys.stdout.flush()
        sys.stderr.flush()
        caller.sendall(bytes([status % 256]))
        os._exit(0)


def _serve(path: str, *modules: str) -> None:
    """Forks for every caller, until it is ended."""
    atexit.register(_tell)  # before any library's, so that it comes after them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    print("listens", flush=True)
    while True:
        caller, _ = server.accept()
        message, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        for module in modules:
            import_module(module)
        if os.fork() == 0:
            server.close()
            caller.sendall(BEGUN)
            _run(caller, streams, *json.loads(message))
        caller.close()
        for stream in streams:
            os.close(stream)


def _run(
    caller: socket.socket, streams: list[int], python: str, folder: str, environment: dict, words: list[str]
) -> None:
    """In the fork: what `python <words>` does in that folder, on these streams; tells how it ended.

    Raises:
        SystemExit: when it has ended.
    """
    ending[:] = [caller, 1]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable, sys.argv = python, words
    try:
        if words[0] == "-m":
            sys.path[:0] = [folder]
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[:0] = [os.path.join(folder, os.path.dirname(words[0])), folder]
            runpy.run_path(words[0], run_name="__main__")
        ending[1] = 0
    except SystemExit as error:
        ending[1] = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        ending[1] = 130
    except BaseException:
        traceback.print_exc()
    sys.exit()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
