"""Classify a folder of pictures with a packaged model: a row per picture, those that cannot be read too, into one Parquet file.

Parts are kept beside the output as they are done, so that a killed job goes on where it stopped.
Small folders are done in this process; larger ones by Ray Data, with one copy of the model per
worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EXTENSIONS = (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "webp",
    "bmp",
    "tif",
    "tiff",
    "gif",
    "ppm",
    "pgm",
)
PART = 512
"""Pictures per part: what is lost when the job is killed."""
SMALL = 2000
"""Fewer pictures than this are not worth starting Ray for."""
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("class", pa.string()),
        ("probability", pa.float64()),
        ("top_classes", pa.list_(pa.string())),
        ("top_probabilities", pa.list_(pa.float64())),
        ("error", pa.string()),
    ]
)


class PredictError(ValueError):
    """A source, model or output that cannot be used; the message says what to do."""


def pictures(source: Path) -> list[str]:
    """Picture files below `source` (names relative to it, sorted), or the one file that it is. By extension."""
    if source.is_file():
        return [source.name]
    if not source.is_dir():
        raise PredictError(f"{source}: there is no such folder or file")
    found = sorted(
        str(Path(root, name).relative_to(source))
        for root, _, names in os.walk(source)
        for name in names
        if name.rpartition(".")[2].lower() in EXTENSIONS
    )
    if not found:
        raise PredictError(f"{source} holds no pictures ({', '.join(EXTENSIONS)})")
    return found


class Classifier:
    """A packaged model that turns paths into rows. One per Ray Data worker."""

    def __init__(self, model: str, tracking: str, source: str, top_k: int) -> None:
        from ftlib.packaging.package import load

        self.model, self.source, self.top_k = load(model, tracking), Path(source), top_k

    def rows(self, paths: Sequence[str]) -> pa.Table:
        base = self.source if self.source.is_dir() else self.source.parent
        answers = self.model.predict(
            [base / p for p in paths], params={"top_k": self.top_k, "on_error": "row"}
        )
        return pa.Table.from_pylist(
            [
                {
                    "path": path,
                    "class": a.get("class"),
                    "probability": a.get("probability"),
                    "top_classes": [t["class"] for t in a.get("top", [])],
                    "top_probabilities": [t["probability"] for t in a.get("top", [])],
                    "error": a.get("error"),
                }
                for path, a in zip(paths, answers)
            ],
            schema=SCHEMA,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.rows(batch["path"].to_pylist())


def predict_folder(
    model: str,
    source: str | Path,
    out: str | Path,
    *,
    tracking: str = "",
    top_k: int = 5,
    engine: str = "auto",
    workers: int = 1,
    gpus: float = 0.0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> pa.Table:
    """Write `out` (Parquet, rows in the order of file names) and return it. A finished `out` of the same job is returned as it is.

    Args:
        model: folder of a package, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/model.
        tracking: MLflow tracking URI, for names.
        engine: here, ray, or auto (Ray from 2,000 pictures on).
        workers, gpus: copies of the model under Ray, and GPUs for each.
        tick: called with (pictures done, pictures in all).
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    if engine not in ("auto", "here", "ray"):
        raise PredictError(f"--engine {engine}: needs to be auto, here or ray")
    if out.suffix != ".parquet":
        raise PredictError(f"--out {out.name}: the file's name must end in .parquet")
    names = pictures(source)
    job = hashlib.sha256(json.dumps([model, str(source), top_k, names]).encode()).hexdigest()
    if out.exists():
        if (pq.read_schema(out).metadata or {}).get(b"ftlib.job", b"").decode() == job:
            return pq.read_table(out)
        raise PredictError(
            f"{out} is there already, from another model or other pictures. Choose another --out, or delete it"
        )
    parts = out.with_name(f".{out.name}.parts-{job[:12]}")
    parts.mkdir(parents=True, exist_ok=True)
    done = {
        path
        for part in parts.glob("part-*.parquet")
        for path in pq.read_table(part, columns=["path"])["path"].to_pylist()
    }
    left = [n for n in names if n not in done]
    tick(len(names) - len(left), len(names))
    use_ray = engine == "ray" or (engine == "auto" and len(left) >= SMALL)
    arguments = (model, tracking, str(source), top_k)
    for table in _with_ray(arguments, left, workers, gpus) if use_ray else _here(arguments, left):
        _keep(table, parts)
        done.update(table["path"].to_pylist())
        tick(len(done), len(names))
    whole = pa.concat_tables(
        [pq.read_table(part) for part in parts.glob("part-*.parquet")]
    ).sort_by("path")
    pq.write_table(
        whole.replace_schema_metadata({b"ftlib.job": job.encode(), b"ftlib.model": model.encode()}),
        out.with_name(f".{out.name}.tmp"),
    )
    os.replace(out.with_name(f".{out.name}.tmp"), out)
    shutil.rmtree(parts, ignore_errors=True)
    return whole


def _keep(table: pa.Table, parts: Path) -> None:
    """One part, whole or not at all; named by its first picture, so that a repeated part takes its place."""
    name = hashlib.sha256(table["path"][0].as_py().encode()).hexdigest()[:16]
    pq.write_table(table, parts / f".tmp-{name}")
    os.replace(parts / f".tmp-{name}", parts / f"part-{name}.parquet")


def _here(arguments: tuple[Any, ...], names: list[str]) -> Iterator[pa.Table]:
    if not names:
        return
    classifier = Classifier(*arguments)
    for start in range(0, len(names), PART):
        yield classifier.rows(names[start : start + PART])


def _with_ray(
    arguments: tuple[Any, ...], names: list[str], workers: int, gpus: float
) -> Iterator[pa.Table]:
    """Batches of rows in the order in which they are done."""
    if not names:
        return
    from ftlib.launch.cluster import connect

    mine = connect()
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rows = (
            ray.data.from_arrow(pa.table({"path": names}))
            .repartition(max(1, -(-len(names) // PART)))
            .map_batches(
                Classifier,
                fn_constructor_args=arguments,
                batch_format="pyarrow",
                batch_size=PART,
                concurrency=workers,
                num_cpus=1,
                num_gpus=gpus,
            )
        )
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            if len(batch):
                yield batch.select(SCHEMA.names).cast(SCHEMA)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, ValueError) else error from None
    finally:
        if mine:
            ray.shutdown()
