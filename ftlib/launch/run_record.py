"""A run's name is its identity: what it is called, whether it may go on, and that only one process
at a time carries it out.

The fingerprint covers every setting that changes what is computed, the data set by its digest
and the starting weights by theirs. The same name and fingerprint resumes; another fingerprint
under a name that is taken is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ftlib import settings, storage
from ftlib.config import NOT_IN_FINGERPRINT, NOT_IN_FINGERPRINT_AT_DEFAULT, Run
from ftlib.launch.errors import LaunchError
from ftlib.storage import join

RENEW_SECONDS = 10.0
"""Seconds between two renewals of a lease."""
EXPIRE_SECONDS = 45.0
"""A lease on another machine that was not renewed for this long is dead."""


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
        ops: the augmentation ops to choose from, as `augment.op_versions` names them; by default
            those of the present table.
    """
    from ftlib.data.augment import FIRST_OPS, op_versions

    leave_out = (*NOT_IN_FINGERPRINT, "model.init_from") if init_sha256 else NOT_IN_FINGERPRINT
    ops = op_versions(run.augment) if ops is None else tuple(ops)
    changed = {} if ops == op_versions(run.augment, FIRST_OPS) else {"ops": ops}
    return settings.fingerprint(
        run,
        leave_out,
        NOT_IN_FINGERPRINT_AT_DEFAULT,
        data=data_digest,
        init=init_sha256,
        **changed,
    )


def recorded_ops(run: Run, record: RunRecord | None) -> tuple[str, ...]:
    """The augmentation ops of `run`: those it began with, or those of the present table for a new
    run.

    A record of fingerprint version 1 has no list; its ops are those of the table of that time.
    """
    from ftlib.data.augment import FIRST_OPS, op_versions

    if record is None:
        return op_versions(run.augment)
    if record.fingerprint_version < 2:
        return op_versions(run.augment, FIRST_OPS)
    return tuple(record.ops)


def with_ops(run: Run, ops: tuple[str, ...]) -> Run:
    """`run`, choosing from `ops` also where the table of ops has grown since.

    Raises LaunchError where one of them is gone or does something else by now.
    """
    from ftlib.data.augment import op_versions

    present = op_versions(run.augment)
    if ops == present:
        return run
    everything = op_versions(settings.override(run.augment, {"randaugment_ops": ()}))
    if missing := [op for op in ops if op not in everything]:
        raise LaunchError(
            f"the run {run.name!r} was begun with augmentation ops that this version of ftlib does "
            f"not have: {', '.join(missing)}. Go on with the version that began it, or give another "
            "--name to begin again"
        )
    names = tuple(op.partition("@")[0] for op in ops)
    return settings.override(run, {"augment.randaugment_ops": names})


def default_name(run: Run, data_name: str, print_: str) -> str:
    """STAGE-DATASET-FINGERPRINT, the data set's name cut down to what a name may hold."""
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", data_name).strip("-.") or "data"
    return f"{run.stage}-{data[:40]}-{print_[:6]}"


@dataclass
class RunRecord:
    """run.json: what is known of a run before and while it trains."""

    run: dict[str, Any]
    """The whole recipe, as JSON."""
    fingerprint: str
    data: dict[str, Any]
    """name, digest, classes, path."""
    init: dict[str, Any] | None = None
    """Where the first weights came from (`InitialWeights.to_dict`)."""
    mlflow: dict[str, str] | None = None
    """uri, experiment_id, run_id of the run in MLflow."""
    launches: int = 0
    """How often the run was started."""
    fingerprint_version: int = 1
    """`FINGERPRINT_VERSION` of the code that began the run."""
    ops: list[str] = field(default_factory=list)
    """The augmentation ops that the run chooses from (`augment.op_versions`); empty in version 1.
    """
    created: float = field(default_factory=time.time)
    """Unix time of the first start, in seconds."""

    def write(self, run_dir: str) -> None:
        storage.write_file(join(run_dir, "run.json"), json.dumps(self.__dict__, indent=2).encode())

    @classmethod
    def read(cls, run_dir: str) -> RunRecord | None:
        """The record in `run_dir`; None where there is none. Raises LaunchError for one that
        cannot be read."""
        try:
            values = storage.read_json(join(run_dir, "run.json"))
            if values is None:
                return None
            return cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
        except (storage.DamagedError, TypeError, AttributeError) as error:
            raise LaunchError(
                f"{run_dir}/run.json cannot be read ({error}). Move that folder away, or give the run another --name"
            ) from None


