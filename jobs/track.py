"""Look after tracking: open the MLflow UI, deliver what could not be delivered, end runs whose driver died.

    python jobs/track.py ui                  # start the MLflow UI on the runs below $FTLIB_HOME, and print its address
    python jobs/track.py status              # what the journals hold that MLflow has not got
    python jobs/track.py deliver             # deliver it: after offline runs, dead servers and killed drivers
    eval "$(python jobs/track.py env)"       # let mlflow's own commands find this store
    python jobs/track.py reap                # end runs that are RUNNING in MLflow although their driver is gone

The store is --uri, else $MLFLOW_TRACKING_URI, else the SQLite database below $FTLIB_HOME. `deliver` and `reap` also happen by themselves
whenever a run starts; both may be repeated without harm. They take seconds.
"""

from __future__ import annotations

import argparse

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
    commands.add_parser(
        "env",
        parents=[where],
        help='print the lines with which mlflow finds this store: eval "$(... env)"',
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
        help="how long to watch for a heartbeat of runs on other machines (default: %(default)g)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = options().parse_args(argv)
    from ftlib.track import commands
    from ftlib.track.store import resolve_uri

    if arguments.command == "status":
        commands.status(arguments.folders)
        return
    uri = resolve_uri(arguments.uri)
    if arguments.command == "ui":
        commands.ui(uri, arguments.port, arguments.only_print)
    elif arguments.command == "env":
        commands.environment(uri)
    elif arguments.command == "deliver":
        any_uri = bool(arguments.uri)
        commands.deliver(uri, arguments.folders, requeue=arguments.again, any_uri=any_uri)
    else:
        commands.reap(uri, arguments.stale)


if __name__ == "__main__":
    job(main)
