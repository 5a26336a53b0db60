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
            "make-target": (MakeTargetConfig, "stages.ops.run:run_make_target"),
            "plan": (PlanConfig, "stages.ops.plan:run"),
            "validate": (ValidateConfig, "stages.ops.validate:run"),
            "status": (StatusConfig, "stages.ops.status:run"),
            "watch": (WatchConfig, "stages.ops.status:watch"),
            "triage": (TriageConfig, "stages.ops.triage:run"),
            "review": (ReviewConfig, "stages.ops.triage:run_review"),
        },
    )
