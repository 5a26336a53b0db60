# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.synth`: answer prompts with the target."""

from shared.cli import launch
from stages.synth.config import SynthConfig

if __name__ == "__main__":
    launch("synth", {"run": (SynthConfig, "stages.synth.run:run")})
