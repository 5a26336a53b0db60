# SPDX-License-Identifier: Apache-2.0
"""Capture with transformers: for targets that vLLM has no hooks for, and as the check on vLLM.

In: rows of token ids. Out: per row the states entering the aux layers and the final state before
the norm, [T, A+1, H] bf16. Costs one forward pass of the target without its lm_head, in padded
batches of rows of similar length. HF's own `hidden_states[L]` is *after* the final norm, so a hook
takes the final state on its way into the norm.

Shapes: B rows of a batch, T tokens of a row, S the longest T of a batch, A aux layers, H hidden.
"""

import dataclasses
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from shared.contracts.layers import resolve_aux_layers
from shared.errors import UserError
from shared.runtime.processor import keep_freed_memory
from shared.target.classes import class_facts, loadable_class
from shared.target.model import TargetConfig, read_config
from shared.target.probe import parent_of
from stages.dump.backends.base import Captured, CaptureSettings, Row

logger = logging.getLogger(__name__)

# Rows are sorted by length this many batches at a time: little padding, and still a stream.
SORTED_BATCHES = 16
# More tokens a batch leave a processor's caches: 8192 were a quarter slower.
CPU_BATCH_TOKENS = 2048


@dataclasses.dataclass(kw_only=True)
class HfCapture(CaptureSettings):
    """A target in transformers that answers rows of token ids with hidden states.

    `max_num_batched_tokens` counts padding too.

    Attributes:
        device: "cuda", "cpu", or None for a GPU where there is one.
    """

    device: str | None = None
    # Batches of rows of similar length never cross a shard's edge: the same in every run.
    streams = False

    def __enter__(self) -> Self:
        """Load the target.

        Raises:
            UserError: ids out of range, another number of layers, or no place to hook into.
        """
        self.aux_layers = resolve_aux_layers(self.aux_layers, self.num_layers)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cpu":
            keep_freed_memory()
            self.max_num_batched_tokens = min(self.max_num_batched_tokens, CPU_BATCH_TOKENS)
        try:
            target = read_config(Path(self.target), trust_remote_code=self.trust_remote_code)
            facts = class_facts(target)
            model = loadable_class(target).from_pretrained(
                self.target,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                # Over all GPUs that are there; a target larger than one still loads.
                device_map="auto" if device == "cuda" else device,
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"transformers could not load {self.target}: {error}",
                code="target-not-loadable",
                remedy="Check run.target, or set backend: vllm.",
                facts={"target": str(self.target)},
            ) from error
        self._model = model.eval()
        self._decoder = parent_of(model, model.get_input_embeddings())
        layers = getattr(self._decoder, facts.layers)
        norm = getattr(self._decoder, facts.final_norm)
        self.require_num_layers(len(layers))
        self._taken: dict[int, torch.Tensor] = {}
        self._hooks = ExitStack()
        for slot, module in enumerate([*(layers[i] for i in self.aux_layers), norm]):
            hook = module.register_forward_pre_hook(self._keeper(slot), with_kwargs=True)
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._taken.clear()
        del self._decoder, self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Yield each row's states, not in the rows' order.

        Raises:
            UserError: a row is empty or longer than `max_length_tokens`, or memory is short.
        """
        for window in _windows(enumerate(rows), SORTED_BATCHES * self.max_num_batched_tokens):
            for index, row in window:
                self.require_length(index, row.ids)
            for batch in _batches(window, self.max_num_batched_tokens):
                try:
                    states = self._forward([row.ids for _, row in batch])
                    for slot, (index, row) in enumerate(batch):
                        logprobs = self._logprobs(row.ids) if row.is_probe else None
                        yield Captured(index, states[slot, : len(row.ids)], logprobs)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"the GPU has no memory for a batch of {self.max_num_batched_tokens} "
                        f"tokens: {error}",
                        code="out-of-memory",
                        remedy="Lower dump.batch_tokens.",
                        facts={"batch_tokens": self.max_num_batched_tokens},
                    ) from error

    @torch.inference_mode()
    def _logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[T-1] log-probabilities of a row, by the whole model, alone and without padding."""
        device = next(self._decoder.parameters()).device
        row = torch.tensor([list(ids)], device=device)
        values = self._model(input_ids=row, use_cache=False).logits[0, :-1].float()  # [T-1, V]
        wanted = row[0, 1:].to(values.device)[:, None]
        return torch.log_softmax(values, dim=-1).gather(-1, wanted)[:, 0].cpu()

    @torch.inference_mode()
    def _forward(self, rows: list[Sequence[int]]) -> torch.Tensor:
        """Run one batch, padded on the right.

        Causal attention never looks right, so padding there changes no real token. That needs no
        mask, and without one attention takes its fastest kernel.

        Returns:
            [B, S, A+1, H] bf16 on the CPU.
        """
        longest = max(map(len, rows))
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # [B, S]
        for i, ids in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
        device = next(self._decoder.parameters()).device
        # The decoder alone: logits of a large vocabulary would be the biggest tensor here.
        self._decoder(input_ids=input_ids.to(device), use_cache=False)
        slots = range(len(self.aux_layers) + 1)
        taken = [self._taken.pop(slot).to("cpu", torch.bfloat16) for slot in slots]
        return torch.stack(taken, dim=2)

    def _keeper(self, slot: int) -> Any:
        """A hook that keeps the first input of its module, [B, S, H], as `slot`."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._taken[slot] = args[0] if args else kwargs["hidden_states"]

        return keep


def require_known(target: TargetConfig, *, why: str) -> None:
    """Refuse a target that transformers has no usable class for.

    Raises:
        UserError: with `why`, the reason that vLLM gave.
    """
    try:
        class_facts(target)
    except UserError as error:
        raise UserError(
            f"no backend can capture {target.folder}. vLLM: {why} hf: {error.problem}",
            code="no-backend",
            remedy="Choose another target, or capture with newer versions of vLLM or transformers.",
            facts={"target": str(target.folder)},
        ) from error


def _windows(
    numbered: Iterator[tuple[int, Row]], max_tokens: int
) -> Iterator[list[tuple[int, Row]]]:
    """Rows in their order, about `max_tokens` at a time."""
    window: list[tuple[int, Row]] = []
    tokens = 0
    for index, row in numbered:
        window.append((index, row))
        tokens += len(row.ids)
        if tokens >= max_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _batches(window: list[tuple[int, Row]], max_tokens: int) -> Iterator[list[tuple[int, Row]]]:
    """Rows of similar length together, each batch at most `max_tokens` with its padding."""
    batch: list[tuple[int, Row]] = []
    # Longest first: the first batch shows at once whether memory is enough.
    for index, row in sorted(window, key=lambda numbered: -len(numbered[1].ids)):
        if batch and (len(batch) + 1) * len(batch[0][1].ids) > max_tokens:
            yield batch
            batch = []
        batch.append((index, row))
    if batch:
        yield batch
