# SPDX-License-Identifier: Apache-2.0
"""Stands in for TensorRT-LLM where there is none: its calls, its refusals, and the files it saves.

In: a folder with a small target. Out: what the real package's drafter writes while states are saved,
by its source: rows of a step one after the other in one buffer, each saved from the buffer's first
row on; a layer's output as its column, ascending, the normed final state last. A real transformers
model computes them, on the CPU. `faults` says what goes wrong.
"""

import dataclasses
import queue
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .llmapi import LlmArgs

__version__ = "1.2.1"
TOKENS_PER_BLOCK = 32


@dataclasses.dataclass
class Faults:
    forces_one_a_step: bool = True  # the real one does; ours asks for it all the same
    refuses: Exception | None = None  # at the start
    dies_at: int | None = None  # the request that ends the engine, from 1
    says_so: bool = True  # a killed worker says nothing
    keeps_files: bool = False  # answers, and writes none
    has_hooks: bool = True
    other_ids: bool = False  # in the files


faults = Faults()
engines: list["LLM"] = []


class RequestError(RuntimeError):
    pass


@dataclasses.dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    max_tokens: int = 32
    temperature: float | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    return_context_logits: bool = False
    prompt_logprobs: int | None = None


class Answer:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.aborted = False
        self._queue: queue.Queue[Exception | None] = queue.Queue()

    def put(self, error: Exception | None) -> None:
        self._queue.put(error)

    def result(self, timeout: float | None = None) -> "Answer":
        error = self._queue.get()  # the real one forgets its timeout here too
        if error is not None:
            raise error
        return self

    def abort(self) -> None:
        self.aborted = True


class LLM:
    def __init__(self, model: str, **kwargs: Any) -> None:
        self.args = LlmArgs(model=model, **kwargs)
        if faults.forces_one_a_step:
            self.args.save_one_at_a_time()
        if faults.refuses is not None:
            raise faults.refuses
        self.steps: list[int] = []  # rows of each
        self.is_shut = False
        spec = self.args.speculative_config
        wanted = sorted(spec.eagle3_layers_to_capture)
        self._layers = [*(layer for layer in wanted if layer >= 0), -1]
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=self.args.dtype).eval()
        self._hidden_size = self._model.config.hidden_size
        self._buffer = torch.ones(  # whatever lay in memory
            self.args.max_num_tokens + 2,
            len(self._layers) * self._hidden_size,
            dtype=torch.bfloat16,
        )
        self._requests: queue.Queue[Answer | None] = queue.Queue()
        self._seen: list[list[int]] = []
        self._count, self._iter, self._saved = 0, 1, []
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        engines.append(self)

    def generate_async(self, inputs: list[int], sampling_params: SamplingParams) -> Answer:
        if sampling_params.end_id is None and self.args.skip_tokenizer_init:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if len(inputs) > self.args.max_num_tokens and not self.args.enable_chunked_prefill:
            raise RequestError("should not exceed max_num_tokens")
        answer = Answer(list(inputs))
        self._requests.put(answer)
        return answer

    def shutdown(self) -> None:
        self.is_shut = True
        self._requests.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (first := self._requests.get()) is not None:
            step = [first]
            while len(step) < self.args.max_batch_size and not self._requests.empty():
                if (more := self._requests.get()) is None:
                    return
                step.append(more)
            self._count += len(step)
            if faults.dies_at is not None and self._count >= faults.dies_at:
                if faults.says_so:
                    step[0].put(RequestError("Executor worker died"))
                return
            self.steps.append(len(step))
            self._compute([self._cached(answer.ids) for answer in step], step)
            for answer in step:
                if not faults.keeps_files:
                    self._save(answer.ids)
                answer.put(None)

    def _cached(self, ids: list[int]) -> int:
        """How many tokens of a row lie in the cache already, in whole blocks."""
        if not self.args.kv_cache_config.enable_block_reuse:
            return 0
        found = 0
        for seen in self._seen:
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, seen, strict=False)) if a != b), None
            )
            length = min(len(ids), len(seen)) if same is None else same
            found = max(found, min(length, len(ids) - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK)
        self._seen.append(ids)
        return found

    def _compute(self, cached: list[int], step: list[Answer]) -> None:
        if not faults.has_hooks:
            return
        start = 0
        for skipped, answer in zip(cached, step, strict=True):
            states = self._states(answer.ids)[skipped:]
            self._buffer[start : start + len(states)] = states.flatten(1)
            start += len(states)

    @torch.inference_mode()
    def _states(self, ids: list[int]) -> torch.Tensor:
        """[T, columns, H]: layers' outputs, and the final state after the norm."""
        taken: dict[int, torch.Tensor] = {}

        def keep(index: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                taken[index] = (output[0] if isinstance(output, tuple) else output)[0]

            return hook

        hooks = [
            layer.register_forward_hook(keep(i)) for i, layer in enumerate(self._model.model.layers)
        ]
        hooks.append(self._model.model.norm.register_forward_hook(keep(-1)))
        self._model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack([taken[layer].view(len(ids), -1) for layer in self._layers], dim=1)

    def _save(self, ids: list[int]) -> None:
        spec = self.args.speculative_config
        told = [token + 1 for token in ids] if faults.other_ids else ids
        rows = self._buffer[: len(ids)]
        entry = {
            "id": self._iter,
            "input_ids": torch.tensor(told, dtype=torch.long),
            "hidden_state": rows[:, -self._hidden_size :].clone(),
        }
        if len(self._layers) > 1:
            whole = rows if spec._last_hidden_in_save else rows[:, : -self._hidden_size]
            entry["aux_hidden_states"] = whole.clone()
        self._saved.append(entry)
        if self._iter % spec.write_interval == 0:
            folder = Path(spec.output_directory)
            torch.save(self._saved, folder / f"{spec.file_prefix}_{self._iter}.pt")
            self._saved = []
        self._iter += 1
