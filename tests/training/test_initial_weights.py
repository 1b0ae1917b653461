"""Where first weights come from: found by themselves, checked, loaded, or refused with the
remedy."""

import json

import pytest
import timm
import torch
from safetensors.torch import save, save_file

from ftlib import storage
from ftlib.config import Model, Run
from ftlib.report import evaluation
from ftlib.settings import ConfigError, override, to_dict
from ftlib.training import initial_weights, models
from ftlib.tune import stored_predictions
from tests import weights

CLASSES = ("cat", "dog", "owl")
SMALL = {"model.arch": "shufflenet_v2_x0_5", "augment.size": 32}


def recipe(**changes):
    return override(Run(), {**SMALL, **changes})


def finished(
    root,
    name,
    stage="phase1",
    digest="d1",
    top1=50.0,
    classes=CLASSES,
    status="completed",
    seed=0,
    **more,
):
    """A finished run's folder with random weights; the weights."""
    torch.manual_seed(seed)
    run = recipe(stage=stage)
    state = models.build(run.model, len(classes)).state_dict()
    about = {
        "arch": run.model.arch,
        "classes": list(classes),
        "run": name,
        "stage": stage,
        "scores": {"val/top1": top1},
        "step": 3,
        **more,
    }
    storage.write_folder(
        str(root / name / "best" / "step-00000003"),
        {"model.safetensors": save(state), "model.json": json.dumps(about).encode()},
        {},
    )
    (root / name / "run.json").write_text(
        json.dumps({"run": to_dict(run), "data": {"name": "pets", "digest": digest}})
    )
    (root / name / "result.json").write_text(
        json.dumps({"status": status, "metrics": {"best/val_top1": top1}})
    )
    return state


def find(root, init_from, digest="d1", classes=CLASSES, **changes):
    return initial_weights.resolve_init(
        recipe(**{"model.init_from": init_from, **changes}), "pets", digest, classes, str(root)
    )


def test_scratch_needs_no_source(tmp_path):
    assert find(tmp_path, "scratch") is None


def test_the_best_finished_run_of_the_stage_on_the_same_data_is_found(tmp_path):
    finished(tmp_path, "a", top1=60)
    state = finished(tmp_path, "b", top1=70, seed=1)
    finished(tmp_path, "other-data", top1=99, digest="d2")
    finished(tmp_path, "other-stage", top1=99, stage="phase2")
    finished(tmp_path, "unfinished", top1=99, status="running")
    source = find(tmp_path, "phase1")
    assert source.run_name == "b" and source.top1 == 70
    model = initial_weights.start(recipe(**{"model.init_from": "phase1"}), CLASSES, source)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_no_earlier_phase_says_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        ConfigError, match=r"one with: \S*python \S*jobs/phase1.py --data.path pets"
    ):
        find(tmp_path, "phase1")
    finished(tmp_path, "x", digest="d2")
    with pytest.raises(ConfigError, match=r"other data: x \(on pets\)"):
        find(tmp_path, "phase1")


@pytest.mark.parametrize(
    "wanted, words",
    [
        ("run:none", "holds no best model"),
        ("file:/none", "never finished"),
        ("file:/none.safetensors", "there is no file"),
        ("ftp://x", "use scratch, pretrained"),
        ("pretraind", r"Did you mean pretrained\?"),
        ("file:~/none.pth", "there is no file /"),
        ("file:/none.txt", r"file that ends in .safetensors, .pth"),
        ("mlflow:abc", "no tracking server"),
    ],
)
def test_sources_that_are_not_there(tmp_path, wanted, words):
    with pytest.raises(ConfigError, match=words):
        find(tmp_path, wanted)


