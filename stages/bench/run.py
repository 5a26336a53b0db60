# SPDX-License-Identifier: Apache-2.0
"""A draft head -> what it is worth in vLLM.

In: the export and prompts that no training has seen. Out: `report.json`. Cost: one engine start and
one pass over the prompts for each of: no draft head, the head, and (where asked) ngram. Each engine
is a process of its own, so that none inherits the memory or the caches of the one before.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared import files, target
from shared.errors import OutputError, RetryableError, UserError
from shared.manifest import Artifact, require_parent
from shared.paths import require_input
from shared.process import die_with_parent, end_group, stop_if_requested
from shared.prompts import BadRow, Prompt
from shared.sources import read_prompts
from shared.status import Accounting, Status
from stages.bench import report
from stages.bench.config import BenchConfig
from stages.bench.metrics import needed_model_len

# Never measured: they only make the engine allocate and compile what it will need.
WARMUP_TEXTS = ("Hello there.", "What is the capital of a country?", "Tell me something short.")
_GRACE_S = 20.0

logger = logging.getLogger(__name__)


def run(config: BenchConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no finished export, no prompts, or the engine refuses the head.
        OutputError: a gate is missed; the report is written and says by how much.
        RetryableError: an engine died.
    """
    export = config.paths.export
    parent = require_parent(export, stage="train", config=config)
    folder = target.locate(config.run.target, config.workspace, revision=config.run.target_revision)
    target.require_chat_template(folder)
    prompts_path = require_input(config.prompts, config.workspace, what="bench.prompts")
    inputs = {"prompts": files.sha256(prompts_path), "target": target.weights_hash(folder)}
    artifact = Artifact(
        config.paths.stage("bench"), config, parents={"train": parent}, inputs=inputs
    )
    if artifact.is_done():
        return
    with artifact.work():
        accounting = Accounting()
        rows = list(_usable(prompts_path, accounting))
        rejects = artifact.folder / "rejects.jsonl"
        accounting.write_rejects(rejects)
        accounting.check_input(
            usable=len(rows), max_failed_fraction=0.0, what=str(prompts_path), rejects=rejects
        )
        results = _measure(config, folder, rows, artifact.folder)
        finished = report.build(config, results, provenance_of(parent, inputs))
        report_path = artifact.folder / "report.json"
        files.write_json(report_path, finished)
        report.show(finished)
        if missed := report.missed_gates(config, finished):
            raise OutputError(f"{'; '.join(missed)}. The whole report: {report_path}")
        artifact.finish(
            [report_path.name, rejects.name],
            counts=accounting.as_dict(),
            facts=finished["head"]["acceptance"],
            engine=f"vllm {finished['vllm_version']}",
        )


def provenance_of(parent: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """What the report says of where the head comes from."""
    return {"head_fingerprint": parent["fingerprint"], "training": parent["facts"], **inputs}


def _usable(path: Path, accounting: Accounting) -> Iterator[Prompt]:
    for row in read_prompts(path):
        if isinstance(row, BadRow):
            accounting.fail(row.row, row.reason, row.detail)
        else:
            accounting.ok += 1
            yield row


def _measure(
    config: BenchConfig, target_folder: Path, rows: list[Prompt], folder: Path
) -> dict[str, dict[str, Any]]:
    """One engine after another; returns its raw measurement for each name."""
    plan = _plan(config, target_folder, rows)
    drafters = speculative_configs(config)
    status = Status(config.paths.status("bench"), period_s=0.0)
    results = {}
    for number, (name, speculative) in enumerate(drafters.items()):
        status.progress(number, len(drafters), "engines", measuring=name)
        results[name] = _measure_one(config, name, {**plan, "speculative": speculative}, folder)
        stop_if_requested("a measurement is only kept whole")
    return results


def speculative_configs(config: BenchConfig) -> dict[str, dict[str, Any] | None]:
    """The speculative_config of each engine to measure; None is the plain target."""
    depth = config.num_speculative_tokens
    head = {"method": "eagle3", "model": str(config.paths.export), "num_speculative_tokens": depth}
    # The head comes first: one that the engine refuses must not cost a baseline.
    drafters: dict[str, dict[str, Any] | None] = {"head": head, "baseline": None}
    if config.compare_ngram:
        drafters["ngram"] = {
            "method": "ngram",
            "num_speculative_tokens": depth,
            # The strongest setting on structured answers, in tokens per target step.
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    return drafters


def _plan(config: BenchConfig, target_folder: Path, rows: list[Prompt]) -> dict[str, Any]:
    # Here, not above: a benchmark that is done already must not wait for it.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        target_folder, trust_remote_code=config.run.trust_remote_code
    )

    def ids(messages: Any) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    prompts = [
        {"id": row.sample_id, "category": row.category, "prompt_token_ids": ids(row.messages)}
        for row in rows
    ]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
    return {
        "target": str(target_folder),
        "revision": None,
        "trust_remote_code": config.run.trust_remote_code,
        "dtype": config.dtype,
        "tensor_parallel": config.tensor_parallel_size,
        "max_model_len": needed_model_len(
            longest,
            max_tokens=config.max_tokens,
            num_speculative_tokens=config.num_speculative_tokens,
        ),
        "max_num_seqs": config.concurrency,
        "seed": config.run.seed,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "ignore_eos": False,
        "prompts": prompts,
        "warmup": [ids([{"role": "user", "content": text}]) for text in WARMUP_TEXTS],
        "engine_args": config.engine_args,
    }


def _measure_one(
    config: BenchConfig, name: str, plan: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Run one engine in a process of its own.

    Raises:
        UserError: the engine refused the head or a setting.
        RetryableError: it died or took too long.
    """
    plan_path, out_path = folder / f"{name}.plan.json", folder / f"{name}.raw.json"
    files.write_json(plan_path, plan)
    out_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "stages.bench.engine", str(plan_path), str(out_path)]
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    code = _wait(process, config.engine_timeout_s)
    found = files.read_json(out_path) if out_path.exists() else {}
    if error := found.get("error"):
        kind = UserError if error["kind"] == "user" else RetryableError
        raise kind(f"measuring {name}: {error['message']}")
    if code != 0 or not found:
        raise RetryableError(
            f"measuring {name}: the engine's process ended with code {code} and left no result. "
            "The log above says why; run the same command again, or give it more memory."
        )
    return dict(found)


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                stop_if_requested("a measurement is only kept whole")
                if time.monotonic() > deadline:
                    raise RetryableError(
                        f"an engine did not finish in {timeout_s:.0f} s (bench.engine_timeout_s)."
                    ) from None
    finally:
        end_group(process, grace_s=_GRACE_S)
