"""What the command line understands: its words, and the values of its options."""

import pytest

import regvit.cli.options
import regvit.registers.test_time
from regvit.cli import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["look"], "arguments are required: IMAGE"),
        (["look", "a.png", "--out", "a.jpg"], "a.jpg does not end in .png"),
        (["look", "a.png", "--num-registers", "0"], "0 is below 1"),
        (["look", "a.png", "--num-registers", "100000"], "100000 is over 64; one holds what all outliers carry"),
        (["export", "tiny", "--neurons", "n.json", "--out", "x", "--num-registers", "65"], "65 is over 64"),
        (["look", "a.png", "--num-registers", "few"], "invalid whole number value: 'few'"),
        (["neurons", "tiny", "a.png", "--threshold", "nan"], "nan is not a finite number"),
        (["neurons", "tiny", "a.png", "--threshold", "much"], "invalid number value: 'much'"),
        (["neurons", "tiny", "a.png", "--seed", "-1"], "-1 is below 0"),
        (["neurons", "tiny", "a.png", "--workers", "-3"], "-3 is below 0"),
        (["export", "tiny", "--neurons", "n.json", "--out", "x", "--scale", "inf"], "inf is not a finite number"),
        (["export", "tiny", "--out", "x"], "arguments are required: --neurons"),
    ],
)
def test_a_command_that_is_not_understood_ends_with_2(command, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_bound_of_registers_is_that_of_the_library():
    assert regvit.cli.options.MAX_REGISTERS == regvit.registers.test_time.MAX_REGISTERS
