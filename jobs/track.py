"""Look after tracking: open the MLflow UI, deliver what could not be delivered, end runs whose driver died.

    python jobs/track.py ui                  # start the MLflow UI on the runs below $FTLIB_HOME, and print its address
    python jobs/track.py status              # what the journals hold that MLflow has not got
    python jobs/track.py deliver             # deliver it: after offline runs, dead servers and killed drivers
    python jobs/track.py reap                # end runs that are RUNNING in MLflow although their driver is gone

The store is --uri, else $MLFLOW_TRACKING_URI, else the SQLite database below $FTLIB_HOME. `deliver` and `reap` also happen by themselves
whenever a run starts; both may be repeated without harm. They take seconds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/track.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--uri",
        default="",
        help="MLflow tracking URI (default: $MLFLOW_TRACKING_URI, else SQLite below $FTLIB_HOME)",
    )
    ui = commands.add_parser("ui", parents=[where], help="start the MLflow UI")
    ui.add_argument(
        "--port", type=int, default=5000, help="port on this machine (default: %(default)s)"
    )
    ui.add_argument(
        "--print", action="store_true", dest="only_print", help="only print the command"
    )
    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        help="where to look for journals (default: $FTLIB_HOME)",
    )
    commands.add_parser(
        "status", parents=[folders], help="list the journals that hold something MLflow has not got"
    )
    deliver = commands.add_parser("deliver", parents=[where, folders], help="deliver journals")
    deliver.add_argument(
        "--again",
        action="store_true",
        help="also try once more what MLflow did not take (missing files, say)",
    )
    reap = commands.add_parser("reap", parents=[where], help="end the runs of dead drivers")
    reap.add_argument(
        "--stale",
        type=float,
        default=5.0,
        metavar="MINUTES",
        help="a driver on another machine is dead after this long without a heartbeat (default: %(default)g)",
    )
    return parser


def ui(uri: str, port: int, only_print: bool) -> None:
    from ftlib.track.store import UI_ENVIRONMENT, ensure_store, ui_arguments, ui_base, ui_command

    arguments = ui_arguments(uri, port)
    if only_print or not arguments:
        print(ui_command(uri, port))
        return
    ensure_store(uri)
    print(
        f"MLflow at {ui_base(uri, port)}/#/experiments?workflowType=machine_learning (ready in about 10 s; Ctrl-C ends it)",
        flush=True,
    )
    os.execvpe(arguments[0], arguments, {**os.environ, **UI_ENVIRONMENT})


def journals_below(folders: list[str]) -> list[Path]:
    from ftlib.paths import home
    from ftlib.settings import ConfigError
    from ftlib.track.delivery_thread import journal_folders

    roots = [Path(f).expanduser() for f in folders] or [home()]
    for root in roots:
        if not root.is_dir():
            raise ConfigError(
                f"{root}: no such folder. Name one that holds runs, such as $FTLIB_HOME/runs"
            )
    return [found for root in roots for found in journal_folders(root)]


def status(folders: list[str]) -> None:
    from ftlib.track.delivery_thread import describe
    from ftlib.track.journal import journals

    found = [describe(path) for folder in journals_below(folders) for path in journals(folder)]
    waiting = [j for j in found if j.waiting or j.rejected]
    for journal in waiting:
        refused = f", {journal.rejected} not taken" if journal.rejected else ""
        print(
            f"{journal.name}: {journal.waiting} records wait for {journal.uri}{refused}{'' if journal.run_id else ' (MLflow does not know the run yet)'}"
        )
    print(
        f"{len(found)} runs, {len(waiting)} with something left"
        if waiting
        else f"{len(found)} runs, everything delivered"
    )


def deliver(uri: str, folders: list[str], again: bool, everything: bool) -> None:
    from ftlib.track import delivery_thread as delivery
    from ftlib.track.journal import undelivered
    from ftlib.track.redact import redact
    from ftlib.track.store import client, ensure_store, reach

    found = journals_below(folders)
    if again:
        print(
            f"{sum(delivery.again(folder) for folder in found)} records that MLflow did not take are tried again"
        )
    waiting = [folder for folder in found if undelivered(folder)]
    if not waiting:
        print("everything has been delivered")
        return
    ensure_store(uri)
    reach(uri)
    mlflow = client(uri)
    for folder in waiting:
        names = delivery.deliver_folder(folder, uri, mlflow, any_uri=everything)
        if names is None:
            print(f"{folder}: its driver is running and delivers by itself")
        for name in names or []:
            print(f"{name}: delivered to {redact(uri)}")
        for path in undelivered(folder) if names is not None else []:
            journal = delivery.describe(path)
            if journal.waiting:
                print(
                    f"{journal.name}: {journal.waiting} records are for {journal.uri}. Name that server with --uri, or any other to deliver there"
                )


def reap(uri: str, stale_minutes: float) -> None:
    from ftlib.track.orphans import reap as end_dead
    from ftlib.track.store import client, ensure_store, reach

    ensure_store(uri)
    reach(uri)
    ended = end_dead(client(uri), None, stale_minutes * 60)
    for run in ended:
        print(f"{run.info.run_name} ({run.info.run_id}): its driver is gone; ended as KILLED")
    print(f"{len(ended)} runs ended")


def main(argv: list[str] | None = None) -> None:
    arguments = options().parse_args(argv)
    from ftlib.track.store import resolve_uri

    if arguments.command == "status":
        status(arguments.folders)
        return
    uri = resolve_uri(arguments.uri)
    if arguments.command == "ui":
        ui(uri, arguments.port, arguments.only_print)
    elif arguments.command == "deliver":
        deliver(uri, arguments.folders, arguments.again, everything=bool(arguments.uri))
    else:
        reap(uri, arguments.stale)


if __name__ == "__main__":
    job(main)
