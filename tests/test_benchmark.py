"""The benchmark runs in its smallest form and its report is whole. No time is asserted.

Modules of ftlib.benchmark: baselines, cpu_settings, floor, gpu, loader, measure, one_recipe,
pictures, process_tree, recipes, show, small_run, startup, training, two_workers.
"""

import importlib.util
import io
import json
import multiprocessing
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ftlib.benchmark import (
    cpu_settings,
    floor,
    gpu,
    loader,
    measure,
    pictures,
    recipes,
    scale,
    show,
    startup,
    training,
)
from ftlib.benchmark.measure import BenchmarkError, Case, Cost, Goal, by_turns, ratios
from ftlib.data.augment import TrainTransform
from ftlib.preparation.options import PrepareOptions

JOB = Path(__file__).parents[1] / "jobs" / "benchmark.py"


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("benchmark_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quiet(_):
    pass


# --- sizes of a set ---


def test_a_repeated_set_reads_as_a_prepared_one(tmp_path):
    dataset = scale.repeated(tmp_path / "set", 5000)
    train = dataset.split("train")
    assert len(train) == 2 * scale.ROWS_PER_SHARD and len(train.shards) == 2
    assert train.image(7) == train.image(7 + scale.ROWS_PER_SHARD)
    dataset.verify(deep=True)


def test_what_the_number_of_rows_costs_is_measured_in_its_smallest_form(tmp_path):
    scale.prepared(tmp_path / "files", tmp_path / "set", 200)
    found = scale.measure(str(tmp_path / "set"), workers=1, batches=(2, 4))
    assert len(found["loader_mib"]) == len(found["training_mib"]) == 2 and found["loader_mib"][1]
    assert found["index_bytes"] > 200 * 32 and found["manifest_bytes"] > 500
    assert all(len(found[step]) == 2 for step in ("open", "shuffle", "first batch"))


def test_loader_processes_are_compared_on_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "COMPARED", 2)
    dataset = scale.repeated(tmp_path / "set", 100)
    part = scale.loader_processes(dataset, rounds=1, say=quiet, counts=(1, 2))
    assert list(part.costs) == ["loader processes: 1", "loader processes: 2"]
    assert len(part.notes) == 2 and all("MiB of its own" in note for note in part.notes)


# --- measuring ---


def test_cases_take_turns_forwards_and_backwards():
    order = []

    def case(name):
        return Case(name, lambda: order.append(name) or Cost(1.0, 1.0))

    by_turns("x", "step", [case("a"), case("b")], goals=[], rounds=3, say=quiet)
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_ratios_are_formed_within_rounds():
    # The machine is three times slower in the second round: the ratio does not see it.
    costs = {"ours": [Cost(1, 1), Cost(3, 3)], "peer": [Cost(2, 4), Cost(6, 12)]}
    cpu, wall = ratios(
        costs,
        [
            Goal("ours", "peer", "cpu", 0.4),
            Goal("ours", "peer", "wall", 0.4),
            Goal("ours", "absent", "cpu", 0.4),
        ],
    )
    assert cpu.rounds == (0.5, 0.5) and cpu.met is False
    assert wall.median == 0.25 and wall.met is True


def _burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_of_other_processes_counts():
    tree = measure.ProcessTree()
    before = tree.cpu()
    process = multiprocessing.get_context("fork").Process(target=_burn, args=(0.3,))
    process.start()
    process.join()
    assert 0.28 < tree.cpu() - before < 0.3 + 0.5


def test_processes_that_outlive_their_parents_count(tmp_path):
    """A child that nobody waits for works 0.4 s after the command has ended."""
    work = "import time\nwhile time.process_time() < 0.4: pass"
    leave = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {work!r}]); sys.exit(3)"
    )
    out = tmp_path / "cost.json"
    command = ["ftlib.benchmark.process_tree", str(out), sys.executable, "-c", leave]
    assert subprocess.run([sys.executable, "-m", *command]).returncode == 3
    found = json.loads(out.read_text())
    assert found["cpu"] > 0.4 and found["processes"] == 2


