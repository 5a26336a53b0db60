# SPDX-License-Identifier: Apache-2.0
"""What more rows would bring: a power law through the walked acceptance lengths of growing shares.

In: the walked acceptance length AL of each number of samples. Out: that of more samples, and its range.

AL(n) = L - b n^-c, L at most K + 1, is fitted for each of many exponents c by least squares. The forecast
is the mean over them, each weighted by how likely the walks are by its fit. The best fit alone would follow
the noise of so few walks. Exponents are tried in equal ratios, from the 0.05 of a curve that rises as much
with each doubling (published ones begin at 0.07: Hestness et al., arXiv 1712.00409) to the 1.5 of one
that is all but flat. The range is two standard deviations to either side: of the fits from each other, and of
walks around the best one.

Worked example (K = 3): 75, 150 and 300 samples reach 2.75, 3.15 and 3.34. Each doubling adds 0.47 of what
the one before it added, so the best fit has c = 1.08 and L = 3.52, and reaches 3.47 at 1,140 samples; smaller
exponents, nearly as likely, reach more. The forecast is 3.51, from 3.35 to 3.67.
"""

import math
from collections.abc import Mapping

import numpy as np

EXPONENTS = np.geomspace(0.05, 1.5, 60)
WALK_NOISE = 0.03  # what two trainings differ by in any case
# Standard deviation of AL among answers, by the intervals in MEASUREMENTS.md: 0.03 to 0.04 over 80 prompts.
_ANSWER_SPREAD = 0.3


def walk_noise(answers: int) -> float:
    """Standard error of the walked acceptance length over so many held-out answers."""
    return max(WALK_NOISE, _ANSWER_SPREAD / math.sqrt(max(1, answers)))


def forecast(
    lengths: Mapping[int, float], samples: int, most: int, noise: float = WALK_NOISE
) -> tuple[float, float, float]:
    """(AL at `samples`, the low and the high end of its range).

    Args:
        lengths: AL by number of samples, of three or more.
        most: the largest AL that there can be, K + 1.
        noise: standard error of each AL; walks that scatter more around the best fit have that instead.
    """
    counts, measured = np.array(list(lengths), dtype=float), np.array(list(lengths.values()))
    fits = [_fit(counts, measured, samples, most, exponent) for exponent in EXPONENTS]
    errors, found = np.array(fits).T
    noise = max(noise, float(errors.min()))
    weights = np.exp(-len(lengths) / 2 * (errors**2 - errors.min() ** 2) / noise**2)
    mean = float(np.average(found, weights=weights))
    reach = 2 * math.hypot(noise, math.sqrt(np.average((found - mean) ** 2, weights=weights)))
    return mean, max(1.0, mean - reach), min(float(most), mean + reach)


def _fit(
    counts: np.ndarray, measured: np.ndarray, samples: int, most: int, exponent: float
) -> tuple[float, float]:
    """(root mean square error, AL at `samples`) of the least-squares fit that never falls nor passes `most`.

    Args:
        counts: [N] samples.
        measured: [N] AL.
    """
    falls = (counts / counts.max()) ** -exponent
    columns = np.stack([np.ones_like(falls), -falls], axis=1)
    limit, drop = np.linalg.lstsq(columns, measured, rcond=None)[0]
    if limit > most:
        limit, drop = most, ((most - measured) @ falls) / (falls @ falls)
    if drop < 0:
        limit, drop = measured.mean(), 0.0
    error = np.sqrt(np.mean((limit - drop * falls - measured) ** 2))
    return float(error), float(limit - drop * (samples / counts.max()) ** -exponent)
