# SPDX-License-Identifier: Apache-2.0
"""What the operator's commands take."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic

from shared.config import CommandConfig
from shared.paths import STAGES
from stages.ops.tables import read_data


def _in_order(stages: tuple[str, ...]) -> tuple[str, ...]:
    """These stages in the chain's order.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    if not stages or any(stage not in STAGES for stage in stages):
        raise ValueError(f"stages are {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in stages)


Stages = Annotated[tuple[str, ...], pydantic.AfterValidator(_in_order)]
_GPUS = tuple(read_data("gpus.yaml"))


def _known_gpu(name: str) -> str:
    """The name of a GPU type that a plan knows.

    Raises:
        ValueError: it is none of them.
    """
    if name not in _GPUS:
        raise ValueError(f"GPU types are {', '.join(_GPUS)}; take the nearest in memory")
    return name


class RunChainConfig(CommandConfig):
    """Runs the stages of a recipe one after another, each a process or a container of its own.

    A stage that is done already takes a second. A stage's own interpreter, and with it another
    vLLM, is named by the environment: EYRIE_SYNTH_PYTHON, EYRIE_DUMP_PYTHON, EYRIE_TRAIN_PYTHON,
    EYRIE_BENCH_PYTHON.
    """

    recipe: Path = pydantic.Field(description="The recipe, a YAML file.")
    only: Stages = pydantic.Field(STAGES, description="Run only these stages.")
    from_stage: Literal["synth", "dump", "train", "bench"] | None = pydantic.Field(
        None, alias="from", description="Run this stage and those after it."
    )
    skip: Stages = pydantic.Field((), description="Leave these stages out.")
    by: Literal["processes", "compose", "kubernetes"] = pydantic.Field(
        "processes",
        description="Run each stage as a process, in its image by docker compose, or as a Job of "
        "--overlay.",
    )
    overlay: Path | None = pydantic.Field(
        None, description="With --by kubernetes: the kustomize overlay that holds the Jobs."
    )
    dry_run: bool = pydantic.Field(
        False,
        description="Show the plan, its estimates and what would stop it; run nothing.",
    )
    preflight: bool = pydantic.Field(
        True, description="Check for what would stop the chain before its first stage starts."
    )
    overwrite: bool = pydantic.Field(
        False,
        description="Replace every stage's artifact; work that an earlier --overwrite left unfinished is "
        "continued.",
    )
    open_page: bool = pydantic.Field(
        False,
        alias="open",
        description="Open the report's page in this desktop's browser at the end.",
    )

    @pydantic.model_validator(mode="after")
    def _something_is_left(self) -> "RunChainConfig":
        if not self.stages:
            raise ValueError("only, from and skip together leave no stage to run")
        if (self.by == "kubernetes") != (self.overlay is not None):
            raise ValueError("--by kubernetes and --overlay need each other")
        if self.dry_run and self.open_page:
            raise ValueError("--dry_run makes no report's page for --open to show: leave one out")
        if self.overlay and (self.dry_run or self.overwrite or self.open_page):
            raise ValueError(
                "--by kubernetes takes no --dry_run, --overwrite or --open: see `kubectl diff -k`, or put "
                "--overwrite into the Job's args"
            )
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages to run, in order."""
        first = STAGES.index(self.from_stage) if self.from_stage else 0
        return tuple(
            stage for stage in STAGES[first:] if stage in self.only and stage not in self.skip
        )


class AdaptConfig(CommandConfig):
    """Trains the head that you serve further on your own traffic, and says whether vLLM accepts more of it.

    In:  a recipe, a head, and prompts or traffic, of which a tenth is held out to measure on.
    Out: a run whose export/ is the new head, the old head's report in <run>-before/bench, and
         <run>/adapt.json. Exit 3: no gain, keep the old head, which is never changed.
    """

    groups: ClassVar[Mapping[str, str]] = {
        "Data": "recipe traffic max_rows",
        "Model": "head head_revision",
        "Gates": "min_gain",
    }

    recipe: Path = pydantic.Field(
        description="The recipe, a YAML file; compose/recipes/adapt/recipe.yaml is one."
    )
    head: str = pydantic.Field(description="The head to start from: a folder or a hub id.")
    head_revision: str | None = pydantic.Field(None, description="Hub revision of --head.")
    traffic: str = pydantic.Field(
        description="Prompts or chats: JSON lines, Parquet, a folder or a hub data set; or the log, a folder "
        "or a glob of logs, of a vLLM server with --enable-log-requests at log level DEBUG."
    )
    max_rows: int = pydantic.Field(2000, description="Rows to learn from, at most.", ge=1)
    min_gain: float = pydantic.Field(
        0.02,
        description="Gate: required gain in acceptance length (0.02 is 2 %); the gain's 95 % interval must "
        "lie above 0, too.",
        ge=0,
    )
    dry_run: bool = pydantic.Field(
        False,
        description="Split the traffic and show the plan of both runs; write, measure and train nothing.",
    )
    overwrite: bool = pydantic.Field(
        False,
        description="Split the traffic anew and replace every artifact, as for more traffic or other "
        "settings under the same run.name.",
    )


class ValidateConfig(CommandConfig):
    """Opens and checks every artifact of a run: a table of PASS and FAIL, exit 3 where one fails.

    In:  <workspace>/<run>/, or a ModelOpt launcher's experiment folder (task_0 to task_3), of which
         only the logs are read: what they do not say is UNKNOWN.
    Out: the table, or JSON; with --out the same as Markdown. Nothing in the run is changed.
    """

    positional: ClassVar[tuple[str, ...]] = ("name",)

    name: str = pydantic.Field(description="The run: its name in the workspace, or its folder.")
    only: Stages = pydantic.Field(STAGES, description="The artifacts of these stages.")
    out: Path | None = pydantic.Field(None, description="Write the findings here, as Markdown.")
    as_json: bool = pydantic.Field(False, alias="json", description="Print JSON, no table.")
    min_acceptance_length: float = pydantic.Field(
        2.1, description="What a launcher's benchmark must reach; a run has gates of its own.", ge=1
    )
    checksums: bool = pydantic.Field(
        True, description="Hash every file; false compares sizes alone."
    )


class StatusConfig(CommandConfig):
    """Shows how far each stage of a run is, once.

    A stage that says "running" while its process is gone is shown as died.
    """

    positional: ClassVar[tuple[str, ...]] = ("name",)

    name: str = pydantic.Field(description="The run: its name in the workspace, or its folder.")
    as_json: bool = pydantic.Field(False, alias="json", description="Print JSON, no table.")


class WatchConfig(StatusConfig):
    """Shows how far each stage of a run is, until all are done or one has ended badly.

    Ctrl-C ends it.
    """

    period_s: float = pydantic.Field(2.0, description="Seconds between two looks.", gt=0)


class PlanConfig(CommandConfig):
    """Plans a new target from its config.json: facts, sizes, GPUs, the head's shape, a recipe.

    In:  a model's folder, a config.json, or a hub id.
    Out: tables, or JSON; with --out a recipe for GPUs of the type --gpu, with --overlay the same as
         a Kubernetes overlay.
    """

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str = pydantic.Field(description="A model's folder, a config.json, or a hub id.")
    gpu: Annotated[str, pydantic.AfterValidator(_known_gpu)] = pydantic.Field(
        "H100", description=f"GPU type that the recipe is for: {', '.join(_GPUS)}."
    )
    samples: int = pydantic.Field(
        50_000, description="Conversations for train, its held-out ones included.", ge=2
    )
    length: int = pydantic.Field(2048, description="Tokens of a conversation, at most.", ge=8)
    out: Path | None = pydantic.Field(None, description="Write a recipe here.")
    overlay: Path | None = pydantic.Field(
        None, description="Write a Kubernetes overlay into this folder, for --nodes of them."
    )
    nodes: int = pydantic.Field(1, description="Nodes of that GPU type, for the overlay.", ge=1)
    name: str | None = pydantic.Field(None, description="The recipe's run.name.")
    target: str | None = pydantic.Field(
        None, description="The recipe's run.target, where that is not MODEL."
    )
    prompts: str = pydantic.Field("prompts.jsonl", description="The recipe's synth.prompts.")
    trust_remote_code: bool = pydantic.Field(
        False, description="Allow a target's own Python code in the recipe."
    )
    overwrite: bool = pydantic.Field(
        False, description="Replace a recipe or an overlay that is there and differs."
    )
    as_json: bool = pydantic.Field(False, alias="json", description="Print JSON, no tables.")


class _LogsConfig(CommandConfig):
    """What commands take that read logs."""

    variadic: ClassVar[str] = "logs"

    logs: tuple[Path, ...] = pydantic.Field((), description="Logs, or one folder of them.")
    recipe: Path | None = pydantic.Field(None, description="A recipe: its run's logs are read.")
    folder: Path | None = pydantic.Field(
        None, description="A run's folder, or a ModelOpt launcher's experiment folder."
    )
    exit_codes: dict[str, int] = pydantic.Field(
        {}, description="Exit codes that no status file holds, such as {dump: 137}."
    )


class TriageConfig(_LogsConfig):
    """Says which stage failed, why, and what to type next.

    In:  a run (--recipe or --folder), or logs of any program.
    Out: ranked diagnoses. Exit 3: something failed, known or not. Exit 0: nothing did.
    """

    as_json: bool = pydantic.Field(False, alias="json", description="Print JSON, for scripts.")
    save_fixture: Path | None = pydantic.Field(
        None, description="Also keep the failed log's end here, cleaned, as a test's fixture."
    )


class ReviewConfig(_LogsConfig):
    """One pass/fail page over all logs of a run: a line for each stage, then the next steps.

    In:  as triage.
    Out: Markdown. Exit 3 where a stage failed.
    """

    out: Path | None = pydantic.Field(None, description="Write the page here.")
