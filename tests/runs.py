# SPDX-License-Identifier: Apache-2.0
"""A run that needs no engine: a tiny target, its greedy answers as a synth artifact, and a recipe.

The answers are transformers' own, so that dump (with `backend: hf`) and train run for real on them.
"""

import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from shared.artifacts.artifact import Artifact
from shared.artifacts.manifest import require_parent
from shared.contracts import conversations
from shared.contracts.conversations import Conversation
from shared.io import files
from shared.settings import build
from shared.target import model as target
from shared.target.tokenizer import vocabulary_hash
from stages.synth.config import SynthConfig
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 8
ANSWER_TOKENS = 24


def write_recipe(workspace: Path, **train: object) -> Path:
    """The recipe of the tiny run, with these settings of train on top."""
    recipe = {
        "run": {"target": "tiny", "max_length_tokens": 64, "draft_vocab_size": 128},
        "synth": {"prompts": "prompts.jsonl"},
        "dump": {"backend": "hf", "shard_bytes": 200_000},
        "train": {"epochs": 6, "batch_tokens": 128, "learning_rate": 1e-3, **train},
    }
    path = workspace / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def make_synth(workspace: Path, *, num_rows: int = 40, copies: int = 1) -> None:
    """A target, tied as the small Llamas are, and a finished synth artifact of its answers.

    Args:
        copies: of every row, under names of their own.
    """
    folder = tiny_llama(workspace / "tiny", tied=True)
    (workspace / "prompts.jsonl").write_text("made in code\n")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 400, (num_rows, PROMPT_TOKENS), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for _ in range(ANSWER_TOKENS):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    rows = [
        Conversation(
            sample_id=f"row-{index:03d}" + f"-{copy:03d}" * (copy > 0),
            conversation_id=f"row-{index:03d}" + f"-{copy:03d}" * (copy > 0),
            source="code",
            category="",
            messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
            input_ids=tuple(row),
            loss_spans=((PROMPT_TOKENS, len(row)),),
            finish_reason="length",
            num_prompt_tokens=PROMPT_TOKENS,
            num_completion_tokens=ANSWER_TOKENS,
        )
        for copy in range(copies)
        for index, row in enumerate(ids.tolist())
    ]
    flags = {"recipe": str(write_recipe(workspace)), "workspace": str(workspace)}
    config = build(SynthConfig, flags)
    artifact = Artifact(config.paths.stage("synth"), config, inputs={"prompts": "made in code"})
    with artifact.work():
        conversations.write_part(artifact.folder / conversations.part_name(0), rows)
        counts = {"in": len(rows), "ok": len(rows), "skipped": {}, "failed": {}}
        facts = {
            "target_hash": target.weights_hash(folder),
            "vocabulary_hash": vocabulary_hash(folder),
            "greedy": True,
        }
        artifact.finish([conversations.part_name(0)], counts=counts, facts=facts)


def make_bench(workspace: Path, *, head: str = "") -> None:
    """A finished bench artifact, from measurements made up by hand.

    Args:
        head: one from elsewhere; else the run's export.
    """
    from stages.bench.config import BenchConfig
    from stages.bench.report import gates, html, lineage, report
    from tests.measurements import baseline_requests, engine, head_requests, lossless, under_load

    flags = {"recipe": str(workspace / "recipe.yaml"), "workspace": str(workspace)}
    config = build(BenchConfig, flags | ({"head": head} if head else {}))
    measured, parents = {"prompts": "abc"}, {}
    if not head:
        parents["train"] = require_parent(config.paths.export, stage="train", config=config)
        measured["head_fingerprint"] = parents["train"]["fingerprint"]
    artifact = Artifact(config.paths.stage("bench"), config, parents=parents)
    results = {
        "head": engine(under_load(head_requests(), wall_s=6.0)),
        "baseline": engine(under_load(baseline_requests(), wall_s=12.0), lossless=lossless()),
    }
    with artifact.work():
        found = report.build(config, results, measured=measured)
        found["lineage"] = lineage.of_run(config.paths)
        found["gates"] = gates.judge(config, found, None)
        files.write_json(artifact.folder / "report.json", found)
        files.write_text(artifact.folder / "report.html", html.render(found))
        files.write_text(artifact.folder / "rejects.jsonl", "")
        counts = {"in": 4, "ok": 4, "skipped": {}, "failed": {}}
        names = ["report.json", "report.html", "rejects.jsonl"]
        artifact.finish(names, counts=counts, facts=found["head"]["acceptance"])


def command(workspace: Path, stage: str, *arguments: str) -> list[str]:
    """The command line of a stage on the tiny run."""
    recipe = ["--recipe", str(workspace / "recipe.yaml"), "--workspace", str(workspace)]
    return [sys.executable, "-m", f"stages.{stage}", *arguments, *recipe]


def run(workspace: Path, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a stage to its end."""
    words = command(workspace, stage, *arguments)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
