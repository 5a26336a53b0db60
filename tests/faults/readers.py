# SPDX-License-Identifier: Apache-2.0
"""Every reader of files: how to make a whole file for it, and how it is read.

A damaged file must end in the reader's own refusal, which names it, and in nothing else.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file

from shared import conversations, files, hidden_states, target, vocab
from shared.bench_report import read_report
from shared.config import build
from shared.conversations import Conversation
from shared.errors import OutputError, RetryableError, UserError
from shared.exported_head import check_export, config_json
from shared.head_config import HeadConfig
from shared.manifest import Artifact, require_parent
from shared.paths import RunPaths
from shared.prompts import BadRow
from shared.row_files import RowFile
from shared.safetensors_files import read_header
from shared.sources import Source, read_source
from shared.status import Status
from stages.bench import exposition, gates, head, making, page, report, show
from stages.bench.config import BenchConfig
from stages.dump.capture import read_sidecar
from stages.dump.config import DumpConfig
from stages.dump.plan import PLAN, ShardPlan, ShardRows, read_plan
from stages.dump.plan import _digest as digest_of
from stages.dump.plan import _write_shard as write_planned
from stages.ops import status as ops_status
from stages.synth.config import SynthConfig
from stages.train import checkpoint, in_vocab
from stages.train.data import Dataset
from stages.train.history import _step_of
from stages.train.model import load_head
from tests.heads import write_random_head
from tests.measurements import baseline_requests, cell, engine, head_requests, lossless

LAYERS, SIZE, VOCAB, AUX = 8, 8, 16, (2, 4, 5)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": SIZE,
    "vocab_size": VOCAB,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        make: writes a whole file, and what must lie beside it, below a folder; returns its path.
        read: reads it; raises one of `refusals` where it is damaged, or takes what is left of it.
        form: what the file is, for damage that knows (`mutate.damage`).
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    form: str = "bytes"
    refusals: tuple[type[Exception], ...] = (UserError,)
    names_file: bool = True


def _written(path: Path, value: Any) -> Path:
    files.write_json(path, value)
    return path


# shared/manifest.py


def _dump_config(folder: Path) -> DumpConfig:
    return build(DumpConfig, {"workspace": str(folder), "target": "t"})


def _synth(folder: Path) -> Artifact:
    config = build(SynthConfig, {"workspace": str(folder), "target": "t", "prompts": "p"})
    return Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"})


def _make_manifest(folder: Path) -> Path:
    artifact = _synth(folder)
    with artifact.work():
        files.write_text(artifact.folder / "part.txt", "rows")
        facts = {"target_hash": "t", "vocabulary_hash": "v", "greedy": True}
        counts = {"in": 1, "ok": 1, "skipped": {}, "failed": {}}
        artifact.finish(["part.txt"], counts=counts, facts=facts)
    return artifact.folder / "manifest.json"


def _read_manifest(path: Path) -> None:
    folder = path.parents[2]
    require_parent(path.parent, stage="synth", config=_dump_config(folder))
    making.of_run(RunPaths(folder, "run"))
    ops_status.read_states(RunPaths(folder, "run"))


def _make_identity(folder: Path) -> Path:
    path = _make_manifest(folder)
    path.unlink()
    return path.with_name("identity.json")


# shared/config.py


def _make_recipe(folder: Path) -> Path:
    recipe = {
        "run": {"name": "r", "target": "t", "aux_layers": [1, 2], "seed": 0},
        "synth": {"sources": [{"path": "p", "columns": {"id": "x"}}], "server_args": {"a": [1, 2]}},
        "dump": {"backend": "hf", "min_agreement": 0.5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _read_recipe(path: Path) -> None:
    for config in (SynthConfig, DumpConfig):
        build(config, {"recipe": str(path)}).identity()


# shared/target.py


def _make_target(folder: Path) -> Path:
    _written(folder / "config.json", CONFIG)
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
    return _written(folder / "model.safetensors.index.json", index)


def _read_config(path: Path) -> None:
    config = target.read_config(path.parent)
    _ = config.logit_scale, config.logit_softcap
    raw = HeadConfig.from_json(config.raw, aux_layers=AUX, draft_vocab_size=4)
    _ = raw.num_parameters


def _read_tensors(path: Path) -> None:
    target.weights_hash(path.parent)
    tensors = target.read_tensors(target.read_config(path.parent))
    tensors.lm_head.float().sum()


# Parquet


def _row(number: int) -> Conversation:
    return Conversation(
        sample_id=f"row-{number}",
        conversation_id=f"row-{number}",
        source="s",
        category="c",
        messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
        input_ids=(1, 2, 3, 4, 5),
        loss_spans=((1, 2), (3, 5)),
        finish_reason="stop",
        num_prompt_tokens=1,
        num_completion_tokens=3,
    )


def _make_part(folder: Path) -> Path:
    path = folder / conversations.part_name(0)
    conversations.write_part(path, [_row(number) for number in range(5)])
    return path


def _read_part(path: Path) -> None:
    for row in conversations.read_part(path):
        _ = row.loss_mask(), max(row.input_ids, default=0)
    conversations.read_columns(path, ["sample_id", "num_prompt_tokens"]).to_pylist()


PLANNED = ShardRows(["a", "b"], [[1, 2], [3, 4, 5]], [[0, 1], [0, 1, 1]])


def _make_planned(folder: Path) -> Path:
    return write_planned(folder, 0, 0, 5, PLANNED).path


def _read_planned(path: Path) -> None:
    ShardPlan(0, 0, 2, 5, digest_of(PLANNED), path).read()


def _make_prompts_parquet(folder: Path) -> Path:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"id": f"{i}", "messages": messages, "n": i, "category": "c"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


# Prompts


def _prompt_rows() -> Iterator[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    yield {"id": "a", "prompt": "q", "response": "a", "category": "c", "tools": [{"name": "f"}]}
    yield {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    yield {"turns": ["one", "two"], "question_id": 7}
    user = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "r"}
    tool = {"role": "tool", "content": "1", "tool_call_id": "c"}
    yield {"messages": [user, called, tool], "tools": '[{"name": "f"}]'}


def _make_lines(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _prompt_rows()))
    return path


def _make_list(folder: Path) -> Path:
    return _written(folder / "rows.json", list(_prompt_rows()))


def _read_rows(path: Path) -> None:
    for row in read_source(Source(path=str(path)), path.parent):
        if not isinstance(row, BadRow):
            text = json.dumps([row.content_hash(), row.sample_id, row.category, row.tools])
            text += json.dumps(row.conversation, ensure_ascii=False)
            text.encode()


# .pt and .npy


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


def _make_flags(folder: Path) -> Path:
    torch.save({"vocabulary": "k", "flags": torch.ones(3, dtype=torch.bool)}, folder / "00000.pt")
    _make_row(folder)
    return folder / "00000.pt"


def _read_flags(path: Path) -> None:
    in_vocab._read(path, "k", RowFile(path.with_name("data_0.pt"), 4, SIZE))


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


# Files of dump


def _make_plan(folder: Path) -> Path:
    shard = {"index": 0, "first": 0, "samples": 2, "tokens": 5, "digest": "d"}
    counts = {"in": 2, "ok": 2, "skipped": {}, "failed": {"x": 0}}
    plan = {"fingerprint": "f", "backend": "hf", "counts": counts, "shards": [shard]}
    return _written(folder / PLAN, plan)


def _read_plan(path: Path) -> None:
    plan = read_plan(path.parent, "f")
    if plan is not None:
        _ = plan.tokens, plan.samples, [shard.path for shard in plan.shards]


def _make_sidecar(folder: Path) -> Path:
    (folder / "shard_00000.pt").write_bytes(b"1234")
    facts = {"rows": "d", "files": {"shard_00000.pt": {"bytes": 4, "sha256": "x"}}}
    return _written(folder / "shard_00000.json", facts | {"agreement": {"right": 1, "of": 2}})


def _read_sidecar(path: Path) -> None:
    read_sidecar(path.parent, ShardPlan(0, 0, 2, 5, "d", path))


def _make_data_config(folder: Path) -> Path:
    _make_shard(folder)
    layers = {"layer_ids": [*AUX, LAYERS], "aux_layer_ids": list(AUX)}
    model = {"hidden_size": SIZE, "vocab_size": VOCAB}
    return _written(folder / "data_config.json", {"hidden_states": layers, "model": model})


def _read_data_config(path: Path) -> None:
    data_config = hidden_states.read_data_config(path.parent)
    names = ["shard_00000.pt"]
    Dataset(path.parent, data_config, names, holdout_fraction=0.5, max_holdout_samples=1)


# What runs say of themselves


def _make_history(folder: Path) -> Path:
    (folder / "run" / "train").mkdir(parents=True)
    path = folder / "run" / "train" / "history.jsonl"
    records = [{"step": i, "loss": 3.0 - i, "walked_acceptance_length": 2.0} for i in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _read_history(path: Path) -> None:
    making._curves(path)
    for line in files.read_text(path).splitlines():
        _step_of(line)


def _make_status(folder: Path) -> Path:
    status = Status(folder / "run" / "status" / "synth.json", period_s=0.0)
    status._beats = True  # no thread
    status.started()
    status.progress(1, 10, "rows", failed=0)
    status.ended(3, "it failed")
    return status.path


def _read_status(path: Path) -> None:
    Status(path)._earlier()
    making._seconds(path, "2026-01-01T00:00:00+00:00")
    paths = RunPaths(path.parents[2], "run")
    ops_status._table(paths, ops_status.read_states(paths))


def _make_report(folder: Path) -> Path:
    config = build(BenchConfig, {"target": "tiny"})
    results = {
        "head": engine(cell(head_requests(), wall_s=6.0)),
        "baseline": engine(cell(baseline_requests(), wall_s=12.0), lossless=lossless()),
    }
    found = report.build(config, results, lineage={"prompts": "abc"})
    found["gates"] = gates.judge(config, found, None)
    return _written(folder / "report.json", found)


def _read_report(path: Path) -> None:
    found = read_report(path)
    _ = show._engines(found), show._categories(found), show._sweep(found)
    _ = list(show.sentences(found)), list(show.side_by_side(found, found))
    gates.judge(build(BenchConfig, {"target": "tiny", "max_regression": "0.1"}), found, found)
    page._TEMPLATES.get_template("compare.html.j2")


METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="target"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="target"} 2.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="target"} 3.0
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 10.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 10.0
"""


