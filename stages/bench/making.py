# SPDX-License-Identifier: Apache-2.0
"""How the head that is measured was made: what the run's earlier artifacts say of themselves.

In: the folder of the run. Out: the report's section `making`. Costs reading three manifests and the
training's history. Nothing here decides anything: what a stage did not tell is left out.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import read_text
from shared.manifest import read_manifest
from shared.paths import RunPaths
from shared.status import read_status

_STAGES = ("synth", "dump", "train")
# Facts that a reader of the page wants of each stage.
_FACTS = {
    "synth": ("rows", "tokens", "trained_tokens"),
    "dump": ("tokens", "agreement", "logprob_gap"),
    "train": ("tokens", "steps", "best_step", "walked_acceptance_length", "final_loss"),
}


def of_run(paths: RunPaths) -> dict[str, Any]:
    """`stages`: one entry a stage; `loss` and `walks`: [step, value] as training went."""
    stages = [entry for stage in _STAGES if (entry := _stage(paths, stage))]
    return {"stages": stages, **_curves(paths.stage("train") / "history.jsonl")}


def _stage(paths: RunPaths, stage: str) -> dict[str, Any] | None:
    manifest = read_manifest(paths.stage(stage))
    if manifest is None:
        return None
    facts, counts = manifest["facts"], manifest["counts"]
    provenance = manifest["provenance"]
    return {
        "stage": stage,
        "rows": counts["ok"],
        "left_out": counts["in"] - counts["ok"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "seconds": _seconds(paths.status(stage), provenance["finished"]),
        "facts": {name: facts[name] for name in _FACTS[stage] if facts.get(name) is not None},
        "finished": provenance["finished"],
        "accelerator": provenance["accelerator"],
        "revision": provenance["revision"],
    }


def _seconds(status: Path, finished: str) -> float | None:
    """From the first word of a stage's status to its manifest; None where the status is gone."""
    try:
        started_s = read_status(status)["started_s"]
        ended_s = datetime.datetime.fromisoformat(finished).timestamp()
    except (UserError, ValueError, OverflowError):
        return None
    return round(max(0.0, ended_s - started_s), 1)


def _curves(path: Path) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {"loss": [], "walks": []}
    lines = read_text(path).splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            for name, key in (("loss", "loss"), ("walks", "walked_acceptance_length")):
                if key in record:
                    curves[name].append([int(record["step"]), float(record[key])])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line that a kill cut
    return curves
