"""Serve a packaged model over HTTP, with a page that takes a picture by drag and drop.

    python jobs/serve.py --model models:/NAME@champion          # then open http://127.0.0.1:8000
    curl --data-binary @cat.jpg http://127.0.0.1:8000/predict

A Ray Serve application, on the cluster at RAY_ADDRESS or on this machine; it ends with Ctrl-C. Requests that come together are answered
as one batch. It listens on this machine only: --host 0.0.0.0 opens it to the network, and it asks nobody who they are.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/serve.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="URI",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a package's folder",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="copies of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=20.0,
        metavar="MB",
        help="larger pictures are refused (default: %(default)g)",
    )
    parser.add_argument(
        "--tracking-uri",
        default="",
        metavar="URI",
        help="MLflow, for models:/ and runs:/ (default: $MLFLOW_TRACKING_URI, or the database below $FTLIB_HOME)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    arguments = parser.parse_args(argv)
    if arguments.replicas < 1 or not 0 < arguments.port < 65536 or arguments.max_megabytes <= 0:
        parser.error("--replicas needs to be 1 or more, --port 1 to 65535, --max-megabytes above 0")

    from ftlib.deploy.serving import deployment
    from ftlib.launch.cluster import connect
    from ftlib.packaging.package import check

    model, tracking = arguments.model, ""
    if model.startswith(("models:/", "runs:/")):
        from ftlib.track.store import reach, resolve_uri

        tracking = resolve_uri(arguments.tracking_uri)
        reach(tracking)
    else:
        model = str(Path(model).absolute())
    check(model, tracking)  # a missing model is said here, not in a replica's log

    mine = connect()
    import ray
    from ray import serve

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(http_options={"host": arguments.host, "port": arguments.port})
        serve.run(
            deployment(
                model, tracking, replicas=arguments.replicas, max_megabytes=arguments.max_megabytes
            ),
            name="ftlib",
            route_prefix="/",
        )
        print(
            f"serving {arguments.model} at http://{arguments.host}:{arguments.port} (Ctrl-C ends it)",
            flush=True,
        )
        ended.wait()
    finally:
        serve.delete("ftlib") if not mine else serve.shutdown()
        if mine:
            ray.shutdown()


if __name__ == "__main__":
    job(main)
