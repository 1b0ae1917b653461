"""Ray Tune: runs trials in processes of their own and tells listeners what happens to them.

Tune starts, watches, stops and retries the trials' processes and shares out the cluster. It keeps
no state of ours: after a restart a new Tuner gets the trials that the store still has open.
(`Tuner.restore` would rerun trials that finished after its last snapshot, and it unpickles files.)

The first half runs in the driver (`execute`), the second half in the trial's process (`run_trial`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from ftlib.launch import own_ray
from ftlib.launch.errors import StoppedError
from ftlib.paths import environment_variables
from ftlib.tune.asha import AsynchronousHalving
from ftlib.tune.train_trial import TrainTrial, TrialConfig, TrialStoppedError
from ftlib.tune.trial_store import Trial

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial

WORKER_DEATHS = 2
"""How often a trial is started again after its process died (lost node, out-of-memory killer)."""
UNWIND_SECONDS = 60
"""Time a stopped trial has to close its loader and its MLflow run before its process is killed.
Tune's default of 2 s would also kill the next trial of that process."""

DURING = "trials were running"
SILENT_SECONDS = 25.0
"""A stopped sweep is given up when Tune's loop has not moved for this long. While Ray answers, the
loop waits at most 10 s for its trials' processes (TUNE_FORCE_TRIAL_CLEANUP_S)."""
LOOK_SECONDS = 0.3
"""How often the driver looks whether its Ray is still there."""

_interrupt = threading.Event()
_signal: int = signal.SIGINT
"""The signal that has set `_interrupt`."""


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended."""

    outcome: str
    """completed, pruned, failed; or interrupted, when the sweep ends before the trial."""
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    """What the training function returned; of a failed trial its traceback."""


class TrialListener(Protocol):
    """Gets each event of a trial exactly once, in one thread of the driver's."""

    def started(self, trial: Trial) -> None: ...
    def progressed(self, trial: Trial, point: dict[str, float]) -> None:
        """`point`: epoch, seconds, score and the metrics of one epoch."""

    def ended(self, trial: Trial, end: TrialEnd) -> None: ...


def execute(
    next_trial: Callable[[], Trial | None],
    config: Callable[[Trial], TrialConfig],
    train: TrainTrial,
    listeners: Sequence[TrialListener],
    *,
    resources: Mapping[str, float],
    slots: int,
    halving: AsynchronousHalving | None = None,
    reuse: bool = True,
) -> bool:
    """Run trials until `next_trial` returns None and all have ended. Ray must be initialized.

    Args:
        config: what the trial's process gets; `train(config(trial), report)` runs there.
        listeners: each is called in turn. An exception of one ends the sweep and is raised again.
        resources: what Tune reserves for each trial.
        slots: trials at once.
        reuse: keep a process for the next trial, so that imports are paid once per slot.

    Returns:
        False when a signal (Ctrl-C, SIGTERM) or `interrupt` ended it early.
    """
    _interrupt.clear()
    work = tempfile.mkdtemp(prefix="ftlib-tune-")
    watch = TuneCallback(listeners, halving)

    def function(config: TrialConfig) -> None:
        run_trial(config, train)

    tuner = tune.Tuner(
        tune.with_resources(function, dict(resources)),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=slots,
            search_alg=TrialSearcher(next_trial, config, watch),
            scheduler=halving,
            reuse_actors=reuse,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=work,
            stop=_Interrupted(),
            callbacks=[watch],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=WORKER_DEATHS),
        ),
    )
    try:
        with (
            environment_variables(**_ENVIRONMENT),
            _quiet(),
            _signals(),
            own_ray.announcing(DURING),
        ):
            _fit(tuner, watch)
    except BaseException:
        if watch.error is not None:
            raise watch.error from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if watch.error is not None:
        raise watch.error
    return not _interrupt.is_set()


def _fit(tuner: tune.Tuner, watch: TuneCallback) -> None:
    """`tuner.fit()`, given up once Ray is gone, or silent while the sweep is stopped: Tune would
    wait until Ray, after a minute, ends this whole process, or for ever."""
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            tuner.fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, name="tune", daemon=True)
    thread.start()
    stopped = 0.0
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        if thread.is_alive() and (process := own_ray.gone()):
            _give_up(watch, "the sweep's Ray has ended")
            raise own_ray.gone_error(process, DURING)
        if not _interrupt.is_set():
            continue
        stopped = stopped or time.monotonic()
        if time.monotonic() - max(stopped, watch.moved) > SILENT_SECONDS and thread.is_alive():
            _give_up(watch, "the sweep's Ray did not answer")
            raise StoppedError(
                _signal,
                "stopped without waiting for its trials, because Ray does not answer; the same "
                "command goes on with them",
                ends_at_once=True,
            )
    if ended[0] is not None:
        raise ended[0]


