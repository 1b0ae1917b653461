"""The model card of a package (Mitchell et al. 2019, "Model Cards for Model Reporting")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.config import Run
from ftlib.text import percent

CLASSES_SHOWN = 30
LIMITS = (
    "- It always names one of the classes above, also for pictures of anything else. A low "
    "probability hints that a picture is foreign but does not prove it.",
    "- The scores hold for pictures like those of the data above. With other cameras, "
    "places, crops or qualities they can be worse, and the probabilities too high.",
    "- It sees only the center of a picture: the far ends of a wide or tall one are cut off.",
    "- The run's report has scores per class and the worst mistakes. Read it before you rely "
    "on a class.",
)


def model_card(
    run: Run,
    classes: Sequence[str],
    *,
    scores: Mapping[str, float],
    temperature: float,
    data: Mapping[str, Any],
    calibrated_on: str,
    program_bytes: int,
) -> str:
    """The card as Markdown.

    Args:
        scores: metric name -> value.
        temperature: what logits are divided by.
        data: `name` and `digest` of the training data.
        calibrated_on: what the temperature was fitted on.
        program_bytes: size of the exported program.
    """
    size, short = evaluation_size(run)
    megabytes = program_bytes / 1e6
    lines = [
        f"# {run.name or run.stage}: {run.model.arch} for {len(classes)} classes",
        "",
        "## Use",
        "```python",
        "import mlflow",
        'model = mlflow.pyfunc.load_model("THIS FOLDER, OR models:/NAME@ALIAS")',
        'model.predict([open("picture.jpg", "rb").read()], params={"top_k": 3})',
        "```",
        "Pictures go in as bytes, `pathlib.Path` or base64 text; class names and probabilities "
        f"come out. The program is {megabytes:.1f} MB and runs on a CPU in float32.",
        "",
        "## Classes",
        _classes(classes),
        "",
        "## Data",
        _data(run, data),
        "",
        "## Recipe",
        _recipe(run),
        "",
        "## Scores",
        *(f"- {name}: {value:.4g}" for name, value in scores.items()),
        "",
        "## Preprocessing",
        f"The shorter side is resized to {short} px (antialiased, aspect ratio kept) and the "
        f"central {size} x {size} px are used. Transparent pictures are laid on a background.",
        "",
        "## Probabilities",
        _probabilities(temperature, calibrated_on),
        "",
        "## Limits",
        *LIMITS,
    ]
    return "\n".join(lines) + "\n"


def evaluation_size(run: Run) -> tuple[int, int]:
    """(side of the model's input, length the shorter side is resized to), in pixels."""
    size = run.eval_size
    return size, max(size, round(size / run.evaluate.crop))


def _classes(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:CLASSES_SHOWN])
    more = len(classes) - CLASSES_SHOWN
    return f"{shown} and {more} more (meta.json)" if more > 0 else shown


def _data(run: Run, data: Mapping[str, Any]) -> str:
    name = run.data.path or "not recorded"
    if data.get("name"):
        name = f"{data['name']} (digest {str(data.get('digest', ''))[:12]})"
    if run.data.subset == 1:
        return f"Trained on {name}."
    seed = run.data.subset_seed
    return f"Trained on {name}, {percent(run.data.subset)} of it (stratified, seed {seed})."


def _recipe(run: Run) -> str:
    augment = run.augment
    if augment.trivialaugment:
        policy = "TrivialAugment"
    elif augment.randaugment_n:
        policy = f"RandAugment N {augment.randaugment_n}, M {augment.randaugment_m:g}"
    else:
        policy = "crop, flip, color jitter"
    alphas = {"Mixup": run.mix.mixup_alpha, "CutMix": run.mix.cutmix_alpha}
    mixing = ", ".join(f"{name} alpha {alpha:g}" for name, alpha in alphas.items() if alpha)
    parts = [
        f"{run.train.epochs} epochs at {augment.size} px, batch {run.train.batch_size}",
        f"{type(run.optimizer).__name__} (lr {run.optimizer.lr:g})",
        type(run.schedule).__name__,
        type(run.loss).__name__,
        f"augmentation {policy}",
        f"mixing {mixing or 'none'}",
        f"dropout {run.model.dropout:g}",
        f"started from {run.model.init_from}",
    ]
    if run.train.ema_decay:
        parts.append(f"average of the weights (EMA, decay {run.train.ema_decay:g})")
    return "; ".join(parts) + ". `artifacts/meta.json` holds the complete recipe."


def _probabilities(temperature: float, calibrated_on: str) -> str:
    fitted = f", fitted on {calibrated_on}" if calibrated_on else ""
    return f"Softmax of the logits divided by {temperature:.4g}{fitted}."
