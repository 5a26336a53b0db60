# SPDX-License-Identifier: Apache-2.0
"""Dump with transformers: the same states in both layouts, by one process or by several.

The layout `samples` is read by speculators 0.3.0 itself where $EYRIE_SPECULATORS_PYTHON names an
interpreter that has it: `pip install speculators==0.3.0` into an environment of its own.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from shared.artifacts.manifest import MANIFEST
from shared.contracts import fp8, hidden_states
from shared.contracts.conversations import Conversation
from shared.contracts.row_files import RowFile
from shared.errors import OutputError, UserError
from shared.runtime.status import Accounting
from stages.dump import parallel
from stages.dump.plan import REJECTS, ShardPlan, ShardRows, read_plan, settle
from stages.dump.run import run as dump
from stages.dump.shards.filling import FillingShard
from tests.runs import run
from tests.stages.dump.dumps import NUM_ROWS, config, contents, samples_dump


def test_several_processes_make_the_bytes_that_one_makes(workspace: Path, whole: Path) -> None:
    folder = workspace / "run" / "dump"
    for index in (2, 0, 1):
        assert not (folder / MANIFEST).exists()
        dump(config(workspace, shard_index=index, num_shards=3))
    assert contents(folder) == contents(whole)
    manifests = [json.loads((f / MANIFEST).read_text()) for f in (folder, whole)]
    assert manifests[0]["counts"] == manifests[1]["counts"]
    assert manifests[0]["counts"]["ok"] == NUM_ROWS
    assert manifests[0]["files"].keys() == manifests[1]["files"].keys()
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


def test_data_parallel_makes_the_same_bytes(workspace: Path, whole: Path) -> None:
    done = run(workspace, "dump", "--data_parallel", "2")
    assert done.returncode == 0, done.stderr
    folder = workspace / "run" / "dump"
    assert contents(folder) == contents(whole)
    assert (folder / MANIFEST).exists()
    for engine in range(2):
        assert (workspace / "run" / "status" / f"dump-{engine}.json").exists()


def test_an_engine_of_several_that_fails_gives_its_exit_code(workspace: Path) -> None:
    done = run(workspace, "dump", "--data_parallel", "2", "--max_logprob_gap", "1e-9")
    assert done.returncode == 3, done.stderr
    assert "ended with exit code 3" in done.stderr
    assert not (workspace / "run" / "dump" / MANIFEST).exists()


def test_engines_share_the_gpus() -> None:
    assert parallel.share_devices(["4", "5", "6", "7"], 2, 2) == ["4,5", "6,7"]
    assert parallel.share_devices([], 2, 1) == [None, None]
    with pytest.raises(UserError, match="needs 4 GPUs, found 3"):
        parallel.share_devices(["0", "1", "2"], 2, 2)


def test_engines_of_a_share_worked_example(workspace: Path) -> None:
    """Process 1 of 3 with two engines: the parts 1 and 4 of 6, which are its own shards."""
    own = config(workspace, shard_index=1, num_shards=3, data_parallel=2)
    words = [parallel.child_command(own, engine, ["--x"]) for engine in range(2)]
    indices = [int(w.split("=")[1]) for word in words for w in word if "shard_index" in w]
    assert indices == [1, 4]
    assert all("--num_shards=6" in word for word in words)
    owned = {item for item in range(24) if item % 6 in indices}
    assert owned == {item for item in range(24) if own.share.owns(item)}


def test_data_config_has_every_key_of_speculators(whole: Path) -> None:
    """The keys of the data_config.json that its documentation shows."""
    found = json.loads((whole / hidden_states.DATA_CONFIG).read_text())
    expected = {
        "reproducibility": {"command", "package_versions", "gpu"},
        "model": {
            "target_model_path",
            "tensor_parallel_size",
            "max_model_len",
            "gpu_memory_utilization",
            "hidden_size",
        },
        "data": {
            "train_data_path",
            "seq_length",
            "max_samples",
            "num_samples",
            "seed",
            "chat_template_note",
        },
        "hidden_states": {"layer_ids", "description"},
        "format": {"file_pattern", "data_format_version", "schema"},
    }
    assert {"version", "generated_at", "generation"} <= found.keys()
    for section, keys in expected.items():
        assert keys <= found[section].keys(), section
    assert found["reproducibility"]["command"]
    assert "torch" in found["reproducibility"]["package_versions"]
    assert found["data"]["num_samples"] == NUM_ROWS


def test_samples_hold_what_the_shards_hold(workspace: Path, whole: Path) -> None:
    folder = samples_dump(workspace)
    described = json.loads((folder / hidden_states.DATA_CONFIG).read_text())["format"]
    assert (described["layout"], described["file_pattern"]) == ("samples", "samples/data_{idx}.pt")
    index = 0
    for path in sorted(whole.glob("shard_*.pt")):
        shard = hidden_states.read_shard(path, num_states=4, hidden_size=128)
        for row in range(len(shard)):
            name = hidden_states.sample_name(index)
            sample = torch.load(folder / name, weights_only=True, mmap=True)
            place = shard.rows(row)
            assert sample["input_ids"].dtype == sample["loss_mask"].dtype == torch.int64
            assert torch.equal(sample["input_ids"], shard.input_ids[place].long())
            assert torch.equal(sample["loss_mask"], shard.loss_mask[place].long())
            assert len(sample["hidden_states"]) == 4
            for slot, states in enumerate(sample["hidden_states"]):
                assert states.dtype == torch.bfloat16
                assert torch.equal(states, shard.hidden_states[place, slot])
            # No sample may drag its shard along: ids and mask are 8 bytes, states 4 * 128 * 2.
            assert (folder / name).stat().st_size < 32 * (2 * 8 + 1024) + 8192
            index += 1
    assert index == NUM_ROWS


@pytest.mark.parametrize("layout", ["shards", "samples"])
def test_fp8_holds_the_same_states_rounded_in_fewer_bytes(
    workspace: Path, whole: Path, layout: str
) -> None:
    dump(config(workspace, layout=layout, state_dtype="fp8", shard_bytes=10_000_000))
    folder = workspace / "run" / "dump"
    described = json.loads((folder / hidden_states.DATA_CONFIG).read_text())
    assert described["hidden_states"]["dtype"] == "fp8"
    expected = [
        shard.states(shard.rows(row))
        for path in sorted(whole.glob("shard_*.pt"))
        for shard in [hidden_states.read_shard(path, num_states=4, hidden_size=128)]
        for row in range(len(shard))
    ]
    if layout == "shards":
        (path,) = folder.glob("shard_*.pt")
        shard = hidden_states.read_shard(path, num_states=4, hidden_size=128)
        found = [shard.states(shard.rows(row)) for row in range(len(shard))]
        size = sum(path.stat().st_size for path in whole.glob("shard_*.pt"))
        assert path.stat().st_size < 0.65 * size
    else:
        names = [hidden_states.sample_name(index) for index in range(NUM_ROWS)]
        found = [RowFile(folder / name, 4, 128).hidden_states for name in names]
    for one, other in zip(found, expected, strict=True):
        # Another shard size makes other batches: bfloat16 rounding of the final state differs.
        gaps = (one.float() - other.float()).norm(dim=(0, 2)) / other.float().norm(dim=(0, 2))
        assert float(gaps[:-1].max()) < 0.05, gaps
        assert float(gaps[:-1].min()) > 0.005, "these were never rounded"
        assert float(gaps[-1]) < 0.005
    done = run(workspace, "train", "--epochs", "1")
    assert done.returncode == 0, done.stderr[-2000:]


def test_states_that_fp8_cannot_hold_are_refused(whole: Path) -> None:
    """A rounding that loses a whole state: here its scale is another token's."""
    rows = ShardRows(["a"], [[1, 2]], [[0, 1]])
    plan = ShardPlan(0, 0, 1, 2, "", whole)
    shard = FillingShard(plan, rows, torch.randn(2, 4, 128).bfloat16())
    shard.round_to_fp8()
    encode = fp8.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "encode", lambda states: (encode(states)[0], encode(states)[1] * 2))
        with pytest.raises(OutputError, match="fp8 changes a state by 100% of its norm"):
            shard.round_to_fp8()


