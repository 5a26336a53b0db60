# SPDX-License-Identifier: Apache-2.0
"""How far do steps go, and how far do samples?   python -m tests.perf.learning WORKSPACE

In: the workspace of a finished demo, which is only read. Out: the walked acceptance length over the
demo's own training steps, and then over the number of training samples at the same number of steps,
always on the same held-out samples: two Markdown tables. The last line is JSON.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shared.artifacts.history import read_curves

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compose" / "recipes" / "demo" / "recipe.yaml"


def walks(run: Path) -> dict[int, float]:
    """Step -> walked acceptance length, from a training's history."""
    curves = read_curves(run / "train" / "history.jsonl")
    return {int(step): length for step, length in curves["walks"]}


@contextlib.contextmanager
def trained(workspace: Path, recipe: dict[str, Any], **environment: str) -> Iterator[Path]:
    """The run of a training by `recipe` on the demo's dump, for the length of the block."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "targets").symlink_to((workspace / "targets").resolve())
        (place / "demo").mkdir()
        for stage in ("synth", "dump"):
            (place / "demo" / stage).symlink_to((workspace / "demo" / stage).resolve())
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "stages.train", "--recipe", str(place / "recipe.yaml")]
        subprocess.run(
            [*command, "--workspace", folder],
            cwd=ROOT,
            env={**os.environ, **environment},
            check=True,
        )
        yield place / "demo"


def train(workspace: Path, num_samples: int, epochs: int) -> float:
    """Train on `num_samples` of the demo's dump; the best walk."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    recipe["train"] |= {"epochs": epochs, "max_samples": num_samples, "eval_every_steps": 50}
    with trained(workspace, recipe) as run:
        return max(walks(run).values())


def table(heading: str, found: dict[int, float]) -> str:
    """A Markdown table of two rows."""
    rows = [[heading, *map(str, found)], ["walked AL", *(f"{al:.2f}" for al in found.values())]]
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[75, 150, 300, 600])
    options = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    manifest = json.loads((options.workspace / "demo" / "train" / "manifest.json").read_text())
    rows, epochs = manifest["counts"]["ok"], recipe["train"]["epochs"]
    whole = rows - min(round(rows * 0.05), 128)  # what train holds out by default
    by_step = walks(options.workspace / "demo")
    by_samples = {
        n: train(options.workspace, n, math.ceil(epochs * whole / n)) for n in options.samples
    }
    by_samples[whole] = max(by_step.values())
    sys.stdout.write(table("step", by_step) + "\n" + table("samples", by_samples) + "\n")
    sys.stdout.write(json.dumps({"by_step": by_step, "by_samples": by_samples}) + "\n")


if __name__ == "__main__":
    main()
