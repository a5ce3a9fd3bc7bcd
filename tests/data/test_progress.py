import io

import pytest

from regvit.data.progress import duration, progress


class Clock:
    """A clock that stands still until it is told to go."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rate_and_time_left_follow_from_work_and_time():
    clock, log = Clock(), io.StringIO()
    with progress(40, "extract", stream=log, clock=clock) as bar:
        clock.now += 6.0
        bar.advance(12)
        assert bar.status() == "12/40 images  2.0 images/s  0:14 left"
    assert log.getvalue() == "extract: 12/40 images  2.0 images/s  0:14 left\n"


def test_a_log_gets_a_line_every_five_seconds_and_one_at_the_end():
    clock, log = Clock(), io.StringIO()
    with progress(100, "decode", stream=log, clock=clock) as bar:
        for _ in range(100):
            clock.now += 0.125
            bar.advance()
    assert log.getvalue().splitlines() == [
        "decode: 40/100 images  8.0 images/s  0:08 left",
        "decode: 80/100 images  8.0 images/s  0:02 left",
        "decode: 100/100 images  8.0 images/s  in 0:12",
    ]


def test_resumed_work_moves_the_count_but_not_the_rate():
    clock = Clock()
    bar = progress(100, "extract", stream=io.StringIO(), clock=clock)
    bar.skip(50)
    clock.now += 5.0
    bar.advance(10)
    assert bar.status() == "60/100 images  2.0 images/s  0:20 left"


def test_a_terminal_gets_a_bar_that_fits_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    clock, terminal = Clock(), Terminal()
    with progress(10, "extract", stream=terminal, clock=clock) as bar:
        clock.now += 1.0
        bar.advance(5)
    drawn = terminal.getvalue().replace("\x1b[K", "").rstrip("\n").split("\r")
    assert drawn[-1] == f"extract [{'#' * 15}{'-' * 15}] 5/10 images  5.0 images/s  0:01 left"
    assert all(len(line) < 80 for line in drawn)


def test_a_narrow_terminal_drops_the_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    with progress(10, "extract", stream=terminal, clock=Clock()):
        pass
    assert terminal.getvalue() == "\r\x1b[Kextract  0/10 image\n"


def test_a_line_of_text_stands_above_the_bar():
    terminal = Terminal()
    with progress(2, "extract", stream=terminal, clock=Clock()) as bar:
        bar.line("resumed")
    assert "\r\x1b[Kresumed\n" in terminal.getvalue()


def test_an_error_inside_the_block_is_not_hidden():
    with pytest.raises(KeyError), progress(2, "extract", stream=io.StringIO()):
        raise KeyError


def test_a_negative_total_is_refused():
    with pytest.raises(ValueError, match=r"total is -1; expected 0 or more images"):
        progress(-1, "extract")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_no_label_shows_nothing():
    terminal = Terminal()
    with progress(2, None, stream=terminal) as bar:
        bar.advance()
        bar.line("resumed")
    assert terminal.getvalue() == ""


def test_a_task_of_no_units_shows_its_lines_only():
    for stream, expected in ((io.StringIO(), "note\n"), (Terminal(), "\r\x1b[Knote\n")):
        with progress(0, "extract", stream=stream) as bar:
            bar.line("note")
        assert stream.getvalue() == expected