@pytest.mark.skipif(
    "EYRIE_SPECULATORS_PYTHON" not in os.environ, reason="no interpreter with speculators 0.3.0"
)
def test_samples_are_read_by_speculators(workspace: Path) -> None:
    folder = samples_dump(workspace)
    program = (
        "import sys, torch\n"
        "from speculators.train.data import Eagle3SampleFileDataset, list_files\n"
        "data = Eagle3SampleFileDataset(64, datapath=sys.argv[1], hidden_states_dtype=torch.bfloat16)\n"
        "assert len(data) == 40, len(data)\n"
        "for path, batch in zip(data.data, data):\n"
        "    raw = torch.load(path, weights_only=True)\n"
        "    assert torch.equal(batch['input_ids'], raw['input_ids'][1:])\n"
        "    aux = torch.cat(raw['hidden_states'][:3], -1)[:-1]\n"
        "    assert torch.equal(batch['hidden_states'], aux) and aux.shape == (31, 384)\n"
        "    last = raw['hidden_states'][3][1:]\n"
        "    assert torch.equal(batch['verifier_last_hidden_states'], last)\n"
        "    assert torch.equal(batch['loss_mask'], raw['loss_mask'][1:])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    python = os.environ["EYRIE_SPECULATORS_PYTHON"]
    words = [python, "-c", program, str(folder / hidden_states.SAMPLES)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def row(name: str, length: int, start: int, *, token: int = 5) -> Conversation:
    """A row of `length` tokens, answered from `start` on."""
    return Conversation(
        name, name, "code", "", (), (token,) * length, ((start, length),), "stop", start, 0
    )


@pytest.mark.parametrize("over_long", ["truncate", "skip"])
def test_every_row_is_accounted_for(workspace: Path, tmp_path: Path, over_long: str) -> None:
    """At most 64 tokens: truncating keeps a long row whose answer begins before that."""
    rows = [
        row("short", 10, 4),
        row("cut", 80, 60),
        row("cut-before-its-answer", 80, 70),
        row("foreign", 10, 4, token=600),
        row("long-enough", 64, 60),
    ]
    accounting = Accounting()
    settings = config(workspace, over_long=over_long, max_failed_fraction=1)
    plan = settle(
        tmp_path / "dump",
        rows,
        settings,
        fingerprint="one",
        accounting=accounting,
        token_bytes=4 * 128 * 2,
        vocab_size=512,
        backend="hf",
    )
    kept = [name for shard in plan.shards for name in shard.read().sample_ids]
    lengths = [len(ids) for shard in plan.shards for ids in shard.read().input_ids]
    foreign = {"token_outside_vocabulary": 1}
    if over_long == "truncate":
        assert (kept, lengths) == (["short", "cut", "long-enough"], [10, 64, 64])
        skipped = {"no_trained_token": 1}
    else:
        assert (kept, lengths) == (["short", "long-enough"], [10, 64])
        skipped = {"too_long": 2}
    assert plan.counts == {"in": 5, "ok": len(kept), "skipped": skipped, "failed": foreign}
    rejects = [json.loads(line) for line in (tmp_path / "dump" / REJECTS).read_text().splitlines()]
    assert len(rejects) == 5 - len(kept)
    again = settle(
        tmp_path / "dump",
        [],
        settings,
        fingerprint="one",
        accounting=Accounting(),
        token_bytes=1,
        vocab_size=1,
        backend="vllm",
    )
    assert again == plan
    assert read_plan(tmp_path / "dump" / "plan", "another") is None
    (tmp_path / "dump" / REJECTS).unlink()
    settle(
        tmp_path / "dump",
        rows,
        settings,
        fingerprint="one",
        accounting=Accounting(),
        token_bytes=4 * 128 * 2,
        vocab_size=512,
        backend="hf",
    )
    assert len((tmp_path / "dump" / REJECTS).read_text().splitlines()) == 5 - len(kept)
    # A changed file would give states to the wrong tokens.
    with plan.shards[0].path.open("r+b") as handle:
        handle.truncate(40)
    with pytest.raises(UserError, match="expected the rows of a planned shard"):
        plan.shards[0].read()
