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
    num_prompts: int = pydantic.Field(1500, description="Prompts for synth.", ge=1)
    num_held_out: int = pydantic.Field(96, description="Prompts for bench, never trained on.", ge=1)


class _LogsConfig(CommandConfig):
    """What commands take that read logs."""

    variadic: ClassVar[str] = "logs"

    logs: tuple[Path, ...] = pydantic.Field((), description="Logs, or one folder of them.")
    recipe: Path | None = pydantic.Field(None, description="A recipe: its run's logs are read.")
    folder: Path | None = pydantic.Field(
        None, description="A run's folder, or a ModelOpt launcher's experiment folder."
    )
    exit_codes: dict[str, int] = pydantic.Field(
        {}, description="Exit codes that no status file tells, such as {dump: 137}."
    )


class TriageConfig(_LogsConfig):
    """Says which stage failed, why, and what to type next.

    In:  a run (--recipe or --folder), or logs.
    Out: ranked diagnoses. Exit 3 where something failed, known or not; 0 where nothing did.
    """

    as_json: bool = pydantic.Field(
        False, alias="json", description="JSON for scripts; give it last."
    )
    save_fixture: Path | None = pydantic.Field(
        None, description="Also keep the failed log's end here, cleaned, as a test's fixture."
    )


class ReviewConfig(_LogsConfig):
    """A pass/fail page over all logs of a run, a line a stage, with the next steps.

    In:  as triage.
    Out: Markdown. Exit 3 where a stage failed.
    """

    out: Path | None = pydantic.Field(None, description="Write the page here.")
