"""Classify a folder of pictures with a packaged model: a row per picture, into one file.

A picture that cannot be read has a row with its error. Parts are kept beside the output as they are
done, so that a killed job goes on where it stopped. Small folders are done in this process; larger
ones by Ray Data, with one copy of the model per worker.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ftlib import storage
from ftlib.deploy.picture_list import PictureList, list_pictures
from ftlib.text import csv_bytes, csv_cell

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
Tick = Callable[[int, int], None]
"""Told of (pictures done, pictures in all)."""


class PredictError(ValueError):
    """A source, model or output that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class PredictOptions:
    """How a folder is classified."""

    tracking: str = ""
    """MLflow tracking URI, for models named by models:/ and runs:/."""
    top_k: int = 5
    """Classes named per picture."""
    engine: str = "auto"
    """here, ray, or auto: Ray from `SMALL` pictures on."""
    workers: int = 1
    """Copies of the model under Ray."""
    gpus: float = 0.0
    """GPUs of each copy."""


class Classifier:
    """A packaged model that turns paths into rows. One per Ray Data worker."""

    def __init__(self, model: str, source: str, options: PredictOptions) -> None:
        from ftlib.packaging.package import load

        self.model, self.options = load(model, options.tracking), options
        self.base = Path(source) if Path(source).is_dir() else Path(source).parent

    def rows(self, files: Sequence[str]) -> pa.Table:
        """`SCHEMA` rows of files, named relative to the source."""
        answers = self.model.predict(
            [self.base / file for file in files],  # a Path is read, a text would be base64
            params={"top_k": self.options.top_k, "on_error": "row"},
        )
        rows = [
            {
                "path": shown(file),
                "class": answer.get("class"),
                "probability": answer.get("probability"),
                "top_classes": [t["class"] for t in answer.get("top", [])],
                "top_probabilities": [t["probability"] for t in answer.get("top", [])],
                "error": answer.get("error"),
            }
            for file, answer in zip(files, answers)
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.rows([os.fsdecode(file) for file in batch["file"].to_pylist()])


def shown(file: str) -> str:
    """A file name as text: bytes that are no UTF-8 become \\xNN."""
    return file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def pictures_of(source: str | Path) -> PictureList:
    """The pictures to classify. Raises PredictError where there are none."""
    source = Path(source).absolute()
    if not source.exists():
        raise PredictError(f"{source}: there is no such folder or file")
    found = list_pictures(source)
    if not found.files:
        aside = f"; {found.left_aside_text()}" if found.left_aside else ""
        raise PredictError(f"{source} holds no pictures{aside}")
    return found


def predict_file(model: str, source: str | Path, options: PredictOptions) -> dict[str, Any]:
    """The row of one picture."""
    source = Path(source).absolute()
    table = Classifier(model, str(source), options).rows([source.name])
    row: dict[str, Any] = table.to_pylist()[0]
    return row


def predict_folder(
    model: str,
    source: str | Path,
    out: str | Path,
    options: PredictOptions = PredictOptions(),
    *,
    files: Sequence[str] | None = None,
    tick: Tick = lambda done, total: None,
) -> pa.Table:
    """Write `out` (.parquet or .csv, rows in the order of file names) and return its rows.

    A finished `out` of the same job is returned as it is.

    Args:
        model: folder of a package, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/model.
        files: the files below `source`; by default those of `pictures_of`.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    if options.engine not in ("auto", "local", "ray"):
        raise PredictError(f"--engine {options.engine}: needs to be auto, local or ray")
    if out.suffix not in (".parquet", ".csv"):
        raise PredictError(f"--out {out.name}: the file's name must end in .parquet or .csv")
    names = list(files) if files is not None else pictures_of(source).files
    asked = [model, str(source), options.top_k, [shown(name) for name in names]]
    job = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    kept = out if out.suffix == ".parquet" else out.with_name(f".{out.name}.parquet")
    if out.exists():
        if (
            kept.exists()
            and (pq.read_schema(kept).metadata or {}).get(b"ftlib.job") == job.encode()
        ):
            return pq.read_table(kept)
        raise PredictError(
            f"{out} is there already, from another model or other pictures. Choose another --out, "
            "or delete it"
        )
    parts = out.with_name(f".{out.name}.parts-{job[:12]}")
    parts.mkdir(parents=True, exist_ok=True)
    _predict_parts(model, source, names, options=options, parts=parts, tick=tick)
    tables = [pq.read_table(part) for part in parts.glob("part-*.parquet")]
    metadata = {b"ftlib.job": job.encode(), b"ftlib.model": model.encode()}
    whole = pa.concat_tables(tables).sort_by("path").replace_schema_metadata(metadata)
    _write(whole, kept)
    if kept != out:
        _write(whole, out)
    shutil.rmtree(parts, ignore_errors=True)
    return whole


def _predict_parts(
    model: str, source: Path, names: list[str], *, options: PredictOptions, parts: Path, tick: Tick
) -> None:
    """Classify what no finished part holds yet."""
    done = {
        path
        for part in parts.glob("part-*.parquet")
        for path in pq.read_table(part, columns=["path"])["path"].to_pylist()
    }
    left = [n for n in names if shown(n) not in done]
    tick(len(names) - len(left), len(names))
    if not left:
        return
    use_ray = options.engine == "ray" or (options.engine == "auto" and len(left) >= SMALL)
    compute = _with_ray if use_ray else _here
    for table in compute((model, str(source), options), left):
        _keep(table, parts)
        done.update(table["path"].to_pylist())
        tick(len(done), len(names))


def _write(table: pa.Table, out: Path) -> None:
    """The whole file or none: a temporary one takes its place."""
    if out.suffix == ".parquet":
        _write_parquet(table, out)
    else:
        _write_csv(table, out)


def _write_csv(table: pa.Table, out: Path) -> None:
    """One column per class and probability; what a spreadsheet would run as a formula is quoted."""
    rows = table.to_pylist()
    places = range(1, max((len(row["top_classes"]) for row in rows), default=0))
    extra = [f"{name}_{place + 1}" for place in places for name in ("class", "probability")]
    cells: list[list[object]] = [["path", "class", "probability", "error", *extra]]
    for row in rows:
        top = zip(row["top_classes"][1:], row["top_probabilities"][1:])
        others = [cell for name, p in top for cell in (csv_cell(name), p)]
        others += [""] * (len(extra) - len(others))
        texts = [csv_cell(row[name] or "") for name in ("path", "class", "error")]
        cells.append([texts[0], texts[1], row["probability"], texts[2], *others])
    storage.write_file(str(out), csv_bytes(cells))


def _keep(table: pa.Table, parts: Path) -> None:
    """Write one part, whole or not at all.

    It is named by its first picture, so that a repeated part takes its place.
    """
    name = hashlib.sha256(table["path"][0].as_py().encode()).hexdigest()[:16]
    _write_parquet(table, parts / f"part-{name}.parquet")


def _write_parquet(table: pa.Table, out: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_file(str(out), buffer.getvalue())


Arguments = tuple[str, str, PredictOptions]


def _here(arguments: Arguments, names: list[str]) -> Iterator[pa.Table]:
    classifier = Classifier(*arguments)
    for start in range(0, len(names), PART):
        yield classifier.rows(names[start : start + PART])


def _with_ray(arguments: Arguments, names: list[str]) -> Iterator[pa.Table]:
    """Batches of rows in the order in which they are done."""
    from ftlib.launch.cluster import connect

    started_here = connect()
    import ray

    options = arguments[2]
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rows = (
            ray.data.from_arrow(pa.table({"file": [os.fsencode(name) for name in names]}))
            .repartition(max(1, -(-len(names) // PART)))
            .map_batches(
                Classifier,
                fn_constructor_args=arguments,
                batch_format="pyarrow",
                batch_size=PART,
                concurrency=options.workers,
                num_cpus=1,
                num_gpus=options.gpus,
            )
        )
        batches = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        for batch in batches:
            assert isinstance(batch, pa.Table)
            if len(batch):
                yield batch.select(SCHEMA.names).cast(SCHEMA)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, ValueError) else error from None
    finally:
        if started_here:
            ray.shutdown()
