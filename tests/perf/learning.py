# SPDX-License-Identifier: Apache-2.0
"""What more rows and more epochs give.

    python -m tests.perf.learning WORKSPACE RUN --cells 250x5 1000x5 1000x10 --held-out FILE ...

In: a workspace, a run whose dump is finished, and files of prompts, one {"prompt": ...} a line. Out:
for each cell, ROWSxEPOCHS, a training on the first rows of that dump, named `RUN-learning-CELL`, and the
acceptance length (AL) of its head on each file in vLLM, greedy, in float32: a Markdown table, then a line of
JSON. A step has as many tokens as train chooses for the cell by itself, at most as many as the recipe
says. Cells train two at a time with a thread each. A second call skips what is done.
"""

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from stages.train.loop import budget
from tests.perf.heads import measured, train

AT_ONCE = 4  # prompts in flight


class Learning:
    """The cells of one run; finished ones are kept in a file of the workspace."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.workspace, self.run = options.workspace.absolute(), options.run
        self.held_out, self.prompts = options.held_out, options.prompts
        self.recipe = yaml.safe_load((self.workspace / self.run / "recipe.yaml").read_text())
        self.kept = self.workspace / f"{self.run}-learning.json"
        self.rows = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        self.lock = threading.Lock()

    def keep(self, cell: str, **found: Any) -> None:
        with self.lock:
            self.rows[cell] = self.rows.get(cell, {}) | found
            self.kept.write_text(json.dumps(self.rows, indent=1))

    def train(self, cell: str) -> None:
        """Train a cell, unless that is done."""
        if cell in self.rows:
            return
        rows, epochs = map(int, cell.split("x"))
        manifest = json.loads((self.workspace / self.run / "dump" / "manifest.json").read_text())
        row_tokens = manifest["facts"]["tokens"] / manifest["counts"]["ok"]
        batch_tokens = budget.batch_tokens(round(rows * epochs * row_tokens))
        limit = self.recipe["train"].get("batch_tokens", "auto")
        if limit != "auto":
            batch_tokens = min(batch_tokens, limit)
        flags = {"max_samples": rows, "epochs": epochs, "batch_tokens": batch_tokens}
        name = f"{self.run}-learning-{cell}"
        found = train(self.workspace, self.run, name, {key: str(flags[key]) for key in flags})
        self.keep(cell, **found, date=time.strftime("%Y-%m-%d"))

    def measure(self, cell: str) -> None:
        """Measure a cell's head on the files that it was not yet measured on."""
        done = self.rows[cell].get("measured", {})
        left = [path for path in self.held_out if path.stem not in done]
        if left:
            head, target = self.rows[cell]["head"], self.workspace / self.recipe["run"]["target"]
            found = measured(Path(head), target, left, self.prompts, AT_ONCE)
            self.keep(cell, measured=done | found)

    def table(self) -> str:
        """The Markdown table of what is measured."""
        files = [path.stem for path in self.held_out]
        titles = ["rows", "epochs", "tokens", "steps", "tokens a step", "training s", "walked AL"]
        lines = [f"| {' | '.join([*titles, *files])} |", "|---" * len([*titles, *files]) + "|"]
        for cell, row in self.rows.items():
            rows, epochs = map(int, cell.split("x"))
            figures = [f"{rows:,}", epochs, f"{row['tokens']:,}", f"{row['steps']:,}"]
            figures += [f"{row['batch_tokens']:,}", f"{row['seconds']:.0f}", f"{row['walked']:.2f}"]
            for name in files:
                found = row["measured"][name]
                low, high = found["interval"]
                figures.append(f"{found['vllm']:.2f} [{low:.2f}, {high:.2f}]")
            lines.append(f"| {' | '.join(map(str, figures))} |")
        return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("run")
    parser.add_argument("--cells", nargs="+", required=True, help="ROWSxEPOCHS, each of them.")
    parser.add_argument("--held-out", nargs="+", required=True, type=Path)
    parser.add_argument("--prompts", type=int, default=80, help="Of each file, at most.")
    options = parser.parse_args()
    learning = Learning(options)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(learning.train, options.cells))
    del os.environ["OMP_NUM_THREADS"]
    for cell in options.cells:
        learning.measure(cell)
    sys.stdout.write(learning.table() + "\n" + json.dumps(learning.rows) + "\n")


if __name__ == "__main__":
    main()
