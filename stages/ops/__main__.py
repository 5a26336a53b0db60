# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.ops`: run the chain, make the demo's target, tell what failed."""

from shared.cli import launch
from stages.ops.config import (
    MakeTargetConfig,
    PlanConfig,
    ReviewConfig,
    RunChainConfig,
    StatusConfig,
    TriageConfig,
    ValidateConfig,
    WatchConfig,
)

if __name__ == "__main__":
    launch(
        "ops",
        {
            "run": (RunChainConfig, "stages.ops.run:run"),
            "make-target": (MakeTargetConfig, "stages.ops.demo.run:run"),
            "plan": (PlanConfig, "stages.ops.plan.run:run"),
            "validate": (ValidateConfig, "stages.ops.validate.run:run"),
            "status": (StatusConfig, "stages.ops.status:run"),
            "watch": (WatchConfig, "stages.ops.status:watch"),
            "triage": (TriageConfig, "stages.ops.triage.run:run"),
            "review": (ReviewConfig, "stages.ops.triage.run:run_review"),
        },
    )
