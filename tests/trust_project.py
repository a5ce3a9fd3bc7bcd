"""A whole small project, and a process that runs its stages in forks: what the tests of trust are made on.

Run as a script it is that process: it imports the stages once, then reads one JSON line a command from stdin, runs the
stage in a fork and answers with one JSON line. In the fork every change that Python makes to the disk (a file opened for
writing, made, renamed, removed) is counted before it happens, and the process can be made to die, or the disk to be full,
at exactly the n-th of them.
"""

import encodings.utf_8_sig  # noqa: F401  a user without rights to the standard library could not import it later
import errno
import fcntl
import gc
import importlib
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML

from regvit.data.manifest import Row, write_dataset
from regvit.data.synthetic import rooms as relief
from regvit.features import store
from regvit.probing import checkpoints

ROOT = Path(__file__).parents[1]
STAGES = ROOT / "stages"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# In the order of the pipeline: every stage that writes data, models, features or metrics (not the report, a page of them).
ORDER = (
    ("download", "home"),
    ("download", "alien"),
    ("download", "rooms"),
    ("backbone", "tiny"),
    ("identify", "tiny"),
    ("compose", "plain"),
    ("compose", "cured"),
    ("extract", "plain", "home"),
    ("extract", "cured", "home"),
    ("extract", "plain", "alien"),
    ("extract", "cured", "alien"),
    ("probe", "plain"),
    ("probe", "cured"),
    ("baselines", "plain"),
    ("baselines", "cured"),
    ("evaluate", "plain"),
    ("evaluate", "cured"),
    ("verify", "cured"),
    ("extract_dense", "cured", "rooms"),
    ("extract_dense", "cured", "boxed"),
    ("extract_dense", "cured", "home"),
    ("tokens", "cured", "rooms"),
    ("token_classes", "cured", "home"),
    ("attention", "cured", "rooms"),
    ("discover", "cured", "boxed"),
    ("segment", "cured", "rooms"),
    ("depth", "cured", "rooms"),
)


@dataclass(frozen=True)
class Ended:
    """How a stage ended: its exit status (negative: the signal that ended it), the changes that it had made to the disk or
    was about to make, the seconds it took, and what it printed."""

    status: int
    changes: int
    seconds: float
    text: str


class Stages:
    """The process that runs stages in forks; use it in a `with` block."""

    def __enter__(self) -> "Stages":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=environment)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, folder: Path, stage: str, *names: str, **more: object) -> Ended:
        """`python stages/<stage>.py <names>` in `folder`, perhaps disturbed.

        Args:
            die_at, signal, wait: send itself that signal (SIGKILL by default, 0 is none) before the n-th change to the
                disk, from 0, and wait so many seconds (0).
            die_after: be sent it so many seconds after the stage began.
            go_on: do not wait for its end; the next run does.
            full_at: from the n-th change on the disk is full: nothing can be made or opened for writing.
            largest: bytes that a file may have at most; the kernel refuses more.
            dies_beyond: bytes of a file beyond which the kernel kills the process, in the middle of writing it.
            user: number of the user to be.
            batch_size: 4 by default.
        """
        command = {"folder": str(folder), "stage": stage, "names": names, **more}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def finish(self, folder: Path, stage: str, *names: str, **more: object) -> Ended:
        """The same, and it must end well."""
        ended = self.run(folder, stage, *names, **more)
        assert ended.status == 0, f"{stage} {' '.join(names)} ended with {ended.status}:\n{ended.text}"
        return ended


