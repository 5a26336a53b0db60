# SPDX-License-Identifier: Apache-2.0
"""What the tests of warm starts share: the start itself, and changed copies of heads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.export import warm_start
from stages.train.model import DraftHead

AUX, DEFAULT = (1, 3, 5), (2, 4, 5)
Config = dict[str, Any]


def start(place: Path, name: str, *, default: tuple[int, ...] = DEFAULT, **flags: str) -> DraftHead:
    settings = {"target": "tiny", "workspace": str(place), "draft_vocab_size": "128", **flags}
    config = build(TrainConfig, {**settings, "init_from": name})
    assert warm_start.fingerprint(config)["init_from"]
    lm_head = torch.arange(512 * 128).reshape(512, 128).float()
    return warm_start.load(config, torch.zeros(512, 128), lm_head, AUX, default)


def changed(
    place: Path,
    folder: Path,
    change: Callable[[Config], None],
    *,
    source: str = "ours",
    **more: Any,
) -> str:
    """A copy of a head with another config and further tensors; None leaves one out."""
    config = json.loads((place / source / "config.json").read_text())
    weights = {**load_file(place / source / "model.safetensors"), **more}
    change(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def same(left: DraftHead, right: DraftHead) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in left.state_dict().items())
