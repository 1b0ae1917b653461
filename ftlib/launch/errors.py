"""What stops a launch. Each message says what is wrong and what to do about it."""

from __future__ import annotations


class LaunchError(ValueError):
    """The run cannot start as asked; nothing was changed."""


class RunFailedError(RuntimeError):
    """Training started and failed for good; the message carries the first worker's reason."""


class LeaseLostError(RuntimeError):
    """Another process has taken the run over; this one may write nothing more."""


class StoppedError(SystemExit):
    """A signal stopped the run. As the process's exit code: 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(128 + signal_number)
        self.message = message
