# SPDX-License-Identifier: Apache-2.0
"""Capture with vLLM: rows of token ids in, hidden states out, at nearly the speed of plain prefill.

In: rows of token ids. Out: per row the states entering the aux layers and the final state before the
norm, [T, A+1, H] bf16. Costs one prefill of the target, cache memory for the states in flight, and a
spool: a private folder through which the engine's process hands them over. It never holds more than
a few batches. A request is answered one engine step before its pages are read (see `connector`), so
its file appears after its answer, and the two are counted separately.

The final state is vLLM's layer id L: before the final norm, unlike HF's `hidden_states[L]`.

Shapes: T tokens of a row, A aux layers, H hidden, L layers of the target.
"""

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import vllm
from safetensors.torch import load_file
from vllm import LLMEngine, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from shared.contracts.layers import resolve_aux_layers
from shared.errors import OutputError, RetryableError, UserError
from shared.runtime.process import stop_if_requested
from shared.runtime.wording import counted
from stages.dump.backends.base import Captured, Row
from stages.dump.backends.spool import FAILED_SUFFIX, STATES_SUFFIX, open_spool
from stages.dump.backends.stats import Stats
from stages.dump.backends.vllm.connector import WRITE_TO
from stages.dump.backends.vllm.setup import VllmSettings, check_version
from stages.dump.backends.vllm.start import starting

# One batch computed, one queued behind it, one being written, one being read.
BATCHES_IN_FLIGHT = 4
# A file follows its answer within a step or two: this long means a hung disk or engine.
FILE_TIMEOUT_S = 300.0
# Each look lists the spool; a step of the engine takes longer than this.
POLL_S = 0.004

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Pending:
    """A row in the engine: its file and its answer are still to come."""

    index: int
    ids: list[int]
    is_probe: bool
    is_answered: bool = False
    logprobs: torch.Tensor | None = None


