# SPDX-License-Identifier: Apache-2.0
"""Would more rows help? Trainings on growing shares of the dump, and a forecast for more than there is.

In: a finished dump. Out: one run `<name>-curve-<samples>` for each share, trained for as many steps as the
recipe makes on all rows, so that they differ in their data alone; `<name>/curve.json`; a table. Cost: one
training for each share. A second call skips those that are done.

The forecast is AL(n) = L - b n^-c, L at most K + 1, fitted to the best walk of each training: the mean over
the exponents c, each weighted by how likely the walks are by its fit. The best fit alone would follow
the noise of so few walks.

Worked example (K = 3): 75, 150 and 300 samples reach 2.75, 3.15 and 3.34. Each doubling adds 0.47 of what
the one before it added, so the best fit has c = 1.08 and L = 3.52, and reaches 3.47 at 1,140 samples; smaller
exponents, nearly as likely, reach more. The forecast is 3.50.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table

from shared.artifacts.history import read_curves
from shared.errors import OutputError, UserError
from shared.io import files
from shared.runtime import tables
from shared.runtime.tables import cell
from stages.train import run as training
from stages.train.config import CurveConfig, TrainConfig, rank
from stages.train.loop import budget

EXPONENTS = np.linspace(0.2, 1.5, 53)  # of fits that are tried
WALK_NOISE = 0.05  # standard error of a walk over some tens of samples
_BAR_CHARS = 40  # for the longest AL there can be, K + 1

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fit:
    """AL(n) = limit - drop * (n / largest)^-exponent, and its root mean square error."""

    error: float
    limit: float
    drop: float
    exponent: float
    largest: int

    def at(self, samples: int) -> float:
        return self.limit - self.drop * (samples / self.largest) ** -self.exponent


def run(config: CurveConfig) -> None:
    """Train on each share, and forecast.

    Raises:
        UserError: as train's.
        OutputError: there are no walks to draw.
    """
    parent, target_config = training.inputs(config)
    whole = budget.resolved(config, parent, target_config.hidden_size)
    rows = budget.training_rows(config, parent)
    lengths: dict[int, float] = {}
    for samples in sample_counts(config.shares, rows):
        settings = _settings(whole, samples, rows)
        logger.info("%d of %d samples: run %s", samples, rows, settings.run.name)
        training.run(settings)
        walks = read_curves(settings.paths.stage("train") / "history.jsonl")["walks"]
        if not walks:
            raise OutputError(
                f"{settings.paths.stage('train')}: expected walked acceptance lengths, found none.",
                code="curve-without-walks",
                remedy="A curve needs held-out samples with greedy answers: set synth.temperature to 0.",
            )
        lengths[samples] = max(length for _, length in walks)
    if rank() == 0:
        _report(config, rows, lengths)


def sample_counts(shares: Sequence[float], rows: int) -> list[int]:
    """The shares as numbers of samples, ascending.

    Raises:
        UserError: they come to fewer than three, through which every curve would go.
    """
    counts = sorted({max(1, round(share * rows)) for share in shares})
    if len(counts) < 3:
        raise UserError(
            f"train.shares: expected three different numbers of samples or more, found {counts} of "
            f"{rows} training samples.",
            code="curve-shares",
            remedy="Set train.shares to three or more different shares, or dump more rows.",
            facts={"samples": counts, "rows": rows},
        )
    return counts


def _settings(whole: CurveConfig, samples: int, rows: int) -> TrainConfig:
    """A training on `samples`, with the batch, the rate and the steps of one on all `rows`."""
    settings = {name: getattr(whole, name) for name in TrainConfig.model_fields}
    settings["run"] = whole.run.model_copy(update={"name": f"{whole.run.name}-curve-{samples}"})
    settings["dump_of"] = whole.dump_of or whole.run.name
    settings["max_samples"] = samples
    settings["epochs"] = math.ceil(whole.epochs * rows / samples)
    return TrainConfig.model_validate(settings)


def _report(config: CurveConfig, rows: int, lengths: Mapping[int, float]) -> None:
    largest = max(lengths)
    wanted = sorted({rows, 2 * largest, 10 * largest} - lengths.keys())
    forecasts = {n: forecast(lengths, n, config.walk_tokens + 1) for n in wanted if n > largest}
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


def forecast(lengths: Mapping[int, float], samples: int, most: int) -> tuple[float, float, float]:
    """(AL at `samples`, and the lowest and highest of the fits that are about as good as the best one).

    They are apart by what the walks scatter around the best fit at least: where more data did not help,
    all fits are their mean.
    """
    tried = list(_fits(lengths, most))
    errors, found = np.array([[fit.error, fit.at(samples)] for fit in tried]).T
    weights = np.exp(-len(lengths) / 2 * (errors**2 - errors.min() ** 2) / WALK_NOISE**2)
    good = found[errors <= max(2 * errors.min(), WALK_NOISE)]
    mean, scatter = float(weights @ found / weights.sum()), max(WALK_NOISE, float(errors.min()))
    low, high = min(good.min(), mean - scatter), max(good.max(), mean + scatter)
    return mean, max(1.0, float(low)), min(float(most), float(high))


def _fits(lengths: Mapping[int, float], most: int) -> Iterator[Fit]:
    """The least-squares fit of each exponent; kept from falling, and below `most`."""
    largest = max(lengths)
    measured = np.array(list(lengths.values()))
    for exponent in EXPONENTS:
        falls = (np.array(list(lengths)) / largest) ** -exponent
        columns = np.stack([np.ones_like(falls), -falls], axis=1)
        limit, drop = np.linalg.lstsq(columns, measured, rcond=None)[0]
        if limit > most:
            limit, drop = most, ((most - measured) @ falls) / (falls @ falls)
        if drop < 0:
            limit, drop = measured.mean(), 0.0
        error = float(np.sqrt(np.mean((limit - drop * falls - measured) ** 2)))
        yield Fit(error, float(limit), float(drop), float(exponent), largest)
