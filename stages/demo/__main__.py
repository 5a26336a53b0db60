# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.demo`: make a target to try everything on."""

from shared.cli import launch
from stages.demo.config import MakeTargetConfig, RealTargetConfig

if __name__ == "__main__":
    launch(
        "demo",
        {
            "make-target": (MakeTargetConfig, "stages.demo.run:run"),
            "real-target": (RealTargetConfig, "stages.demo.run:run_real"),
        },
    )
