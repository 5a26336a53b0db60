# SPDX-License-Identifier: Apache-2.0
"""Would more rows help? Trainings on growing shares of the dump, and a forecast for more than there is.

In: a finished dump of greedy answers. Out: one run `<name>-curve-<samples>` for each share, trained for
exactly as many steps as the recipe makes on all rows, so that they differ in their data alone;
`<name>/curve.json`; a table. Cost: one training for each share. A second call skips those that are done.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from shared.artifacts.history import read_curves
from shared.errors import OutputError, UserError
from shared.io import files
from shared.runtime import tables
from shared.runtime.tables import cell
from stages.train import run as training
from stages.train.commands import CurveConfig
from stages.train.config import TrainConfig, rank
from stages.train.forecast import forecast, walk_noise
from stages.train.loop import budget

if TYPE_CHECKING:
    from stages.train.data.dataset import Dataset, Sample

_BAR_CHARS = 40  # for the longest AL there can be, K + 1

logger = logging.getLogger(__name__)


def run(config: CurveConfig) -> None:
    """Train on each share, and forecast.

    Raises:
        UserError: as train's, or no answer can be walked.
        OutputError: there are no walks to draw.
    """
    parent, target_config = training.inputs(config)
    whole = budget.resolved(config, parent, target_config.hidden_size)
    dataset = training.open_dataset(whole, parent)
    rows = len(dataset.training)
    counts = sample_counts(config.shares, rows)
    require_walks(whole, parent, dataset)
    steps = len([*itertools.islice(_steps(whole, dataset, whole.epochs), whole.max_steps)])
    lengths: dict[int, float] = {}
    for samples in counts:
        settings = settings_of(whole, parent, samples, steps)
        logger.info("%d of %d samples: run %s", samples, rows, settings.run.name)
        training.run(settings)
        walks = read_curves(settings.paths.stage("train") / "history.jsonl")["walks"]
        if not walks:
            raise OutputError(
                f"{settings.paths.stage('train')}: expected walked acceptance lengths, found none.",
                code="curve-without-walks",
                remedy="The held-out answers are too short for a draft: raise synth.max_tokens, or lower "
                "train.walk_tokens.",
            )
        lengths[samples] = max(length for _, length in walks)
    if rank() == 0:
        _report(config, rows, lengths, walk_noise(len(dataset.held_out)))


def require_walks(config: CurveConfig, parent: Mapping[str, Any], dataset: "Dataset") -> None:
    """Refuse, before a share is trained, a dump on which none could be walked.

    Raises:
        UserError: its answers were sampled, or none is held out.
    """
    folder = config.paths.stage("dump")
    if not parent["facts"]["greedy"]:
        raise UserError(
            f"{folder}: expected greedy answers of the target, which alone can be walked, found others.",
            code="curve-not-greedy",
            remedy="Run synth and dump again with synth.temperature 0, and without synth.mode keep, "
            "run.target_train or dump.states.",
        )
    if not dataset.held_out:
        raise UserError(
            f"train.holdout_fraction: expected held-out samples to walk, found {config.holdout_fraction:g} "
            f"of the samples in {folder}, which is none.",
            code="curve-nothing-held-out",
            remedy="Set train.holdout_fraction above 0.",
        )


def sample_counts(shares: Sequence[float], rows: int) -> list[int]:
    """The shares as numbers of samples, ascending.

    Raises:
        UserError: they come to fewer than three, through which every curve would go.
    """
    counts = sorted({max(1, round(share * rows)) for share in shares})
    if len(counts) < 3:
        raise UserError(
            f"--shares: expected three different numbers of samples or more, found {counts} of "
            f"{rows} training samples.",
            code="curve-shares",
            remedy="Give --shares three or more different ones, or dump more rows.",
            facts={"samples": counts, "rows": rows},
        )
    return counts


def _steps(config: TrainConfig, dataset: "Dataset", epochs: int) -> Iterator[list["Sample"]]:
    from stages.train.data.dataset import training_steps

    tokens, seed = int(config.batch_tokens), config.run.seed
    return training_steps(dataset.training, batch_tokens=tokens, seed=seed, epochs=epochs)


def settings_of(
    whole: CurveConfig, parent: dict[str, Any], samples: int, steps: int
) -> TrainConfig:
    """A training on `samples`, with the batch and the rate of one on all rows, that makes `steps`.

    It makes as many epochs as these take, the last one cut short, and has no plateau to end on.
    """
    share = whole.model_copy(update={"max_samples": samples})
    dataset = training.open_dataset(share, parent)
    read = sum(map(len, itertools.islice(_steps(share, dataset, steps), steps)))
    settings = {name: getattr(share, name) for name in TrainConfig.model_fields}
    settings["run"] = whole.run.model_copy(update={"name": f"{whole.run.name}-curve-{samples}"})
    settings["dump_of"] = whole.dump_of or whole.run.name
    settings["epochs"] = math.ceil(read / len(dataset.training))
    settings |= {"max_steps": steps, "plateau_fraction": None}
    return TrainConfig.model_validate(settings)


def _report(config: CurveConfig, rows: int, lengths: Mapping[int, float], noise: float) -> None:
    largest, most = max(lengths), config.walk_tokens + 1
    wanted = sorted({rows, 2 * largest, 10 * largest} - lengths.keys())
    forecasts = {n: forecast(lengths, n, most, noise) for n in wanted if n > largest}
    table = Table(
        "samples", "walked AL", "", title=cell(f"{config.run.name}, K = {config.walk_tokens}")
    )
    for samples, length in lengths.items():
        table.add_row(f"{samples:,}", f"{length:.2f}", _bar(length, config.walk_tokens))
    for samples, (length, low, high) in forecasts.items():
        shown = f"{length:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(f"{samples:,} forecast", shown, _bar(length, config.walk_tokens, "░"))
    tables.log(logger, table)
    made = {
        "k": config.walk_tokens,
        "measured": lengths,
        "forecast": {
            n: dict(zip(("al", "low", "high"), f, strict=True)) for n, f in forecasts.items()
        },
    }
    files.write_json(config.paths.root / "curve.json", made)


def _bar(length: float, depth: int, ink: str = "█") -> str:
    """From AL 1, which is no gain, to K + 1."""
    return ink * round(_BAR_CHARS * (length - 1) / depth)
