"""dvc.lock read by the fast parser: what DVC then writes is what it writes anyway."""

import pytest
from dvc.utils.serialize import _yaml

from regvit.pipeline.quick_dvc import parse

VALUES = [
    "on", "no", "null", "~", "", " a", "012", "1e-3", "1_000", "2.0", "0x1f", "12:30:00", "2020-01-01", "a: b", "# c", "é 🙂",
    "two\nlines", "tab\t", "'", '"', "word " * 40, "x" * 200, "{a}", "[1]", "&a", "*a", "!a", "%a", "@a", "- a",
    0, -1, 10**20, 0.1, 1e-05, 1e22, 1.0, float("inf"), True, False, None, [], {}, [[]], [1, [2, {"a": None}]],
    {"a": {"b": [{"c": 0.5}, {}]}}, {"on": 1, "1": 2, "a b": 3},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_lock_that_was_read_fast_is_written_to_the_byte_as_one_that_was_read_with_comments(value):
    params = {"params.yaml": {"value": value, "list": [value]}}
    lock = {"schema": "2.0", "stages": {"a@b": {"cmd": "python a.py", "params": params}}}
    text = _yaml.dumps_yaml(lock)
    fast, slow = parse(text, "folder/dvc.lock"), _yaml.parse_yaml_for_update(text, "dvc.lock")
    for found in (fast, slow):
        found["stages"]["c"] = {"cmd": "python c.py", "params": params}
    assert _yaml.dumps_yaml(fast) == _yaml.dumps_yaml(slow)
    assert fast == slow


def test_other_files_keep_their_comments():
    text = "stages: # in order\n  a:\n    cmd: python a.py\n"
    assert _yaml.dumps_yaml(parse(text, "dvc.yaml")) == text
