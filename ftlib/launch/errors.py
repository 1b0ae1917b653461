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

    def __init__(self, signal_number: int, message: str, *, ends_at_once: bool = False) -> None:
        super().__init__(128 + signal_number)
        self.message, self.ends_at_once = message, ends_at_once


class RayGoneError(RunFailedError):
    """A process of the job's own Ray has ended, so that nothing can be asked of Ray any more."""

    ends_at_once = True
    """Without Ray's exit handlers, which wait for the dead process for up to a minute."""

    def __init__(self, process: str, during: str, *, said: bool = False) -> None:
        """said: whether it was printed when it was noticed (`own_ray.announcing`)."""
        self.said = said
        super().__init__(
            f"Ray's {process} has ended while {during}. Was it killed, or was memory short "
            "(`dmesg` says so)? The same command goes on from the newest checkpoint"
        )
