"""What may be installed: pinned, hashed, and nothing under a licence that would bind users."""

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pins(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line.rstrip("\\").strip() for line in lines if re.match(r"[a-zA-Z0-9]", line)]


def test_every_requirement_names_one_version():
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in pins(file):
            assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", line), f"{file}: {line}"


def test_the_lock_agrees_with_the_requirements_and_hashes_everything():
    text = (ROOT / "requirements.lock").read_text()
    locked = {
        m[1].lower().replace("_", "-"): m[2]
        for m in re.finditer(r"^([\w.-]+)==([\w.+]+)", text, re.M)
    }
    for line in pins("requirements.txt"):
        name, version = re.sub(r"\[.*\]", "", line).split("==")
        assert locked[name.lower().replace("_", "-")] == version, (
            f"requirements.lock has another {name}: run `make lock`"
        )
    for entry in re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]:
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert "://" not in text, "the lock names a host"


def test_nothing_installed_here_is_agpl_and_the_known_floors_hold():
    for d in importlib.metadata.distributions():
        licence = " ".join(
            filter(
                None,
                [
                    d.metadata.get("License-Expression"),
                    d.metadata.get("License") if len(d.metadata.get("License") or "") < 100 else "",
                    *[c for c in d.metadata.get_all("Classifier") or [] if c.startswith("License")],
                ],
            )
        )
        assert not re.search(r"AGPL|Affero", licence), f"{d.name}: {licence}"
    names = {(d.name or "").lower() for d in importlib.metadata.distributions()}
    assert "albumentationsx" not in names

    def version(name):
        return tuple(int(x) for x in re.findall(r"\d+", importlib.metadata.version(name))[:3])

    assert (
        version("torch") >= (2, 10)
        and version("mlflow") >= (3, 17, 2)
        and version("ray") >= (2, 52)
        and version("opencv-python-headless") >= (4, 12)
    )
    assert version("albumentations") == (2, 0, 8)
