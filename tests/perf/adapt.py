# SPDX-License-Identifier: Apache-2.0
"""What `ops adapt` makes of a head that has never seen half of the traffic, and how long it takes.

    python -m tests.perf.adapt WORKSPACE

In: the workspace of a finished demo. A head is trained on four of the demo's eight kinds of prompts (run
`half`); `ops adapt` gets it with prompts of the other four (runs `adapted` and `adapted-before`); bench then
measures the demo's own head, which was trained on all kinds, on the prompts that adapt held out (run
`all-kinds`). Only `ops adapt` is timed. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "compose" / "recipes"


def command(workspace: Path, *words: str | Path) -> None:
    """`python -m stages.WORDS --workspace WORKSPACE`, from the sources."""
    called = [sys.executable, "-m", f"stages.{words[0]}", *map(str, words[1:])]
    subprocess.run(
        [*called, "--workspace", str(workspace)], cwd=ROOT, check=True, stdout=sys.stderr
    )


def split_kinds(workspace: Path) -> tuple[Path, Path]:
    """The demo's prompts of the first four kinds, and those of the others."""
    rows = [json.loads(line) for line in (workspace / "targets/demo/prompts.jsonl").open()]
    kinds = sorted({row["category"] for row in rows})
    halves = []
    for name, half in (("first", kinds[:4]), ("others", kinds[4:])):
        path = workspace / f"{name}.jsonl"
        lines = [json.dumps(row) + "\n" for row in rows if row["category"] in half]
        path.write_text("".join(lines))
        halves.append(path)
    return halves[0], halves[1]


def train_on(workspace: Path, prompts: Path) -> Path:
    """A head of these prompts alone, by the demo's recipe."""
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / "demo" / "recipe.yaml").read_text())
    recipe["run"]["name"] = "half"
    recipe["synth"]["prompts"] = prompts.name
    path = workspace / "half.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command(workspace, "ops", "run", "--recipe", path, "--only", "synth,dump,train")
    return workspace / "half" / "export"


def measure(workspace: Path, run: str, head: str) -> float:
    """AL of `head`, on the prompts that adapt held out."""
    recipe = yaml.safe_load((workspace / "adapted-before" / "recipe.yaml").read_text())
    recipe["run"]["name"] = run
    recipe["bench"]["head"] = head
    path = workspace / f"{run}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command(workspace, "ops", "run", "--recipe", path, "--only", "bench")
    report = json.loads((workspace / run / "bench" / "report.json").read_text())
    length: float = report["head"]["acceptance"]["acceptance_length"]
    return length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    workspace = parser.parse_args().workspace.absolute()
    first, others = split_kinds(workspace)
    head = train_on(workspace, first)
    started_s = time.monotonic()
    words = ("--recipe", RECIPES / "adapt" / "recipe.yaml", "--head", head, "--traffic", others)
    command(workspace, "ops", "adapt", *words)
    seconds = time.monotonic() - started_s
    result = json.loads((workspace / "adapted" / "adapt.json").read_text())
    result = {name: result[name] for name in ("before", "after", "rows")}
    result |= {
        "seconds": round(seconds, 1),
        "all_kinds": measure(workspace, "all-kinds", "demo/export"),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
