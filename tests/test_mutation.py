"""The tool that changes modules changes what it should, one place at a time."""

import ast

import pytest
from mutation import mutants, mutated

SOURCE = '''"""Says what it is."""
import math

@staticmethod
def f(a: "str" = 1) -> "int":
    """Says what it does."""
    if a < 2 and not a:
        raise ValueError("too small" + str(a))
    print("x")
    return a + 0.5
'''


def test_everything_that_runs_is_changed_once_and_words_for_people_never():
    changes = [(one.line, one.change) for one in mutants(ast.parse(SOURCE))]
    assert changes == [
        (5, "1  ->  2"),
        (7, "if a < 2 and (not a):  ->  if not (a < 2 and (not a)):"),
        (7, "a < 2 and (not a)  ->  a < 2 or not a"),
        (7, "a < 2  ->  a <= 2"),
        (7, "not a  ->  a"),
        (7, "2  ->  3"),
        (8, "raise ValueError('too small' + str(a))  ->  pass"),
        (9, "print('x')  ->  pass"),
        (9, "'x'  ->  'XXx'"),
        (10, "return a + 0.5  ->  return"),
        (10, "a + 0.5  ->  a - 0.5"),
        (10, "0.5  ->  1.5"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_each_change_is_the_only_one(number):
    one = mutants(ast.parse(SOURCE))[number]
    before, after = ast.unparse(ast.parse(SOURCE)).splitlines(), ast.unparse(mutated(SOURCE, one)).splitlines()
    assert len(before) == len(after)
    assert len([pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]) == 1
    compile(mutated(SOURCE, one), "x", "exec")
