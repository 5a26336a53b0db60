# SPDX-License-Identifier: Apache-2.0
"""The comparison of two backends: what it calls the same, and how it names a shifted layer."""

import torch

from stages.dump.checks.parity import Line, compare

NUM_LAYERS = 8
LAYER_IDS = (2, 4, 5, NUM_LAYERS)


def every_state() -> dict[int, torch.Tensor]:
    """Two rows of states of all ids, [T, L+1, H]; each layer moves the state by a third."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for row, tokens in enumerate((7, 5)):
        steps = torch.randn(tokens, NUM_LAYERS + 1, 64, generator=generator)
        steps[:, 1:] /= 3
        rows[row] = steps.cumsum(dim=1)
    return rows


def lines(shift: int = 0, noise: float = 0.0, tolerance: float = 0.02) -> list[Line]:
    expected = every_state()
    found = {}
    for row, states in expected.items():
        ids = [(layer + shift) % (NUM_LAYERS + 1) for layer in LAYER_IDS]
        found[row] = states[:, ids] * (1 + noise)
    return compare(found, expected, LAYER_IDS, tolerance)


def test_the_same_states_are_the_same() -> None:
    for line, layer in zip(lines(noise=0.01), LAYER_IDS, strict=True):
        assert (line.layer, line.nearest) == (layer, layer)
        assert abs(line.difference - 0.01) < 1e-4
        assert line.is_right
    assert not lines(noise=0.01, tolerance=0.005)[0].is_right


def test_a_shifted_layer_is_named() -> None:
    for shift in (-1, 1):
        # However much is allowed: the nearest is another layer.
        for line in lines(shift, tolerance=10.0)[:3]:
            assert line.nearest == line.layer + shift
            assert not line.is_right


def test_a_state_that_is_no_number_is_not_the_same() -> None:
    expected = every_state()
    found = {row: states[:, list(LAYER_IDS)].clone() for row, states in expected.items()}
    found[0][0, 0, 0] = torch.nan
    assert not compare(found, expected, LAYER_IDS, 10.0)[0].is_right


def test_one_wrong_token_is_told_and_two_are_too_many() -> None:
    expected = every_state()
    for wrong, right in ((1, True), (2, False)):
        found = {row: states[:, list(LAYER_IDS)].clone() for row, states in expected.items()}
        found[0][:wrong, 1] *= -1
        line = compare(found, expected, LAYER_IDS, 0.02)[1]
        assert abs(line.worst - 2.0) < 1e-5
        assert abs(line.off - wrong / 12) < 1e-6
        assert line.is_right is right
