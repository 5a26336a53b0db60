# SPDX-License-Identifier: Apache-2.0
"""What dump plans and writes, and others write like it: whole files, and how they are read."""

from pathlib import Path

import torch

from shared.contracts import hidden_states, vocab
from shared.contracts.row_files import RowFile
from shared.errors import RetryableError, UserError
from stages.dump.plan import PLAN, ShardPlan, ShardRows, read_plan
from stages.dump.plan import _digest as digest_of
from stages.dump.plan import _write_shard as write_planned
from stages.dump.shards.writer import read_sidecar
from stages.train.data.dataset import Dataset
from stages.train.objective import in_vocab
from tests.faults.fuzz.reader import AUX, LAYERS, SIZE, VOCAB, Reader, written

PLANNED = ShardRows(["a", "b"], [[1, 2], [3, 4, 5]], [[0, 1], [0, 1, 1]])


def _make_planned(folder: Path) -> Path:
    return write_planned(folder, 0, 0, 5, PLANNED).path


def _read_planned(path: Path) -> None:
    ShardPlan(0, 0, 2, 5, digest_of(PLANNED), path).read()


def _states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _make_shard(folder: Path) -> Path:
    path = folder / hidden_states.shard_name(0)
    hidden_states.write_shard(
        path,
        input_ids=PLANNED.input_ids,
        loss_masks=PLANNED.loss_masks,
        states=_states(5, 4, SIZE),
        sample_ids=PLANNED.sample_ids,
    )
    return path


def _read_shard(path: Path) -> None:
    shard = hidden_states.read_shard(path, num_states=4, hidden_size=SIZE)
    for index, name in enumerate(shard.sample_ids):
        assert name.isprintable() or name
        rows = shard.rows(index)
        _ = shard.input_ids[rows].long(), shard.loss_mask[rows].bool(), shard.states(rows).float()


def _make_row(folder: Path) -> Path:
    row = {
        "input_ids": torch.arange(3),
        "loss_mask": torch.ones(3, dtype=torch.int64),
        "hidden_states": [_states(3, SIZE) for _ in range(4)],
    }
    torch.save(row, folder / "data_0.pt")
    return folder / "data_0.pt"


def _make_foreign_row(folder: Path) -> Path:
    row = {
        "input_ids": torch.arange(3),
        "loss_mask": torch.ones(3, dtype=torch.bool),
        "hidden_states": _states(3, SIZE),
        "aux_hidden_states": _states(3, 3 * SIZE),
    }
    torch.save(row, folder / "modelopt.pt")
    return folder / "modelopt.pt"


def _read_row(path: Path) -> None:
    row = RowFile(path, 4, SIZE)
    _ = row.input_ids.tolist(), row.loss_mask.tolist(), row.states(row.rows(0)).float()


def _make_freq(folder: Path) -> Path:
    torch.save(torch.arange(VOCAB), folder / hidden_states.TOKEN_FREQ)
    return folder / hidden_states.TOKEN_FREQ


def _read_freq(path: Path) -> None:
    vocab.from_counts(hidden_states.read_token_freq(path.parent, VOCAB), 4)


def _make_flags(folder: Path) -> Path:
    torch.save({"vocabulary": "k", "shares": torch.ones(3).half()}, folder / "00000.pt")
    _make_row(folder)
    return folder / "00000.pt"


def _read_flags(path: Path) -> None:
    in_vocab._read(path, "k", RowFile(path.with_name("data_0.pt"), 4, SIZE))


def _make_plan(folder: Path) -> Path:
    shard = {"index": 0, "first": 0, "samples": 2, "tokens": 5, "digest": "d"}
    counts = {"in": 2, "ok": 2, "skipped": {}, "failed": {"x": 0}}
    plan = {"fingerprint": "f", "backend": "hf", "counts": counts, "shards": [shard]}
    return written(folder / PLAN, plan)


def _read_plan(path: Path) -> None:
    plan = read_plan(path.parent, "f")
    if plan is not None:
        _ = plan.tokens, plan.samples, [shard.path for shard in plan.shards]


def _make_sidecar(folder: Path) -> Path:
    (folder / "shard_00000.pt").write_bytes(b"1234")
    facts = {
        "rows": "d",
        "tokens": 5,
        "hits": 1,
        "positions": 2,
        "logprob_gap": 0.1,
        "failed": [{"row": "a", "failed": "states_zero", "detail": ""}],
        "files": {"shard_00000.pt": {"bytes": 4, "sha256": "x"}},
    }
    return written(folder / "shard_00000.json", facts)


def _read_sidecar(path: Path) -> None:
    facts = read_sidecar(path.parent, ShardPlan(0, 0, 2, 5, "d", path))
    if facts is not None:
        _ = [failure["row"] for failure in facts["failed"]], facts["tokens"] + facts["hits"]
        _ = facts["positions"], facts["logprob_gap"]


def _make_data_config(folder: Path) -> Path:
    _make_shard(folder)
    layers = {"layer_ids": [*AUX, LAYERS], "aux_layer_ids": list(AUX)}
    model = {"hidden_size": SIZE, "vocab_size": VOCAB}
    return written(folder / "data_config.json", {"hidden_states": layers, "model": model})


def _read_data_config(path: Path) -> None:
    data_config = hidden_states.read_data_config(path.parent)
    names = ["shard_00000.pt"]
    Dataset(path.parent, data_config, names, holdout_fraction=0.5, max_holdout_samples=1)


STATES: dict[str, Reader] = {
    # Removed rows are planned again by the next run.
    "planned rows": Reader(_make_planned, _read_planned, refusals=(UserError, RetryableError)),
    "shard": Reader(_make_shard, _read_shard, "tensors"),
    "row": Reader(_make_row, _read_row, "tensors"),
    "modelopt row": Reader(_make_foreign_row, _read_row, "tensors"),
    "token counts": Reader(_make_freq, _read_freq),
    "in_vocab flags": Reader(_make_flags, _read_flags, "tensors"),
    "plan": Reader(_make_plan, _read_plan, "json"),
    "sidecar": Reader(_make_sidecar, _read_sidecar, "json"),
    "data_config": Reader(_make_data_config, _read_data_config, "json"),
}
