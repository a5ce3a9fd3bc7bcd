"""Knobs that change no result: from the environment, runtime.yaml, or the machine."""

from pathlib import Path

import pytest
import torch

from regvit.pipeline import runtime as module
from regvit.pipeline.runtime import Runtime


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path) -> Path:
    """A repository without runtime.yaml, where the environment says nothing."""
    for name in Runtime.model_fields:
        monkeypatch.delenv(f"REGVIT_{name.upper()}", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def written(bare):
    def write(text: str) -> Runtime:
        (bare / "runtime.yaml").write_text(text)
        return Runtime.load()

    return write


def test_on_a_cpu_images_are_decoded_in_between_and_batches_are_of_8(written):
    runtime = written("device: cpu\n")
    assert (runtime.batch_size, runtime.batch_size_given, runtime.workers) == (8, False, 0)
    assert (runtime.engine, runtime.address, runtime.worker_device) == ("local", None, None)


def test_with_a_gpu_every_usable_core_decodes(written, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module, "usable_cores", lambda: 12)
    runtime = Runtime.load()
    assert (runtime.device, runtime.workers, runtime.batch_size, runtime.batch_size_given) == ("cuda", 12, 32, False)
    assert written("workers: 0").workers == 0


def test_auto_and_null_leave_a_knob_to_the_machine(written):
    default = Runtime.load()
    assert written("device: auto\nbatch_size: auto\nworkers: auto\nthreads: null\n") == default
    assert not Runtime.load().batch_size_given and written("batch_size: 8").batch_size_given


def test_the_environment_goes_before_runtime_yaml_and_that_before_the_defaults(written, monkeypatch):
    monkeypatch.setenv("REGVIT_WORKERS", "3")
    monkeypatch.setenv("REGVIT_BATCH_SIZE", "")
    runtime = written("device: cpu\nbatch_size: 7\nworkers: 2\n")
    assert (runtime.device, runtime.batch_size, runtime.workers) == ("cpu", 7, 3)


def test_a_cluster_is_named_with_what_its_workers_get(written):
    runtime = written("engine: ray\naddress: auto\nworker_device: cuda\ngpus_per_worker: 0.5\ncpus_per_worker: 4\n")
    assert (runtime.engine, runtime.address, runtime.worker_device) == ("ray", "auto", "cuda")
    assert (runtime.gpus_per_worker, runtime.cpus_per_worker) == (0.5, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size: 0", "batch_size is 0, expected greater than 0"),
        ("batch_size: many", "batch_size is 'many', expected a whole number"),
        ("threads: 1.5", "threads is 1.5, expected a whole number"),
        ("engine: slurm", "engine is 'slurm', expected 'local' or 'ray'"),
        ("worker_device: cud", "worker_device is 'cud': did you mean 'cuda'?"),
        ("gpus_per_worker: 2", "gpus_per_worker is 2, expected less than or equal to 1"),
        ("batchsize: 3", "unknown key batchsize: did you mean 'batch_size'?"),
        ("device: gpu", "device is 'gpu', expected auto, cpu, cuda or cuda:<n>"),
        ("device: cuda:99", "device is 'cuda:99', expected auto or cpu, as torch sees 0 CUDA"),
    ],
)
def test_a_wrong_knob_is_said_with_its_place_and_what_was_expected(written, bare, text, said):
    with pytest.raises(ValueError, match=f"{bare}/runtime.yaml: {said.replace('?', '.')}"):
        written(text)
