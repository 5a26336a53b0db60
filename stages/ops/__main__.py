# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.ops`: run the chain, make the demo's target."""

from shared.cli import launch
from stages.ops.config import MakeTargetConfig, RunChainConfig

if __name__ == "__main__":
    launch(
        "ops",
        {
            "run": (RunChainConfig, "stages.ops.run:run"),
            "make-target": (MakeTargetConfig, "stages.ops.run:run_make_target"),
        },
    )
