"""The parameters that a run shows in MLflow's tables: a few flat ones with short names.

They are logged for every run, defaults included (a setting that is off is 0), because a run that
lacks one drops out of the parallel-coordinates and scatter charts. The complete settings are the
artifact run.json.
"""

from __future__ import annotations

from typing import Any

from ftlib.config import Run
from ftlib.settings import to_dict

PARAMS = (
    "dropout",
    "drop_path",
    "mixup_alpha",
    "cutmix_alpha",
    "randaugment_n",
    "randaugment_m",
    "randaugment_p",
    "lr",
    "weight_decay",
    "optimizer",
    "schedule",
    "loss",
    "label_smoothing",
    "epochs",
    "batch_size",
    "size",
    "arch",
    "subset",
    "seed",
    "ema_decay",
    "erasing_p",
    "init_from",
)
"""Names of the parameters, in the order in which charts and tables are most useful."""
_PATHS = {
    "dropout": "model.dropout",
    "drop_path": "model.drop_path",
    "mixup_alpha": "mix.mixup_alpha",
    "cutmix_alpha": "mix.cutmix_alpha",
    "randaugment_n": "augment.randaugment_n",
    "randaugment_m": "augment.randaugment_m",
    "randaugment_p": "augment.randaugment_p",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "label_smoothing": "loss.label_smoothing",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "size": "augment.size",
    "arch": "model.arch",
    "subset": "data.subset",
    "seed": "seed",
    "ema_decay": "train.ema_decay",
    "erasing_p": "augment.erasing_p",
    "init_from": "model.init_from",
}
_SHORT = {path: name for name, path in _PATHS.items()}


def params_of(run: Run) -> dict[str, Any]:
    """The run's parameters by their short names."""
    values: dict[str, Any] = {name: _at(run, path) for name, path in _PATHS.items()}
    for union in ("optimizer", "schedule", "loss"):
        values[union] = type(getattr(run, union)).__name__
    return {name: values[name] for name in PARAMS}


def short_name(path: str) -> str:
    """The name under which MLflow shows a setting: `mix.mixup_alpha` is `mixup_alpha`.

    A swept setting that is not among the parameters gets the last part of its path.
    """
    return _SHORT.get(path, path.rsplit(".", 1)[-1])


def swept_params(run: Run, paths: list[str]) -> dict[str, Any]:
    """`params_of`, plus the settings of a sweep that are not among them."""
    return {**params_of(run), **{short_name(p): _shown(_at(run, p)) for p in paths}}


def _at(run: Run, path: str) -> Any:
    node: Any = run
    for part in path.split("."):
        node = getattr(node, part)
    return node


def _shown(value: Any) -> Any:
    if isinstance(value, (int, float, str, bool)):
        return value
    return type(value).__name__ if hasattr(value, "section") else str(to_dict(value))
