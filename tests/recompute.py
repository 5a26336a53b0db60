# SPDX-License-Identifier: Apache-2.0
"""Acceptance figures from two raw `/metrics` texts, by code that knows nothing of bench.

`python -m tests.recompute BEFORE.prom AFTER.prom` prints them as JSON. Written against vLLM's metric
names and Prometheus' text format alone: regular expressions, no parser library, nothing of ours.
"""

import json
import re
import sys
from pathlib import Path

SAMPLE = re.compile(r"^vllm:spec_decode_num_(\w+?)_total\{(.*)\} (\S+)$", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')


def counts(text: str) -> dict[str, float]:
    """`drafts`, `draft_tokens`, `accepted_tokens` and `position 0` .. `position K-1`."""
    found: dict[str, float] = {}
    for name, labels, value in SAMPLE.findall(text):
        key = name
        if name == "accepted_tokens_per_pos":
            position = POSITION.search(labels)
            assert position
            key = f"position {position[1]}"
        found[key] = found.get(key, 0.0) + float(value)
    return found


def figures(before: str, after: str) -> dict[str, object]:
    """Acceptance length, rate and shares by position between two texts."""
    early, late = counts(before), counts(after)
    gained = {name: late[name] - early.get(name, 0.0) for name in late}
    drafts = gained["drafts"]
    positions = sorted(
        (name for name in gained if name.startswith("position")), key=lambda n: int(n[9:])
    )
    return {
        "acceptance_length": 1 + gained["accepted_tokens"] / drafts,
        "acceptance_rate": gained["accepted_tokens"] / gained["draft_tokens"],
        "per_position": [gained[name] / drafts for name in positions],
        "num_drafts": drafts,
    }


if __name__ == "__main__":
    json.dump(figures(*(Path(name).read_text() for name in sys.argv[1:3])), sys.stdout, indent=2)
