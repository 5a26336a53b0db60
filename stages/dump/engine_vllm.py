# SPDX-License-Identifier: Apache-2.0
"""Capture with vLLM: rows of token ids in, hidden states out, at nearly the speed of plain prefill.

In: rows of token ids. Out: per row the states entering the aux layers and the final state before the
norm, [T, A+1, H] bf16. Costs one prefill of the target, cache memory for the states in flight, and a
spool: a private folder through which the engine's process hands them over, never fuller than a few
batches. The surprise: a request is answered one engine step before its pages are read (see
`connector`), so its file appears after its answer, and the two are counted apart.

The final state is vLLM's layer id L: before the final norm, unlike HF's `hidden_states[L]`.

Shapes: T tokens of a row, A aux layers, H hidden, L layers of the target.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from safetensors.torch import load_file
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from shared.errors import OutputError, RetryableError, UserError
from shared.layers import resolve_aux_layers
from stages.dump.connector import FAILED_SUFFIX, SHM, STATES_SUFFIX, WRITE_TO, open_spool
from stages.dump.engine_hf import check_row

SUPPORTED_VLLM = ">=0.28,<0.33"
# One batch computed, one queued behind it, one being written, one being read.
BATCHES_IN_FLIGHT = 4
# vLLM takes no states at all from a step in which a row fills its limit: the limit is one higher.
HEADROOM_TOKENS = 1
MAX_ROWS_A_STEP = 256
# A file follows its answer within a step or two: this long means a hung disk or engine.
FILE_TIMEOUT_S = 300.0
POLL_S = 0.001


@dataclasses.dataclass(kw_only=True)
class VllmCapture:
    """A vLLM engine that answers rows of token ids with hidden states.

    Attributes:
        target, revision: name or folder of the target; its revision where it is a name.
        aux_layers: ids of the states to take, ascending; id i is the state entering layer i.
        num_layers: L, checked against the target.
        max_length_tokens: longest row that will be asked for.
        dtype: what the target computes in, as vLLM's `--dtype`.
        tensor_parallel: GPUs that share the target.
        max_num_batched_tokens: tokens of one engine step; longer rows are prefilled in chunks.
        spool: folder to make the private spool folder in; None for /dev/shm where it has room,
            else `scratch`, a folder on a disk (None for the system's).
    """

    target: str | Path
    revision: str | None = None
    aux_layers: Sequence[int]
    num_layers: int
    max_length_tokens: int
    dtype: str = "auto"
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    max_num_batched_tokens: int = 8192
    spool: Path | None = None
    scratch: Path | None = None
    seed: int = 0

    def __enter__(self) -> Self:
        """Start the engine and send one short row through it.

        Raises:
            UserError: this vLLM, this target or this machine cannot do it.
            RetryableError: the target could not be fetched.
        """
        check_version(vllm.__version__)
        self.aux_layers = resolve_aux_layers(self.aux_layers, self.num_layers)
        _prepare_environment()
        config = self._engine_config()
        self._check_target(config)
        self._hidden_size = config.model_config.get_hidden_size()
        self._serial = 0
        batch_tokens = max(self.max_num_batched_tokens, self.max_length_tokens)
        self._max_in_flight_tokens = BATCHES_IN_FLIGHT * batch_tokens
        token_bytes = (len(self.aux_layers) + 1) * self._hidden_size * torch.bfloat16.itemsize
        folders = [self.spool] if self.spool else [SHM, self.scratch or Path(tempfile.gettempdir())]
        with contextlib.ExitStack() as stack:
            self._spool = stack.enter_context(
                open_spool(folders, needed_bytes=self._max_in_flight_tokens * token_bytes)
            )
            try:
                self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
                stack.callback(self._engine.engine_core.shutdown)
                # Not every model that says it has hooks has one for id L: find out now.
                list(self.run([[0] * min(8, self.max_length_tokens)]))
            except (RuntimeError, ValueError, RetryableError) as error:
                raise UserError(
                    f"vLLM {vllm.__version__} could not start capturing {self.target}: {error} "
                    "The cause stands above this in the log. If memory is short, lower "
                    "max_num_batched_tokens; if the model is not supported, set engine: hf."
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, rows: Iterable[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index of the row, states [T, A+1, H] bf16 on the CPU) as rows become ready.

        `rows` is drawn from only as fast as results are taken: at most BATCHES_IN_FLIGHT batches
        of tokens are in the engine and the spool together.

        Raises:
            UserError: a row is empty or too long, or the spool is full.
            OutputError: a file holds another row's states, or pages that were never written.
            RetryableError: the engine died.
        """
        numbered = self._checked(rows)
        upcoming = next(numbered, None)
        in_flight: dict[str, tuple[int, list[int]]] = {}  # file name -> row
        unanswered: set[str] = set()
        num_tokens = 0
        last_progress = time.monotonic()
        try:
            while upcoming or in_flight:
                while upcoming and num_tokens + len(upcoming[1]) <= self._max_in_flight_tokens:
                    name = self._submit(upcoming[1])
                    in_flight[name] = upcoming
                    unanswered.add(name)
                    num_tokens += len(upcoming[1])
                    upcoming = next(numbered, None)
                    last_progress = time.monotonic()
                unanswered -= self._step()
                for path in self._ready_files():
                    # A file that nobody waits for is left of a run that was broken off.
                    if row := in_flight.pop(path.name, None):
                        num_tokens -= len(row[1])
                        yield row[0], self._read(path, *row)
                        last_progress = time.monotonic()
                    path.unlink(missing_ok=True)
                if time.monotonic() - last_progress > FILE_TIMEOUT_S:
                    raise RetryableError(
                        f"vLLM gave no hidden states for {FILE_TIMEOUT_S:.0f} s, with "
                        f"{len(in_flight)} rows asked for. Its log is above; run again to continue."
                    )
        except (EngineDeadError, EngineGenerateError) as error:
            raise RetryableError(
                f"the vLLM engine died with {len(in_flight)} rows in flight; its log is above. Run "
                "the same command again to continue."
            ) from error
        finally:
            # Some are left only where the run is broken off: nobody waits for them any more.
            with contextlib.suppress(EngineDeadError):
                self._engine.abort_request(sorted(unanswered))

    def _checked(self, rows: Iterable[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        for index, row in enumerate(rows):
            check_row(index, row, self.max_length_tokens)
            yield index, [int(token) for token in row]

    def _submit(self, ids: list[int]) -> str:
        """Ask for one row. Returns the name of the file its states will have."""
        # Our own count, not the row's index: an index comes again in the next run.
        name = f"{self._serial:08d}{STATES_SUFFIX}"
        self._serial += 1
        wanted = {WRITE_TO: str(self._spool / name)}
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": wanted},
        )
        self._engine.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def _step(self) -> set[str]:
        """Let the engine work. Returns the names of the requests it has answered.

        An engine in this process moves only when stepped, also to hand over files. One in a process
        of its own moves by itself; stepping only takes its answers. That would wait forever for an
        engine that was killed, so look first whether there is one.
        """
        client = self._engine.engine_core
        if hasattr(client, "outputs_queue") and client.outputs_queue.empty():
            if client.resources.engine_dead:
                raise EngineDeadError
            time.sleep(POLL_S)
            return set()
        return {output.request_id for output in self._engine.step() if output.finished}

    def _ready_files(self) -> list[Path]:
        """The whole files in the spool, oldest request first.

        Raises:
            UserError: the engine's side could not write one.
        """
        paths = sorted(self._spool.iterdir())
        if any(path.suffix == FAILED_SUFFIX for path in paths):
            free_mib = shutil.disk_usage(self._spool).free >> 20
            raise UserError(
                f"vLLM could not write hidden states to {self._spool} ({free_mib} MiB free); the "
                "cause stands above in the log. Give the spool a folder with more room."
            )
        return [path for path in paths if path.suffix == STATES_SUFFIX]

    def _read(self, path: Path, index: int, ids: list[int]) -> torch.Tensor:
        """The states [T, A+1, H] of row `index`, checked to be its own, in memory of their own.

        Raises:
            OutputError: another row's states, or pages that were never written.
        """
        tensors = load_file(path)
        if tensors["token_ids"].tolist() != ids:
            raise OutputError(
                f"row {index}: vLLM returned the hidden states of other tokens than were sent. "
                "This is a fault of the engine; report it with the versions in the manifest."
            )
        states = tensors["hidden_states"]
        missing = len(ids) - int(states[:, -1].any(dim=-1).sum())
        if missing:
            raise OutputError(
                f"row {index}: {missing} of {len(ids)} tokens have no final hidden state. vLLM "
                f"{vllm.__version__} did not capture them; use engine: hf for this target."
            )
        # `load_file` maps the file: without the copy the spool would stay full until the caller
        # lets go of the tensor.
        return states.clone()

    def _engine_config(self) -> VllmConfig:
        """The configuration for capture, as vLLM resolves it.

        Raises:
            UserError: vLLM refuses it.
            RetryableError: the target could not be fetched.
        """
        try:
            try:
                return self._arguments(HEADROOM_TOKENS).create_engine_config()
            except ValueError:
                # Perhaps only for the headroom, where rows go up to the target's own limit. No
                # token is ever computed at that position, so vLLM may be told to let it pass.
                self._arguments(0).create_engine_config()
                os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
                return self._arguments(HEADROOM_TOKENS).create_engine_config()
        except ValueError as error:
            raise UserError(f"vLLM {vllm.__version__} refuses {self.target}: {error}") from error
        except OSError as error:
            kind = UserError if Path(self.target).exists() else RetryableError
            raise kind(f"could not load {self.target}: {error}") from error

    def _arguments(self, headroom_tokens: int) -> EngineArgs:
        layer_ids = [*self.aux_layers, self.num_layers]
        return EngineArgs(
            model=str(self.target),
            revision=self.revision,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            tensor_parallel_size=self.tensor_parallel,
            max_model_len=self.max_length_tokens + headroom_tokens,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=min(MAX_ROWS_A_STEP, self.max_num_batched_tokens),
            enforce_eager=current_platform.is_cpu(),
            # A row whose prefix is found in a cache comes back short by it.
            enable_prefix_caching=False,
            seed=self.seed,
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids}
                },
            },
            kv_transfer_config={
                "kv_connector": "HiddenStatesConnector",
                "kv_connector_module_path": "stages.dump.connector",
                "kv_role": "kv_producer",
            },
        )

    def _check_target(self, config: VllmConfig) -> None:
        """Refuse, before any weight is loaded, a target that cannot be captured.

        Raises:
            UserError: another number of layers, or no hooks for hidden states.
        """
        model = config.model_config
        found = model.get_total_num_hidden_layers()
        if found != self.num_layers:
            raise UserError(
                f"{self.target}: expected {self.num_layers} layers, found {found}. Set run.target "
                "to the model the recipe was made for."
            )
        model_class, architecture = ModelRegistry.resolve_model_cls(model.architectures, model)
        if model.use_mla or not supports_eagle3(model_class):
            raise UserError(
                f"vLLM {vllm.__version__} cannot hand out the hidden states of {architecture} "
                f"({self.target}). Set engine: hf in the recipe's dump section."
            )


def check_version(found: str) -> None:
    """Refuse a vLLM whose capture was never tried.

    Raises:
        UserError: naming the version found and the versions supported.
    """
    # A build for CPUs is 0.32.0+cpu; a specifier is about the release alone.
    if Version(Version(found).base_version) not in SpecifierSet(SUPPORTED_VLLM):
        raise UserError(
            f"this stage captures with vLLM {SUPPORTED_VLLM}, found vLLM {found}. Build the dump "
            "image with DUMP_VLLM_VERSION set to one of those, or set engine: hf."
        )


def _prepare_environment() -> None:
    """What vLLM's processes inherit: where our connector is, how much to say, how much to take."""
    source_root = str(Path(__file__).resolve().parents[2])
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if source_root not in search:
        os.environ["PYTHONPATH"] = os.pathsep.join([source_root, *filter(None, search)])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
