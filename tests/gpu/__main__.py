# SPDX-License-Identifier: Apache-2.0
"""What a card alone can tell, in one command: `make gpu-check`, or `python -m tests.gpu`.

In: a machine with a card, torch, triton, transformers, accelerate, safetensors, pyarrow, pydantic and
pytest; no network. Out: OUT.json and OUT.md with the tests' counts, the training step's speed against
the card's own rate of a product in bfloat16, memory, and the kernels that take longest. Cost: under ten
minutes. `--peer-python` names an environment with speculators (tests/perf/requirements-peers.txt),
which then takes turns with ours. Without a card: exit code 2.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.gpu.conftest import DEVICE_VARIABLE
from tests.perf.problem import SHAPES, attention_flops, necessary_flops, row
from tests.perf.train import ROOT, Worker, table

PACKAGES = ("torch", "triton", "transformers", "accelerate", "speculators", "vllm")
# The shape, and the share of the measured rate that a step should reach.
CELLS = {"cuda": {"1B": 0.5, "1B-chat": 0.4}, "cpu": {"S0": 0.5, "S0-chat": 0.4}}
SQUARE = {"cuda": 8192, "cpu": 128}
SHARE = 0.6  # of the slots that count
TESTS_S, DUMP_S = 300, 120
WARM_UP = 3
COLUMNS = (
    ("shape", "shape"),
    ("tokens", "tokens"),
    ("K", "ttt_steps"),
    ("ours ms", "ours_ms"),
    ("tokens/s", "tokens_per_s"),
    ("peak MiB", "peak_mib"),
    ("bf16 TFLOP/s measured", "tflops"),
    ("share of it, wanted", "wanted"),
    ("with attention", "share"),
    ("without", "share_without_attention"),
    ("launches", "launches"),
    ("device busy", "busy_share"),
    ("speculators ms", "peer_ms"),
    ("times", "ratio"),
)
KERNELS = (("ms", "ms"), ("calls", "calls"), ("kernel", "name"))


def run_tests(device: str) -> dict[str, Any]:
    """The tests marked gpu: how many passed, and the others by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}"]
        environment = {**os.environ, DEVICE_VARIABLE: device}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=TESTS_S, check=False)
        except subprocess.TimeoutExpired:
            return {"passed": 0, "failed": [f"not finished after {TESTS_S} s"], "skipped": []}
        if not report.exists():
            return {"passed": 0, "failed": [f"pytest: {done.returncode}"], "skipped": []}
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    named = {f"{case.get('classname')}.{case.get('name')}": case for case in cases}
    failed = [
        n for n, c in named.items() if any(c.find(k) is not None for k in ("failure", "error"))
    ]
    skipped = [n for n, case in named.items() if case.find("skipped") is not None]
    passed = len(named) - len(failed) - len(skipped)
    return {"passed": passed, "failed": failed, "skipped": skipped}


def measured(options: argparse.Namespace, shape: str, wanted: float) -> dict[str, Any]:
    """One shape: our step, and speculators' in turns with it where it runs."""
    if options.peer_python:
        try:
            return measure(options, shape, wanted, ["ours", "speculators"])
        except SystemExit as error:
            sys.stderr.write(f"gpu-check: {shape} beside speculators: {error} It is left out.\n")
    try:
        return measure(options, shape, wanted, ["ours"])
    except SystemExit as error:
        return {"failed": f"{shape}: {error}"}


def measure(
    options: argparse.Namespace, shape_name: str, wanted: float, sides: Sequence[str]
) -> dict[str, Any]:
    """One shape, with the sides' steps in turns.

    Raises:
        SystemExit: one of them ended; out of memory, for one.
    """
    words = (shape_name, "bfloat16", str(options.threads), options.device)
    workers: dict[str, Worker] = {}
    try:
        for side in sides:
            workers[side] = Worker(options, side, "default", *words)
        return _figures(options, shape_name, wanted, workers)
    finally:
        for worker in workers.values():
            worker.end()


