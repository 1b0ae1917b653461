"""What all tests share: a home of their own, one thread per process, the user's files untouched."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["MLFLOW_TRACKING_URI"] = ""
os.environ.pop("RAY_ADDRESS", None)
# Jobs and workers that tests start import the ftlib under test, wherever another one is installed.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_paths = dict.fromkeys([_checkout, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))])
os.environ["PYTHONPATH"] = ":".join(_paths)

import pytest
from hypothesis import settings

# A busy machine is not a bug: no test of ours asserts a time.
settings.register_profile("ftlib", deadline=None)
settings.load_profile("ftlib")


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """FTLIB_HOME below pytest's temporary folder, and no MLflow store but the one in it.

    mlflow.set_tracking_uri sets the variable of the whole process, so it is put back too.
    """
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FTLIB_HOME", str(path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return path


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A prepared data set of three drawn classes."""
    from tests.deploy import made

    return made.dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def shapes_run(shapes, tmp_path_factory):
    """The folder of a run on it, with a model that is right more often than not."""
    from tests.deploy import made

    return made.run_folder(tmp_path_factory.mktemp("home"), shapes)


@pytest.fixture(scope="session")
def lite0_cache(tmp_path_factory):
    """A cache of the Hugging Face Hub that holds EfficientNet-Lite0 with its ImageNet weights."""
    from tests import weights

    cache = tmp_path_factory.mktemp("hub")
    config = {
        "architecture": "tf_efficientnet_lite0",
        "num_classes": 1000,
        "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "input_size": [3, 224, 224],
        },
    }
    weights.hub_cache(cache, weights.LITE0_REPO, weights.lite0_state(), config)
    return cache


@pytest.fixture
def offline_hub(lite0_cache, tmp_path, monkeypatch):
    """No network: what is in `lite0_cache` is there, and nothing else."""
    monkeypatch.setenv("HF_HUB_CACHE", str(lite0_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    return lite0_cache