def _give_up(watch: TuneCallback, why: str) -> None:
    own_ray.end_processes()
    for number in list(watch.running):
        watch.end(number, TrialEnd("interrupted", why))


def interrupt() -> None:
    """End the running `execute` in order, as Ctrl-C does."""
    _interrupt.set()


def preload() -> None:
    """Import what Tune imports when it starts. Call before any other thread runs.

    Tune looks for MLflow's callback whether it is used or not. Two threads that import mlflow at
    once (the other one delivers the tracking journal) deadlock on Python's import locks.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("ray.air.integrations.mlflow")


def _trial_name(trial: TuneTrial) -> str:
    return f"t{trial.config['number']:02d}"


class TrialSearcher(Searcher):
    """Hands Tune the next trial of the trial store."""

    def __init__(
        self,
        next_trial: Callable[[], Trial | None],
        config: Callable[[Trial], TrialConfig],
        watch: TuneCallback,
    ):
        super().__init__(metric="score", mode="max")
        self.next_trial, self.config_of, self.watch = next_trial, config, watch

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts for a restore, which we never do

    def suggest(self, trial_id: str) -> Any:
        if self.watch.requeued:
            return self.config_of(self.watch.requeued.pop(0))
        if self.watch.error is not None or (trial := self.next_trial()) is None:
            # A running trial may have to be handed out again, so the search is not over yet.
            return None if self.watch.running else Searcher.FINISHED
        self.watch.running[trial.number] = trial
        return self.config_of(trial)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """TuneCallback handles it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the trial store has it all. Tune calls this at each snapshot."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is restarted from its trial store")


