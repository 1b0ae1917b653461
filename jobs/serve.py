"""Serve a packaged model over HTTP, with a page that takes pictures by drag and drop.

    python jobs/serve.py --model models:/NAME@champion          # then open http://127.0.0.1:8000
    curl -F file=@cat.jpg http://127.0.0.1:8000/predict

One process serves one copy of the model; with --replicas 2 or more it is a Ray Serve application,
on the cluster at RAY_ADDRESS or on this machine. Ctrl-C ends it. Requests that arrive together are
computed as one batch. It listens on this machine only: --host 0.0.0.0 opens it to the network,
without a password.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ftlib.checks import check_model
from ftlib.cli import JobOptions, job, options
from ftlib.config import AtLeastOne, Positive
from ftlib.flags import Metavar
from ftlib.gc_pause import lasting_imports
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
    """Copies of the model; from 2 on they run on Ray Serve."""
    max_megabytes: Annotated[Positive, Metavar("MB")] = 20.0
    """Larger pictures are refused."""
    tracking_uri: Annotated[str, Metavar("URI")] = ""
    """MLflow, for models:/ and runs:/. By default $MLFLOW_TRACKING_URI, or the database below
    $FTLIB_HOME."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    check_model(asked.model, asked.tracking_uri)
    print("looking for the model ...", file=sys.stderr, flush=True)
    with lasting_imports():
        from ftlib.packaging.package import check, locate

    model, tracking = locate(asked.model, asked.tracking_uri)
    check(model, tracking)  # a missing model is said here, not in a replica's log
    from ftlib.deploy.http_server import serve_model

    serve_model(
        model,
        tracking,
        host=asked.host,
        port=asked.port,
        replicas=asked.replicas,
        max_megabytes=asked.max_megabytes,
    )


if __name__ == "__main__":
    job(main)
