# SPDX-License-Identifier: Apache-2.0
"""What the demo's commands take."""

from pathlib import Path
from typing import ClassVar

import pydantic

from shared.config import CommandConfig


class MakeTargetConfig(CommandConfig):
    """Makes the demo's target: a small Llama, its tokenizer and prompts, learnt on the spot.

    In:  nothing but a seed.
    Out: a model folder with prompts.jsonl (for synth) and held_out.jsonl (for bench) in it.
    """

    positional: ClassVar[tuple[str, ...]] = ("out",)

    out: Path = pydantic.Field(description="Folder to make; done already if it is there.")
    seed: int = pydantic.Field(0, description="Seed of the dialogues and the weights.")
    steps: int | None = pydantic.Field(
        None, description="Training steps; fewer is a worse model.", ge=1
    )
    num_prompts: int = pydantic.Field(1200, description="Prompts for synth.", ge=1)
    num_held_out: int = pydantic.Field(96, description="Prompts for bench, never trained on.", ge=1)
