"""Look after tracking: open the MLflow UI, deliver what is waiting, end runs of dead drivers.

    python jobs/track.py ui                  # start the MLflow UI, and print its address
    python jobs/track.py status              # what the journals hold that MLflow has not got
    python jobs/track.py deliver             # deliver it: after offline runs and dead servers
    eval "$(python jobs/track.py env)"       # let mlflow's own commands find this store
    python jobs/track.py reap                # end runs that are RUNNING without a driver

The store is --uri, else $MLFLOW_TRACKING_URI, else the SQLite database below $FTLIB_HOME. A run
that starts delivers and reaps too; both may be repeated without harm. They take seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ftlib.cli import JobOptions, command, job
from ftlib.config import NotNegative
from ftlib.flags import Metavar, Position
from ftlib.settings import Between


@dataclass(frozen=True, kw_only=True)
class StoreOptions(JobOptions):
    uri: Annotated[str, Metavar("URI")] = ""
    """MLflow tracking URI. By default $MLFLOW_TRACKING_URI, else SQLite below $FTLIB_HOME."""


@dataclass(frozen=True, kw_only=True)
class FolderOptions(JobOptions):
    folders: Annotated[tuple[str, ...], Position, Metavar("FOLDER")] = ()
    """Where to look for journals. By default $FTLIB_HOME."""


@dataclass(frozen=True, kw_only=True)
class Ui(StoreOptions):
    """Start the MLflow UI."""

    port: Annotated[int, Between(1, 65535)] = 5000
    """Port on this machine."""
    print: bool = False
    """Only print the command."""


@dataclass(frozen=True, kw_only=True)
class Env(StoreOptions):
    """Print the lines with which mlflow's own commands find this store: eval "$(... env)"."""


@dataclass(frozen=True, kw_only=True)
class Status(FolderOptions):
    """List the journals that hold something MLflow has not got."""


@dataclass(frozen=True, kw_only=True)
class Deliver(StoreOptions, FolderOptions):
    """Deliver the journals."""

    again: bool = False
    """Try once more what MLflow did not take, such as missing files."""


@dataclass(frozen=True, kw_only=True)
class Reap(StoreOptions):
    """End the runs of dead drivers."""

    stale: Annotated[NotNegative, Metavar("MINUTES")] = 5.0
    """How long to watch for a heartbeat of runs on other machines."""


def main(argv: Sequence[str] | None = None) -> None:
    names = {"ui": Ui, "env": Env, "status": Status, "deliver": Deliver, "reap": Reap}
    _, asked = command(names, __doc__, argv)
    from ftlib.track import commands
    from ftlib.track.store import resolve_uri

    if isinstance(asked, Status):
        commands.status(asked.folders)
        return
    uri = resolve_uri(asked.uri)
    if isinstance(asked, Ui):
        commands.ui(uri, asked.port, asked.print)
    elif isinstance(asked, Env):
        commands.environment(uri)
    elif isinstance(asked, Deliver):
        commands.deliver(uri, asked.folders, requeue=asked.again, any_uri=bool(asked.uri))
    else:
        commands.reap(uri, asked.stale)


if __name__ == "__main__":
    job(main, deliver_leftovers=False)