def _figures(
    options: argparse.Namespace, shape_name: str, wanted: float, workers: Mapping[str, Worker]
) -> dict[str, Any]:
    shape = SHAPES[shape_name]
    times: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(WARM_UP + options.rounds):
        for side, worker in workers.items():
            spent_ms = worker.ask("step", share=SHARE)["ms"]
            if number >= WARM_UP:  # kernels are compiled and tuned before
                times[side].append(spent_ms)
    ours = workers["ours"]
    rates = [ours.ask("gemm"), ours.ask("square", size=SQUARE[options.device])]
    tflops = max(rate["gflops"] for rate in rates) / 1e3
    profile, memory = ours.ask("profile", share=SHARE), ours.ask("memory", share=SHARE)
    peer = workers.get("speculators")
    peer_memory = peer.ask("memory", share=SHARE) if peer else None
    ms = {side: statistics.median(spent) for side, spent in times.items()}
    mask = row(shape, SHARE).loss_mask
    without = necessary_flops(shape, mask) / 1e9 / tflops  # ms
    whole = without + attention_flops(shape, mask) / 1e9 / tflops
    return {
        "shape": shape_name,
        "tokens": f"{shape.documents} x {shape.document_tokens}",
        "ttt_steps": shape.ttt_steps,
        "counted": SHARE,
        "ours_ms": round(ms["ours"], 1),
        "tokens_per_s": round(shape.tokens / ms["ours"] * 1e3),
        "peak_mib": round(memory["whole_mib"]),
        "step_mib": round(memory["mib"]),
        "tflops": round(tflops, 3),
        "wanted": wanted,
        "share": float(f"{whole / ms['ours']:.4g}"),
        "share_without_attention": float(f"{without / ms['ours']:.4g}"),
        "launches": profile["launches"],
        "busy_share": round(profile["busy_ms"] / ms["ours"], 2),
        "peer_ms": round(ms["speculators"], 1) if peer_memory else "not run",
        "peer_peak_mib": round(peer_memory["whole_mib"]) if peer_memory else None,
        "ratio": round(ms["speculators"] / ms["ours"], 2) if peer_memory else "",
        "kernels": profile["kernels"],
    }


def dump_against_prefill(device: str) -> dict[str, Any]:
    """What dump keeps of vLLM's own prefill rate, where there is a vLLM for the device."""
    if device != "cuda" or find_spec("vllm") is None:
        return {"skipped": "no vLLM for CUDA here"}
    command = [sys.executable, "-m", "tests.perf.dump", "--only", "vllm"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=DUMP_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {DUMP_S} s"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def about(device: str) -> dict[str, Any]:
    """When, on what, with which versions."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    git = ["git", "rev-parse", "HEAD"]
    revision = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": names if device == "cuda" else [platform.processor() or "cpu"],
        "revision": revision.strip() or os.environ.get("EYRIE_REVISION", "unknown"),
        "packages": packages,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The JSON's figures as a page."""
    about, tests = found["about"], found["tests"]
    packages = ", ".join(f"{name} {v}" for name, v in about["packages"].items() if v)
    lines = [
        f"# gpu-check: {', '.join(about['device'])}, {about['date']}\n",
        f"{packages}; revision {about['revision'][:12]}.\n",
        f"Tests: {tests['passed']} passed, {len(tests['failed'])} failed, "
        f"{len(tests['skipped'])} skipped.",
        *(f"- failed: {name}" for name in tests["failed"]),
        *(f"- skipped: {name}" for name in tests["skipped"]),
        f"\nA training step in bfloat16, {SHARE:.0%} of the slots counted, AdamW included; the rate is the "
        "better one of a square product and of lm_head's.\n",
        table(COLUMNS, found["cells"]),
        *(f"\n- failed: {line}" for line in found["failed"]),
        f"\ndump against plain prefill: {json.dumps(found['dump'])}",
    ]
    for cell in found["cells"]:
        lines.append(f"\nThe ten kernels that take longest, {cell['shape']}:\n")
        lines.append(table(KERNELS, cell["kernels"]))
    return "\n".join(lines) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=CELLS, default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="without a suffix")
    parser.add_argument("--peer-python", help="of an environment with speculators")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"gpu-check: no CUDA device. torch {torch.__version__} sees none; run this on a machine with "
            "an NVIDIA GPU and a CUDA build of torch.\n"
        )
        return 2
    wanted = CELLS[options.device].items()
    cells = [measured(options, shape, share) for shape, share in wanted]
    found = {
        "about": about(options.device),
        "tests": run_tests(options.device),
        "cells": [cell for cell in cells if "failed" not in cell],
        "failed": [cell["failed"] for cell in cells if "failed" in cell],
        "dump": dump_against_prefill(options.device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{options.out}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = markdown(found)
    Path(f"{options.out}.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    is_whole = not (found["tests"]["failed"] or found["failed"] or "failed" in found["dump"])
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
