# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself, and how it is read: manifests, recipes, progress, reports, metrics."""

import json
from pathlib import Path

import yaml

from shared.artifacts.artifact import Artifact
from shared.artifacts.history import read_curves
from shared.artifacts.manifest import require_parent
from shared.contracts.bench_report import read_report
from shared.errors import OutputError
from shared.io import files
from shared.paths import RunPaths
from shared.runtime.status import Status
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.bench.measure import exposition
from stages.bench.report import gates, html, lineage, report, terminal
from stages.dump.config import DumpConfig
from stages.ops.look import status as ops_status
from stages.synth.config import SynthConfig
from stages.train.loop.history import _step_of
from tests.faults.fuzz.reader import Reader, written
from tests.measurements import baseline_requests, engine, head_requests, lossless, under_load


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
    lineage.of_run(RunPaths(folder, "run"))
    ops_status.read_states(RunPaths(folder, "run"))


def _make_identity(folder: Path) -> Path:
    path = _make_manifest(folder)
    path.unlink()
    return path.with_name("identity.json")


def _make_recipe(folder: Path) -> Path:
    recipe = {
        "run": {"name": "r", "target": "t", "aux_layers": [1, 2], "seed": 0},
        "synth": {"sources": [{"path": "p", "columns": {"id": "x"}}], "server_args": {"x": [1, 2]}},
        "dump": {"backend": "hf", "min_agreement": 0.5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _read_recipe(path: Path) -> None:
    for config in (SynthConfig, DumpConfig):
        build(config, {"recipe": str(path)}).identity()


def _make_history(folder: Path) -> Path:
    (folder / "run" / "train").mkdir(parents=True)
    path = folder / "run" / "train" / "history.jsonl"
    records = [{"step": i, "loss": 3.0 - i, "walked_acceptance_length": 2.0} for i in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _read_history(path: Path) -> None:
    read_curves(path)
    for line in files.read_text(path).splitlines():
        _step_of(line)


def _make_status(folder: Path) -> Path:
    status = Status(folder / "run" / "status" / "synth.json", period_s=0.0)
    status._beats = True  # no thread
    status.started()
    status.progress(1, 10, "rows", failed=0)
    status.failed(OutputError("it failed", code="x"))
    return status.path


def _read_status(path: Path) -> None:
    Status(path)._earlier()
    paths = RunPaths(path.parents[2], "run")
    ops_status._table(paths, ops_status.read_states(paths))


def _make_report(folder: Path) -> Path:
    config = build(BenchConfig, {"target": "tiny"})
    results = {
        "head": engine(under_load(head_requests(), wall_s=6.0)),
        "baseline": engine(under_load(baseline_requests(), wall_s=12.0), lossless=lossless()),
    }
    found = report.build(config, results, measured={"prompts": "abc"})
    found["gates"] = gates.judge(config, found, None)
    return written(folder / "report.json", found)


def _read_report(path: Path) -> None:
    found = read_report(path)
    terminal.show(found)
    _ = terminal._sweep(found), list(terminal.side_by_side(found, found))
    gates.judge(build(BenchConfig, {"target": "tiny", "max_regression": "0.1"}), found, found)
    html._TEMPLATES.get_template("compare.html.j2")


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


RUNS: dict[str, Reader] = {
    "manifest": Reader(_make_manifest, _read_manifest, "json"),
    "identity": Reader(_make_identity, lambda path: _synth(path.parents[2]).is_done(), "json"),
    "recipe": Reader(_make_recipe, _read_recipe, "yaml"),
    "history": Reader(_make_history, _read_history, "lines"),
    "status": Reader(_make_status, _read_status, "json"),
    "bench report": Reader(_make_report, _read_report, "json"),
    "metrics text": Reader(_make_metrics, _read_metrics, refusals=(ValueError,), names_file=False),
}
