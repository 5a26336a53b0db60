# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.dump`: capture the target's hidden states over synth's conversations."""

from shared.cli import launch
from stages.dump.config import DumpConfig, ParityConfig

if __name__ == "__main__":
    launch(
        "dump",
        {
            "run": (DumpConfig, "stages.dump.run:run"),
            "parity": (ParityConfig, "stages.dump.checks.parity:run"),
        },
    )
