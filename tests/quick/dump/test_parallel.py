# SPDX-License-Identifier: Apache-2.0
"""Several engines on one node: what their processes' ends mean."""

import pytest

from shared.errors import EyrieError, OutputError, RetryableError, UserError
from stages.dump.parallel import _engine_error, visible_devices


@pytest.mark.parametrize(
    ("exit_code", "kind"),
    [
        (1, EyrieError),  # a bug stays one: a retry would only repeat it
        (2, UserError),
        (3, OutputError),
        (75, RetryableError),
        (-9, RetryableError),
        (120, EyrieError),
    ],
)
def test_an_engines_exit_code_is_this_processs(exit_code: int, kind: type[EyrieError]) -> None:
    error = _engine_error(1, exit_code, engines=4)
    assert type(error) is kind
    assert error.facts == {"engine": 1, "exit_code": exit_code}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("4,5", ["4", "5"]),
        ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]),
        ("2,-1,3", ["2"]),
        ("", []),
        ("-1", []),
    ],
)
def test_devices_are_those_that_cuda_would_use(
    monkeypatch: pytest.MonkeyPatch, listed: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_devices() == expected
