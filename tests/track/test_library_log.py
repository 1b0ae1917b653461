"""Tracebacks of MLflow and SQLAlchemy go to a file, and ftlib's own line names it."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.track import library_log
from ftlib.track.store import ensure_store

ROOT = Path(__file__).parents[2]


def loggers():
    """The state of each logger; pytest's own handlers come and go within a test."""
    found = [logging.getLogger(name) for name in library_log.LIBRARIES]
    return [
        ([h for h in log.handlers if "pytest" not in type(h).__module__], log.propagate)
        for log in found
    ]


@pytest.fixture(autouse=True)
def unchanged():
    """The loggers are as before when a test ends."""
    before = loggers()
    yield
    assert loggers() == before


def test_messages_go_to_the_file_while_it_is_active_and_nowhere_else(tmp_path, capsys):
    file = library_log.start(tmp_path)
    try:
        logging.getLogger("sqlalchemy.pool").error("the database is locked", exc_info=False)
        try:
            raise ValueError("deep inside")
        except ValueError:
            logging.getLogger("urllib3.connectionpool").exception("no answer")
    finally:
        library_log.stop(tmp_path)
    text = file.read_text()
    assert "the database is locked" in text and "Traceback" in text and "deep inside" in text
    out, err = capsys.readouterr()
    assert out == err == ""


def test_the_newest_of_several_files_counts_until_it_is_stopped(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    logger = logging.getLogger("alembic")
    library_log.start(one)
    library_log.start(two)
    logger.warning("for two")
    library_log.stop(two)
    logger.warning("for one")
    library_log.stop(one)
    assert "for two" in (two / library_log.FILE).read_text()
    assert (one / library_log.FILE).read_text().count("for") == 1


def test_a_file_that_cannot_be_written_is_silent(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    library_log.start(tmp_path / "file" / "below")
    logging.getLogger("alembic").error("lost")
    library_log.stop(tmp_path / "file" / "below")
    assert capsys.readouterr().err == ""


FULL_DISK = """
import logging, sys, time
from pathlib import Path
from ftlib.config import Track
from ftlib.track import delivery_thread
from ftlib.track.tracking import open_tracking
import ftlib.track.tracking as tracking_module
tracking_module.FINISH_SECONDS = 0.5
with open_tracking(Track(), experiment="e", journal_dir=Path(sys.argv[1])) as tracking:
    run = tracking.start_run("r", tags={}, params={})
    import sqlite3
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    def refuse(*_):
        raise sqlite3.OperationalError("database or disk is full")
    event.listen(Engine, "before_cursor_execute", refuse)
    for step in range(3):
        run.writer().metrics({"m": step}, step)
        tracking.delivery.flush_now()
        time.sleep(1)
    run.finish("completed")
"""


def test_a_full_disk_under_sqlite_costs_two_lines_on_the_terminal(home, empty_store, tmp_path):
    shutil.copyfile(empty_store, home / "mlflow.db")
    ensure_store(f"sqlite:///{home / 'mlflow.db'}")
    folder = tmp_path / "runs" / "r" / "journal"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert "disk is full" in lines[0] and str(folder / library_log.FILE) in lines[0]
    assert "has not taken everything yet" in lines[1] and "track.py deliver" in lines[1]
    assert "disk is full" in (folder / library_log.FILE).read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_hide_the_error_that_ends_a_run(tmp_path):
    (tmp_path / library_log.FILE).symlink_to("/dev/full")
    library_log.start(tmp_path)
    logging.getLogger("sqlalchemy").error("database or disk is full")
    library_log.stop(tmp_path)
    assert not library_log._active
