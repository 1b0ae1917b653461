"""Ray Tune, driven from the ledger: trials go in one by one, what happens to them comes out as calls on a listener.

Tune starts, watches, stops and retries the trials' processes and shares out the cluster. It does not remember anything: a restart is a new Tuner
fed with what the ledger still has open. (Tuner.restore reruns trials that finished after its last snapshot, and unpickles what it finds.)
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from ftlib.paths import environment
from ftlib.tune.asha import AsynchronousHalving
from ftlib.tune.trial import Train, run_trial
from ftlib.tune.trial_store import Trial

_interrupt = threading.Event()
WORKER_DEATHS = 2
"""How often a trial whose process died (a lost node, the kernel's out-of-memory killer) is started again."""


class Listener(Protocol):
    def started(self, number: int) -> None: ...
    def progressed(self, number: int, point: dict[str, float]) -> None: ...
    def ended(self, number: int, outcome: str, reason: str, result: dict[str, Any]) -> None:
        """`outcome`: completed, pruned, failed, or interrupted when the sweep ends before the trial."""


def execute(
    next_trial: Callable[[], Trial | None],
    config: Callable[[Trial], dict[str, Any]],
    train: Train,
    listener: Listener,
    *,
    resources: Mapping[str, float],
    slots: int,
    halving: AsynchronousHalving | None = None,
    reuse: bool = True,
) -> bool:
    """Run trials until `next_trial` gives None and all are over, `slots` at a time. False when a signal (Ctrl-C, SIGTERM) ended it early.

    Ray must be initialised. Each trial runs `train(config(trial), report)` in a process with `resources`; with `reuse` the process is kept for
    the next trial, so that imports are paid once per slot. Exceptions of the listener end the run and are raised again.
    """
    _interrupt.clear()
    work = tempfile.mkdtemp(prefix="ftlib-tune-")
    watch = TuneCallback(listener, halving)

    def function(config: dict[str, Any]) -> None:
        run_trial(config, train)

    tuner = tune.Tuner(
        tune.with_resources(function, dict(resources)),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=slots,
            search_alg=TrialSearcher(next_trial, config, watch),
            scheduler=halving,
            reuse_actors=reuse,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
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
        with environment(**_ENVIRONMENT), _quiet(), _signals():
            tuner.fit()
    except BaseException:
        if watch.error is not None:
            raise watch.error from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if watch.error is not None:
        raise watch.error
    return not _interrupt.is_set()


def preload() -> None:
    """Import what Tune imports when it starts, before any other thread runs. Tune looks for MLflow's callback whether it is used or not; two threads that
    import mlflow at once (the other one delivers the tracking journal) end in a deadlock of Python's import locks."""
    with contextlib.suppress(ImportError):
        importlib.import_module("ray.air.integrations.mlflow")


def _name(trial: Any) -> str:
    return f"t{trial.config['number']:02d}"


class TrialSearcher(Searcher):
    """Hands Tune the next trial of the ledger."""

    def __init__(
        self,
        next_trial: Callable[[], Trial | None],
        config: Callable[[Trial], dict[str, Any]],
        watch: TuneCallback,
    ):
        super().__init__(metric="score", mode="max")
        self.next_trial, self.config_of, self.watch = next_trial, config, watch

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts for a restore that is never done

    def suggest(self, trial_id: str) -> Any:
        if self.watch.again:
            return self.config_of(self.watch.again.pop(0))
        if self.watch.error is not None or (trial := self.next_trial()) is None:
            return (
                None if self.watch.running else Searcher.FINISHED
            )  # a running one may yet have to be given out again
        self.watch.running[trial.number] = trial
        return self.config_of(trial)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """The watch has seen it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger has it all. Tune asks at each snapshot."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is restarted from its ledger")


class TuneCallback(tune.Callback):
    """Tells the listener what Tune does, each trial's end exactly once."""

    def __init__(self, listener: Listener, halving: AsynchronousHalving | None):
        self.listener, self.halving = listener, halving
        self.running: dict[int, Trial] = {}
        self.again: list[Trial] = []
        self.error: BaseException | None = None
        self.failed: set[str] = set()
        """Tune's ids of the trials whose failure has been dealt with."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """An error of the listener (a full disk) ends the sweep in order instead of breaking Tune's loop."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            _interrupt.set()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        with self._kept():
            self.listener.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        number = trial.config["number"]
        with self._kept():
            if "ended" in result:
                if self.running.pop(number, None) is not None:
                    self.listener.ended(
                        number,
                        result["outcome"],
                        result.get("reason", ""),
                        dict(result["result"] or {}),
                    )
            elif "score" in result:
                self.listener.progressed(
                    number,
                    {
                        k: v
                        for k, v in result.items()
                        if isinstance(v, (int, float))
                        and not isinstance(v, bool)
                        and k not in _TUNES_OWN
                    },
                )

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if self.running.pop(number, None) is None:
            return
        epoch = self.halving.stopped.get(number) if self.halving else None
        with self._kept():
            if epoch is None:
                self.listener.ended(number, "interrupted", "the sweep was stopped", {})
            else:
                self.listener.ended(
                    number,
                    "pruned",
                    f"stopped after epoch {epoch}: not among the best {_share(self.halving)} there",
                    {},
                )

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._failed(trial)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        # A process that could not be handed on to the next trial (it was still busy with the one before) is an error that Tune tells nobody.
        if self.running:
            for trial in trials:
                if trial.status == "ERROR" and trial.trial_id not in self.failed:
                    self._failed(trial)

    def _failed(self, trial: Any) -> None:
        number = trial.config["number"]
        if trial.trial_id in self.failed or number not in self.running:
            return
        self.failed.add(trial.trial_id)
        try:
            why = Path(trial.error_file).read_text()
        except (OSError, TypeError):
            why = ""
        if "runner reuse" in why and "Failure #" in why and not trial.run_metadata.last_result:
            self.again.append(self.running[number])  # it never began
            return
        del self.running[number]
        with self._kept():
            self.listener.ended(number, "failed", _died(why), {})


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


def _share(halving: AsynchronousHalving | None) -> str:
    return f"1/{halving._reduction_factor:g}" if halving else ""


def _died(why: str) -> str:
    """Why a trial's process is gone, in a line, from Tune's account of its failures."""
    if "OutOfMemory" in why or "out of memory" in why.lower():
        return f"out of memory: its process was killed {WORKER_DEATHS + 1} times. Lower train.microbatch_size, or run fewer trials at once"
    if "actor died" in why.lower() or "ActorDied" in why or "ActorUnavailable" in why:
        return f"its process died {WORKER_DEATHS + 1} times (killed from outside, or out of memory)"
    lines = [line for line in why.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "its process died"


class _Interrupted(tune.Stopper):
    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return _interrupt.is_set()


def interrupt() -> None:
    """End the running `execute` in order, as Ctrl-C does."""
    _interrupt.set()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the sweep in order; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: Any) -> None:
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
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours tells the listener
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard beside the ledger
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report is its outcome and has no score
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own snapshots are not used
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    "TUNE_WARN_THRESHOLD_S": "10",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even when asked to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune's and Train's own talk, which would run through the live table."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def remove_placement_groups(before: set[str]) -> int:
    """Remove the placement groups that came up since `before` (ids) and are still there; how many. A nested trainer that was stopped while its
    workers were starting leaves its reservation behind, and the cluster would wait for it for ever."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    left = placement_groups() - before
    for group in left:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
    return len(left)


def placement_groups() -> set[str]:
    """Ids of the placement groups that hold or await resources."""
    return {
        i for i, about in ray.util.placement_group_table().items() if about["state"] != "REMOVED"
    }