def make_project(folder: Path) -> Path:
    """params.yaml, images of three classes and of none, and the weights of a small model: all that a run starts from."""
    rng = np.random.default_rng(0)
    for name, count in (("photos/a", 14), ("photos/b", 14), ("photos/c", 14), ("strange", 12)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            flat = np.full((40, 40, 3), (ord(name[-1]) * 37) % 200)
            Image.fromarray((flat + rng.integers(0, 50, flat.shape)).astype(np.uint8)).save(folder / name / f"{i}.png")
    _boxed(folder, rng)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=64)
    torch.save(model.state_dict(), folder / "weights.pt")
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(ROOT / "params.yaml")
    changes = {
        "in_distribution": "home",
        "datasets": {"home": {"source": "folder:photos", "role": "id"},
                     "alien": {"source": "folder:strange", "role": "anomaly"}},
        "scenes": {"rooms": {"source": "relief"}, "boxed": {"source": "folder:strange"}},
        "backbones": {"tiny": {"source": "file:weights.pt", "architecture": "test_vit", "img_size": 64}},
        "runs": {"plain": {"backbone": "tiny", "registers": "none", "num_registers": 0},
                 "cured": {"backbone": "tiny", "registers": "test_time", "num_registers": 1}},
        "identify": params["identify"] | {"images": 16, "layer": 3, "threshold": None, "top_k": 5},
        "probe": params["probe"] | {"learning_rates": [0.01, 0.1], "steps": 40, "seeds": 2},
        "baselines": params["baselines"] | {"logistic": [0.1], "neighbours": [3]},
        "evaluate": {"detectors": ["msp", "knn"], "bootstrap": 20},
        "verify": {"images": 8, "pictures": "rooms"},
        "extract_dense": {"layers": 1, "datasets": {
            "rooms": {"img_size": 64, "arrays": ["patches", "norms", "attention"]},
            "boxed": {"img_size": 64, "arrays": ["inside"]},
            "home": {"img_size": None, "arrays": ["patches"]},
        }},
        "tokens": {"datasets": ["rooms"]},
        "token_classes": params["token_classes"] | {"datasets": ["home"], "steps": 20},
        "attention": params["attention"] | {"datasets": ["rooms"]},
        "discover": params["discover"] | {"datasets": ["boxed"], "features": ["k"], "biases": [0.0, -0.1], "k_patches": 8},
        "segment": params["segment"] | {"datasets": ["rooms"], "learning_rates": [0.01], "steps": 10, "batch_size": 4},
        "depth": params["depth"] | {"datasets": ["rooms"], "learning_rates": [0.01], "steps": 10, "batch_size": 4,
                                    "bins": 16},
        "hummingbird": params["hummingbird"] | {"datasets": ["rooms"]},
        "correspond": {"datasets": ["rooms"]},
        "retrieve": params["retrieve"] | {"datasets": []},
    }  # fmt: skip
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params | changes, file)
    return folder


def _boxed(folder: Path, rng: np.random.Generator) -> None:
    """data/boxed: a bright square on noise, with its box."""
    rows = []
    (folder / "data/boxed/images").mkdir(parents=True)
    for i in range(10):
        pixels, (x, y) = rng.integers(0, 90, (64, 64, 3)), rng.integers(0, 40, 2)
        pixels[y : y + 20, x : x + 20] += 160
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"data/boxed/images/{i}.png")
        box = json.dumps([[int(x), int(y), int(x) + 20, int(y) + 20]])
        rows.append(Row(f"{i}", f"images/{i}.png", "", ("train", "val", "test")[i % 3], boxes=box))
    write_dataset(folder / "data/boxed", "boxed", rows, (), {})


