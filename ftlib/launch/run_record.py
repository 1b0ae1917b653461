"""A run's name is its identity: its name, its fingerprint and its record in run.json.

The fingerprint covers every setting that changes what is computed, the data set by its digest and
the starting weights by theirs. The same name and fingerprint resumes; another fingerprint under a
name that is taken is refused.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlib import settings, storage
from ftlib.config import NOT_IN_FINGERPRINT, NOT_IN_FINGERPRINT_AT_DEFAULT, Run
from ftlib.launch.errors import LaunchError
from ftlib.storage import join

FINGERPRINT_VERSION = 2
"""Version 2 also covers the augmentation ops that RandAugment and TrivialAugment choose from, where
they are not those of version 1."""


def fingerprint(
    run: Run, data_digest: str, init_sha256: str | None, ops: Sequence[str] | None = None
) -> str:
    """sha256 (hex) over what determines the run's result.

    Starting weights that were found (phase1, run:NAME, file:PATH) count by their contents, so
    that the same weights named in another way are the same run, and better weights of Phase 1
    make another run of Phase 2.

    Args:
        data_digest: digest of the data set.
        init_sha256: digest of the starting weights, None for scratch and imagenet.
        ops: the augmentation ops to choose from, as `policy.op_versions` names them; by default
            those of the present table.
    """
    leave_out = (*NOT_IN_FINGERPRINT, "model.init_from") if init_sha256 else NOT_IN_FINGERPRINT
    ops = _ops(run) if ops is None else tuple(ops)
    changed = {} if ops == _ops(run, first=True) else {"ops": ops}
    return settings.fingerprint(
        run,
        leave_out,
        NOT_IN_FINGERPRINT_AT_DEFAULT,
        data=data_digest,
        init=init_sha256,
        **changed,
    )


def recorded_ops(run: Run, record: RunRecord | None) -> tuple[str, ...]:
    """The augmentation ops of `run`: those it began with, or the present table for a new run.

    A record of fingerprint version 1 has no list; its ops are those of the table of that time.
    """
    if record is None:
        return _ops(run)
    if record.fingerprint_version < 2:
        return _ops(run, first=True)
    return tuple(record.ops)


def _ops(run: Run, first: bool = False) -> tuple[str, ...]:
    """`policy.op_versions` of the present table, or of the `first`; () without a policy, which then
    need not be imported."""
    if not run.augment.has_policy:
        return ()
    from ftlib.data.policy import FIRST_OPS, op_versions

    return op_versions(run.augment, FIRST_OPS if first else None)


def with_ops(run: Run, ops: tuple[str, ...]) -> Run:
    """`run`, choosing from `ops` also where the table of ops has grown since.

    Raises LaunchError where one of them is gone or does something else by now.
    """
    present = _ops(run)
    if ops == present:
        return run
    everything = _ops(settings.override(run, {"augment.randaugment_ops": ()}))
    if missing := [op for op in ops if op not in everything]:
        raise LaunchError(
            f"the run {run.name!r} was begun with augmentation ops that this version of ftlib does "
            f"not have: {', '.join(missing)}. Go on with the version that began it, or give "
            "another --name to begin again"
        )
    names = tuple(op.partition("@")[0] for op in ops)
    return settings.override(run, {"augment.randaugment_ops": names})


def default_name(run: Run, data_name: str, digest: str) -> str:
    """STAGE-DATASET-FINGERPRINT, with only those characters of the data set that a name may hold.

    `digest` is the run's fingerprint.
    """
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", data_name).strip("-.") or "data"
    return f"{run.stage}-{data[:40]}-{digest[:6]}"


@dataclass
class RunRecord:
    """run.json: written at each launch, before training starts."""

    run: dict[str, Any]
    """The whole recipe, as JSON."""
    fingerprint: str
    data: dict[str, Any]
    """name, digest, classes, path."""
    init: dict[str, Any] | None = None
    """Where the first weights came from (`InitialWeights.to_dict`)."""
    seen: dict[str, Any] | None = None
    """Training images of the data set that its weights will have seen, with those of the runs they
    come from: how many, and the digest of seen_rows.json."""
    mlflow: dict[str, str] | None = None
    """uri, experiment_id, run_id of the run in MLflow."""
    launches: int = 0
    """How often the run was launched."""
    fingerprint_version: int = 1
    """`FINGERPRINT_VERSION` of the code that began the run."""
    ops: list[str] = field(default_factory=list)
    """The augmentation ops that the run chooses from (`policy.op_versions`); empty in version 1.
    """
    created: float = field(default_factory=time.time)
    """Unix time of the first start, in seconds."""

    def write(self, run_dir: str) -> None:
        storage.write_file(join(run_dir, "run.json"), json.dumps(self.__dict__, indent=2).encode())

    @classmethod
    def read(cls, run_dir: str) -> RunRecord | None:
        """The record in `run_dir`, None if there is none. Raises LaunchError for a damaged one."""
        try:
            values = storage.read_json(join(run_dir, "run.json"))
            if values is None:
                return None
            return cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
        except (storage.DamagedError, TypeError, AttributeError) as error:
            raise LaunchError(
                f"{run_dir}/run.json cannot be read ({error}). Move that folder away, or give the "
                "run another --name"
            ) from None


def refuse_other_settings(
    run: Run, run_dir: str, record: RunRecord, wanted: str, data_digest: str
) -> None:
    """Raise LaunchError if the run in `run_dir` has another fingerprint than `wanted`."""
    if record.fingerprint != wanted:
        difference = _difference(run, record, data_digest)
        raise LaunchError(
            f"the name {run.name!r} is taken by a run with {difference}. Leave --name out, choose "
            f"another, or repeat the first settings to go on with that run ({run_dir})"
        )


def _difference(run: Run, record: RunRecord, data_digest: str) -> str:
    """What differs between a recorded run and `run`, for a person."""
    name, digest = record.data.get("name"), str(record.data.get("digest"))
    if digest != data_digest:
        return f"other data ({name}, digest {digest[:12]}; now {data_digest[:12]})"
    try:
        changed = settings.differences(settings.from_dict(Run, record.run), run)
    except settings.ConfigError as error:
        return f"a recipe of another version of ftlib ({error})"
    listed = [f"{p} was {a!r}, now {b!r}" for p, (a, b) in changed.items() if _counts(p)]
    return "other settings: " + ", ".join(listed[:6]) if listed else "other starting weights"


def _counts(path: str) -> bool:
    """Whether a setting is part of the fingerprint."""
    return not any(path == out or path.startswith(out + ".") for out in NOT_IN_FINGERPRINT)