def test_processes_that_nobody_waits_for_count(tmp_path):
    """As Ray's workers: their parent ignores the signal that tells of a child's end, and the
    kernel then adds what the child has used to nobody's account."""
    work = "import time\nwhile time.process_time() < 1: pass"
    leave = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {work!r}]).wait()"
    )
    out = tmp_path / "cost.json"
    command = ["ftlib.benchmark.process_tree", str(out), sys.executable, "-c", leave]
    assert subprocess.run([sys.executable, "-m", *command]).returncode == 0
    assert json.loads(out.read_text())["cpu"] > 0.8


def test_stream_counts_what_was_made_not_what_was_there():
    import contextlib

    @contextlib.contextmanager
    def opened():
        yield iter([8] * 1000)

    cost = measure.stream_cost(opened, images=64, ahead=32)
    assert cost.wall >= 0 and cost.cpu >= 0


# --- the loader ---


def test_generated_photos_are_like_photos(tmp_path):
    loader.photos(tmp_path, 4)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 4
    for file in files:
        with Image.open(file) as picture:
            assert sorted(picture.size) == [375, 500]
        assert 20_000 < file.stat().st_size < 250_000


def test_the_job_in_its_smallest_form(job, tmp_path, capsys):
    job.main(
        [
            "--what",
            "loader,step",
            "--rounds",
            "2",
            "--images",
            "8",
            "--size",
            "32",
            "--workers",
            "0",
            "--only",
            "ftlib Phase 2",
            "torchvision reference",
            "full-size",
            "--max-side",
            "64",
            "--step-size",
            "32",
            "--batch",
            "2",
            "--steps",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    text = capsys.readouterr().out
    assert "Input pipeline" in text and "Training step" in text and "cores" in text
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert found["machine"]["cores"] >= 1 and "--what loader,step" in found["command"]
    pipeline, step = found["parts"]
    names = [case["name"] for case in pipeline["cases"]]
    assert {loader.ORIGINALS, loader.REENCODED, loader.TORCHVISION, loader.FULL_SIZE} <= set(names)
    for part in found["parts"]:
        assert part["ratios"]
        for ratio in part["ratios"]:
            assert (
                len(ratio["rounds"]) == 2
                and ratio["low"] <= ratio["median"] <= ratio["high"]
                and ratio["low"] > 0
            )
        for case in part["cases"]:
            assert len(case["cpu_ms"]) == len(case["wall_ms"]) == 2
    assert step["ratios"][0]["goal"] == 1.01
    with Image.open(tmp_path / "out" / "benchmark.png") as picture:
        assert picture.size[0] > 500


def test_quality_in_its_smallest_form(job, tmp_path, capsys):
    job.main(
        [
            "--what",
            "sides,accuracy",
            "--rounds",
            "2",
            "--seeds",
            "2",
            "--images",
            "8",
            "--size",
            "32",
            "--workers",
            "0",
            "--epochs",
            "1",
            "--arch",
            "shufflenet_v2_x0_5",
            "--out",
            str(tmp_path),
        ]
    )
    sides, accuracy = json.loads((tmp_path / "benchmark.json").read_text())["parts"]
    kilobytes = [float(re.search(r": ([0-9.]+) kB", note)[1]) for note in sides["notes"]]
    quality = [float(re.search(r"are ([0-9.]+) dB", note)[1]) for note in sides["notes"][1:]]
    assert len(sides["cases"]) == 1 + len(pictures.WAYS) == len(kilobytes)
    smaller = [i for i, rules in enumerate(pictures.WAYS) if rules.subsampling is None]
    for kept in ([kilobytes[1 + i] for i in smaller], [quality[i] for i in smaller]):
        assert kept == sorted(kept), "the more pixels are kept, the longer and the closer"
    assert 20 < quality[0] < quality[-1] < 60
    assert (
        re.search(r"difference of the means [+-][0-9.]+ points", capsys.readouterr().out)
        and len(accuracy["cases"]) == 2
    )


def test_loader_processes_are_measured_and_ended(tmp_path):
    """Also those that peers fork, after OpenCV has been at work here with all its threads."""
    import cv2
    import psutil

    cv2.setNumThreads(4)
    loader.photos(tmp_path / "photos", 8)
    before = len(psutil.Process().children(recursive=True))
    part = loader.benchmark(
        tmp_path,
        tmp_path / "photos",
        images=8,
        rounds=1,
        workers=1,
        max_side=64,
        size=32,
        only=[loader.REENCODED, loader.FULL_SIZE],
        say=quiet,
    )
    assert part.costs[loader.REENCODED][0].cpu > 0 and part.costs[loader.FULL_SIZE][0].cpu > 0
    assert (
        len(psutil.Process().children(recursive=True)) <= before + 2
    )  # the fork server and the resource tracker stay


@pytest.mark.parametrize("rules", [PrepareOptions(tiles=True), PrepareOptions(max_side=200)])
def test_the_floor_makes_the_pixels_that_training_crops(tmp_path, rules):
    loader.photos(tmp_path / "photos", 4)
    dataset = loader.prepared(tmp_path / "photos", tmp_path / "set", rules)
    augment = replace(loader.sized(loader.PLAIN, 64), flip=0.0)
    split, transform = dataset.split("train"), TrainTransform(augment, 0)
    made = floor.crops(dataset, augment, epochs=2)
    wanted = [transform(split.image(row), epoch, row) for epoch in range(2) for row in range(4)]
    lengths = [len(split.image(row)) for row in range(4)]
    assert sum(len(crop.jpeg) for crop in made) < 1.8 * sum(lengths), "tiles were cut out"
    alone = floor.Floor(made, 64)
    for number, pixels in enumerate(wanted):
        assert alone[[number]] == (None, [number])
        assert np.array_equal(alone.out[number], pixels)


def test_the_floor_is_measured_in_processes_and_pieces_sum_to_the_whole(tmp_path):
    loader.photos(tmp_path / "photos", 4)
    dataset = loader.prepared(tmp_path / "photos", tmp_path / "set", PrepareOptions(max_side=64))
    augment = loader.sized(loader.PHASE2, 32)
    with floor.opened(floor.crops(dataset, augment), 32, batch_size=3, workers=1)() as batches:
        assert [next(batches) for _ in range(12)] == [3] * 12, "it goes on after the last crop"
    part = floor.pieces("pieces", dataset, augment, 2, quiet)
    *each, whole = part.costs.values()
    for n in range(2):
        assert sum(costs[n].cpu for costs in each) == pytest.approx(whole[n].cpu)


def test_cpu_settings_in_their_smallest_form(job, monkeypatch, capsys):
    monkeypatch.delitem(cpu_settings.CHOICES, "bf16, compiled")
    monkeypatch.delitem(cpu_settings.CHOICES, "fp32, compiled")
    monkeypatch.setattr(cpu_settings, "available_cpus", lambda: 2)
    words = "--what cpu --arch shufflenet_v2_x0_5 --step-size 32 --batch 2 --steps 1 --rounds 1"
    before = torch.get_num_threads()
    job.main(words.split())
    assert torch.get_num_threads() == before
    text = capsys.readouterr().out
    assert "bf16, threads: 2 / fp32, threads: 2" in text
    assert "fp32, threads: 2 / fp32, threads: 1" in text


def test_checkpoints_in_their_smallest_form(tmp_path):
    part = training.checkpoints(
        training.BenchmarkSettings(size=32, batch=2, steps=1, rounds=1), tmp_path, quiet
    )
    assert part.ratios[0].goal == 1.01 and "a checkpoint" in part.notes[1]


@pytest.mark.slow
def test_two_workers_and_startup(tmp_path):
    smallest = training.BenchmarkSettings(size=32, batch=2, steps=1, rounds=1)
    found = training.scaling(smallest, tmp_path, quiet)
    assert (
        set(found.costs) == {"ftlib, two workers", "torchrun DDP, two workers"}
        and len(found.ratios[0].rounds) == 1
    )


@pytest.mark.slow
def test_startup_in_its_smallest_form(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "FILES", 100)
    monkeypatch.setattr(startup, "TRIALS", 2)
    smallest = training.BenchmarkSettings(size=32, batch=4, steps=1, rounds=1)
    found = startup.startup(smallest, tmp_path, quiet)
    assert {startup.BARE, startup.PAIR, startup.SEVERAL, "ftlib evaluate"} < set(found.costs)
    assert found.costs[startup.PAIR][0].processes > 5, "Ray's processes are counted"
    assert [(ratio.ours, ratio.of) for ratio in found.ratios] == [
        (name, of) for name in (startup.STEP, startup.WHOLE) for of in ("cpu", "wall")
    ]
    assert found.notes[-1].startswith("processes: bare script ")


# --- a GPU ---


def test_gpu_in_its_smallest_form(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PICTURES", 24)
    monkeypatch.setattr(gpu, "_sweep", lambda *_: [])  # it starts Ray: a test of its own
    words = "--what gpu --arch shufflenet_v2_x0_5 --size 32 --batch 2 --steps 1 --rounds 1"
    job.main([*words.split(), "--workers", "0", "--max-side", "64", "--out", str(tmp_path)])
    capsys.readouterr()
    steps, kept = json.loads((tmp_path / "benchmark.json").read_text())["parts"]
    assert steps["ratios"][0]["goal"] == pytest.approx(1 / 0.95) and kept["title"] == "Checkpoints"
    said = " ".join(steps["notes"])
    assert all(word in said for word in ("images/s", "GFLOP", "wait of", "cores", "--timm"))
    page = (tmp_path / "benchmark.md").read_text()
    assert "| ftlib end to end |" in page and all(f"- {note}" in page for note in steps["notes"])


@pytest.mark.slow
def test_gpu_sweeps_four_trials_at_once(tmp_path):
    plan = gpu.GpuPlan(training.BenchmarkSettings("shufflenet_v2_x0_5", 32), 0, 64)
    folder = loader.pictures_of(None, tmp_path, 60)
    rules = PrepareOptions(max_side=64)
    dataset = loader.prepared(folder, tmp_path / "prepared", rules, val_fraction=0.1)
    (said,) = gpu._sweep(plan, dataset, tmp_path / "sweep")
    assert re.fullmatch(r"sweep: 4 trials at once in \d+ s, Ray included", said)


def test_no_piece_is_begun_when_the_time_is_over():
    assert gpu._try("timm", lambda: ["measured"], time.monotonic() + 60, quiet) == ["measured"]
    (said,) = gpu._try("timm", lambda: ["measured"], time.monotonic() - 1, quiet)
    assert "timm: left out" in said


def test_a_piece_that_fails_or_hangs_costs_no_other_its_result(monkeypatch):
    def fails():
        raise RuntimeError("no kernel image")

    ends = time.monotonic() + 60
    assert gpu._try("waits", fails, ends, quiet) == ["waits: failed, RuntimeError: no kernel image"]
    monkeypatch.setattr(gpu, "PIECE_SECONDS", 0.1)
    found = gpu._try("timm", lambda: [str(time.sleep(60))], ends, quiet)
    assert found == ["timm: did not fit into 0 s"]
    assert gpu._try("loader", lambda: ["measured"], ends, quiet) == ["measured"]


def test_the_longest_waits_and_what_the_host_did_in_them():
    def event(name, start, end):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))

    kernels = [event("c", 50, 60), event("a", 0, 10), event("inner", 2, 30), event("d", 62, 70)]
    assert [(w, s, e.name) for w, s, e in gpu.gaps(kernels)] == [(20, 30, "c"), (2, 60, "d")]
    host = [event("aten::item", 31, 46), event("aten::to", 46, 50)]
    assert gpu.during(host, 30, 20) == "75 % of it in aten::item"
    assert "Python" in gpu.during(host, 60, 2)


# --- recipes beside other ways ---


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Folder of 40 pictures of 32 px whose left or right half is bright."""
    folder, draw = tmp_path_factory.mktemp("halves"), np.random.default_rng(0)
    for side, bright in (("left", slice(0, 16)), ("right", slice(16, 32))):
        (folder / side).mkdir()
        for i in range(20):
            pixels = draw.integers(0, 90, (32, 32, 3), np.uint8)
            pixels[:, bright] += 120
            Image.fromarray(pixels).save(folder / side / f"{i}.jpg")
    return folder


def smallest_plan(**changed):
    plan = {"recipes": ("phase1",), "arch": "shufflenet_v2_x0_5", "size": 32, "epochs": 1}
    return recipes.RecipesPlan(**{**plan, "seeds": 2, **changed})


@pytest.mark.slow
def test_recipes_in_their_smallest_form(job, halves, tmp_path, capsys):
    """And the same command again trains nothing."""
    words = ["--what", "recipes", "--source", str(halves), "--arch", "shufflenet_v2_x0_5"]
    words += ["--size", "32", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path / "out")]
    job.main(words)
    first = capsys.readouterr().out
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "out/recipes/trainings").iterdir()}
    assert len(kept) == 6, "three ways, two seeds"
    job.main(words)
    again = capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out/recipes/trainings").iterdir()} == kept
    assert re.sub(r".* load .*", "", first) == re.sub(r".* load .*", "", again)
    assert "timm's train.py: not measured: give its file with --timm" in first
    (part,) = json.loads((tmp_path / "out" / "benchmark.json").read_text())["parts"]
    assert [case["name"] for case in part["cases"]] == [
        "ftlib from-scratch-short",
        recipes.TORCHVISION,
        recipes.PLAIN,
    ]
    for curves in part["curves"].values():
        assert [len(curve) for curve in curves] == [1, 1]
        assert all(0 <= top1 <= 100 for curve in curves for top1 in curve)
    assert {r["of"] for r in part["ratios"]} == {"cpu"} and len(part["ratios"]) == 2
    assert not list((tmp_path / "out/recipes").glob("trainings/*.part"))


def test_a_way_that_fails_is_named_and_the_others_are_compared(halves, tmp_path, monkeypatch):
    """Also where it fails after some seeds."""
    monkeypatch.setattr(recipes, "_run", lambda words: "[40.0, 50.0]")
    answers = iter([[45.0], BenchmarkError("no memory left")])

    def timm(*_):
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(recipes, "by_timm", timm)
    part = recipes.benchmark(smallest_plan(timm="train.py"), halves, tmp_path, quiet)
    assert list(part.curves) == ["ftlib phase1", recipes.TORCHVISION, recipes.PLAIN]
    assert "timm's train.py: not measured: no memory left" in part.notes
    assert f"ftlib phase1 minus {recipes.PLAIN}: +0.00 points [+0.00, +0.00], p = 1" in part.notes


def test_peers_read_the_very_bytes_that_ftlib_reads(halves, tmp_path):
    dataset = loader.prepared(halves, tmp_path / "set", recipes.PrepareOptions(), val_fraction=0.2)
    folder = recipes.as_folders(dataset, tmp_path / "pictures")
    for name in ("train", "val"):
        split = dataset.split(name)
        files = {int(f.stem): f for f in (folder / name).rglob("*.jpg")}
        assert sorted(files) == list(range(len(split)))
        assert all(files[row].read_bytes() == bytes(split.image(row)) for row in files)
        assert all(int(files[row].parent.name) == split.labels[row] for row in files)


def test_another_setting_or_seed_is_another_training(halves, tmp_path):
    dataset = loader.prepared(halves, tmp_path / "set", recipes.PrepareOptions(), val_fraction=0.2)

    def keys(seed=0, **changed):
        plan = smallest_plan(timm="train.py", **changed)
        return {cell.key for cell in recipes.cells(plan, dataset, tmp_path / "p", seed)}

    base = keys()
    assert len(base) == 4 and base == keys()
    for other in (keys(seed=1), keys(epochs=2), keys(size=64), keys(arch="resnet18")):
        assert not base & other


def test_timm_is_given_the_bench_s_settings_and_its_scores_are_read(tmp_path):
    """By a script that stands for timm's train.py: it writes what it was given."""
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse, pathlib\n"
        "p = argparse.ArgumentParser()\n"
        "for name in ('output', 'experiment', 'data-dir', 'model', 'epochs', 'seed'):\n"
        "    p.add_argument('--' + name)\n"
        "a, _ = p.parse_known_args()\n"
        "out = pathlib.Path(a.output, a.experiment)\n"
        "out.mkdir(parents=True)\n"
        "rows = [f'{e},{10 + e}.5' for e in range(int(a.epochs))]\n"
        "(out / 'summary.csv').write_text('\\n'.join(['epoch,eval_top1', *rows]))\n"
    )
    words = recipes.timm_arguments(smallest_plan(epochs=3, timm_lr=1e-3), classes=2, seed=7)
    assert recipes.by_timm(script, tmp_path, words, tmp_path) == [10.5, 11.5, 12.5]
    assert words[words.index("--seed") + 1] == "7" and "3" in words
    assert words[words.index("--lr") + 1] == "0.001"
    script.write_text("raise SystemExit('no timm here')")
    with pytest.raises(BenchmarkError, match="no timm here"):
        recipes.by_timm(script, tmp_path, words, tmp_path)


