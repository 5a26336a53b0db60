# SPDX-License-Identifier: Apache-2.0
"""Do two backends hand out the same states for the same rows, layer by layer?

In: the recipe, and the rows that dump would take. Out: a table, and exit 3 if a layer differs by
more than the tolerance. Cost: both backends are loaded, one after the other. For every layer the
table names the id of the other backend's state that is nearest: a shifted layer shows at once.

Legend: T tokens of a row, A aux layers, H hidden size, L layers of the target.
"""

import itertools
import logging

import torch
from rich.table import Table

from shared.contracts import layers
from shared.errors import OutputError, UserError
from shared.runtime import tables
from shared.runtime.status import Accounting
from shared.runtime.wording import counted
from shared.target import model as target
from shared.target.model import TargetConfig
from stages.dump import sources
from stages.dump.backends.base import Row
from stages.dump.backends.choose import choose, open_backend
from stages.dump.config import ParityConfig

logger = logging.getLogger(__name__)

# A token that is this many tolerances away is far off; a larger share of them is a mix-up.
FAR = 5
MAX_OFF = 0.1
States = dict[int, torch.Tensor]


def run(config: ParityConfig) -> None:
    """Compare the recipe's backend with `--against`.

    Raises:
        UserError: both are the same backend, or there are no rows.
        OutputError: a layer differs.
    """
    source = sources.open_source(config)
    folder = target.locate_trained(config.run, config.workspace)
    target_config = target.read_config(folder, trust_remote_code=config.run.trust_remote_code)
    aux_layers = layers.resolve_aux_layers(config.run.aux_layers, target_config.num_layers)
    name = choose(config, target_config, aux_layers)
    if name == config.against:
        raise UserError(
            f"parity: both backends are {name}.",
            code="parity-one-backend",
            remedy="Set --backend or --against to another one.",
            facts={"backend": name},
        )
    limit = config.run.max_length_tokens
    chosen = itertools.islice(source.rows(folder, Accounting()), config.rows)
    rows = [Row(row.input_ids[:limit], sample_id=row.sample_id) for row in chosen]
    if not rows:
        raise UserError(
            "parity: expected at least one row to compare, found none.",
            code="no-rows",
            remedy="Check synth's answers, or --conversations.",
        )
    captured = _capture(name, config, target_config, aux_layers, rows)
    # Every state that the other backend can give, so that the nearest is among them.
    every = tuple(range(target_config.num_layers))
    expected = _capture(config.against, config, target_config, every, rows)
    lines = compare(captured, expected, (*aux_layers, target_config.num_layers), config.tolerance)
    tables.log(logger, _table(name, config.against, lines))
    wrong = [line for line in lines if not line.is_right]
    if wrong:
        differences = ", ".join(
            f"id {line.layer} differs by {line.difference:.3f}, {line.off:.0%} of tokens far off"
            + (f" and is nearest to id {line.nearest}" if line.nearest != line.layer else "")
            for line in wrong
        )
        raise OutputError(
            f"{name} and {config.against} disagree on {counted(len(rows), 'row')} ({differences}), expected "
            f"at most {config.tolerance}.",
            code="parity-differs",
            remedy="A nearest id other than its own means a shifted layer: check run.aux_layers.",
            facts={"layers": [line.layer for line in wrong]},
        )


def _capture(
    name: str,
    config: ParityConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    rows: list[Row],
) -> States:
    logger.info("%s through %s", counted(len(rows), "row"), name)
    with open_backend(name, config, target_config, aux_layers) as backend:
        return {captured.row: captured.states.clone() for captured in backend.run(rows)}


class Line:
    """One layer's comparison over all tokens. Differences are relative to the expected state.

    Attributes:
        layer: its id.
        difference: of the median token. Norms differ a hundredfold between tokens, and a mixture of
            experts routes a token elsewhere at a near tie, so a sum or the worst token shows little.
        worst: of the token that differs most.
        off: share of tokens that differ by more than FAR tolerances.
        nearest: id of the other backend's state that is nearest to this one.
    """

    def __init__(
        self, layer: int, states: torch.Tensor, expected: torch.Tensor, tolerance: float
    ) -> None:
        """Compare states [n, H] with the expected ones of all ids [n, L+1, H]."""
        gaps = (states[:, None] - expected).norm(dim=2) / expected.norm(dim=2)  # [n, L+1]
        medians = gaps.median(dim=0).values
        self.layer = layer
        self.tolerance = tolerance
        self.difference = float(medians[layer])
        self.nearest = int(medians.argmin())
        self.worst = float(gaps[:, layer].max())
        self.off = float((gaps[:, layer] > FAR * tolerance).float().mean())

    @property
    def is_right(self) -> bool:
        """Whether this is the expected state; a NaN is not."""
        near = self.difference <= self.tolerance and self.off <= MAX_OFF
        return near and self.nearest == self.layer


def compare(
    captured: States, expected: States, layer_ids: tuple[int, ...], tolerance: float
) -> list[Line]:
    """Compare states [T, A+1, H] of each row with the other backend's of all ids, [T, L+1, H].

    Args:
        layer_ids: the A+1 ids of `captured`, in order.
    """
    rows = sorted(expected)
    whole = torch.cat([expected[row] for row in rows]).float()
    ours = torch.cat([captured[row] for row in rows]).float()
    return [Line(layer, ours[:, slot], whole, tolerance) for slot, layer in enumerate(layer_ids)]


def _table(name: str, against: str, lines: list[Line]) -> Table:
    table = Table(title=f"{name} against {against}")
    for heading in ("layer id", "difference", "worst token", "far off", "nearest id", ""):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            str(line.layer),
            f"{line.difference:.4f}",
            f"{line.worst:.4f}",
            f"{line.off:.1%}",
            str(line.nearest),
            "same" if line.is_right else "DIFFERS",
        )
    return table
