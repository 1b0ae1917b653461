"""A decoder that crashes or hangs costs one file: a fake simplejpeg does both."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from ftlib.preparation import sandbox
from ftlib.preparation.options import ImageRejectedError, PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox

MEAN = """
import os, sys, time
_here = os.path.dirname(os.path.abspath(__file__))
sys.path = [p for p in sys.path if os.path.abspath(p or ".") != _here]
del sys.modules["simplejpeg"]
import simplejpeg as _real
sys.modules["simplejpeg"] = _real
_decode = _real.decode_jpeg
def decode_jpeg(data, *args, **kwargs):
    if b"CRASH" in data:
        os.kill(os.getpid(), 11)
    if b"EXIT" in data:
        os._exit(3)
    if b"HANG" in data:
        time.sleep(60)
    if b"BUG" in data:
        raise RuntimeError("a bug")
    return _decode(data, *args, **kwargs)
_real.decode_jpeg = decode_jpeg
"""


@pytest.fixture
def mean_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes get a simplejpeg that crashes on pictures with CRASH in them, and so on."""
    folder = tmp_path / "mean"
    folder.mkdir()
    (folder / "simplejpeg.py").write_text(MEAN)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def picture(path: Path, comment: bytes = b"") -> str:
    data = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), colorspace="RGB")
    path.write_bytes(data + comment)
    return str(path)


def test_crashes_and_hangs_cost_one_file(mean_decoder: None, tmp_path: Path) -> None:
    examiner = DecoderSandbox(PrepareOptions(), seconds_per_file=3)
    try:
        good = picture(tmp_path / "good.jpg")
        for comment, reason, detail in (
            (b"CRASH", "decoder_crashed", "SIGSEGV"),
            (b"EXIT", "decoder_crashed", "exit status 3"),
            (b"HANG", "decoder_hung", "over 3 seconds"),
            (b"BUG", "decoder_failed", "RuntimeError: a bug"),
        ):
            with pytest.raises(ImageRejectedError, match=detail) as caught:
                examiner.examine(picture(tmp_path / "bad.jpg", comment))
            assert caught.value.reason == reason
            assert examiner.examine(good).jpeg == Path(good).read_bytes()
    finally:
        examiner.close()


def test_storage_errors_are_not_the_pictures_fault(tmp_path: Path) -> None:
    examiner = DecoderSandbox(PrepareOptions())
    try:
        with pytest.raises(FileNotFoundError):
            examiner.examine(str(tmp_path / "gone.jpg"))
        with pytest.raises(IsADirectoryError):
            examiner.examine(str(tmp_path))
        with open(tmp_path / "huge.jpg", "wb") as f:
            f.truncate((1 << 30) + 1)
        with pytest.raises(ImageRejectedError, match=r"1,073,741,825 bytes"):
            examiner.examine(str(tmp_path / "huge.jpg"))
    finally:
        examiner.close()


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    examiner = DecoderSandbox(PrepareOptions())
    examiner.examine(picture(tmp_path / "a.jpg"))
    assert examiner._child is not None and examiner._pipe is not None
    examiner._pipe.close()  # what the kernel does for a killed parent
    assert examiner._child.wait(timeout=60) == 0
    examiner.close()


@pytest.mark.timeout(300)  # its end alone ends the wait, which is never over by itself
def test_a_child_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS_TO_START", None)
    (tmp_path / "simplejpeg.py").write_text("raise ImportError('no libjpeg here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path)]))
    with pytest.raises(RuntimeError, match=r"no libjpeg here"):
        DecoderSandbox(PrepareOptions()).examine("x")
