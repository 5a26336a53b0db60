# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.ops`: run the chain, watch it, tell what failed."""

from shared.cli import launch
from stages.ops.config import (
    AdaptConfig,
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
            "run": (RunChainConfig, "stages.ops.chain.run:run"),
            "adapt": (AdaptConfig, "stages.ops.adapt.run:run"),
            "plan": (PlanConfig, "stages.ops.plan.run:run"),
            "validate": (ValidateConfig, "stages.ops.look.validate.run:run"),
            "status": (StatusConfig, "stages.ops.look.status:run"),
            "watch": (WatchConfig, "stages.ops.look.status:watch"),
            "triage": (TriageConfig, "stages.ops.look.triage.run:run"),
            "review": (ReviewConfig, "stages.ops.look.triage.run:run_review"),
        },
    )
