"""The benchmarks run, on tiny sizes; what they find is for larger ones."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import __main__ as runner
from benchmarks import machine, memory, pipeline, probes, stores


def row(ratio, wanted=1.0):
    return {"name": "a / b", "ratio": ratio, "wanted": wanted, "detail": "of 3"}


def test_the_runner_makes_one_table_and_says_what_is_below(tmp_path, capsys, monkeypatch):
    for name, ratio in (("probes", 2.5), ("stores", 0.5)):
        module = type(sys)(f"benchmarks.{name}")
        module.measure = lambda quick, ratio=ratio: [row(ratio)]
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)
    out = tmp_path / "deep" / "x.json"
    assert runner.main(["--only", "probes", "stores", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "| a / b | 2.50 | ≥ 1 | of 3 |" in said and "| a / b | 0.50 **below** | ≥ 1 | of 3 |" in said
    written = json.loads(out.read_text())
    assert [each["ratio"] for each in written["rows"]] == [2.5, 0.5] and written["machine"]["cores"] >= 1
    assert runner.main(["--quick", "--only", "probes", "stores"]) == 0  # tiny sizes say nothing, and write nothing


def test_a_ratio_without_an_aim_is_shown_and_misses_nothing():
    price = row(0.03, wanted=None)
    assert runner.table([price]).splitlines()[-1] == "| a / b | 0.03 | – | of 3 |"
    assert not runner.is_below(price) and runner.is_below(row(0.5)) and not runner.is_below(row(1.0))


def test_a_row_with_other_keys_is_refused():
    with pytest.raises(ValueError, match=r"benchmarks\.x gave a row with \['ratio'\]; expected name, ratio, wanted"):
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
    order = []
    timed = machine.in_turn(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert order == ["a", "b"] * 4 and len(timed.first) == len(timed.second) == 3
    assert machine.Timed((1.0, 2.0, 1.0), (3.0, 4.0, 30.0)).ratio == 3


def test_a_machine_is_named_by_its_processor_in_letters_and_digits(tmp_path):
    (tmp_path / "cpuinfo").write_text("vendor_id : X\nmodel name : AMD EPYC(TM) 7\nmodel name : other\n")
    assert machine.processor(tmp_path / "cpuinfo") == "AMD EPYC(TM) 7"
    assert machine.kind("AMD EPYC(TM) 7") == "amd-epyc-tm-7"
    assert machine.describe()["versions"]["torch"]


def test_a_store_that_is_not_made_has_the_files_of_the_format():
    found = stores.measured(600, 4)
    assert found["files"] == 3 + 2  # units of 256 rows, and the metadata of the group and of the array
    large = stores.extrapolated(1_281_167, 4, found)
    assert large["how"] == "extrapolated" and large["files"] == 313 + 2
    assert large["bytes"] == 313 * (4096 * 4 * 2 + 4)


def test_memory_is_flat_if_it_grows_by_metadata_only(monkeypatch):
    peaks = iter([100 << 20, 101 << 20, 110 << 20, 100 << 20, 200 << 20, 900 << 20])
    answer = type("Done", (), {"stdout": property(lambda _: f"{next(peaks)}\n")})
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: answer())
    assert memory.measured("probe")["flat"] and not memory.measured("probe")["flat"]


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
