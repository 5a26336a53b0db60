# SPDX-License-Identifier: Apache-2.0
"""Capture with TensorRT-LLM: text models on NVIDIA's GPUs, with tensor and expert parallel.

In: rows of token ids. Out: per row the states entering the aux layers and the final state before the
norm, [T, A+1, H] bf16. Costs one prefill of the target, one row a step, and a spool: a private folder
into which the engine's process writes one file per row. It was never run on a GPU; `setup` says which
sources it was written against, and what follows from them.

Shapes: T tokens of a row, A aux layers, H hidden, L layers of the target.
"""

import contextlib
import dataclasses
import logging
import pickle
import threading
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Self

import tensorrt_llm
import torch
from tensorrt_llm import LLM, SamplingParams

from shared.contracts.layers import resolve_aux_layers
from shared.errors import OutputError, RetryableError
from shared.target.model import read_config
from stages.dump.backends.base import Captured, Row
from stages.dump.backends.spool import open_spool
from stages.dump.backends.trtllm.setup import TrtllmSettings, check_version, engine_died, starting

# A file is written before its row is answered: so long a wait means a hung disk or engine.
FILE_TIMEOUT_S = 300.0
POLL_S = 0.002
# What torch.load raises for a file that is not whole yet.
_HALF_WRITTEN = (RuntimeError, EOFError, OSError, pickle.UnpicklingError)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class TrtllmCapture(TrtllmSettings):
    """A TensorRT-LLM engine that answers rows of token ids with hidden states, one after another."""

    streams = True

    def __enter__(self) -> Self:
        """Start the engine and send two short rows through it.

        Raises:
            UserError: this TensorRT-LLM, this target or this machine cannot do it.
            RetryableError: the engine was killed.
        """
        check_version(tensorrt_llm.__version__)
        self.aux_layers = resolve_aux_layers(self.aux_layers, self.num_layers)
        config = read_config(Path(self.target))
        self.require_num_layers(config.num_layers)
        self._config = config
        # The aux layers, the final state, and the normed one that the engine adds.
        row_bytes = self.max_length_tokens * (len(self.aux_layers) + 2) * config.hidden_size * 2
        with contextlib.ExitStack() as stack:
            self._spool = stack.enter_context(
                open_spool(
                    self.spool_parents(), needed_bytes=2 * row_bytes, sharers=self.spool_sharers
                )
            )
            arguments = self.arguments(self._spool)
            with starting(self.target):
                self._engine = LLM(**arguments)
            stack.callback(self._engine.shutdown)
            self._require_hooks()
            self._stack = stack.pop_all()
        logger.warning(
            "TensorRT-LLM reports no log-probabilities here: only greedy answers check the final "
            "state. Compare all layers with transformers: `dump parity --against hf`."
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Yield each row's states, in the rows' order, mapped from the spool; never log-probabilities.

        The next row is in the engine while the caller has the last one's states.

        Raises:
            UserError: a row is empty or too long.
            OutputError: a file holds another row's states, or other layers.
            RetryableError: the engine died.
        """
        numbered = iter(enumerate(rows))
        pending = self._submit(next(numbered, None))
        try:
            while pending is not None:
                captured = Captured(pending.index, self._wait(pending), None)
                pending = self._submit(next(numbered, None))
                yield captured
        finally:
            if pending is not None:
                with contextlib.suppress(RuntimeError):
                    pending.answer.abort()

    def _submit(self, numbered: tuple[int, Row] | None) -> "_Pending | None":
        if numbered is None:
            return None
        index, ids = numbered[0], [int(token) for token in numbered[1].ids]
        self.require_length(index, ids)
        # An end that no token has: without one, the engine would need a tokenizer.
        params = SamplingParams(max_tokens=1, temperature=0.0, end_id=-1, detokenize=False)
        try:
            return _Pending(index, ids, self._engine.generate_async(ids, params))
        except RuntimeError as error:
            raise engine_died(error) from error

    def _wait(self, pending: "_Pending") -> torch.Tensor:
        """The states [T, A+1, H] of the row that is in the engine."""
        end = time.monotonic() + FILE_TIMEOUT_S
        strangers = 0
        while time.monotonic() < end:
            for path in self._spool.glob("*.pt"):
                entries = _load(path)
                if entries is None:
                    continue
                path.unlink()
                # A file that nobody waits for was left by a run that was broken off.
                own = [entry for entry in entries if entry["input_ids"].tolist() == pending.ids]
                if own:
                    return self._states(own[0], pending)
                strangers += 1
            if pending.error is not None:
                raise engine_died(pending.error) from pending.error
            time.sleep(POLL_S)
        if strangers:
            raise OutputError(
                f"row {pending.index}: TensorRT-LLM returned the hidden states of other tokens than "
                "were sent.",
                code="states-of-other-tokens",
                remedy="This is a fault of the engine; report it with the versions in the manifest.",
                facts={"row": pending.index},
            )
        raise RetryableError(
            f"TensorRT-LLM returned no hidden states for {FILE_TIMEOUT_S:.0f} s, for row "
            f"{pending.index}.",
            code="engine-silent",
            remedy="Its log is above; run the same command again to continue.",
            facts={"row": pending.index},
        )

    def _states(self, entry: dict[str, Any], pending: "_Pending") -> torch.Tensor:
        """[T, A+1, H] out of a file's entry: its columns are layers in ascending order, as ours."""
        num_states = len(self.aux_layers) + 1
        columns = entry.get("aux_hidden_states")
        expected = [len(pending.ids), num_states * self._config.hidden_size]
        shape = None if columns is None else list(columns.shape)
        if columns is None or shape != expected:
            raise OutputError(
                f"row {pending.index}: expected aux_hidden_states {expected} from TensorRT-LLM "
                f"{tensorrt_llm.__version__}, found {shape}.",
                code="states-other-columns",
                remedy="Set backend: hf for this target.",
                facts={"expected": expected, "found": shape},
            )
        return columns.view(len(pending.ids), num_states, -1).to(torch.bfloat16)

    def _require_hooks(self) -> None:
        """Two rows of other tokens must leave other states, in every layer.

        Raises:
            UserError: a layer's memory was not touched by the second.
        """
        length = min(4, self.max_length_tokens)
        rows = [Row(range(start, start + length)) for start in (0, 1)]
        first, second = (c.states[-1].clone().view(torch.int16) for c in self.run(rows))  # [A+1, H]
        if bool((first == second).all(dim=-1).any()):
            raise self.unsupported(
                f"TensorRT-LLM {tensorrt_llm.__version__}",
                self._config.model_type,
                "its model has no hooks",
            )


class _Pending:
    """A row in the engine, and a thread that waits for its answer: a killed engine never answers.

    Attributes:
        error: what the engine raised instead of an answer.
    """

    def __init__(self, index: int, ids: list[int], answer: Any) -> None:
        self.index = index
        self.ids = ids
        self.answer = answer
        self.error: Exception | None = None
        threading.Thread(target=self._listen, name="eyrie-answer", daemon=True).start()

    def _listen(self) -> None:
        try:
            self.answer.result()
        except (RuntimeError, ValueError, OSError) as error:
            self.error = error


def _load(path: Path) -> list[dict[str, Any]] | None:
    """A file's rows, mapped; None while it is being written."""
    try:
        entries = torch.load(path, weights_only=True, mmap=True)
    except _HALF_WRITTEN:
        return None
    return list(entries)
