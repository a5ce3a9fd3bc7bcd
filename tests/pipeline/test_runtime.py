import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "stages"))

from regvit.pipeline import runtime as module
from regvit.pipeline.runtime import Runtime

KNOBS = (
    "DEVICE",
    "BATCH_SIZE",
    "WORKERS",
    "THREADS",
    "COMPILE",
    "ENGINE",
    "ADDRESS",
    "WORKER_DEVICE",
    "GPUS_PER_WORKER",
)


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    for name in (*KNOBS, "CPUS_PER_WORKER"):
        monkeypatch.delenv(f"REGVIT_{name}", raising=False)
    return tmp_path


def written(folder: Path, text: str) -> Runtime:
    (folder / "runtime.yaml").write_text(text)
    return Runtime.load(folder)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module, "usable_cores", lambda: 12)


def test_on_a_cpu_images_are_decoded_in_between_and_batches_are_of_8(bare):
    runtime = written(bare, "device: cpu\n")
    assert (runtime.batch_size, runtime.batch_size_given, runtime.workers, runtime.compile) == (8, False, 0, None)
    assert (runtime.engine, runtime.address, runtime.worker_device) == ("local", None, None)


def test_with_a_gpu_every_usable_core_decodes(bare, gpu):
    runtime = Runtime.load(bare)
    assert (runtime.device, runtime.workers, runtime.batch_size, runtime.batch_size_given) == ("cuda", 12, 32, False)
    assert written(bare, "workers: 3").workers == 3
    assert written(bare, "workers: 0").workers == 0


def test_auto_and_null_leave_a_knob_to_the_machine(bare):
    runtime = written(bare, "device: auto\nbatch_size: auto\nworkers: auto\ncompile: auto\nthreads: null\n")
    assert runtime == Runtime.load(bare.parent)  # where there is no runtime.yaml


def test_a_batch_size_is_known_to_be_given_also_from_the_environment(bare, monkeypatch):
    assert written(bare, "batch_size: 32").batch_size_given
    monkeypatch.setenv("REGVIT_BATCH_SIZE", "auto")
    assert not Runtime.load(bare).batch_size_given


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False), ("auto", None)])
def test_compile_is_yes_no_or_left_open(bare, monkeypatch, text, expected):
    assert written(bare, f"compile: {text}").compile is expected
    (bare / "runtime.yaml").unlink()
    monkeypatch.setenv("REGVIT_COMPILE", text)
    assert Runtime.load(bare).compile is expected


def test_a_cluster_is_named_with_what_its_workers_get(bare):
    text = "engine: ray\naddress: auto\nworker_device: cuda\ngpus_per_worker: 0.5\ncpus_per_worker: 4\n"
    runtime = written(bare, text)
    assert (runtime.engine, runtime.address, runtime.worker_device) == ("ray", "auto", "cuda")
    assert (runtime.gpus_per_worker, runtime.cpus_per_worker) == (0.5, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size: many", "batch_size .* is 'many', expected a whole number of at least 1, or auto"),
        ("threads: auto", "threads .* is 'auto', expected a whole number of at least 1$"),
        ("compile: maybe", "compile .* is 'maybe', expected one of true, false, auto"),
        ("engine: slurm", "engine .* is 'slurm', expected one of local, ray"),
        ("worker_device: tpu", "worker_device .* is 'tpu', expected one of cpu, cuda"),
        ("gpus_per_worker: 2", "gpus_per_worker .* is 2, expected a number above 0, at most 1"),
        ("gpus_per_worker: half", "gpus_per_worker .* is 'half', expected a number above 0"),
        ("batch_size_given: true", "expected a block with some of the keys device, batch_size"),
    ],
)
def test_a_wrong_knob_is_said_with_its_place_and_what_was_expected(bare, text, said):
    with pytest.raises(ValueError, match=said):
        written(bare, text)
