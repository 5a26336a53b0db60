# SPDX-License-Identifier: Apache-2.0
"""Hidden states that were made elsewhere become an artifact of ours: ModelOpt's keys, both norms.

The states are transformers' own forward pass, written as ModelOpt writes them: its `hidden_states`
is the last entry that the model reports, which is after the final norm.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.artifacts.manifest import MANIFEST
from shared.contracts import conversations, hidden_states
from shared.errors import UserError
from shared.settings import build
from shared.target import model as target
from shared.target.tensors import FinalNorm, read_tensors
from stages.dump.backends import files as files_backend
from stages.dump.backends.base import Row
from stages.dump.backends.choose import open_backend
from stages.dump.backends.files import is_normed
from stages.dump.config import DumpConfig
from tests.runs import make_synth, run

NUM_ROWS = 12
AUX = (2, 4, 5)


def write_theirs(workspace: Path, *, normed: bool) -> None:
    """`<workspace>/theirs/<conversation>.pt` with ModelOpt's keys."""
    model = AutoModelForCausalLM.from_pretrained(workspace / "tiny", dtype=torch.float32).eval()
    before: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    (workspace / "theirs").mkdir()
    for row in conversations.read_conversations(workspace / "run" / "synth"):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            reported = model(ids, output_hidden_states=True).hidden_states
        final = reported[-1] if normed else before[-1]
        theirs = {
            "conversation_id": row.sample_id,
            "input_ids": ids[0],
            "hidden_states": final[0].bfloat16(),
            "aux_hidden_states": torch.cat([reported[i][0] for i in AUX], dim=-1).bfloat16(),
            "loss_mask": torch.tensor(row.loss_mask()),
        }
        torch.save(theirs, workspace / "theirs" / f"{row.sample_id}.pt")


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the same rows captured by our own backend."""
    workspace = tmp_path_factory.mktemp("captured")
    make_synth(workspace, num_rows=NUM_ROWS)
    assert run(workspace, "dump", "--shard_bytes", "1000000").returncode == 0
    return workspace


@pytest.fixture
def workspace(captured: Path, tmp_path: Path) -> Path:
    """The same answers, nothing captured."""
    place = tmp_path / "workspace"
    shutil.copytree(captured, place)
    shutil.rmtree(place / "run" / "dump")
    return place


def synth(workspace: Path) -> Path:
    return workspace / "run" / "synth"


def only_shard(workspace: Path) -> hidden_states.Shard:
    path = workspace / "run" / "dump" / hidden_states.shard_name(0)
    return hidden_states.read_shard(path, num_states=len(AUX) + 1, hidden_size=128)


def manifest(workspace: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workspace / "run" / "dump" / MANIFEST).read_text())
    return found


@pytest.mark.parametrize("normed", [False, True])
def test_states_of_modelopt_become_ours(workspace: Path, captured: Path, normed: bool) -> None:
    write_theirs(workspace, normed=normed)
    done = run(workspace, "dump", "--states", "theirs", "--shard_bytes", "1000000")
    assert done.returncode == 0, done.stderr
    assert f"taken {'after' if normed else 'before'} the final norm" in done.stderr
    ours, theirs = only_shard(captured), only_shard(workspace)
    assert theirs.sample_ids == ours.sample_ids
    assert torch.equal(theirs.input_ids, ours.input_ids)
    assert torch.equal(theirs.loss_mask, ours.loss_mask)
    # Captured in bfloat16 by the one, computed in float32 by the other.
    aux = [shard.hidden_states[:, :-1].float() for shard in (ours, theirs)]
    assert (aux[0] - aux[1]).norm() / aux[0].norm() < 0.02
    config = target.read_config(workspace / "tiny")
    tensors = read_tensors(config)
    one, other = (tensors.logits(shard.hidden_states[:, -1]) for shard in (ours, theirs))
    assert (one - other).norm() / one.norm() < 0.02
    assert manifest(workspace)["facts"]["agreement"] > 0.95
    assert manifest(workspace)["facts"]["logprob_gap"] is None, "files tell no probabilities"
    assert manifest(workspace)["counts"]["ok"] == NUM_ROWS
    assert run(workspace, "train", "--epochs", "1").returncode == 0


def test_a_file_that_is_none_is_accounted_for(workspace: Path) -> None:
    write_theirs(workspace, normed=False)
    broken, short = sorted((workspace / "theirs").glob("*.pt"))[:2]
    broken.write_bytes(b"no states")
    raw = torch.load(short, weights_only=True)
    torch.save(raw | {"aux_hidden_states": raw["aux_hidden_states"][:, :-1]}, short)
    refused = run(workspace, "dump", "--states", "theirs")
    assert refused.returncode == 3
    assert "2 of 12 rows failed" in refused.stderr
    allowed = run(workspace, "dump", "--states", "theirs", "--max_failed_fraction", "0.2")
    assert allowed.returncode == 0, allowed.stderr
    assert manifest(workspace)["counts"]["failed"] == {"unreadable": 2}
    rejects = (workspace / "run" / "dump" / "rejects.jsonl").read_text()
    assert str(short) in rejects and "expected the shapes" in rejects


def spoil(path: Path, fault: str) -> None:
    """Plant a fault into a file's states."""
    raw = torch.load(path, weights_only=True)
    final, aux = raw["hidden_states"], raw["aux_hidden_states"]
    if fault == "not_finite":
        final[3, 5] = torch.nan
    elif fault == "infinite":
        aux[-1, 7] = torch.inf
    elif fault == "zero":
        aux[:, :128] = 0
    else:
        aux[:, 128:256] = aux[:1, 128:256]
    torch.save(raw, path)