def _make_metrics(folder: Path) -> Path:
    (folder / "metrics.txt").write_text(METRICS)
    return folder / "metrics.txt"


def _read_metrics(path: Path) -> None:
    # A server's answer, decoded as the client does; it is no file of ours.
    if path.is_file() and not path.is_symlink():
        exposition.parse(path.read_bytes().decode(errors="replace"))


# Heads


def _make_head(folder: Path) -> Path:
    _make_target(folder)
    return write_random_head(folder / "head", target=folder, draft_vocab_size=4)


def _make_head_config(folder: Path) -> Path:
    return _make_head(folder) / "config.json"


def _make_export(folder: Path) -> Path:
    path = _make_head_config(folder)
    shape = HeadConfig.from_json(CONFIG, aux_layers=AUX, draft_vocab_size=4)
    return _written(path, config_json(shape, dtype="float32"))


def _make_head_weights(folder: Path) -> Path:
    return _make_head(folder) / "model.safetensors"


def _check_head(path: Path) -> None:
    head.check(path.parent, target.read_config(path.parents[1]))


def _load_head(path: Path) -> None:
    load_head(path.parent, torch.zeros(VOCAB, SIZE))


def _check_export(path: Path) -> None:
    check_export(path.parent)


BOTH = (UserError, OutputError)
READERS: dict[str, Reader] = {
    "manifest": Reader(_make_manifest, _read_manifest, "json"),
    "identity": Reader(_make_identity, lambda path: _synth(path.parents[2]).is_done(), "json"),
    "recipe": Reader(_make_recipe, _read_recipe, "yaml"),
    "target config": Reader(
        lambda f: _make_target(f).with_name("config.json"), _read_config, "json"
    ),
    "safetensors header": Reader(_make_target, read_header),
    "target tensors": Reader(_make_target, _read_tensors),
    "weights index": Reader(_make_index, _read_tensors, "json"),
    "conversations": Reader(_make_part, _read_part),
    # Removed rows are planned again by the next run.
    "planned rows": Reader(_make_planned, _read_planned, refusals=(UserError, RetryableError)),
    "prompts parquet": Reader(_make_prompts_parquet, _read_rows),
    "prompts lines": Reader(_make_lines, _read_rows, "lines"),
    "prompts list": Reader(_make_list, _read_rows, "json"),
    "shard": Reader(_make_shard, _read_shard, "tensors"),
    "row": Reader(_make_row, _read_row, "tensors"),
    "modelopt row": Reader(_make_foreign_row, _read_row, "tensors"),
    "token counts": Reader(_make_freq, _read_freq),
    "checkpoint": Reader(_make_checkpoint, checkpoint.load, "tensors"),
    "in_vocab flags": Reader(_make_flags, _read_flags, "tensors"),
    "d2t": Reader(_make_d2t, lambda path: vocab.read(path.parent)),
    "t2d": Reader(_make_t2d, lambda path: vocab.read(path.parent)),
    "plan": Reader(_make_plan, _read_plan, "json"),
    "sidecar": Reader(_make_sidecar, _read_sidecar, "json"),
    "data_config": Reader(_make_data_config, _read_data_config, "json"),
    "history": Reader(_make_history, _read_history, "lines"),
    "status": Reader(_make_status, _read_status, "json"),
    "bench report": Reader(_make_report, _read_report, "json"),
    "metrics text": Reader(_make_metrics, _read_metrics, refusals=(ValueError,), names_file=False),
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
