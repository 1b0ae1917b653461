"""Progress on terminals and elsewhere."""

import io

import pytest

from ftlib import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_the_end_is_one_plain_line(capsys):
    with console.Progress(3, "checking", unit="pictures") as progress:
        for _ in range(3):
            progress.advance()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("checking: 3 of 3 pictures, ")
    assert "\x1b" not in err and "\r" not in err


def test_lines_come_at_intervals_and_the_end_comes_once(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with console.Progress(2, "checking") as progress:
        progress.update(1, 2)
        progress.update(2, 2)
    assert [line[:20] for line in capsys.readouterr().err.splitlines()] == [
        "checking: 1 of 2 fil",
        "checking: 2 of 2 fil",
    ]


def test_a_terminal_shows_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with console.Progress(2, "checking", unit="pictures") as progress:
        progress.advance(2)
    assert "checking" in terminal.getvalue() and "2/2" in terminal.getvalue()


def test_a_hidden_progress_prints_nothing_and_a_failure_prints_no_end(capsys):
    with console.Progress(2, "checking", shown=False) as progress:
        progress.advance(2)
    with pytest.raises(ValueError, match="stop"), console.Progress(2, "checking"):
        raise ValueError("stop")
    assert capsys.readouterr().err == ""


def test_only_a_terminal_gets_a_live_bar():
    assert console.live_bar(io.StringIO(), "bar") is None
    assert console.live_bar(Terminal(), "{task.description}", "bar", "share", "left") is not None
