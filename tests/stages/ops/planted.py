# SPDX-License-Identifier: Apache-2.0
"""Corruptions of a finished run, each with the question that must name it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from shared.artifacts.manifest import fingerprint
from shared.contracts import conversations
from shared.io import files


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file as somebody with an editor would."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def own(folder: Path, name: str) -> None:
    """Let the manifest (and a shard's own file) tell the new size and checksum of `name`."""
    path = folder / name
    entry = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    if path.match("shard_*.pt"):
        edit(path.with_suffix(".json"), lambda sidecar: sidecar["files"].update({name: entry}))
        own(folder, path.with_suffix(".json").name)
    edit(folder / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_rows(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the first row of synth's part, in a file that is otherwise as synth writes it."""
    name = conversations.part_name(0)
    table = pq.read_table(folder / "synth" / name)
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "synth" / name)
    own(folder / "synth", name)


def damage_shard(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "dump" / "shard_00001.pt"
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)
    own(folder / "dump", path.name)


def damage_export(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "export" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    own(folder / "export", path.name)


def damage_json(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    artifact, file = name.split("/")
    edit(folder / name, change)
    own(folder / artifact, file)


def damage_history(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = folder / "train" / "history.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    own(folder / "train", path.name)


def roll_vocabulary(folder: Path) -> None:
    path = folder / "train" / "d2t.npy"
    np.save(path, np.roll(np.load(path), 1))
    own(folder / "train", path.name)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (open, ("/tmp/eyrie-must-not-appear", "w"))


def plant_payload(folder: Path) -> None:
    path = folder / "dump" / "shard_00000.pt"
    torch.save({"input_ids": Payload()}, path)
    own(folder / "dump", path.name)


def other_parent(folder: Path) -> None:
    """Synth was run again with another seed, and nothing after it."""

    def reseed(manifest: dict[str, Any]) -> None:
        manifest["identity"]["run.seed"] = manifest["config"]["run"]["seed"] = 7
        manifest["fingerprint"] = fingerprint(manifest["identity"])

    edit(folder / "synth" / "manifest.json", reseed)
    manifest = json.loads((folder / "synth" / "manifest.json").read_text())
    (folder / "synth" / "identity.json").write_text(json.dumps(manifest["identity"]))


def raise_the_loss(records: list[dict[str, Any]]) -> None:
    losses = [record for record in records if "loss" in record]
    for step, record in enumerate(losses):
        record["loss"] = 1.0 + step


def swap_d2t(weights: dict[str, torch.Tensor]) -> None:
    """The first D ids instead of the frequent ones: consistent in itself, and another vocabulary."""
    weights["d2t"] = torch.zeros_like(weights["d2t"])
    weights["t2d"] = torch.arange(weights["t2d"].numel()) < weights["d2t"].numel()


def shift_aux_layers(config: dict[str, Any]) -> None:
    config["eagle_aux_hidden_state_layer_ids"] = [1, 3, 4]
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 2, 3]


def miss_a_gate(folder: Path) -> None:
    """As bench leaves it: a report whose gate is missed, and no manifest."""
    (folder / "bench" / "manifest.json").unlink()
    gate = {"name": "acceptance length", "value": 1.7, "bound": "least", "limit": 2.1, "met": False}
    edit(folder / "bench" / "report.json", lambda report: report.update(gates=[gate]))


def claim_more(report: dict[str, Any]) -> None:
    report["head"]["acceptance"]["acceptance_length"] = 3.9


def retrain_target(folder: Path) -> None:
    path = folder.parent / "tiny" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def drop_file(path: Path) -> None:
    path.unlink()


Plant = Callable[[Path], Any]


# What is planted -> the question that must fail, and what its answer must name.
PLANTED: dict[str, tuple[Plant, tuple[str, str], str]] = {
    "a truncated part": (
        lambda run: truncate(run / "synth/part-00000-00000.parquet"),
        ("synth", "files"),
        r"part-00000-00000\.parquet: expected \d+ bytes",
    ),
    "a bit flipped in a shard": (
        lambda run: flip(run / "dump/shard_00001.pt"),
        ("dump", "files"),
        r"shard_00001\.pt: expected the SHA-256",
    ),
    "a missing shard": (
        lambda run: drop_file(run / "dump/shard_00002.pt"),
        ("dump", "files"),
        r"shard_00002\.pt: .*found no file",
    ),
    "a part that no manifest names": (
        lambda run: shutil.copy(
            run / "synth/part-00000-00000.parquet", run / "synth/part-00000-00009.parquet"
        ),
        ("synth", "files"),
        r"part-00000-00009\.parquet is not in the manifest",
    ),
    "a manifest cut short": (
        lambda run: truncate(run / "train/manifest.json"),
        ("train", "manifest"),
        r"train/manifest\.json is not valid JSON",
    ),
    "a manifest of another version": (
        lambda run: edit(run / "dump/manifest.json", lambda m: m.update(schema_version=9)),
        ("dump", "manifest"),
        "expected schema version 1, found 9",
    ),
    "an identity changed by hand": (
        lambda run: edit(
            run / "train/manifest.json", lambda m: m["identity"].update({"train.epochs": 1})
        ),
        ("train", "manifest"),
        "fingerprint is not that of its identity",
    ),
    "a setting changed by hand": (
        lambda run: edit(run / "train/manifest.json", lambda m: m["config"].update(epochs=1)),
        ("train", "settings"),
        r"train\.epochs = 6, its config 1",
    ),
    "counts that do not add up": (
        lambda run: edit(run / "dump/manifest.json", lambda m: m["counts"].update(ok=39)),
        ("dump", "counts"),
        "in = 40 is not ok",
    ),
    "another parent": (other_parent, ("dump", "lineage"), "made from another synth"),
    "a token outside the vocabulary": (
        lambda run: damage_rows(run, lambda row: row["input_ids"].__setitem__(3, 99999)),
        ("synth", "rows"),
        "row-000 holds the token 99999",
    ),
    "a span outside its row": (
        lambda run: damage_rows(run, lambda row: row["loss_spans"][0].update(end=77)),
        ("synth", "rows"),
        r"row-000 has the loss span \[8, 77\) in 32 tokens",
    ),
    "a row that is there twice": (
        lambda run: damage_rows(run, lambda row: row.update(sample_id="row-001")),
        ("synth", "rows"),
        "some are there twice",
    ),
    "other tokens in the states": (
        lambda run: damage_shard(run, lambda shard: shard["input_ids"].__setitem__(2, 11)),
        ("dump", "rows"),
        r"sample row-\d+ has other tokens",
    ),
    "NaN in the states": (
        lambda run: damage_shard(run, lambda s: s["hidden_states"][5, 1].fill_(float("nan"))),
        ("dump", "states"),
        r"shard_00001\.pt: token 5, state 1 holds NaN",
    ),
    "states of zeros": (
        lambda run: damage_shard(run, lambda shard: shard["hidden_states"][:, 3].zero_()),
        ("dump", "states"),
        r"shard_00001\.pt: token 0, state 3 is all zeros",
    ),
    "code in a shard": (plant_payload, ("dump", "states"), r"shard_00000\.pt: expected a shard"),
    "states after the norm": (
        lambda run: damage_json(
            run,
            "dump/data_config.json",
            lambda c: c["hidden_states"].update(final_hidden="postnorm"),
        ),
        ("dump", "data_config"),
        "final_hidden = 'prenorm', found 'postnorm'",
    ),
    "states that do not agree": (
        lambda run: edit(run / "dump/manifest.json", lambda m: m["facts"].update(agreement=0.5)),
        ("dump", "capture"),
        r"50\.0% of the target's own greedy tokens",
    ),
    "a loss that is no number": (
        lambda run: damage_history(run, lambda records: records[1].update(loss=float("nan"))),
        ("train", "loss"),
        "loss at step 20 is nan",
    ),
    "a loss that rises": (
        lambda run: damage_history(run, raise_the_loss),
        ("train", "loss"),
        "the loss does not fall",
    ),
    "a vocabulary rolled by one": (
        roll_vocabulary,
        ("train", "vocabulary"),
        r"draft_id \+ d2t\[draft_id\]",
    ),
    "a checkpoint cut short": (
        lambda run: truncate((run / "train/checkpoints/best.pt").resolve()),
        ("train", "checkpoint"),
        r"best\.pt: expected a checkpoint",
    ),
    "an export without its norm": (
        lambda run: damage_export(run, lambda weights: weights.pop("norm.weight")),
        ("export", "keys and shapes"),
        r"norm\.weight: expected .* found none",
    ),
    "a null in the export's config": (
        lambda run: damage_json(
            run, "export/config.json", lambda config: config.update(use_cache=None)
        ),
        ("export", "keys and shapes"),
        "expected use_cache = 'no such key', found None",
    ),
    "other aux layers in the export": (
        lambda run: damage_json(run, "export/config.json", shift_aux_layers),
        ("export", "keys and shapes"),
        r"\(2, 4, 5\).*found \(\(1, 3, 4\)",
    ),
    "another vocabulary in the export": (
        lambda run: damage_export(run, swap_d2t),
        ("export", "weights"),
        "its d2t is not that of",
    ),
    "weights of another step": (
        lambda run: damage_export(run, lambda weights: weights["fc.weight"].mul_(2)),
        ("export", "weights"),
        r"fc\.weight is not that of checkpoints/best\.pt",
    ),
    "a gate that is missed": (
        miss_a_gate,
        ("bench", "manifest"),
        r"acceptance length is 1\.7, the gate asks for at least 2\.1",
    ),
    "a report that claims more": (
        lambda run: damage_json(run, "bench/report.json", claim_more),
        ("bench", "figures"),
        r"says acceptance length 3\.9, its counters 2\.45",
    ),
    "a report of another head": (
        lambda run: damage_json(
            run, "bench/report.json", lambda r: r["measured"].update(head_fingerprint="f" * 64)
        ),
        ("bench", "head"),
        "measured the head ffffffffffff",
    ),
    "another target": (retrain_target, ("run", "target"), "tiny changed since"),
}