@dataclasses.dataclass(kw_only=True)
class VllmCapture(VllmSettings):
    """A vLLM engine that answers rows of token ids with hidden states."""

    streams = True

    def __enter__(self) -> Self:
        """Start the engine and send one short row through it.

        Raises:
            UserError: this vLLM, this target or this machine cannot do it.
            RetryableError: the target could not be fetched, or the engine was killed.
        """
        check_version(vllm.__version__)
        self.aux_layers = resolve_aux_layers(self.aux_layers, self.num_layers)
        config = self.resolve()
        hidden_size = config.model_config.get_hidden_size()
        self._serial = 0
        batch_tokens = max(self.max_num_batched_tokens, self.max_length_tokens)
        self._max_in_flight_tokens = BATCHES_IN_FLIGHT * batch_tokens
        token_bytes = (len(self.aux_layers) + 1) * hidden_size * torch.bfloat16.itemsize
        with contextlib.ExitStack() as stack:
            self._spool = stack.enter_context(
                open_spool(
                    self.spool_parents(),
                    needed_bytes=self._max_in_flight_tokens * token_bytes,
                    sharers=self.spool_sharers,
                )
            )
            with starting(self.target):
                self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
                stack.callback(self._engine.engine_core.shutdown)
                # Not every model that claims to have hooks has one for id L: find out now.
                list(self.run([Row([0] * min(8, self.max_length_tokens))]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Yield each row's states, mapped from the spool, as they become ready.

        `rows` is drawn from only as fast as results are taken: at most BATCHES_IN_FLIGHT batches
        of tokens are in the engine and the spool together.

        Raises:
            UserError: a row is empty or too long, or the spool is full.
            OutputError: a file holds another row's states, or pages that were never written.
            RetryableError: the engine died.
            Stopped: Ctrl-C reached the engine's process, too.
        """
        numbered = self._checked(rows)
        upcoming = next(numbered, None)
        pending: dict[str, _Pending] = {}  # by the name of the file to come
        num_tokens = 0
        last_progress = time.monotonic()
        try:
            while upcoming or pending:
                while upcoming and num_tokens + len(upcoming.ids) <= self._max_in_flight_tokens:
                    pending[self._submit(upcoming)] = upcoming
                    num_tokens += len(upcoming.ids)
                    upcoming = next(numbered, None)
                    last_progress = time.monotonic()
                self._step(pending)
                for path in self._ready_files():
                    row = pending.get(path.name)
                    if row is not None and row.is_probe and not row.is_answered:
                        continue
                    # A file that nobody waits for was left by a run that was broken off.
                    if row is not None:
                        num_tokens -= len(row.ids)
                        del pending[path.name]
                        states, stats = self._read(path, row)
                        yield Captured(row.index, states, row.logprobs, stats)
                        last_progress = time.monotonic()
                    path.unlink(missing_ok=True)
                if time.monotonic() - last_progress > FILE_TIMEOUT_S:
                    raise _engine_silent(len(pending))
        except (EngineDeadError, EngineGenerateError) as error:
            stop_if_requested("every whole shard is saved")
            raise _engine_died(len(pending), self._exit_codes()) from error
        finally:
            # Some remain only where the run is broken off: nobody waits for them any more.
            with contextlib.suppress(EngineDeadError):
                self._engine.abort_request([n for n, row in pending.items() if not row.is_answered])

    def _checked(self, rows: Iterable[Row]) -> Iterator[_Pending]:
        for index, row in enumerate(rows):
            self.require_length(index, row.ids)
            yield _Pending(index, [int(token) for token in row.ids], row.is_probe)

    def _submit(self, row: _Pending) -> str:
        """Submit one row. Returns the name of the file that its states will have."""
        # Our own count, not the row's index, which comes again in the next run.
        name = f"{self._serial:08d}{STATES_SUFFIX}"
        self._serial += 1
        wanted = {WRITE_TO: str(self._spool / name)}
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if row.is_probe else None,
            extra_args={"kv_transfer_params": wanted},
        )
        self._engine.add_request(name, {"prompt_token_ids": row.ids}, params)
        return name

    def _step(self, pending: dict[str, _Pending]) -> None:
        """Let the engine work, and note what it has answered.

        An engine in this process moves only when stepped, also to hand over files. One in a process
        of its own moves by itself; stepping only takes its answers, and would wait for ever for an
        engine that was killed. So look first whether it lives.
        """
        client = self._engine.engine_core
        if hasattr(client, "outputs_queue") and client.outputs_queue.empty():
            if client.resources.engine_dead:
                raise EngineDeadError
            time.sleep(POLL_S)
            return
        for output in self._engine.step():
            row = pending.get(output.request_id)
            if output.finished and row is not None:
                row.is_answered = True
                if row.is_probe:
                    row.logprobs = _token_logprobs(row.ids, output.prompt_logprobs)

    def _exit_codes(self) -> str:
        """How the engine's processes ended, in the form that vLLM uses at start-up."""
        manager = getattr(getattr(self._engine.engine_core, "resources", None), "engine_manager", 0)
        codes = {p.name: p.exitcode for p in getattr(manager, "processes", ()) if p.exitcode}
        return f" {codes}" if codes else ""

    def _ready_files(self) -> list[Path]:
        """The whole files in the spool, oldest request first.

        Raises:
            UserError: the engine's side could not write one.
        """
        paths = sorted(self._spool.iterdir())
        if any(path.suffix == FAILED_SUFFIX for path in paths):
            free_mib = shutil.disk_usage(self._spool).free >> 20
            raise UserError(
                f"vLLM could not write hidden states to {self._spool} ({free_mib} MiB free).",
                code="spool-write-failed",
                remedy="The cause is above this line in the log. Give /dev/shm or the workspace's disk "
                "more room, or lower dump.batch_tokens.",
                facts={"free_mib": free_mib},
            )
        return [path for path in paths if path.suffix == STATES_SUFFIX]

    def _read(self, path: Path, row: _Pending) -> tuple[torch.Tensor, Stats]:
        """The states [T, A+1, H] of `row`, mapped from the file, and what the engine measured of them.

        Raises:
            OutputError: another row's states, or pages that were never written.
        """
        tensors = load_file(path)
        if tensors["token_ids"].tolist() != row.ids:
            raise OutputError(
                f"row {row.index}: vLLM returned the hidden states of other tokens than were sent.",
                code="states-of-other-tokens",
                remedy="This is a fault of the engine; report it with the versions in the manifest.",
                facts={"row": row.index},
            )
        stats = Stats(*(tensors[name] for name in Stats._fields))
        missing = len(row.ids) - int(stats.filled)
        if missing:
            raise OutputError(
                f"row {row.index}: {missing} of {len(row.ids)} tokens have no final hidden state: "
                f"vLLM {vllm.__version__} did not capture them.",
                code="states-missing",
                remedy="Set backend: hf for this target.",
                facts={"row": row.index, "missing": missing, "tokens": len(row.ids)},
            )
        return tensors["hidden_states"], stats


def _engine_silent(rows: int) -> RetryableError:
    return RetryableError(
        f"vLLM returned no hidden states for {FILE_TIMEOUT_S:.0f} s, with {counted(rows, 'row')} in flight.",
        code="engine-silent",
        remedy="Its log is above; run the same command again to continue.",
        facts={"rows_in_flight": rows},
    )


def _engine_died(rows: int, exit_codes: str) -> RetryableError:
    return RetryableError(
        f"the vLLM engine died with {counted(rows, 'row')} in flight{exit_codes}.",
        code="engine-died",
        remedy="Its log is above; run the same command again to continue.",
        facts={"rows_in_flight": rows},
    )


def _token_logprobs(ids: list[int], reported: Any) -> torch.Tensor:
    """[T-1] from vLLM's list of T: None at 0; at t a dict of token -> its entry after ids[:t].

    Worked example, ids [7, 8, 9]: the list is [None, {8: -1.5}, {9: -0.3}], the result [-1.5, -0.3].
    """
    pairs = zip(ids[1:], list(reported)[1:], strict=True)
    return torch.tensor([entries[token].logprob for token, entries in pairs])
