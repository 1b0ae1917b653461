"""Messages of the libraries below tracking go to a file instead of the terminal.

When a store fails, MLflow and SQLAlchemy log a traceback at each try, every few seconds. ftlib says
once, in one line, what is wrong; that line names the file with the libraries' own words.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path

LIBRARIES = ("mlflow", "alembic", "sqlalchemy", "urllib3")
MAX_BYTES = 1 << 20
"""Size at which the file is renamed to `<file>.1` and begun anew."""
FILE = "libraries.log"


class _QuietHandler(RotatingFileHandler):
    """Keeps silent where the file cannot be written: its disk may be the fault it would report."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        pass


_lock = threading.Lock()
_active: list[_QuietHandler] = []
_replaced: dict[str, tuple[list[logging.Handler], bool]] = {}


def start(folder: Path) -> Path:
    """Send the libraries' messages to a file in `folder` until `stop`. Returns the file.

    Called again with another folder, the newest one counts.
    """
    with _lock:
        _active.append(_QuietHandler(Path(folder) / FILE))
    apply()
    return Path(folder) / FILE


def apply() -> None:
    """Take over the loggers of what has been imported since; MLflow sets up its own on import."""
    with _lock:
        if not _active:
            return
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            if name == "mlflow" and "mlflow" not in sys.modules:
                continue
            if logger.handlers == [_active[-1]]:
                continue
            ours = [h for h in logger.handlers if isinstance(h, _QuietHandler)]
            if not ours:
                _replaced[name] = (logger.handlers[:], logger.propagate)
            logger.handlers[:] = [_active[-1]]
            logger.propagate = False


def stop(folder: Path) -> None:
    """End what `start(folder)` began; the loggers are as they were after the last one."""
    file = str((Path(folder) / FILE).absolute())
    with _lock:
        for handler in [h for h in _active if h.baseFilename == file][-1:]:
            _active.remove(handler)
            with contextlib.suppress(OSError):  # a full disk; what is lost is a log's last lines
                handler.close()
        if not _active:
            for name, (handlers, propagate) in _replaced.items():
                logger = logging.getLogger(name)
                logger.handlers[:], logger.propagate = handlers, propagate
            _replaced.clear()
    apply()
