# SPDX-License-Identifier: Apache-2.0
"""Is what a disturbed stage left in the end what the undisturbed one left?

To the byte for dump and train; for synth every sample once, with the very same tokens; for bench the
counts of its report, since times differ. And nothing beside it: no temporary file, no traceback.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.contracts import conversations
from shared.errors import EyrieError
from tests.faults.bed import MAKES, Reference, World

# Of these the bytes differ: they tell when, where and how long.
_TELLING = {"manifest.json", "data_config.json", "README.md", "report.json", "report.html"}


def _manifests(root: Path, stage: str) -> dict[str, Any]:
    found = {}
    for name in MAKES[stage]:
        manifest = json.loads((root / name / "manifest.json").read_text())
        found |= {f"{name}: {key}": manifest[key] for key in ("counts", "fingerprint")}
    return found


def _synth(root: Path) -> dict[str, Any]:
    rows = list(conversations.read_conversations(root / "synth"))
    counted = Counter(row.sample_id for row in rows)
    twice = sorted(name for name, number in counted.items() if number > 1)
    return {"twice": twice, "rows": {r.sample_id: (r.input_ids, r.loss_spans) for r in rows}}


def _bytes(root: Path, *names: str) -> dict[str, Any]:
    """The whole content of what the manifests list."""
    found: dict[str, Any] = {}
    for name in names:
        listed = json.loads((root / name / "manifest.json").read_text())["files"]
        present = {
            str(path.relative_to(root / name))
            for path in (root / name).rglob("*")
            if path.is_file() and not path.name.startswith(".lock")
        }
        found[f"{name}: names"] = present
        for each in listed:
            if Path(each).name not in _TELLING:
                found[f"{name}/{each}"] = (root / name / each).read_bytes()
    return found


def _dump(root: Path) -> dict[str, Any]:
    return _bytes(root, "dump")


def _train(root: Path) -> dict[str, Any]:
    found = _bytes(root, "train", "export")
    # The optimizer's step counters and the pickle's own order may differ; the weights may not.
    found.pop("train/checkpoints/best.pt")
    lines = found.pop("train/history.jsonl").decode().splitlines()
    records = [json.loads(line) for line in lines]
    found["history"] = [(r["step"], sorted(r), round(r.get("loss", 0), 5)) for r in records]
    manifest = json.loads((root / "train" / "manifest.json").read_text())
    found["facts"] = {k: v for k, v in manifest["facts"].items() if k != "seconds"}
    found["facts"]["final_loss"] = round(found["facts"]["final_loss"], 5)
    return found


def _bench(root: Path) -> dict[str, Any]:
    report = json.loads((root / "bench" / "report.json").read_text())
    head, baseline = report["head"], report["baseline"]
    return {
        "page": (root / "bench" / "report.html").stat().st_size > 10_000,
        "counters": head["counters"],
        "length": head["acceptance"]["acceptance_length"],
        "sizes": [(each["requests"], each["output_tokens"]) for each in (head, baseline)],
        "lossless": report["lossless"],
        "gates": [gate["met"] for gate in report["gates"]],
        "rejects": (root / "bench" / "rejects.jsonl").read_bytes(),
    }


_OF: dict[str, Callable[[Path], dict[str, Any]]] = {
    "synth": _synth,
    "dump": _dump,
    "train": _train,
    "bench": _bench,
}


def differences(stage: str, world: World, reference: Reference) -> list[str]:
    """What of the stage's result is not as in the undisturbed run."""
    try:
        ours, theirs = (
            {**_OF[stage](root), **_manifests(root, stage)} for root in (world.root, reference.root)
        )
    except (OSError, KeyError, ValueError, EyrieError) as error:
        return [f"no whole result: {type(error).__name__}: {error}"]
    found = []
    for key in theirs:
        if key.endswith(": names"):  # caches may be missing; nothing may be there besides
            found += [f"besides {each}" for each in ours[key] - theirs[key]]
        elif ours.get(key) != theirs[key]:
            found.append(f"another {key}")
    return found


def untidy(world: World) -> Iterator[str]:
    """What a run must never leave: temporary files, tracebacks, a status that does not end."""
    for path in world.root.rglob(".*.tmp-*"):
        yield f"left {path.relative_to(world.root)}"
    for path in (*(world.root / "logs").glob("*.log"), *world.path.glob("console-*")):
        lines = path.read_text(errors="replace").splitlines()
        at = next((i for i, line in enumerate(lines) if "Traceback" in line), None)
        if at is not None:
            yield f"a traceback in {path.name}: {lines[min(at + 40, len(lines) - 1)][:200]}"


def status_of(stage: str, world: World) -> str:
    """The state that `status/<stage>.json` tells."""
    path = world.root / "status" / f"{stage}.json"
    return str(json.loads(path.read_text())["state"]) if path.exists() else "none"
