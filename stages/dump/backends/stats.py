# SPDX-License-Identifier: Apache-2.0
"""What dump's checks need to know of one row's states, measured where the states are.

The engine measures on its own device while it copies, so the stage's process need not read
gigabytes again. Legend: T tokens of a row or of a part of it, A aux layers, H hidden size.
"""

from typing import NamedTuple

import torch


class Stats(NamedTuple):
    """Measured on states [T, A+1, H].

    Attributes:
        magnitude: [A+1] float32, the largest absolute value of each layer; NaN where it holds one.
        is_constant: [A+1] bool, the layer's state is the same at every token.
        filled: [] int64, number of tokens whose final state is not all zeros.
    """

    magnitude: torch.Tensor
    is_constant: torch.Tensor
    filled: torch.Tensor

    def joined(self, other: "Stats") -> "Stats":
        """Stats of a row from those of its parts."""
        return Stats(
            torch.maximum(self.magnitude, other.magnitude),  # a NaN comes through
            self.is_constant & other.is_constant,
            self.filled + other.filled,
        )


def measure(states: torch.Tensor, first: torch.Tensor | None = None) -> Stats:
    """Stats of states [T, A+1, H], on their device.

    Args:
        first: [A+1, H] the first token of the row, where `states` is a later part of it.
    """
    # Two plain reductions along H are three times as fast on a CPU as one over abs() of everything.
    magnitude = torch.maximum(states.amax(2).amax(0), -states.amin(2).amin(0)).float()
    first = states[0] if first is None else first
    if states.is_cpu and not bool((states[-1] == first).all(1).any()):
        # The last token nearly always settles it. A GPU must not wait for such a question.
        is_constant = torch.zeros_like(magnitude, dtype=torch.bool)
    else:
        is_constant = (states == first).all(2).all(0)
    return Stats(magnitude, is_constant, states[:, -1].any(dim=-1).sum())
