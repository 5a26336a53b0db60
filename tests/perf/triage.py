# SPDX-License-Identifier: Apache-2.0
"""How long does triage take for a gigabyte of logs, and in what memory?   python -m tests.perf.triage

In: nothing; a run's four logs are written first, a failure near the end of the last. Out: seconds
and peak resident memory of `stages.ops triage`, once for quiet logs (progress and engine chatter) and
once for loud ones (every tenth line an error that some rule knows, or none does). Last line: JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared.paths import STAGES

_QUIET = (
    "2026-11-20T03:12:{s:02d}Z INFO {stage} steps={n}/99999 loss=1.{s:02d} left_s={n}",
    "(EngineCore pid={n}) INFO 11-20 03:12:{s:02d} [loggers.py:259] Avg prompt throughput: {n}.1 tokens/s",
    "(APIServer pid={n}) WARNING 11-20 03:12:{s:02d} [cpu_worker.py:140] CPU backend skips it, step {n}",
    "Loading safetensors checkpoint shards:  {s}% Completed | {s}/100 [00:09<00:09, 7.36it/s]",
)
_LOUD = (
    "(EngineCore pid={n}) ERROR 11-20 03:12:{s:02d} [core.py:1510] RuntimeError: {word} went wrong at {n}",
    "[rank{s}]: RuntimeError: Connection closed by peer [10.1.2.{s}]:{n} {word}",
    "openai.APIStatusError: Error code: 500 - {word} {n}",
)
_LAST = "2026-11-20T03:59:59Z ERROR bench acceptance length 1.812 is 0.288 under the gate 2.1.\n"
_BLOCK_LINES = 20_000


def write_logs(run: Path, total_bytes: int, *, loud: bool) -> None:
    """Four logs of `total_bytes` together."""
    rng = random.Random(0)
    (run / "logs").mkdir(parents=True)
    for stage in STAGES:
        with (run / "logs" / f"{stage}.log").open("w") as log:
            while log.tell() < total_bytes // len(STAGES):
                log.writelines(_block(rng, stage, loud=loud))
            if stage == "bench":
                log.write(_LAST)


def _block(rng: random.Random, stage: str, *, loud: bool) -> list[str]:
    lines = []
    for number in range(_BLOCK_LINES):
        choice = _LOUD if loud and number % 10 == 0 else _QUIET
        word = "".join(rng.choices("abcdefghij", k=6)) if choice is _LOUD else ""
        line = rng.choice(choice)
        values = {"s": rng.randrange(60), "n": rng.randrange(10**6), "word": word, "stage": stage}
        lines.append(line.format(**values) + "\n")
    return lines


def measure(run: Path) -> dict[str, object]:
    """Seconds, peak memory and the first diagnosis."""
    words = [sys.executable, "-m", "stages.ops", "triage", "--folder", str(run), "--json"]
    started_s = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read() if process.stdout else ""
    _, _, usage = os.wait4(process.pid, 0)
    found = json.loads(out)["diagnoses"]
    return {
        "seconds": round(time.monotonic() - started_s, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
        "first": found[0]["rule"] if found else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room for them")
    arguments = parser.parse_args()
    results = {}
    for name, loud in (("quiet", False), ("loud", True)):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            run = Path(folder) / "run"
            write_logs(run, arguments.megabytes * 1_000_000, loud=loud)
            results[name] = measure(run)
        sys.stdout.write(f"{name}: {results[name]}\n")
    sys.stdout.write(json.dumps({"megabytes": arguments.megabytes, **results}) + "\n")


if __name__ == "__main__":
    main()
