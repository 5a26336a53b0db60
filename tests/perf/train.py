# SPDX-License-Identifier: Apache-2.0
"""Our training step against speculators', interleaved in one run: `python -m tests.perf.train`.

In: an environment with speculators (`--peer-python`; requirements-peers.txt says how to make it).
Out: a Markdown table, then one line of JSON. Cost: 25 minutes for everything on two quiet cores.
Each finished cell (a shape and a dtype) is kept in `--results`, and a second call goes on from there.

Each side runs in processes of its own, one for each allocator setting, and they take turns. After
two rounds the slower setting of each side is dropped. `--parts` takes our ideas out one by one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.perf.problem import SHAPES, attention_flops, necessary_flops, row

ROOT = Path(__file__).resolve().parents[2]
# Freed memory stays with the process, instead of being given back and zeroed again each step.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368"}
SETTINGS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}
PICK_ROUNDS = 2
LEAST_ROUNDS = 3
COLUMNS = (
    ("shape", "shape"),
    ("dtype", "dtype"),
    ("counted", "share"),
    ("rounds", "rounds"),
    ("speculators ms", "peer_ms"),
    ("ours ms", "ours_ms"),
    ("tokens/s, times", "ratio"),
    ("step MiB, theirs", "peer_mib"),
    ("step MiB, ours", "ours_mib"),
    ("memory, times", "memory_ratio"),
    ("GEMM GFLOP/s", "gemm_gflops"),
    ("floor ms", "floor_ms"),
    ("share of floor", "floor_fraction"),
    ("without attention's", "floor_fraction_without_attention"),
    ("allocators (theirs, ours)", "allocators"),
)


class Worker:
    """One side under one allocator setting."""

    def __init__(self, options: argparse.Namespace, side: str, setting: str, *words: str) -> None:
        python = sys.executable if side == "ours" else options.peer_python
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        environment |= SETTINGS[setting] | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        environment["OMP_NUM_THREADS"] = str(options.threads)
        self.side, self.setting = side, setting
        command = [python, "-m", "tests.perf.worker", side, *words]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side} ended with {self.process.wait()}; see above.")
        return json.loads(line)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def pick_settings(workers: Sequence[Worker]) -> list[Worker]:
    """The faster allocator setting of each side; the other worker is ended."""
    times = {worker: [] for worker in workers}
    for round_number in range(PICK_ROUNDS + 1):  # the first one warms up
        for worker in workers:
            spent = worker.ask("step", share=0.6)["ms"]
            if round_number:
                times[worker].append(spent)
    kept = []
    for side in dict.fromkeys(worker.side for worker in workers):
        ours = sorted((w for w in workers if w.side == side), key=lambda w: min(times[w]))
        kept.append(ours[0])
        for worker in ours[1:]:
            worker.end()
    return kept


def rounds_of(
    workers: Sequence[Worker], share: float, *, rounds: int, until_s: float
) -> tuple[dict[str, list[float]], list[float]]:
    """Milliseconds of each side's steps, taken in turns, and the GEMM rate between them."""
    times: dict[str, list[float]] = {worker.side: [] for worker in workers}
    rates = []
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > until_s:
            break
        for worker in workers:
            times[worker.side].append(worker.ask("step", share=share)["ms"])
        rates.append(workers[0].ask("gemm")["gflops"])
    return times, rates


def disagreement(workers: Sequence[Worker], share: float) -> float:
    """The largest relative difference of loss and of any weight's gradient between the sides."""
    losses, gradients = [], []
    with tempfile.TemporaryDirectory() as folder:
        for worker in workers:
            path = Path(folder) / f"{worker.side}.pt"
            losses.append(worker.ask("gradients", share=share, to=str(path))["loss"])
            gradients.append(torch.load(path, weights_only=True))
    ours, theirs = gradients
    if ours.keys() != theirs.keys():
        raise SystemExit(f"the sides train other weights: {sorted(ours.keys() ^ theirs.keys())}")
    return max(float((ours[n] - theirs[n]).norm() / ours[n].norm()) for n in ours)