def test_other_classes_are_refused_unless_a_new_head_is_asked_for(tmp_path):
    state = finished(tmp_path, "a")
    for classes in (("cat", "owl", "dog"), ("cat", "dog")):
        with pytest.raises(ConfigError, match="reset-head"):
            find(tmp_path, "run:a", classes=classes)
    run = recipe(**{"model.init_from": "run:a", "model.reset_head": True})
    source = initial_weights.resolve_init(run, "pets", "d9", ("x", "y"), str(tmp_path))
    model = initial_weights.start(run, ("x", "y"), source)
    head = models.head_name(model)
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(value, state[key])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def test_another_architecture_is_refused(tmp_path):
    finished(tmp_path, "a")
    with pytest.raises(ConfigError, match="shufflenet_v2_x0_5"):
        find(tmp_path, "run:a", **{"model.arch": "resnet18"})


def test_damaged_weights_are_never_used(tmp_path):
    finished(tmp_path, "a")
    path = tmp_path / "a" / "best" / "step-00000003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="sha256"):
        find(tmp_path, "phase1")


def test_a_finished_model_comes_back_whole(tmp_path):
    state = finished(tmp_path, "a")
    loaded = initial_weights.load_run_model(str(tmp_path / "a"))
    assert loaded.classes == CLASSES and not loaded.model.training and loaded.about["run"] == "a"
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in state.items())
    with pytest.raises(ValueError, match="not a run"):
        initial_weights.load_run_model(str(tmp_path / "nothing"))


# --- published weights ----------------------------------------------------------------------------


def lite0(**changes):
    return override(
        Run(),
        {
            "model.arch": weights.LITE0,
            "model.init_from": "pretrained",
            "augment.size": 64,
            **changes,
        },
    )


def resolve(run, classes=CLASSES, root="/nowhere"):
    return initial_weights.resolve_init(run, "pets", "d", classes, str(root))


@pytest.mark.parametrize("wanted", ["pretrained", "imagenet", f"hf-hub:{weights.LITE0_REPO}"])
def test_published_weights_come_from_the_hubs_cache_without_a_network(
    offline_hub, wanted, tmp_path
):
    run = lite0(**{"model.init_from": wanted})
    source = resolve(run)
    assert source.kind == "pretrained" and source.classes == 1000 and source.new_head
    assert "the classifier starts anew" in " ".join(source.notes)
    copy = initial_weights.materialize(source, str(tmp_path / "run"))
    assert copy.uri == str(tmp_path / "run" / "init") and copy.sha256 == source.sha256
    model = initial_weights.start(run, CLASSES, copy)
    state = weights.lite0_state()
    for key, value in model.state_dict().items():
        if key in state and not key.startswith("classifier."):
            assert torch.equal(value, state[key]), key
    # A new classifier on pretrained weights starts without an opinion.
    assert torch.equal(model(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))


def test_the_logits_are_those_of_timm_with_the_same_weights(offline_hub):
    classes = tuple(str(i) for i in range(1000))
    run = lite0()
    source = resolve(run, classes)
    assert not source.new_head
    ours = initial_weights.start(run, classes, source).eval()
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(weights.lite0_state(), strict=False)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_mean_std_and_crop_come_with_the_weights_unless_they_are_set(offline_hub):
    run = lite0()
    source = resolve(run)
    found = initial_weights.with_preprocessing(run, source)
    assert found.data.mean == (0.5, 0.5, 0.5) and found.data.std == (0.5, 0.5, 0.5)
    assert (found.evaluate.crop, found.evaluate.interpolation) == (0.875, "bicubic")
    assert initial_weights.with_preprocessing(found, source) == found
    given = lite0(**{"data.mean": [0.4, 0.4, 0.4], "evaluate.crop": 0.9})
    kept = initial_weights.with_preprocessing(given, source)
    assert (kept.data, kept.evaluate.crop) == (given.data, 0.9)
    kept = lite0(**{"model.preprocessing": "settings"})
    assert initial_weights.with_preprocessing(kept, source) == kept
    assert initial_weights.with_preprocessing(run, None) == run


