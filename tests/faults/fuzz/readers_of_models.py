# SPDX-License-Identifier: Apache-2.0
"""Targets, draft heads and what training keeps of them: whole files, and how they are read."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from shared.contracts import vocab
from shared.contracts.exported_head import check_export, config_json
from shared.contracts.head_config import HeadConfig
from shared.errors import OutputError, UserError
from shared.io.safetensors_files import read_header
from shared.target import model as target
from shared.target.tensors import read_tensors
from stages.bench import head_check as head
from stages.train.config import TrainConfig
from stages.train.export import warm_start
from stages.train.loop import checkpoint
from tests.faults.fuzz.reader import AUX, CONFIG, SIZE, VOCAB, Reader, written
from tests.heads import write_random_head

BOTH = (UserError, OutputError)


def _make_target(folder: Path) -> Path:
    written(folder / "config.json", CONFIG)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, SIZE, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(SIZE).bfloat16(),
        "lm_head.weight": torch.randn(VOCAB, SIZE, generator=generator).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def _make_index(folder: Path) -> Path:
    names = read_header(_make_target(folder))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    return written(folder / "model.safetensors.index.json", index)


def _read_config(path: Path) -> None:
    config = target.read_config(path.parent)
    raw = HeadConfig.from_json(config.settings, aux_layers=AUX, draft_vocab_size=4)
    _ = raw.num_parameters


def _read_tensors(path: Path) -> None:
    target.weights_hash(path.parent)
    tensors = read_tensors(target.read_config(path.parent))
    tensors.lm_head.float().sum()


def _make_checkpoint(folder: Path) -> Path:
    state = {
        "step": 3,
        "weights": {"fc.weight": torch.ones(2, 2)},
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {"last_epoch": 3},
        "rng": torch.get_rng_state()[:64].clone(),
        "best": [3, 2.0],
        "sums": None,
    }
    torch.save(state, folder / "step_00000003.pt")
    return folder / "step_00000003.pt"


def _make_d2t(folder: Path) -> Path:
    vocab.write(folder, vocab.from_counts(torch.arange(VOCAB), 4))
    return folder / vocab.D2T


def _make_t2d(folder: Path) -> Path:
    return _make_d2t(folder).with_name(vocab.T2D)


def _make_bin(folder: Path) -> Path:
    _make_target(folder)
    head_folder = write_random_head(folder / "head", target=folder, draft_vocab_size=4)
    from safetensors.torch import load_file

    weights = load_file(head_folder / "model.safetensors")
    (head_folder / "model.safetensors").unlink()
    torch.save(weights, head_folder / "pytorch_model.bin")
    return head_folder / "pytorch_model.bin"


def _make_head(folder: Path) -> Path:
    _make_target(folder)
    return write_random_head(folder / "head", target=folder, draft_vocab_size=4)


def _make_head_config(folder: Path) -> Path:
    return _make_head(folder) / "config.json"


def _make_export(folder: Path) -> Path:
    path = _make_head_config(folder)
    shape = HeadConfig.from_json(CONFIG, aux_layers=AUX, draft_vocab_size=4)
    return written(path, config_json(shape, dtype="float32"))


def _make_head_weights(folder: Path) -> Path:
    return _make_head(folder) / "model.safetensors"


def _check_head(path: Path) -> None:
    head.check(path.parent, target.read_config(path.parents[1]))


def _load_head(path: Path) -> None:
    run = {"target": "t", "draft_vocab_size": 4}
    config = TrainConfig.model_validate({"run": run, "init_from": str(path.parent)})
    rows = torch.zeros(VOCAB, SIZE)
    warm_start.load(config, rows, rows, AUX, AUX)


def _check_export(path: Path) -> None:
    check_export(path.parent)


MODELS: dict[str, Reader] = {
    "target config": Reader(
        lambda f: _make_target(f).with_name("config.json"), _read_config, "json"
    ),
    "safetensors header": Reader(_make_target, read_header),
    "target tensors": Reader(_make_target, _read_tensors),
    "weights index": Reader(_make_index, _read_tensors, "json"),
    "checkpoint": Reader(_make_checkpoint, checkpoint.load, "tensors"),
    "d2t": Reader(_make_d2t, lambda path: vocab.read(path.parent)),
    "t2d": Reader(_make_t2d, lambda path: vocab.read(path.parent)),
    "head config": Reader(_make_head_config, _check_head, "json"),
    "head weights": Reader(_make_head_weights, _check_head),
    "head bin": Reader(_make_bin, _check_head, "tensors"),
    "warm start config": Reader(_make_head_config, _load_head, "json"),
    "warm start weights": Reader(_make_head_weights, _load_head),
    "export config": Reader(_make_export, _check_export, "json", BOTH),
    "export weights": Reader(
        lambda folder: _make_export(folder).with_name("model.safetensors"),
        _check_export,
        refusals=BOTH,
    ),
}
