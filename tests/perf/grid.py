# SPDX-License-Identifier: Apache-2.0
"""Is the rule for batch size and learning rate a good one?   python -m tests.perf.grid WORKSPACE RUN

In: a workspace with a finished run, which is only read. Out: for each number of samples a Markdown
table of the best walked acceptance length over three batch sizes and three learning rates, and with
both left at `auto`, on the same held-out samples. The last line is JSON: every cell, and which share
of the grid's best the rule's choice has. A cell trains in a process of one thread, two at a time.
"""

import argparse
import concurrent.futures
import contextlib
import json
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
BATCHES = (512, 2048, 8192)
RATES = {"adamw": (7e-4, 2e-3, 6e-3), "muon": (2e-3, 6e-3, 2e-2)}
AUTO = ("auto", "auto")

Cell = tuple[Any, Any]  # batch_tokens, learning_rate


def walks(run: Path) -> dict[int, float]:
    """Step -> walked acceptance length, from a training's history."""
    curves = read_curves(run / "train" / "history.jsonl")
    return {int(step): length for step, length in curves["walks"]}


@contextlib.contextmanager
def trained(folder: Path, recipe: dict[str, Any], **environment: str) -> Iterator[Path]:
    """The run of a training by `recipe` on the dump of the run in `folder`, for the length of the block."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "targets").symlink_to((folder.parent / "targets").resolve())
        (place / folder.name).mkdir()
        for stage in ("synth", "dump"):
            (place / folder.name / stage).symlink_to((folder / stage).resolve())
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "stages.train", "--recipe", str(place / "recipe.yaml")]
        subprocess.run(
            [*command, "--workspace", temporary],
            cwd=ROOT,
            env={**os.environ, **environment},
            check=True,
        )
        yield place / folder.name


def train(folder: Path, optimizer: str, samples: int, epochs: int, cell: Cell) -> dict[str, Any]:
    """The best walk of one training, its steps, and the batch size and rate that it used."""
    recipe: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["train"] = {
        "optimizer": optimizer,
        "epochs": epochs,
        "max_samples": samples,
        "batch_tokens": cell[0],
        "learning_rate": cell[1],
    }
    with trained(folder, recipe, OMP_NUM_THREADS="1") as run:
        manifest = json.loads((run / "train" / "manifest.json").read_text())
        used = {name: manifest["config"][name] for name in ("batch_tokens", "learning_rate")}
        best = max(walks(run).values())
        return {"al": round(best, 3), "steps": manifest["facts"]["steps"], **used}


def table(samples: int, rates: tuple[float, ...], found: dict[Cell, dict[str, Any]]) -> str:
    """The grid of one number of samples as a Markdown table, the rule's own cell last."""
    rows = [[f"{samples:,} samples", *(f"rate {rate:g}" for rate in rates)], ["---"] * 4]
    for batch in BATCHES:
        cells = [found[batch, rate] for rate in rates]
        rows.append(
            [f"{batch} tokens, {cells[0]['steps']} steps", *(f"{c['al']:.2f}" for c in cells)]
        )
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    chosen = found[AUTO]
    return (
        f"{lines}\nThe rule: {chosen['batch_tokens']} tokens, {chosen['steps']} steps, rate "
        f"{chosen['learning_rate']:g}: {chosen['al']:.2f}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, nargs="+", default=[238, 475, 950])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--optimizer", choices=[*RATES], default="muon")
    parser.add_argument("--results", type=Path, help="Keep finished cells here, and continue.")
    options = parser.parse_args()
    kept: dict[str, Any] = {}
    if options.results and options.results.exists():
        kept = json.loads(options.results.read_text())
    rates, folder = RATES[options.optimizer], options.workspace / options.run
    cells: list[Cell] = [*((batch, rate) for batch in BATCHES for rate in rates), AUTO]
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        waiting = {
            pool.submit(train, folder, options.optimizer, samples, options.epochs, cell): (
                samples,
                cell,
            )
            for samples in options.samples
            for cell in cells
            if str((options.optimizer, samples, *cell)) not in kept
        }
        for done in concurrent.futures.as_completed(waiting):
            samples, cell = waiting[done]
            kept[str((options.optimizer, samples, *cell))] = done.result()
            if options.results:
                options.results.write_text(json.dumps(kept, indent=1))
    shares = {}
    for samples in options.samples:
        found = {cell: kept[str((options.optimizer, samples, *cell))] for cell in cells}
        sys.stdout.write(table(samples, rates, found) + "\n")
        best = max(found[cell]["al"] for cell in cells if cell != AUTO)
        shares[samples] = round(found[AUTO]["al"] / best, 3)
    sys.stdout.write(json.dumps({"share_of_best": shares, "cells": kept}) + "\n")


if __name__ == "__main__":
    main()
