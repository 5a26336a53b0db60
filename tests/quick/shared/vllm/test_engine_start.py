# SPDX-License-Identifier: Apache-2.0
"""Why a vLLM server did not start, or died: from how it ended and its last lines."""

import pytest

from shared.errors import RetryableError, UserError
from shared.vllm.engine_start import last_exception, server_death, server_start_error

WRAPPER = (
    "RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {%s}"
)
TOO_SMALL = (
    "(EngineCore pid=7) ERROR 11-28 11:00:00 [core.py:9] EngineCore failed to start.\n"
    "(EngineCore pid=7) ERROR 11-28 11:00:00 [core.py:9] ValueError: To serve at least one request "
    "0.5 GiB of KV cache is needed\n"
)


@pytest.mark.parametrize(
    ("code", "text", "kind", "name"),
    [
        (1, TOO_SMALL + WRAPPER % "'EngineCore_DP0': 1", UserError, "engine-start-refused"),
        (
            1,
            TOO_SMALL + WRAPPER % "'EngineCore_DP0': 1, 'b': -15",
            UserError,
            "engine-start-refused",
        ),
        (1, TOO_SMALL + WRAPPER % "", UserError, "engine-start-refused"),
        (1, WRAPPER % "'EngineCore_DP0': -9", RetryableError, "engine-start-killed"),
        (1, WRAPPER % "", RetryableError, "engine-start-killed"),
        (-9, "", RetryableError, "engine-start-killed"),
        (
            2,
            "api_server.py: error: unrecognized arguments: --x 1",
            UserError,
            "engine-start-refused",
        ),
        (1, "OSError: [Errno 98] Address already in use", RetryableError, "engine-start-transient"),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", UserError, "engine-start-refused"),
        (1, "", UserError, "engine-start-refused"),
    ],
)
def test_a_failed_start(code: int, text: str, kind: type, name: str) -> None:
    error = server_start_error(code, text)
    assert (type(error), error.code) == (kind, name)


@pytest.mark.parametrize(
    ("code", "text", "kind", "name"),
    [
        (-9, "", RetryableError, "engine-died"),
        (1, "EngineDeadError: EngineCore encountered an issue", RetryableError, "engine-died"),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", UserError, "engine-out-of-memory"),
    ],
)
def test_a_death_in_use(code: int, text: str, kind: type, name: str) -> None:
    error = server_death(code, text)
    assert (type(error), error.code) == (kind, name)


def test_the_cause_and_not_its_wrapper_is_shown() -> None:
    text = TOO_SMALL + WRAPPER % "'EngineCore_DP0': 1"
    assert last_exception(text).startswith("ValueError: To serve at least one request")
    assert "To serve at least one request" in server_start_error(1, text).problem