def measure(options: argparse.Namespace, shape_name: str, dtype: str) -> list[dict[str, Any]]:
    """One cell: both sides at 60 % and at 100 % counted slots."""
    words = (shape_name, dtype, str(options.threads), "cpu")
    sides = ("ours", "speculators")
    workers = [Worker(options, side, s, *words) for side in sides for s in SETTINGS]
    # Before any step: AdamW's first steps make equal gradients' last bits into other weights.
    apart = disagreement(workers[:: len(SETTINGS)], 0.6) if dtype == "float32" else None
    kept = pick_settings(workers)
    started_s, found = time.monotonic(), []
    for index, share in enumerate((0.6, 1.0)):
        until_s = started_s + (index + 1) / 2 * options.cell_s
        for worker in kept:
            worker.ask("step", share=share)
        times, rates = rounds_of(kept, share, rounds=options.rounds, until_s=until_s)
        ours_ms, peer_ms = (statistics.median(times[side]) for side in sides)
        ours_mib, peer_mib = (worker.ask("memory", share=share)["mib"] for worker in kept)
        rate = statistics.median(rates)
        shape = SHAPES[shape_name]
        mask = row(shape, share).loss_mask
        without_ms = necessary_flops(shape, mask) / rate / 1e6
        floor_ms = without_ms + attention_flops(shape, mask) / rate / 1e6
        found.append(
            {
                "shape": shape_name,
                "dtype": dtype,
                "share": share,
                "rounds": len(times["ours"]),
                "ours_ms": round(ours_ms),
                "peer_ms": round(peer_ms),
                "ratio": round(peer_ms / ours_ms, 2),
                "tokens_per_s": round(shape.tokens / ours_ms * 1e3),
                "ours_mib": round(ours_mib),
                "peer_mib": round(peer_mib),
                "memory_ratio": round(ours_mib / peer_mib, 2),
                "gemm_gflops": round(rate, 1),
                "floor_ms": round(floor_ms),
                "floor_fraction": round(floor_ms / ours_ms, 2),
                "floor_fraction_without_attention": round(without_ms / ours_ms, 2),
                "allocators": f"{kept[1].setting}, {kept[0].setting}",
                "gradients_apart": apart,
            }
        )
    for worker in kept:
        worker.end()
    return found


def measure_parts(options: argparse.Namespace, shape_name: str, dtype: str) -> list[dict[str, Any]]:
    """Our step whole, and with each idea taken out, in turns; under the tuned allocator."""
    from tests.perf.switches import PARTS

    words = (shape_name, dtype, str(options.threads), "cpu")
    workers = {"": Worker(options, "ours", "tuned", *words)}
    workers["allocator"] = Worker(options, "ours", "default", *words)
    times: dict[str, list[float]] = {}
    found = []
    for part in ("allocator", *PARTS):  # two at a time: eight would not fit into memory
        workers[part] = workers.get(part) or Worker(options, "ours", "tuned", *words, part)
        pair = {"": workers[""], part: workers[part]}
        times = {name: [] for name in pair}
        for round_number in range(options.rounds + 1):
            for name, worker in pair.items():
                spent = worker.ask("step", share=0.6)["ms"]
                if round_number:
                    times[name].append(spent)
        whole, without = (statistics.median(times[name]) for name in pair)
        mib = [round(worker.ask("memory", share=0.6)["mib"]) for worker in pair.values()]
        workers.pop(part).end()
        found.append(
            {
                "shape": shape_name,
                "dtype": dtype,
                "without": part,
                "idea": PARTS[part][0] if part in PARTS else "freed memory stays with the process",
                "ms": round(without),
                "whole_ms": round(whole),
                "factor": round(without / whole, 2),
                "mib": mib[1],
                "whole_mib": mib[0],
            }
        )
    workers[""].end()
    return found


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[str(row[key]) for _, key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=os.environ.get("EYRIE_PEER_PYTHON", "python3"))
    parser.add_argument("--shapes", default="S1,S2,S3")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cell-s", type=float, default=240.0, help="then a cell takes 3 rounds")
    parser.add_argument("--results", type=Path, default=Path("perf-train.jsonl"))
    parser.add_argument("--parts", action="store_true", help="where each factor comes from")
    return parser.parse_args()


def main() -> None:
    options = _options()
    known = options.results.read_text().splitlines() if options.results.exists() else []
    cells = {(c["parts"], c["shape"], c["dtype"]): c for c in map(json.loads, known)}
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes.split(","):
        for shape in options.shapes.split(","):
            key = (options.parts, shape, dtype)
            if key not in cells:
                made = (measure_parts if options.parts else measure)(options, shape, dtype)
                cells[key] = {"parts": options.parts, "shape": shape, "dtype": dtype, "rows": made}
                with options.results.open("a", encoding="utf-8") as results:
                    results.write(json.dumps(cells[key]) + "\n")
            rows += cells[key]["rows"]
    parts = [(k, k) for k in ("shape", "dtype", "idea", "ms", "whole_ms", "factor", "mib")]
    sys.stdout.write(table(parts if options.parts else COLUMNS, rows) + "\n")
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
