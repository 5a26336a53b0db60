# SPDX-License-Identifier: Apache-2.0
"""Can training read as fast as the disk gives?   python -m tests.perf.read

In: nothing; shards are written first, then taken out of the page cache. Out: GB/s of random samples
drawn from the mapped shards, as training draws them, against the disk's own rate: plain sequential
reads of the same files in the same run, in turns. Also the anonymous memory that it took. The last
line is JSON.
"""

import argparse
import collections
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shared.contracts import hidden_states

HIDDEN_SIZE = 4096
NUM_STATES = 4
SAMPLE_TOKENS = 1024  # 32 MiB a sample
AHEAD = 3  # samples that are on their way from the disk while one is copied


def write_shards(folder: Path, total_bytes: int, shard_bytes: int) -> list[Path]:
    """Shards of about `shard_bytes` each, `total_bytes` together."""
    sample_bytes = SAMPLE_TOKENS * NUM_STATES * HIDDEN_SIZE * 2
    samples = shard_bytes // sample_bytes
    states = torch.randn(samples * SAMPLE_TOKENS, NUM_STATES, HIDDEN_SIZE).bfloat16()
    paths = []
    for index in range(max(1, total_bytes // shard_bytes)):
        path = folder / hidden_states.shard_name(index)
        hidden_states.write_shard(
            path,
            input_ids=[[1] * SAMPLE_TOKENS] * samples,
            loss_masks=[[1] * SAMPLE_TOKENS] * samples,
            states=states,
            sample_ids=[f"{index}-{row}" for row in range(samples)],
        )
        paths.append(path)
    return paths


def forget(paths: list[Path]) -> None:
    """Take the files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def disk_rate(paths: list[Path]) -> float:
    """GB/s of plain sequential reads."""
    forget(paths)
    block = bytearray(16 << 20)
    size, started_s = 0, time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as handle:
            while read := handle.readinto(block):
                size += read
    return size / (time.perf_counter() - started_s) / 1e9


def random_rate(paths: list[Path], seed: int) -> tuple[float, int]:
    """GB/s of every sample once in random order, and the most anonymous memory seen."""
    forget(paths)
    most, size, started_s = 0, 0, time.perf_counter()
    kept = torch.empty(SAMPLE_TOKENS, NUM_STATES, HIDDEN_SIZE, dtype=torch.bfloat16)
    shards = [
        hidden_states.read_shard(path, num_states=NUM_STATES, hidden_size=HIDDEN_SIZE)
        for path in paths
    ]
    places = [(shard, row) for shard in shards for row in range(len(shard))]
    random.Random(seed).shuffle(places)
    # Asked for ahead, as a loader that knows its next batch does.
    coming = collections.deque(shard.states(shard.rows(row)) for shard, row in places[:AHEAD])
    for place in range(len(places)):
        if place + AHEAD < len(places):
            shard, row = places[place + AHEAD]
            coming.append(shard.states(shard.rows(row)))
        states = coming.popleft()
        kept.copy_(states)
        size += states.numel() * states.element_size()
        most = max(most, anonymous_bytes())
    return size / (time.perf_counter() - started_s) / 1e9, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--shard_bytes", type=int, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="On the disk to measure.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        needed = int(options.gigabytes * 1e9)
        if shutil.disk_usage(place).free < needed + (2 << 30):
            sys.exit(f"{place}: expected {needed >> 20} MiB free and 2 GiB to spare.")
        paths = write_shards(Path(place), needed, options.shard_bytes)
        disk, drawn, memory = [], [], 0
        for round_ in range(options.rounds):
            disk.append(disk_rate(paths))
            rate, most = random_rate(paths, round_)
            drawn.append(rate)
            memory = max(memory, most)
    result: dict[str, Any] = {
        "gigabytes": options.gigabytes,
        "disk_gb_s": round(statistics.median(disk), 3),
        "random_gb_s": round(statistics.median(drawn), 3),
        "ratio": round(statistics.median(drawn) / statistics.median(disk), 3),
        "rounds_gb_s": [[round(a, 3), round(b, 3)] for a, b in zip(disk, drawn, strict=True)],
        "rss_anon_gb": round(memory / 1e9, 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
