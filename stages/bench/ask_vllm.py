# SPDX-License-Identifier: Apache-2.0
"""Asks vLLM itself, without starting an engine, what it would make of a head: the one file that imports it.

In: a question (JSON): the target, the head, its tensors' names and shapes, the engine's options. Out:
an `Answer` (JSON). Costs one import of vLLM, about 10 s, and no memory: the draft model is built
on the meta device, and its own loader gets meta tensors with the file's names and shapes. A watcher
sees which parameters the loader writes to and which tensors it reads from, so that nothing here
repeats vLLM's rules for names, shapes or flags.

`python -m stages.bench.ask_vllm QUESTION.json ANSWER.json`
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import __version__ as VLLM_VERSION
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import get_model_cls, initialize_model
from vllm.model_executor.models.interfaces import supports_eagle3, supports_multimodal
from vllm.v1.sample.rejection_sampler import MAX_SPEC_LEN
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from shared.errors import FOREIGN_ERRORS
from shared.io.files import read_json, write_json
from shared.runtime.process import expect_threads_to_outlive_the_work, leave

# Options of the engine that decide how models are read.
_READING = (
    "code_revision",
    "config_format",
    "hf_config_path",
    "hf_overrides",
    "kv_cache_dtype",
    "load_format",
    "model_impl",
    "quantization",
    "tokenizer",
    "tokenizer_mode",
)
_WRAPPERS = "vllm.model_executor.models.transformers"
_WRITES = ("aten::copy_", "aten::fill_", "aten::zero_")
_READS = {"aten::copy_": 1, "aten::_to_copy": 0}  # operator -> index of the argument that is read


class _Watcher(TorchDispatchMode):
    """Counts the elements written to each storage, and those read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, int] = {}
        self.read: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in _WRITES:
            key = _storage(args[0])
            self.written[key] = self.written.get(key, 0) + args[0].numel()
        if name in _READS and isinstance(source := args[_READS[name]], torch.Tensor):
            key = _storage(source)
            self.read[key] = self.read.get(key, 0) + source.numel()
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    """The same for all views of one tensor, also on the meta device."""
    return int(tensor.untyped_storage()._cdata)


def _draft_model(config: VllmConfig) -> torch.nn.Module:
    draft = config.speculative_config.draft_model_config
    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            return initialize_model(vllm_config=config, model_config=draft)


def _borrow_embedding(config: VllmConfig) -> None:
    """Raise what vLLM raises where its wrapper around transformers' class cannot serve the head.

    The wrapper is built on the meta device, and vLLM's drafter looks for the embedding that it lends to
    a head. vLLM's own classes with hooks all have one: they are not built.
    """
    with torch.device("meta"):
        target: Any = initialize_model(vllm_config=config)
    text = target.get_language_model() if supports_multimodal(target) else target
    drafter: Any = SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace()))
    EagleProposer._maybe_share_embeddings(drafter, text)


def _load(model: Any, shapes: dict[str, list[int]]) -> tuple[dict[str, str], list[str], _Watcher]:
    """(tensors that vLLM refuses and why, tensors that it does not read whole, what it wrote)."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    # Of a P-EAGLE head; without it vLLM loads no other tensor.
    mask: Any = getattr(model, "mask_hidden", None)
    refused: dict[str, str] = {}
    watcher = _Watcher()
    for name, tensor in tensors.items():  # one by one, so that a refusal has a name
        try:
            with watcher:
                beside = mask is not None and "mask_hidden" not in name
                given = {name: tensor} | ({"mask_hidden": torch.empty_like(mask)} if beside else {})
                model.load_weights(iter(given.items()))
        except FOREIGN_ERRORS as error:
            refused[name] = str(error) or type(error).__name__
    dropped = [
        name
        for name, tensor in tensors.items()
        if name not in refused and watcher.read.get(_storage(tensor), 0) < tensor.numel()
    ]
    return refused, dropped, watcher


def _unwritten(
    model: Any, config: VllmConfig, watcher: _Watcher
) -> Iterator[tuple[str, list[int]]]:
    """Parameters that the file does not fill, and that the target does not lend its own for."""
    target = config.model_config
    lent = [target.get_vocab_size(), target.get_hidden_size()]
    owned = {
        "embed_tokens": getattr(model, "has_own_embed_tokens", False),
        "lm_head": getattr(model, "has_own_lm_head", False),
    }
    for name, parameter in model.named_parameters():
        if watcher.written.get(_storage(parameter), 0) >= parameter.numel():
            continue
        part = next((part for part in owned if f"{part}.weight" in name), None)
        module = model.get_submodule(name.rpartition(".")[0])
        shape = [getattr(module, "org_vocab_size", parameter.shape[0]), *parameter.shape[1:]]
        if part is None or owned[part] or shape != lent:
            yield name, shape


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    options = question["engine_args"]
    try:
        config = EngineArgs(
            model=question["target"],
            trust_remote_code=question["trust_remote_code"],
            dtype=question["dtype"],
            max_model_len=question["max_model_len"],
            speculative_config=question["speculative"],
            enforce_eager=True,
            **{name: options[name] for name in _READING if name in options},
        ).create_engine_config()
        target = get_model_cls(config.model_config)
        if not supports_eagle3(target):
            return {"without_hooks": target.__name__}
        with set_current_vllm_config(config):
            model: Any = _draft_model(config)
            if target.__module__.startswith(_WRAPPERS):
                _borrow_embedding(config)
    except FOREIGN_ERRORS as error:
        return {"refusal": f"{type(error).__name__}: {error}"}
    with set_current_vllm_config(config):
        refused, dropped, watcher = _load(model, question["shapes"])
    runner: Any = SimpleNamespace(speculative_config=config.speculative_config)
    aux_layers = GPUModelRunner._get_eagle3_aux_layers_from_config(runner)
    return {
        "refused": refused,
        "dropped": dropped,
        "unwritten": dict(_unwritten(model, config, watcher)),
        "aux_layers": list(aux_layers) if aux_layers else None,
        "num_aux_states": getattr(model.model, "num_aux_hidden_states", None),
        "is_quantised": config.speculative_config.draft_model_config.quantization is not None,
    }


def main(question_path: Path, answer_path: Path) -> int:
    """Write the answer, or vLLM's refusal. Any other exception is a bug and a traceback."""
    question = read_json(question_path)
    known: dict[str, Any] = {
        "vllm_version": VLLM_VERSION,
        "max_draft_length": MAX_SPEC_LEN,
        "unknown_options": sorted(
            question["engine_args"].keys() - EngineArgs.__dataclass_fields__.keys()
        ),
    }
    depth = question["speculative"]["num_speculative_tokens"]
    is_plain = not known["unknown_options"] and depth <= MAX_SPEC_LEN
    write_json(answer_path, known | (_answer(question) if is_plain else {}))
    return 0


if __name__ == "__main__":
    expect_threads_to_outlive_the_work()  # gloo's, which vLLM's layers ask for
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
