"""Serve a packaged model over HTTP, with a page that takes a picture by drag and drop.

    python jobs/serve.py --model models:/NAME@champion          # then open http://127.0.0.1:8000
    curl --data-binary @cat.jpg http://127.0.0.1:8000/predict

It is a Ray Serve application, on the cluster at RAY_ADDRESS or on this machine; Ctrl-C ends it.
Requests that arrive together are answered as one batch. It listens on this machine only: --host
0.0.0.0 opens it to the network, where it does not ask who they are.
"""

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ftlib.checks import check_model_folder
from ftlib.cli import JobOptions, job, options
from ftlib.config import AtLeastOne, Positive
from ftlib.flags import Metavar
from ftlib.settings import Between


@dataclass(frozen=True, kw_only=True)
class Options(JobOptions):
    model: Annotated[str, Metavar("URI")]
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a package's folder."""
    host: Annotated[str, Metavar("ADDRESS")] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Between(1, 65535)] = 8000
    """Port to listen on."""
    replicas: AtLeastOne = 1
    """Copies of the model."""
    max_megabytes: Annotated[Positive, Metavar("MB")] = 20.0
    """Larger pictures are refused."""
    tracking_uri: Annotated[str, Metavar("URI")] = ""
    """MLflow, for models:/ and runs:/. By default $MLFLOW_TRACKING_URI, or the database below
    $FTLIB_HOME."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    check_model_folder(asked.model)
    from ftlib.packaging.package import check, locate

    model, tracking = locate(asked.model, asked.tracking_uri)
    check(model, tracking)  # a missing model is said here, not in a replica's log
    serve_model(asked, model, tracking)


def serve_model(asked: Options, model: str, tracking: str) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from ftlib.deploy.serving import deployment
    from ftlib.launch.cluster import connect

    started_here = connect()
    import ray
    from ray import serve

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(http_options={"host": asked.host, "port": asked.port})
        application = deployment(
            model, tracking, replicas=asked.replicas, max_megabytes=asked.max_megabytes
        )
        serve.run(application, name="ftlib", route_prefix="/")
        print(
            f"serving {asked.model} at http://{asked.host}:{asked.port} (Ctrl-C ends it)",
            flush=True,
        )
        ended.wait()
    finally:
        if started_here:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete("ftlib")


if __name__ == "__main__":
    job(main)