def test_a_model_of_a_run_hands_on_its_mean_and_standard_deviation(tmp_path):
    finished(tmp_path, "a", mean=[0.1, 0.2, 0.3], std=[1, 1, 1], crop=1.0)
    run = recipe(**{"model.init_from": "run:a"})
    found = initial_weights.with_preprocessing(run, find(tmp_path, "run:a"))
    assert found.data.mean == (0.1, 0.2, 0.3) and found.evaluate.crop == run.evaluate.crop


def test_the_copy_is_made_once_and_read_like_what_it_copies(offline_hub, tmp_path):
    run = lite0()
    source = resolve(run)
    run_dir = str(tmp_path / "run")
    copy = initial_weights.materialize(source, run_dir)
    manifest = tmp_path / "run" / "init" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert initial_weights.materialize(source, run_dir) == copy
    assert initial_weights.materialize(copy, run_dir) == copy
    assert manifest.stat().st_mtime_ns == before
    again = resolve(lite0(**{"model.init_from": f"file:{copy.uri}"}))
    assert (again.sha256, again.kind, again.new_head) == (source.sha256, "pretrained", True)
    assert initial_weights.InitialWeights.from_dict(json.loads(json.dumps(copy.to_dict()))) == copy


def test_a_tag_names_weights_and_not_another_architecture(offline_hub, tmp_path):
    tagged = f"{weights.LITE0}.in1k"
    assert resolve(lite0(**{"model.arch": tagged})).sha256 == resolve(lite0()).sha256
    finished(tmp_path, "a", arch=tagged)
    with pytest.raises(ConfigError, match="do not fit"):  # not: of another architecture
        initial_weights.start(
            lite0(**{"model.init_from": "run:a"}),
            CLASSES,
            resolve(lite0(**{"model.init_from": "run:a"}), root=tmp_path),
        )


def test_the_hub_config_says_which_architecture_its_weights_are_of(offline_hub):
    run = lite0(**{"model.arch": "resnet18", "model.init_from": f"hf-hub:{weights.LITE0_REPO}"})
    with pytest.raises(ConfigError, match="Set model.arch to timm/tf_efficientnet_lite0"):
        resolve(run)


@pytest.mark.parametrize(
    "arch, wanted, words",
    [
        ("timm/resnet10t", "pretrained", r"timm/resnet10t.c3_in1k.*`hf download timm/resnet10t"),
        ("resnet18", "pretrained", r"resnet18-f37072fd.pth.*put it at .*torch-home.*checkpoints"),
        ("timm/resnet10t", "hf-hub:acme/net@v2", r"acme/net@v2 is not in .*--revision v2"),
        ("timm/resnet10t", "hf-hub:a/b/c", "not a name of a repository"),
    ],
)
def test_without_a_network_the_message_says_which_file_to_put_where(
    offline_hub, arch, wanted, words
):
    with pytest.raises(ConfigError, match=f"model.init_from = {wanted}: .*{words}"):
        resolve(lite0(**{"model.arch": arch, "model.init_from": wanted}))


# --- bare files -----------------------------------------------------------------------------------


def test_a_bare_file_of_other_classes_starts_a_new_classifier_and_says_so(tmp_path):
    run = recipe(**{"model.init_from": f"file:{tmp_path}/w.safetensors"})
    torch.manual_seed(5)
    state = models.build(run.model, 5).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    source = resolve(run)
    assert source.new_head and source.classes == 5
    assert any("for 5 classes, the data set has 3" in note for note in source.notes)
    model = initial_weights.start(run, CLASSES, source)
    head = models.head_name(model)
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(value, state[key])
    same = resolve(run, tuple("abcde"))
    assert not same.new_head
    kept = initial_weights.start(run, tuple("abcde"), same)
    assert torch.equal(kept.state_dict()[f"{head}.weight"], state[f"{head}.weight"])
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="changed since"):
        initial_weights.start(run, CLASSES, source)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        resolve(run)


