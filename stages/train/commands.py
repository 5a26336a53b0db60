# SPDX-License-Identifier: Apache-2.0
"""The flags of train's other commands: the section `train`, and a few of their own."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pydantic

from shared.config import operational
from shared.paths import is_hub_id
from stages.train.config import TrainConfig


class VocabConfig(TrainConfig):
    """Makes the draft vocabulary from dump's token counts and logs its share of the answers.

    In:  <workspace>/<run>/dump/token_freq.pt.
    Out: <workspace>/<run>/train/d2t.npy and t2d.npy. A later `train` uses the same ones.
    """

    groups: ClassVar[Mapping[str, str]] = {"Data": "dump_of"}
    lists_all: ClassVar[bool] = False


class CheckHeadConfig(TrainConfig):
    """Checks that a training can start from --init_from; needs no dump.

    In:  the head's folder and the target's.
    Out: exit 0, or exit 2 with what does not fit.
    """

    groups: ClassVar[Mapping[str, str]] = {
        "Model": "init_from variant layer draft_window parallel_drafting intermediate_size ttt_steps "
        "walk_tokens"
    }
    lists_all: ClassVar[bool] = False


class CurveConfig(TrainConfig):
    """Trains on growing shares of the dump, and forecasts the walked acceptance length of more data.

    In:  <workspace>/<run>/dump/, of greedy answers.
    Out: a run <run>-curve-<samples> for each share, trained for as many steps as the recipe makes on all
         rows, plateau or not; <run>/curve.json and a table: twice and ten times the largest share are
         forecast.
    """

    groups: ClassVar[Mapping[str, str]] = {"Curve": "shares", **TrainConfig.groups}

    shares: tuple[Annotated[float, pydantic.Field(gt=0, le=1)], ...] = operational(
        (0.125, 0.25, 0.5, 1.0), "Shares of the training samples; at least three.", min_length=3
    )

    @pydantic.field_validator("follow")
    @classmethod
    def _reads_a_whole_dump(cls, follow: bool) -> bool:
        if follow:
            raise ValueError(
                "a curve reads a finished dump several times, and follow one as it is made"
            )
        return follow

    @property
    def process_name(self) -> str:
        """Its log is not train's."""
        return super().process_name.replace("train", "curve", 1)


class ExportConfig(TrainConfig):
    """Exports a checkpoint of a finished or unfinished training in either layout, with its settings.

    In:  <workspace>/<run>/train/checkpoints/ and d2t.npy.
    Out: the folder --output; an earlier export there is replaced.
    """

    groups: ClassVar[Mapping[str, str]] = {
        "Export": "checkpoint format output push_to export_dtype walk_tokens",
        "Data": "dump_of",
    }
    lists_all: ClassVar[bool] = False

    checkpoint: str = operational("best", "best, latest, or the path of a checkpoint file.")
    format: Literal["hf", "speculators"] = operational(
        "hf", "hf: for vLLM, SGLang and TensorRT-LLM; speculators: the layout of that library."
    )
    output: str | None = operational(
        None, "Output folder; default <workspace>/<run>/export-<format>."
    )
    push_to: str | None = operational(
        None, "Also upload to this hub repository; a new one is private."
    )

    @pydantic.field_validator("push_to")
    @classmethod
    def _a_hub_takes_the_name(cls, name: str | None) -> str | None:
        """Before the export is written, since the upload comes last."""
        if name is not None:
            # Here, not above: --help must answer at once.
            from huggingface_hub.utils import validate_repo_id

            if not is_hub_id(name):
                raise ValueError("expected a repository as organisation/name")
            validate_repo_id(name)
        return name
