# SPDX-License-Identifier: Apache-2.0
"""What the operator's commands take."""

from pathlib import Path
from typing import ClassVar

import pydantic

from shared.config import CommandConfig
from shared.paths import STAGES


class RunChainConfig(CommandConfig):
    """Runs the stages of a recipe one after another, each a process of its own.

    A stage that is done already takes a second. A stage's own interpreter, and with it another
    vLLM, is named by the environment: EYRIE_SYNTH_PYTHON, EYRIE_DUMP_PYTHON, EYRIE_TRAIN_PYTHON,
    EYRIE_BENCH_PYTHON.
    """

    recipe: Path = pydantic.Field(description="The recipe, a YAML file.")
    only: tuple[str, ...] = pydantic.Field(STAGES, description="Run these stages alone.")
    overwrite: bool = pydantic.Field(
        False, description="Replace artifacts that were made with another configuration."
    )

    @pydantic.field_validator("only")
    @classmethod
    def _known_stages(cls, only: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [stage for stage in only if stage not in STAGES]
        if unknown or not only:
            raise ValueError(f"stages are {', '.join(STAGES)}")
        return tuple(stage for stage in STAGES if stage in only)


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
