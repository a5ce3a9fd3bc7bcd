"""The benchmarks run, on tiny sizes; what they find is for larger ones."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import __main__ as runner
from benchmarks import extraction, identification, machine, memory, pipeline, probes, stores
from regvit.features.store import ArraySpec


def row(ratio, wanted=1.0):
    return machine.Timed((1.0,), (ratio,)).row("a / b", wanted, "of 3")


def test_the_runner_makes_one_table_and_says_what_is_below(tmp_path, capsys, monkeypatch):
    for name, ratio in (("probes", 2.5), ("stores", 0.5)):
        module = type(sys)(f"benchmarks.{name}")
        module.measure = lambda quick, ratio=ratio: [row(ratio)]
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)
    out = tmp_path / "deep" / "x.json"
    assert runner.main(["--only", "probes", "stores", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "| a / b | 2.50 [2.50, 2.50] | ≥ 1 | of 3 |" in said
    assert "| a / b | 0.50 [0.50, 0.50] **below** | ≥ 1 | of 3 |" in said
    written = json.loads(out.read_text())
    assert [each["ratio"] for each in written["rows"]] == [2.5, 0.5] and written["machine"]["cores"] >= 1
    assert runner.main(["--quick", "--only", "probes", "stores"]) == 0  # tiny sizes say nothing, and write nothing


def test_a_ratio_without_an_aim_is_shown_and_misses_nothing():
    price = row(0.03, wanted=None)
    assert runner.table([price]).splitlines()[-1] == "| a / b | 0.03 [0.03, 0.03] | – | of 3 |"
    assert not runner.is_below(price) and runner.is_below(row(0.5)) and not runner.is_below(row(1.0))


def test_a_row_with_other_keys_is_refused():
    with pytest.raises(ValueError, match=r"benchmarks\.x gave a row with \['ratio'\]; expected name, ratio, ratio_lo"):
        runner.run({"x": lambda quick: [{"ratio": 1}]}, True)


def test_every_benchmark_of_the_table_offers_measure():
    root = Path(runner.__file__).parent
    for name in runner.MODULES:
        if (root / f"{name}.py").exists():
            assert "def measure(quick: bool = False) -> list[dict]:" in (root / f"{name}.py").read_text(), name


def test_the_light_ones_run_on_tiny_sizes():
    rows = runner.run({"probes": probes.measure, "stores": stores.measure}, True)
    assert [each["name"].split()[0] for each in rows] == ["probes", "store", "store"]
    assert all(each["ratio"] > 0 for each in rows)


def test_two_pieces_of_work_run_in_turn_and_the_first_run_is_not_counted():
    order, said = [], []
    timed = machine.in_turn(lambda: order.append("a"), lambda: order.append("b"), 3, say=said.append)
    assert order == ["a", "b"] * 4 and len(timed.first) == len(timed.second) == len(said) == 3
    found = machine.Timed((1.0, 2.0, 1.0), (3.0, 4.0, 30.0)).row("a", 2.0, "b", times=10)
    assert found == {
        "name": "a", "ratio": 30, "ratio_lo": 20, "ratio_hi": 300, "rounds": 3, "wanted": 2.0, "detail": "b",
    }  # fmt: skip


@pytest.mark.parametrize(("rounds", "low"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (30, 9)])
def test_a_median_lies_between_the_ranks_that_the_sign_test_gives(rounds, low):
    """Ranks from the usual tables: the 10th of 30, the 3rd of 12, the 2nd of 9; of fewer than nine the least."""
    found = machine.median_with_interval(list(range(rounds))[::-1])
    assert found == ((rounds - 1) / 2, low, rounds - 1 - low)


def test_a_machine_is_named_by_its_processor_in_letters_and_digits(tmp_path):
    (tmp_path / "cpuinfo").write_text("vendor_id : X\nmodel name : AMD EPYC(TM) 7\nmodel name : other\n")
    assert machine.processor(tmp_path / "cpuinfo") == "AMD EPYC(TM) 7"
    assert machine.kind("AMD EPYC(TM) 7") == "amd-epyc-tm-7"
    assert machine.describe()["versions"]["torch"]


def test_a_store_that_is_not_made_has_the_files_of_the_format():
    arrays = {"cls": ArraySpec((4,)), "registers": ArraySpec((2, 4)), "patch_mean": ArraySpec((4,))}
    found = stores.measured(600, arrays)  # 3 units of 256 rows
    assert found["files"] == 3 * (3 + 1) + 1  # with the metadata of the arrays and of the group
    large = stores.extrapolated(1_281_167, arrays, found)
    assert large["how"] == "extrapolated" and large["files"] == 3 * (313 + 1) + 1
    assert large["bytes"] == sum(313 * (4096 * values * 2 + 4) for values in (4, 8, 4))


def test_memory_is_flat_if_it_grows_by_what_must_be_known_of_each_image_only(monkeypatch):
    mib = 1 << 20  # 92,160 images more are allowed 45 MiB, and the first peak a quarter
    peaks = iter([100 * mib, 120 * mib, 169 * mib, 100 * mib, 120 * mib, 171 * mib])
    monkeypatch.setitem(memory.PIECES, "evaluate", (memory.evaluate, 6144, 512))
    answer = type("Done", (), {"stdout": property(lambda _: f"{next(peaks)}\n")})
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: answer())
    flat, grown = memory.measured("evaluate"), memory.measured("evaluate")
    assert flat["flat"] and not grown["flat"]
    assert flat["images"] == [6144, 24576, 98304] and flat["allowed_per_image"] == 512


def test_memory_allows_far_less_than_the_logits_of_an_image():
    logits = 4 * memory.EVALUATED_CLASSES * memory.EVALUATED_SEEDS * len(memory.EVALUATED_READOUTS)
    assert memory.PIECES["evaluate"][2] < logits / 40
    assert max(allowed for _, _, allowed in memory.PIECES.values()) == memory.OF_MAKING == 512


def test_memory_counts_what_is_held_and_not_the_holes_that_the_allocator_leaves(monkeypatch):
    given = []
    answer = type("Done", (), {"stdout": "1\n"})()
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **more: given.append(more["env"]) or answer)
    memory.measured("bootstrap")
    assert [each["MALLOC_MMAP_THRESHOLD_"] for each in given] == ["131072"] * 3
    assert given[0]["PATH"] == os.environ["PATH"]


def test_one_piece_is_measured_again_and_the_others_stay(tmp_path):
    out = tmp_path / "memory.json"
    first = [memory.row(name, [1, 4, 16], [5, 5, 5]) for name in ("probe", "evaluate")]
    assert memory.merged(out, first) == first
    out.write_text(json.dumps({"rows": first}))
    again = memory.row("evaluate", [1, 4, 16], [7, 7, 7])
    assert memory.merged(out, [again]) == [first[0], again]


def test_what_is_in_the_folder_was_judged_by_the_allowance_of_its_piece():
    for row in json.loads((Path(memory.__file__).parent / "memory.json").read_text())["rows"]:
        assert row == memory.row(row["piece"], row["images"], row["bytes"])


def test_extraction_is_measured_on_a_gpu_where_there_is_one(monkeypatch):
    given = []

    def run(asked, say):
        given.append(asked)
        return {"rows": [row(1.0)]}

    monkeypatch.setattr(extraction, "run", run)
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert extraction.measure(True) == [row(1.0)] and given[-1].device == device


def test_extraction_leaves_the_threads_as_they_were_and_records_its_own(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(extraction, "measurements", lambda given, say: {"threads": torch.get_num_threads()})
    given = type("Given", (), {"threads": before + 1})
    found = extraction.run(given, print)
    assert found["threads"] == found["machine"]["threads"] == before + 1 and torch.get_num_threads() == before


def test_the_published_search_runs_in_full_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(identification, "published_search", lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    found = type("Found", (), {"detection": type("Detection", (), {"layer": 1, "threshold": 2.0})})
    identification.published(torch.nn.Linear(2, 2), torch.zeros(3, 2), found)
    assert seen == [False] and torch.backends.cudnn.allow_tf32


def test_what_is_saved_names_the_machine(tmp_path):
    machine.save(None, {"x": 1})
    machine.save(tmp_path / "deep" / "x.json", {"x": 1})
    found = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert found["x"] == 1 and found["machine"]["versions"]["torch"]


def test_the_peak_of_a_piece_is_measured():
    assert 0 <= memory.peak_of("neighbours", 400) < 1 << 30


def test_a_pipeline_grows_by_copies_of_its_entries(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("datasets:\n  a: {role: id} # kept\n  b: {role: ood}\nruns:\n  r: {backbone: x}\n")
    pipeline.enlarge(params, 4, 2)
    assert params.read_text() == (
        "datasets:\n  a: {role: id} # kept\n  b: {role: ood}\n  more_0:\n    role: ood\n  more_1:\n    role: ood\n"
        "runs:\n  r: {backbone: x}\n  more_0:\n    backbone: x\n"
    )


def test_a_stand_in_is_a_file_or_a_folder_by_its_name(tmp_path):
    for name in ("a.json", "b.zarr", "c"):
        pipeline.place(tmp_path / name)
    assert (tmp_path / "a.json").is_file() and (tmp_path / "b.zarr/content").is_file() and (tmp_path / "c").is_dir()