def tree(folder: Path, *parts: str) -> dict[str, bytes]:
    """Every file below the parts of a folder, with its bytes."""
    found = [path for part in parts or (".",) for path in (folder / part).rglob("*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found) if path.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    """Every file that stages left, with its bytes; what is not yet under a final name is hidden or in work/."""
    return tree(folder, "data", "features", "metrics")


@dataclass(frozen=True)
class Moment:
    """A copy of a project as it was before a stage: its folder and what is in it, the results among that, those that the
    stage is to leave there, and how it ended undisturbed."""

    folder: Path
    there: frozenset[Path]
    start: dict[str, bytes]
    finished: dict[str, bytes]
    ended: Ended


class Undisturbed:
    """A project whose stages ran to their end one after another, nothing disturbing them."""

    def __init__(self, stages: Stages, folder: Path):
        self.folder = make_project(folder)
        self.given = tree(folder)
        self.outputs, self.ended, before = {}, {}, results(folder)
        for stage in ORDER:
            self.ended[stage] = stages.finish(folder, *stage)
            after = results(folder)
            self.outputs[stage] = {name: after[name] for name in after if before.get(name) != after[name]}
            before = after

    def before(self, stage: tuple[str, ...], folder: Path) -> Moment:
        """Makes a copy without what the stage and those after it left."""
        files = dict(self.given)
        for earlier in ORDER[: ORDER.index(stage)]:
            files |= self.outputs[earlier]
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        start = results(folder)
        return Moment(folder, frozenset(folder.rglob("*")), start, start | self.outputs[stage], self.ended[stage])


# The process that runs stages.


def _watch(command: dict, report: int) -> None:
    """Counts the changes to the disk from here on, and does at one of them what the command says."""
    seen, folder = [0], command["folder"]
    die_at, full_at = command.get("die_at"), command.get("full_at")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            makes = (isinstance(mode, str) and bool(set(mode) & set("wax+"))) or bool((flags or 0) & WRITING)
            if not makes:
                return
        elif event in CHANGES:
            path, makes = arguments[0], event in ("os.mkdir", "os.link", "os.symlink")
        else:
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not path or (os.path.isabs(path) and not path.startswith(folder)) or "__pycache__" in path:
            return
        if seen[0] == die_at:
            os.pwrite(report, str(seen[0]).encode(), 0)
            os.kill(os.getpid(), command.get("signal", signal.SIGKILL))
            time.sleep(command.get("wait", 0.0))
        seen[0] += 1
        os.pwrite(report, str(seen[0]).encode(), 0)
        if full_at is not None and seen[0] > full_at and makes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)


def _child(command: dict, report: int, log: int) -> int:
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
    os.chdir(command["folder"])
    os.environ.pop("DVC_ROOT", None)
    os.environ["REGVIT_DEVICE"], os.environ["REGVIT_THREADS"], os.environ["REGVIT_BATCH_SIZE"] = (
        "cpu",
        "1",
        str(command.get("batch_size", 4)),
    )
    sys.argv = [f"stages/{command['stage']}.py", *command["names"]]
    if command.get("largest"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest"],) * 2)
    if command.get("dies_beyond"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["dies_beyond"],) * 2)
    if command.get("user"):
        os.setgroups([])
        os.setgid(command["user"])
        os.setuid(command["user"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _watch(command, report)
    try:
        runpy.run_path(str(STAGES / f"{command['stage']}.py"), run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _serve() -> None:
    """Answers commands until stdin ends."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(STAGES))
    for stage in {stage for stage, *_ in ORDER if (STAGES / f"{stage}.py").exists()}:  # imports once what they import
        runpy.run_path(str(STAGES / f"{stage}.py"), run_name="imported")
    for name in ("dvc.repo", "dvclive", "pandas.io.formats.csvs", "pandas.io.formats.string", "pyarrow.pandas_compat"):
        importlib.import_module(name)  # and what they would import as they run
    Image.init()
    relief.COUNTS = {"train": 8, "val": 4, "test": 4}
    draw = relief.render
    relief.render = lambda generator: draw(generator, 48)
    store.SMALLEST_UNIT = 4  # many units of few images
    checkpoints.SAVE_EVERY = 0.0  # seconds: a checkpoint at every point of the curves
    gc.freeze()  # else the first collection of every fork would copy all of this process's memory
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    first = []
    for line in sys.stdin:
        command = json.loads(line)
        report, (said, log) = os.memfd_create("changes"), os.pipe()  # a pipe, as limits of size are not on it
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 1 << 20)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _child(command, report, log)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        if command.get(
            "go_on"
        ):  # a first run goes on while others come and go; the next command without it waits for it
            first.append(child)
            answers.write(json.dumps({"status": 0, "changes": 0, "seconds": 0.0, "text": ""}) + "\n")
            continue
        if "die_after" in command:
            time.sleep(command["die_after"])
            os.kill(child, command.get("signal", signal.SIGKILL))
        _, status = os.waitpid(child, 0)
        os.close(log)
        with open(said, "rb") as pipe:
            text = pipe.read().decode(errors="replace")
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "changes": int(os.pread(report, 20, 0) or 0),
            "seconds": time.monotonic() - began,
            "text": re.sub(r"\r[^\n]*\r", "\r", text),
        }
        os.close(report)
        for other in first:
            assert os.waitpid(other, 0)[1] == 0, f"the run that went on beside it ended badly: {other}"
        first.clear()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _serve()
