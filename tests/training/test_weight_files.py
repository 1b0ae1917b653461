"""Files of weights: every form that people have, and files that would run code."""

import hashlib
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from ftlib.training import weight_files
from ftlib.training.weight_files import WeightFileError


@pytest.fixture
def state():
    torch.manual_seed(0)
    return OrderedDict({"conv.weight": torch.randn(4, 3, 1, 1), "fc.bias": torch.randn(5)})


def equal(found, state):
    assert set(found) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in found.items())
    return True


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".ckpt"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_of_every_name_and_age(tmp_path, state, suffix, legacy):
    path = tmp_path / f"w{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    found = weight_files.read(str(path))
    assert equal(found.state, state)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and not found.notes


def test_safetensors(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    assert equal(weight_files.read(str(tmp_path / "w.safetensors")).state, state)


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


FORMS = {
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "best_acc1": 0.5},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "averaged first": lambda s: {"model": prefixed("x.", s), "model_ema": s},
    "timm's averaged": lambda s: {"state_dict": prefixed("x.", s), "state_dict_ema": s},
    "DataParallel": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "both": lambda s: {"state_dict": prefixed("module._orig_mod.", s)},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)},
    "Lightning": lambda s: {
        "pytorch-lightning_version": "2.5",
        "state_dict": {**prefixed("model.", s), "loss.weight": torch.ones(3)},
    },
    "nested": lambda s: {"state_dict": {"model": s}},
    "more than tensors": lambda s: {**s, "epoch": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_unwrapped(tmp_path, state, form):
    torch.save(FORMS[form](state), tmp_path / "w.pth")
    found = weight_files.read(str(tmp_path / "w.pth"))
    assert equal(found.state, state)
    assert bool(found.notes) == (form != "more than tensors")


def test_tensors_that_share_memory_come_apart(tmp_path):
    both = torch.arange(6.0)
    torch.save({"a": both[:3], "b": both[3:], "c": both.reshape(2, 3).T}, tmp_path / "w.pth")
    found = weight_files.read(str(tmp_path / "w.pth")).state
    save_file(found, tmp_path / "copy.safetensors")
    assert found["a"].untyped_storage().nbytes() == 12


class Payload:
    """Runs a command when it is unpickled the plain way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["alone", "beside the weights", "plain pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, state, where):
    ran = tmp_path / "ran"
    path = tmp_path / "w.pth"
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(Payload(ran)))
    else:
        torch.save(
            {"state_dict": state, "x": Payload(ran)} if "beside" in where else Payload(ran), path
        )
    with pytest.raises(WeightFileError, match=r"w\.pth: it (holds more than|cannot be read)"):
        weight_files.read(str(path))
    assert not ran.exists()


def test_a_pickled_model_is_refused_with_how_to_convert_it(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightFileError, match=r"weights_only=False.*save_file"):
        weight_files.read(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "there is no file"),
        (b"", "cannot be read|holds more"),
        (b"not a pickle at all", "cannot be read|holds more"),
        (b"PK\x03\x04broken", "cannot be read"),
    ],
)
def test_files_that_are_not_weights(tmp_path, content, words):
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightFileError, match=words):
        weight_files.read(str(path))


@pytest.mark.parametrize("tree", [{"epoch": 3}, [1, 2], {"state_dict": {}}, "text"])
def test_files_without_tensors(tmp_path, tree):
    torch.save(tree, tmp_path / "w.pth")
    with pytest.raises(WeightFileError, match="holds no tensors by name"):
        weight_files.read(str(tmp_path / "w.pth"))


def test_a_hash_in_the_name_is_checked(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    good = tmp_path / f"net-{digest[:8]}.pth"
    good.write_bytes(data)
    if not digest[:8].isdigit():
        assert equal(weight_files.read(str(good)).state, state)
        wrong = tmp_path / "net-0aa007d2.pth"
        wrong.write_bytes(data)
        with pytest.raises(WeightFileError, match=f"begins with {digest[:8]}, .* says 0aa007d2"):
            weight_files.read(str(wrong))
    dated = tmp_path / "net-20261126.pth"
    dated.write_bytes(data)
    assert equal(weight_files.read(str(dated)).state, state)