@pytest.mark.parametrize("normed", [False, True])
def test_rows_with_bad_states_fail_and_the_share_decides(workspace: Path, normed: bool) -> None:
    write_theirs(workspace, normed=normed)
    paths = sorted((workspace / "theirs").glob("*.pt"))
    faults = {0: "not_finite", 4: "infinite", 5: "zero", 11: "constant"}
    for index, fault in faults.items():
        spoil(paths[index], fault)
    bad = [paths[index].stem for index in faults]
    flags = ("--states", "theirs", "--shard_bytes", "100000")
    refused = run(workspace, "dump", *flags)
    assert refused.returncode == 3
    assert "4 of 12 rows failed" in refused.stderr
    rejects = workspace / "run" / "dump" / "rejects.jsonl"
    assert [json.loads(line)["row"] for line in rejects.read_text().splitlines()] == bad
    allowed = run(workspace, "dump", *flags, "--max_failed_fraction", "0.34")
    assert allowed.returncode == 0, allowed.stderr
    assert manifest(workspace)["counts"] == {
        "in": NUM_ROWS,
        "ok": NUM_ROWS - 4,
        "skipped": {},
        "failed": {"states_constant": 1, "states_not_finite": 2, "states_zero": 1},
    }
    folder = workspace / "run" / "dump"
    kept, tokens, answers = [], 0, 0
    for path in sorted(folder.glob("shard_*.pt")):
        shard = hidden_states.read_shard(path, num_states=len(AUX) + 1, hidden_size=128)
        assert bool(shard.hidden_states.isfinite().all())
        kept += shard.sample_ids
        tokens += len(shard.input_ids)
        answers += int(shard.loss_mask.sum())
    assert kept == [path.stem for path in paths if path.stem not in bad]
    assert manifest(workspace)["facts"]["tokens"] == tokens
    assert int(hidden_states.read_token_freq(folder, 512).sum()) == answers
    assert [json.loads(line)["row"] for line in rejects.read_text().splitlines()] == bad
    assert run(workspace, "train", "--epochs", "1").returncode == 0


def test_a_file_mended_after_it_failed_is_read_again(workspace: Path) -> None:
    write_theirs(workspace, normed=False)
    path = min((workspace / "theirs").glob("*.pt"))
    sound = path.read_bytes()
    spoil(path, "not_finite")
    assert run(workspace, "dump", "--states", "theirs").returncode == 3
    path.write_bytes(sound)
    assert run(workspace, "dump", "--states", "theirs").returncode == 0
    assert manifest(workspace)["counts"]["failed"] == {}
    assert (workspace / "run" / "dump" / "rejects.jsonl").read_text() == ""


def test_no_row_left_is_refused(workspace: Path) -> None:
    write_theirs(workspace, normed=False)
    for path in (workspace / "theirs").glob("*.pt"):
        spoil(path, "zero")
    done = run(workspace, "dump", "--states", "theirs", "--max_failed_fraction", "1")
    assert done.returncode == 3
    assert "none of 12 rows is usable" in done.stderr


def test_the_other_convention_is_refused_also_behind_the_first_files(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_theirs(workspace, normed=True)
    (workspace / "theirs").rename(workspace / "after")
    write_theirs(workspace, normed=False)
    last = max((workspace / "theirs").glob("*.pt"))
    shutil.copy(workspace / "after" / last.name, last)
    monkeypatch.setattr(files_backend, "_FILES_SAMPLED", 3)
    flags = {"states": "theirs", "backend": "hf", "workspace": str(workspace), "name": "run"}
    config = build(DumpConfig, {**flags, "recipe": str(workspace / "recipe.yaml")})
    target_config = target.read_config(workspace / "tiny")
    with open_backend("files", config, target_config, AUX) as backend:
        names = sorted(path.stem for path in (workspace / "theirs").glob("*.pt"))
        rows = {row.sample_id: row for row in conversations.read_conversations(synth(workspace))}
        requests = [Row(rows[name].input_ids, sample_id=name) for name in names]
        with pytest.raises(UserError, match=f"final states of {last.stem} were taken after"):
            list(backend.run(requests))


def test_both_conventions_in_one_folder_are_refused(workspace: Path) -> None:
    write_theirs(workspace, normed=False)
    (workspace / "theirs").rename(workspace / "before")
    write_theirs(workspace, normed=True)
    shutil.copy(workspace / "before" / "row-003.pt", workspace / "theirs" / "row-003.pt")
    done = run(workspace, "dump", "--states", "theirs")
    assert done.returncode == 2
    assert "row-003 before it" in done.stderr


def test_parity_names_the_layers_that_files_hold(workspace: Path) -> None:
    write_theirs(workspace, normed=False)
    right = run(workspace, "dump", "parity", "--states", "theirs", "--against", "hf")
    assert right.returncode == 0, right.stderr
    claimed = ("--aux_layers", "[2,4,6]")
    wrong = run(workspace, "dump", "parity", "--states", "theirs", "--against", "hf", *claimed)
    assert wrong.returncode == 3
    assert "id 6 differs" in wrong.stderr and "nearest to id 5" in wrong.stderr


def test_no_folder_and_no_files(workspace: Path) -> None:
    for name in ("nowhere", "run/synth"):
        done = run(workspace, "dump", "--states", name)
        assert done.returncode == 2
        assert "dump.states: expected a folder with .pt files" in done.stderr


def test_the_worked_example() -> None:
    weight = torch.tensor([2.0, 0.5])
    state = torch.tensor([[3.0, 4.0]])
    normed = weight * state / state.square().mean(-1, keepdim=True).sqrt()
    assert normed.tolist() == [[pytest.approx(1.697, abs=1e-3), pytest.approx(0.566, abs=1e-3)]]
    assert is_normed(normed, FinalNorm(weight, 1e-6))
    assert not is_normed(state, FinalNorm(weight, 1e-6))
