"""Final files are whole or not there."""

import errno
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from regvit.files import write_atomic, write_bytes, write_json, write_table, write_text


def test_what_is_written_is_what_is_read(tmp_path):
    write_bytes(tmp_path / "a", b"\x00\r\n")
    write_text(tmp_path / "b", "é\n")
    write_json(tmp_path / "c.json", {"a": [1, None]})
    write_table(tmp_path / "d.csv", ["x", "y"], [[1, "a,b"], ["é", None]])
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n"
    assert (tmp_path / "b").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "c.json").read_bytes() == b'{\n "a": [\n  1,\n  null\n ]\n}\n'
    assert (tmp_path / "d.csv").read_bytes() == b'x,y\n1,"a,b"\n\xc3\xa9,\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c.json", "d.csv"]


def test_an_error_in_the_middle_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a", "old")

    def rows():
        yield [1]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_table(tmp_path / "a", ["x"], rows())
    with pytest.raises(KeyboardInterrupt), write_atomic(tmp_path / "new") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_final_name_is_taken_in_one_step(tmp_path):
    write_text(tmp_path / "a", "old")
    with write_atomic(tmp_path / "a") as beside:
        beside.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


def test_the_path_to_write_to_has_the_final_name_by_whose_suffix_libraries_tell_the_format(tmp_path):
    with write_atomic(tmp_path / "a.png") as beside:
        assert beside.name == "a.png"
        beside.touch()


def test_what_a_killed_process_left_is_cleared_away_with_the_temporary_files_of_libraries(tmp_path):
    (tmp_path / "a.safetensors.partial").mkdir()
    (tmp_path / "a.safetensors.partial/.tmpX1y2").write_bytes(b"half")
    (tmp_path / "a.safetensors.partial/a.safetensors").write_bytes(b"half")
    with write_atomic(tmp_path / "a.safetensors") as beside:
        save_file({"x": np.arange(3)}, beside)
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    """DVC's cache may be linked into the working tree: written through, it would be corrupted silently."""
    (tmp_path / "cache").write_text("cached")
    (tmp_path / "soft").symlink_to(tmp_path / "cache")
    os.link(tmp_path / "cache", tmp_path / "hard")
    for name in ("soft", "hard"):
        write_text(tmp_path / name, "new")
    assert (tmp_path / "cache").read_text() == "cached"
    assert not (tmp_path / "soft").is_symlink() and (tmp_path / "soft").read_text() == "new"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_has_no_word_for_is_refused_and_the_file_named(tmp_path, value):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match=r"a\.json cannot hold these values: Out of range float values are not JSON"):
        write_json(tmp_path / "a.json", {"x": [value]})
    assert (tmp_path / "a.json").read_text() == '{\n "old": 1\n}\n'


def test_a_block_that_writes_nothing_is_an_error_and_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), write_atomic(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "none/a", "x")
    assert caught.value.errno == errno.ENOENT


def test_of_two_that_write_the_same_file_at_once_the_first_fails_and_the_file_is_whole(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomic(tmp_path / "a") as first:
        first.write_text("first")
        write_text(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "second"


@pytest.mark.parametrize("place", ["/dev/stdout", "/proc/self/fd/1"])
def test_what_belongs_to_the_system_is_never_replaced(place):
    before = os.readlink(place)
    with pytest.raises(OSError, match="is no place for a file"):
        write_text(place, "text")
    assert os.readlink(place) == before
