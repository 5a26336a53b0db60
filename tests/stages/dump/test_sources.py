# SPDX-License-Identifier: Apache-2.0
"""Dump over finished conversations: the template's ids and spans, every row accounted for."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from shared.artifacts.manifest import read_manifest
from shared.contracts import hidden_states
from shared.errors import UserError
from shared.runtime.status import Accounting
from shared.settings import build
from shared.target import model as target
from stages.dump.config import DumpConfig
from stages.dump.run import run as dump
from stages.dump.sources import StateRows, open_source
from stages.ops.config import ValidateConfig
from stages.ops.look.validate.run import run as validate
from tests.models import tiny_llama
from tests.quick.shared.artifacts.test_manifest import dump_config, finished
from tests.runs import make_synth
from tests.runs import run as stage

GOOD = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A mutable sequence."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "An immutable one."},
]
# Without marks, and with earlier answers shown otherwise than they were as the last.
UNSTABLE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}(earlier) {% endif %}"
    "{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"id": "good", "messages": GOOD},
    {"id": "unanswered", "messages": GOOD[:1]},
    {"id": "refused", "messages": [*GOOD[:2], {"role": "assistant", "content": "Again."}]},
    {"id": "sharegpt", "conversations": [
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}
    ]},
]  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny", tied=False)
    return tmp_path


def run(workspace: Path, conversations: str, **flags: str) -> tuple[dict, hidden_states.Shard]:
    given = {"workspace": str(workspace), "target": "tiny", "backend": "hf", **flags}
    dump(build(DumpConfig, {**given, "conversations": conversations}))
    folder = workspace / "run" / "dump"
    manifest = read_manifest(folder)
    assert manifest is not None
    path = folder / hidden_states.shard_name(0)
    return manifest, hidden_states.read_shard(path, num_states=4, hidden_size=128)


def answers(workspace: Path, shard: hidden_states.Shard, row: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tiny")
    place = shard.rows(row)
    return tokenizer.decode(shard.input_ids[place][shard.loss_mask[place].bool()])


def test_json_lines(workspace: Path) -> None:
    lines = [json.dumps(row) for row in ROWS] + ["{broken"]
    (workspace / "chats.jsonl").write_text("\n".join(lines))
    manifest, shard = run(workspace, "chats.jsonl", max_failed_fraction="0.5")
    assert shard.sample_ids == ["good", "sharegpt"]
    assert (
        answers(workspace, shard, 0) == "A mutable sequence.<|im_end|>An immutable one.<|im_end|>"
    )
    assert answers(workspace, shard, 1) == "Because.<|im_end|>"
    assert manifest["counts"] == {
        "in": 5,
        "ok": 2,
        "skipped": {"no_answer": 1},
        "failed": {"broken_json": 1, "two_assistant_turns": 1},
    }
    assert manifest["parents"] == {}
    assert manifest["facts"]["greedy"] is False
    # Nobody's greedy answers, so the probes alone speak for these states.
    assert manifest["facts"]["logprob_gap"] < 0.05
    counts = torch.load(workspace / "run" / "dump" / hidden_states.TOKEN_FREQ, weights_only=True)
    assert int(counts.sum()) == int(shard.loss_mask.sum())


def test_a_run_of_finished_conversations_is_valid_without_synth(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "chats.jsonl").write_text(json.dumps(ROWS[0]))
    run(workspace, "chats.jsonl")
    only = {"only": "synth,dump", "workspace": str(workspace), "json": "true"}
    assert validate(build(ValidateConfig, {"name": "run", **only})) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [(row["question"], row["verdict"]) for row in found if row["artifact"] == "synth"] == [
        ("manifest", "SKIP")
    ]


def test_a_row_that_comes_twice_is_skipped_and_has_not_failed(workspace: Path) -> None:
    (workspace / "chats.jsonl").write_text("\n".join([json.dumps(ROWS[0])] * 2))
    manifest, shard = run(workspace, "chats.jsonl", max_failed_fraction="0")
    assert shard.sample_ids == ["good"]
    assert manifest["counts"] == {"in": 2, "ok": 1, "skipped": {"duplicate_id": 1}, "failed": {}}
    (reject,) = (workspace / "run" / "dump" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject) == {
        "row": "good",
        "skipped": "duplicate_id",
        "detail": "chats.jsonl",
    }


def test_another_chat_template_is_another_dump(workspace: Path) -> None:
    (workspace / "chats.jsonl").write_text(json.dumps(ROWS[0]))
    run(workspace, "chats.jsonl")
    (workspace / "tiny" / "chat_template.jinja").write_text(UNSTABLE_TEMPLATE)
    with pytest.raises(UserError, match=r"input\.tokenizer: was"):
        run(workspace, "chats.jsonl")


@pytest.mark.parametrize(("facts", "is_greedy"), [({}, True), ({"on_policy": False}, False)])
def test_what_a_data_set_says_is_not_the_targets_argmax(
    tmp_path: Path, facts: dict[str, bool], is_greedy: bool
) -> None:
    path = finished(tmp_path).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"] |= facts
    path.write_text(json.dumps(manifest))
    assert open_source(dump_config(tmp_path)).is_greedy is is_greedy


def test_a_mask_that_is_none_is_accounted_for(workspace: Path) -> None:
    folder = workspace / "states"
    folder.mkdir()
    row = {"input_ids": torch.arange(4), "hidden_states": [torch.zeros(4, 128)] * 4}
    torch.save(row | {"loss_mask": torch.tensor([0, 0, 1, 1])}, folder / "a.pt")
    torch.save(row | {"loss_mask": torch.tensor([0, 2, 1, 0])}, folder / "b.pt")
    accounting = Accounting()
    (taken,) = StateRows(folder, None, {}).rows(workspace / "tiny", accounting)
    assert (taken.sample_id, taken.loss_spans) == ("a", ((2, 4),))
    assert accounting.failed == {"unreadable": 1}


def test_parquet(workspace: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": GOOD}] * 1), workspace / "chats.parquet")
    _, shard = run(workspace, "chats.parquet")
    assert answers(workspace, shard, 0).count("<|im_end|>") == 2


def test_where_earlier_answers_change_each_answer_is_a_row(workspace: Path) -> None:
    (workspace / "tiny" / "chat_template.jinja").write_text(UNSTABLE_TEMPLATE)
    (workspace / "chats.jsonl").write_text(json.dumps(ROWS[0]))
    _, shard = run(workspace, "chats.jsonl")
    assert shard.sample_ids == ["good/0", "good/1"]
    assert answers(workspace, shard, 0) == "A mutable sequence.<|im_end|>"
    assert answers(workspace, shard, 1) == "An immutable one.<|im_end|>"


def test_nothing_there_or_no_template_is_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"dump\.conversations: expected a file"):
        run(workspace, "chats.jsonl")
    (workspace / "chats.jsonl").write_text(json.dumps(ROWS[0]))
    (workspace / "tiny" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="expected a chat template"):
        run(workspace, "chats.jsonl")


def test_a_quantised_targets_answers_are_dumped_from_its_original(tmp_path: Path) -> None:
    """Same ids, other weights: the original is taken; other ids are refused."""
    make_synth(tmp_path, num_rows=8)
    tiny_llama(tmp_path / "original", seed=3)
    refused = stage(tmp_path, "dump", "--target_train", "other")
    assert refused.returncode == 2
    assert "run.target_train" in refused.stderr
    done = stage(tmp_path, "dump", "--target_train", "original")
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "run" / "dump" / "manifest.json").read_text())
    assert manifest["facts"]["greedy"] is False, "the copy's argmax is not the original's"
    assert manifest["facts"]["target_hash"] == target.weights_hash(tmp_path / "original")
    tokenizer = json.loads((tmp_path / "original" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        text: (511 - token_id if token_id > 300 else token_id)
        for text, token_id in tokenizer["model"]["vocab"].items()
    }
    (tmp_path / "original" / "tokenizer.json").write_text(json.dumps(tokenizer))
    renumbered = stage(tmp_path, "dump", "--target_train", "original", "--overwrite")
    assert renumbered.returncode == 2
    assert "other token ids" in renumbered.stderr