def refuse_other_settings(
    run: Run, run_dir: str, record: RunRecord, wanted: str, data_digest: str
) -> None:
    """Raise LaunchError if the run in `run_dir` has another fingerprint than `wanted`, naming what
    differs."""
    if record.fingerprint == wanted:
        return
    if record.data.get("digest") != data_digest:
        what = f"it was trained on other data ({record.data.get('name')}, digest {str(record.data.get('digest'))[:12]}; now {data_digest[:12]})"
    else:
        try:
            changed = settings.differences(settings.from_dict(Run, record.run), run)
            changed = {
                p: v
                for p, v in changed.items()
                if not any(p == o or p.startswith(o + ".") for o in NOT_IN_FINGERPRINT)
            }
            what = (
                "other settings: "
                + ", ".join(f"{p} was {a!r}, now {b!r}" for p, (a, b) in list(changed.items())[:6])
                if changed
                else "other starting weights"
            )
        except settings.ConfigError as error:
            what = f"its recipe is of another version of ftlib ({error})"
    raise LaunchError(
        f"the name {run.name!r} is taken by a run with {what}. Leave --name out, choose another, or repeat the first settings to go on with that run ({run_dir})"
    )


# --- the lease --------------------------------------------------------------------------------------------------------------------


class Lease:
    """Keeps two launches from writing one run. Held by the launching process, in
    `<run>/lease.json`; a context manager.

    On the same machine a lease ends with its process, also after kill -9; elsewhere it ends
    EXPIRE_SECONDS after its last renewal. On a file system the lease is taken by an exclusive
    create, on an object store by writing and reading back.
    """

    def __init__(self, run_dir: str, name: str) -> None:
        self.file, self.name = join(run_dir, "lease.json"), name
        self.token = uuid.uuid4().hex
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.take()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, storage.StorageError):
            if self._holder().get("token") == self.token:
                self._remove()

    def take(self) -> None:
        """Take the lease. Raises LaunchError when somebody alive holds it; waits up to
        EXPIRE_SECONDS to tell a dead machine from a live one."""
        first: dict[str, Any] | None = None
        started = time.monotonic()
        while True:
            if self._create():
                return
            holder = self._holder()
            if first is None:
                first = holder
            alive = _alive(holder)
            if alive is None:  # on another machine: does it still move?
                if holder.get("renewed") != first.get("renewed"):
                    alive = True
                elif (
                    time.monotonic() - started < EXPIRE_SECONDS
                    and abs(time.time() - float(holder.get("renewed", 0))) < 10 * EXPIRE_SECONDS
                ):
                    time.sleep(1)
                    continue
            if alive:
                raise LaunchError(
                    f"the run {self.name!r} is being trained already, by process {holder.get('pid')} on {holder.get('host')}. "
                    "Wait for it, stop it, or give this one another --name"
                )
            self._evict(holder)

    def _mine(self) -> bytes:
        return json.dumps({"token": self.token, **_me(), "renewed": time.time()}).encode()

    def _create(self) -> bool:
        if storage.is_remote(self.file):
            if storage.read_file(self.file) is not None:
                return False
            storage.write_file(self.file, self._mine())
            time.sleep(1)  # the later of two writers wins; both see who that was
            return bool(self._holder().get("token") == self.token)
        path = Path(self.file)
        temporary = path.with_name(f".tmp-lease-{self.token}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(self._mine())
            os.link(
                temporary, path
            )  # fails if it exists; whole at once, unlike open(O_EXCL) and then write
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise storage.StorageError(storage.explain(self.file, error)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _holder(self) -> dict[str, Any]:
        try:
            found = storage.read_json(self.file)
        except storage.DamagedError:
            return {}
        return found if isinstance(found, dict) else {}

    def _evict(self, holder: dict[str, Any]) -> None:
        """Take a dead lease away; a rename, so that of two that try only one succeeds."""
        if storage.is_remote(self.file):
            self._remove()
            return
        aside = Path(self.file).with_name(f".tmp-lease-dead-{self.token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.file, aside)
            with contextlib.suppress(ValueError):
                if json.loads(aside.read_bytes()).get("token") != holder.get(
                    "token"
                ):  # somebody else was faster: give it back
                    os.rename(aside, self.file)
                    return
            aside.unlink()

    def _remove(self) -> None:
        if storage.is_remote(self.file):
            fs, path = storage.filesystem(self.file)
            with contextlib.suppress(FileNotFoundError):
                fs.delete_file(path)
        else:
            Path(self.file).unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            with contextlib.suppress(
                storage.StorageError, OSError
            ):  # storage that is away for a while must not end the run
                storage.write_file(self.file, self._mine())


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _machine() -> str:
    """This boot of this machine and this process namespace: where a process number means
    something."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {space}"


def _alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives; None when it is on another machine and that cannot be
    seen from here."""
    if not holder:
        return False
    if holder.get("machine") != _machine():
        return None
    with contextlib.suppress(psutil.Error, TypeError, ValueError):
        process = psutil.Process(int(holder["pid"]))
        return (
            abs(process.create_time() - float(holder["started"])) < 1
            and process.status() != psutil.STATUS_ZOMBIE
        )
    return False
