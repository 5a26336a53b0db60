# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.bench`: measure the draft head in vLLM; `compare` two measurements."""

from shared.cli import launch
from stages.bench.config import BenchConfig, CompareConfig

if __name__ == "__main__":
    launch(
        "bench",
        {
            "run": (BenchConfig, "stages.bench.run:run"),
            "compare": (CompareConfig, "stages.bench.run:compare"),
        },
    )