class TuneCallback(tune.Callback):
    """Turns Tune's callbacks into events for the listeners, each trial's end exactly once."""

    def __init__(self, listeners: Sequence[TrialListener], halving: AsynchronousHalving | None):
        self.listeners, self.halving = listeners, halving
        self.running: dict[int, Trial] = {}
        """Trials handed to Tune that have not ended, by number."""
        self.requeued: list[Trial] = []
        """Trials that never began, because the process they were given to was still busy."""
        self.error: BaseException | None = None
        """First error of a listener."""
        self.failed: set[str] = set()
        """Tune's ids of the trials whose failure has been handled."""
        self.moved = 0.0
        """When Tune's loop ended a step last (time.monotonic)."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _notify(self, event: Callable[[TrialListener], None]) -> None:
        """Call all listeners. An error (a full disk) ends the sweep in order, not Tune's loop."""
        try:
            for listener in self.listeners:
                event(listener)
        except Exception as error:
            self.error = self.error or error
            _interrupt.set()

    def end(self, number: int, end: TrialEnd) -> None:
        trial = self.running.pop(number, None)
        if trial is not None:
            self._notify(lambda listener: listener.ended(trial, end))

    def on_trial_start(self, iteration: int, trials: list, trial: TuneTrial, **info: Any) -> None:
        if (started := self.running.get(trial.config["number"])) is not None:
            self._notify(lambda listener: listener.started(started))

    def on_trial_result(
        self, iteration: int, trials: list, trial: TuneTrial, result: dict, **info: Any
    ) -> None:
        number = trial.config["number"]
        if "ended" in result:
            self.end(
                number,
                TrialEnd(result["outcome"], result.get("reason", ""), dict(result["result"] or {})),
            )
        elif "score" in result and number in self.running:
            point = {k: v for k, v in result.items() if _is_number(v) and k not in _TUNES_OWN}
            running = self.running[number]
            self._notify(lambda listener: listener.progressed(running, point))

    def on_trial_complete(
        self, iteration: int, trials: list, trial: TuneTrial, **info: Any
    ) -> None:
        number = trial.config["number"]
        epoch = self.halving.stopped.get(number) if self.halving else None
        if self.halving is None or epoch is None:
            self.end(number, TrialEnd("interrupted", "the sweep was stopped"))
            return
        share = f"1/{self.halving.reduction:g}"
        reason = f"stopped after epoch {epoch}: not among the best {share} there"
        self.end(number, TrialEnd("pruned", reason))

    def on_trial_error(self, iteration: int, trials: list, trial: TuneTrial, **info: Any) -> None:
        self._fail(trial)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self.moved = time.monotonic()
        # Tune reports no event when a process cannot be reused because its last trial is still
        # unwinding; the trial only turns up with the status ERROR.
        if self.running:
            for trial in trials:
                if trial.status == "ERROR" and trial.trial_id not in self.failed:
                    self._fail(trial)

    def _fail(self, trial: TuneTrial) -> None:
        number = trial.config["number"]
        if trial.trial_id in self.failed or number not in self.running:
            return
        self.failed.add(trial.trial_id)
        try:
            why = Path(trial.error_file).read_text()
        except (OSError, TypeError):
            why = ""
        if "runner reuse" in why and "Failure #" in why and not trial.run_metadata.last_result:
            self.requeued.append(self.running[number])
            return
        self.end(number, TrialEnd("failed", _death_reason(why)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TUNES_OWN = {
    "timestamp",
    "training_iteration",
    "time_this_iter_s",
    "time_total_s",
    "time_since_restore",
    "iterations_since_restore",
    "pid",
    "checkpoint_dir_name",
    "done",
}
"""Numbers that Tune adds to each result."""


def _death_reason(why: str) -> str:
    """One line that says why a trial's process died, from Tune's error file."""
    times = f"{WORKER_DEATHS + 1} times"
    if "OutOfMemory" in why or "out of memory" in why.lower():
        return (
            f"out of memory: its process was killed {times}. "
            "Lower train.microbatch_size, or run fewer trials at once"
        )
    if "actor died" in why.lower() or "ActorDied" in why or "ActorUnavailable" in why:
        return f"its process died {times} (killed from outside, or out of memory)"
    lines = [line for line in why.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "its process died"


class _Interrupted(tune.Stopper):
    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return _interrupt.is_set()


def exit_code() -> int:
    """The exit code of a process whose sweep was ended by a signal: 130 or 143."""
    return 128 + _signal


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the sweep in order; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: FrameType | None) -> None:
        global _signal
        _signal = number
        _interrupt.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours tells the listeners
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report has no score
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own snapshots are not used
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    "TUNE_WARN_THRESHOLD_S": "10",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even when asked to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of Tune and Train, which would break the live table."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def placement_groups() -> set[str]:
    """Ids of the placement groups that hold or await resources."""
    groups = ray.util.placement_group_table().items()
    return {identity for identity, about in groups if about["state"] != "REMOVED"}


def remove_placement_groups(before: set[str]) -> int:
    """Remove the placement groups made since `before` (ids); returns how many there were.

    A nested trainer that is stopped while its workers start leaves its reservation behind, and the
    cluster would wait for it forever.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    left = placement_groups() - before
    for group in left:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
    return len(left)


# --- in the trial's process ------------------------------------------------------------------


def run_trial(config: TrialConfig, train: TrainTrial) -> None:
    """The Tune function: train, report each epoch, and report an outcome at the end.

    A training that fails is a result of its trial; Tune retries only a process that died.
    """
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(UNWIND_SECONDS)
    began = last = time.monotonic()

    def report(epoch: int, metrics: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        values = {k: float(v) for k, v in metrics.items()}
        point = {**values, "epoch": int(epoch), "seconds": now - last}
        last = now
        try:
            tune.report(point)
        except SystemExit:  # how Tune ends this thread at its next report
            raise TrialStoppedError(
                "other trials score higher after as many epochs, or the sweep is ending"
            ) from None

    final: dict[str, Any]
    try:
        result = train(config, report)
        wall = time.monotonic() - began
        final = {"outcome": "completed", "result": {**result, "wall_seconds": wall}}
    except TrialStoppedError:
        sys.exit(0)
    except Exception as error:
        final = {
            "outcome": "failed",
            "reason": failure_reason(error),
            "result": {"traceback": traceback.format_exc(limit=-20)},
        }
    free_memory()
    tune.report({"ended": True, **final})


def failure_reason(error: BaseException) -> str:
    """One line that says why a trial failed."""
    text = str(error).strip().splitlines()
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or "out of memory" in str(error).lower():
        kind = "out of memory"
    return f"{kind}: {text[0][:300]}" if text else kind


def free_memory() -> None:
    """Free what a trial held: its process goes on with the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