def test_weights_of_another_architecture_do_not_fit(tmp_path):
    run = recipe(**{"model.init_from": f"file:{tmp_path}/w.safetensors"})
    save_file(models.build(Model(arch="resnet18"), 3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="do not fit a shufflenet_v2_x0_5 with 3 classes"):
        resolve(run)


@pytest.mark.parametrize("arch", [weights.LITE0, "shufflenet_v2_x0_5"])
def test_a_file_with_other_names_says_how_many_fit_which_do_not_and_what_to_do(tmp_path, arch):
    """timm's own message lists every name; cut off, it ends within one."""
    run = recipe(**{"model.arch": arch, "model.init_from": f"file:{tmp_path}/w.safetensors"})
    own = models.build(run.model, 3).state_dict()
    _, second, third, *_ = names = [k for k in own if not k.endswith(models.COUNTER)]
    save_file(
        {f"net.{k}" if k in (second, third) else k: own[k] for k in names},
        tmp_path / "w.safetensors",
    )
    wrong = sorted([f"net.{second}", f"net.{third}"])
    with pytest.raises(ConfigError) as refused:
        resolve(run)
    assert str(refused.value).endswith(
        f"with 3 classes: {len(names) - 2} of its {len(names)} tensors fit by name and shape; 2 do "
        f"not, such as {wrong[0]}, {wrong[1]}; the model lacks 2, such as {second}, {third}. Set "
        "model.arch to the architecture that they were trained as, or rename the file's keys to "
        "the model's"
    )


@pytest.mark.parametrize(
    "arch, theirs, hint",
    [
        ("efficientnet_b0", "timm/tf_efficientnet_lite0", "Its keys are timm's: set model.arch to"),
        ("timm/efficientnet_b0", "efficientnet_b0", "Its keys are torchvision's: set model.arch"),
    ],
)
def test_the_other_librarys_keys_are_told(tmp_path, arch, theirs, hint):
    save_file(models.build(Model(arch=theirs), 3).state_dict(), tmp_path / "w.safetensors")
    run = recipe(**{"model.arch": arch, "model.init_from": f"file:{tmp_path}/w.safetensors"})
    with pytest.raises(ConfigError, match=hint):
        resolve(run)


def test_a_hand_made_timm_checkpoint_starts_a_run(tmp_path):
    """As timm's train.py writes it, DataParallel's prefix and all."""
    state = weights.lite0_state()
    wrapped = {f"module.{k}": v for k, v in state.items()}
    torch.save(
        {"epoch": 3, "arch": "tf_efficientnet_lite0", "state_dict": wrapped},
        tmp_path / "best.pth.tar",
    )
    run = lite0(**{"model.init_from": f"file:{tmp_path}/best.pth.tar"})
    source = resolve(run)
    assert source.classes == 1000 and source.new_head
    assert initial_weights.with_preprocessing(run, source).data.mean == (0.5, 0.5, 0.5)
    model = initial_weights.start(run, CLASSES, source)
    assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"best/epoch": 4.0}, "best/epoch is 4 there and 3 here"),
        ({"best/val_top1": 60.0}, "best/val_top1 is 60 there and 50 here"),
    ],
)
def test_scores_of_another_model_are_noticed_by_all_that_is_made_of_a_run(tmp_path, changed, words):
    """result.json was copied from elsewhere, or best/ was. Report, package and the predictions that
    a promotion judges by are made of neither."""
    finished(tmp_path, "a", epoch=3)
    folder = tmp_path / "a"
    metrics = {"best/epoch": 3.0, "best/val_top1": 50.0, "final/train_top1": 70.0}
    write = (folder / "result.json").write_text
    write(json.dumps({"status": "completed", "metrics": metrics}))
    assert evaluation.load(str(folder)).about["epoch"] == 3
    write(json.dumps({"status": "completed", "metrics": metrics | changed}))
    for read in (
        evaluation.load,  # the report, and every evaluation
        initial_weights.load_run_model,  # the package
        stored_predictions.predictions,  # promotion and comparison
    ):
        with pytest.raises(ValueError, match=f"the scores of another model.*{words}"):
            read(str(folder))