def test_a_gain_is_a_paired_t_test():
    """Against scipy's."""
    from scipy import stats

    ours, theirs = [50.1, 51.0, 49.2, 52.3], [47.0, 46.1, 48.0, 47.5]
    found, oracle = recipes.paired_gain(ours, theirs), stats.ttest_rel(ours, theirs)
    low, high = oracle.confidence_interval(0.95)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert str(recipes.paired_gain([50.0], [48.0])) == "+2.00 points, one seed"


def test_an_evaluation_size_keeps_its_ratio(shapes, monkeypatch):
    large = recipes.override(recipes.recipes.load("phase1"), {"evaluate.size": 160})
    monkeypatch.setattr(recipes.recipes, "load", lambda _: large)
    run = recipes.ftlib_run("phase1", smallest_plan(), shapes, 3)
    assert (run.augment.size, run.evaluate.size, run.seed, run.data.subset) == (32, 40, 3, 1.0)
    assert run.gates.val_top1 == 0


# --- what is shown, what is refused ---


def test_a_missed_goal_is_said(tmp_path):
    part = measure.Part(
        "T",
        "image",
        {"a": [Cost(1, 1)], "b": [Cost(1, 1)]},
        ratios({"a": [Cost(1, 1)], "b": [Cost(1, 1)]}, [Goal("a", "b", "cpu", 0.5)]),
        ["note"],
    )
    out = io.StringIO()
    show.table(part, out)
    assert (
        "MISSED" in out.getvalue() and "1.000..1.000" in out.getvalue() and "note" in out.getvalue()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "laoder"], "Did you mean loader"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--source", "/nowhere/pictures"], "no such folder"),
        (["--what", "recipes"], "needs --source"),
        (["--timm", "/nowhere/train.py"], "no such file"),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(job, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        job.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_loader_that_does_not_exist_is_refused(job):
    with pytest.raises(BenchmarkError, match="no loader's name"):
        job.main(["--what", "loader", "--only", "nobody", "--images", "4", "--max-side", "64"])
