# SPDX-License-Identifier: Apache-2.0
"""Random heads of every variant inside vLLM's own model classes, in float32, in both layouts, against ours.

No engine is started: vLLM reads the exported folder, builds its draft model and loads the tensors
with its own loader. Its paged attention alone, which needs an engine, is replaced by a plain one
that sees what vLLM's layer says: all earlier positions, or its window of them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import HeadVariant, named_variant
from shared.io.files import read_json
from shared.target import model as targets
from shared.target.tensors import read_tensors
from stages.bench.head_check import needed_settings
from stages.train.export.hf import export_head
from stages.train.model import DraftHead
from tests.engine.process_group import single_process_group
from tests.heads import draft_logits
from tests.models import tiny_llama

pytestmark = pytest.mark.engine

K = 3
TOLERANCE = 1e-3
LENGTHS = (5, 17, 60)


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    from vllm.config import VllmConfig

    with single_process_group(VllmConfig()):
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("target") / "tiny", max_length_tokens=256)


def random_head(target: Path, variant: HeadVariant) -> DraftHead:
    """Drawn wide, norms spread around 1, so that a norm that is missing moves every logit."""
    config = HeadConfig.from_json(
        targets.read_config(target).settings,
        aux_layers=(1, 3, 5),
        draft_vocab_size=128,
        variant=variant,
    )
    if variant.parallel:  # a token of the texts too: the state beside it tells the mask apart
        config = dataclasses.replace(config, mask_token=77)
    torch.manual_seed(0)
    embeddings = read_tensors(targets.read_config(target)).embed_tokens.float()
    head = DraftHead(config, embed_tokens=embeddings, d2t=torch.arange(128) * 2)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(1.0, 0.3)
    return head.eval()


class PlainAttention(nn.Module):
    """Causal attention that keeps its keys, over the positions that vLLM's own layer would see."""

    def __init__(self, served: Any) -> None:
        super().__init__()
        self.size, self.scale = served.head_size, served.impl.scale
        self.window = served.sliding_window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(1, (-1, self.size)) for x in (query, key, value))
        self.keys.append(key)
        self.values.append(value)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        own = torch.arange(len(keys) - len(query), len(keys))[:, None]
        distance = own - torch.arange(len(keys))[None]
        seen = (distance >= 0) & (distance < (self.window or len(keys)))
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query, keys) * self.scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


class Served:
    """vLLM's draft model of an exported folder."""

    def __init__(self, target: Path, folder: Path, embeddings: Tensor) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader.utils import (
            initialize_model,
            process_weights_after_loading,
        )
        from vllm.utils.torch_utils import set_default_torch_dtype
        from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id

        options: dict[str, Any] = {"method": "eagle3", "model": str(folder)}
        options |= {"num_speculative_tokens": K, **needed_settings(folder)}
        self.config = EngineArgs(
            model=str(target),
            dtype="float32",
            max_model_len=256,
            speculative_config=options,
            enforce_eager=True,
        ).create_engine_config()
        speculative: Any = self.config.speculative_config
        with set_current_vllm_config(self.config), set_default_torch_dtype(torch.float32):
            self.model: Any = initialize_model(
                vllm_config=self.config, model_config=speculative.draft_model_config
            )
            self.model.load_weights(iter(load_file(folder / "model.safetensors").items()))
            self.model.model.embed_tokens.weight.data[: len(embeddings)] = embeddings
            process_weights_after_loading(
                self.model, speculative.draft_model_config, torch.device("cpu")
            )
        self.mask_token: int | None = None
        if speculative.parallel_drafting:
            served = speculative.draft_model_config.hf_config
            self.mask_token = get_parallel_drafting_token_id(served)
        self.layer = self.model.model.layers[0].self_attn
        self.attention = self.layer.attn

    @torch.no_grad()
    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        """[K, V] of the last slot's chain, each step fed as vLLM's proposer feeds it."""
        from vllm.config import set_current_vllm_config

        self.layer.attn = PlainAttention(self.attention)
        last, found = len(states) - 1, []
        inputs, positions = tokens[1 : last + 2], torch.arange(last + 1)
        with set_current_vllm_config(self.config):
            fed = self.model.combine_hidden_states(states)
            if self.mask_token is not None:
                mask = self.model.combine_hidden_states(self.model.mask_hidden.view(-1))
                inputs = torch.cat((inputs, torch.full((K - 1,), self.mask_token)))
                fed = torch.cat((fed, mask.expand(K - 1, -1)))
                output, _ = self.model(inputs, torch.arange(last + K), fed)
                logits: Tensor = self.model.compute_logits(output[last:])
                return logits
            for step in range(K):
                output, fed = self.model(inputs, positions, fed)
                found.append(self.model.compute_logits(output[-1:]))
                fed = fed[-1:]
                inputs, positions = tokens[last + 2 + step][None], positions[-1:] + 1
        return torch.cat(found)


def apart(target: Path, folder: Path, head: DraftHead) -> tuple[float, float]:
    """(largest difference of a logit, share of equal drafted ids)."""
    served, rows = Served(target, folder, head.embed_tokens), head.token_ids()
    worst, equal = 0.0, []
    for seed, length in enumerate(LENGTHS):
        torch.manual_seed(seed)
        tokens, states = torch.randint(0, 512, (length + 1 + K,)), torch.randn(length, 3 * 128)
        theirs = served.logits(tokens, states)[:, rows]
        slot = torch.tensor([length - 1])
        with torch.no_grad():
            ours = draft_logits(head, tokens, states, num_steps=K, slots=slot)[:, 0]
        worst = max(worst, float((theirs - ours).abs().max()))
        equal += (theirs.argmax(-1) == ours.argmax(-1)).tolist()
    return worst, sum(equal) / len(equal)


def as_ours(head: DraftHead, out: Path) -> None:
    export_head(head, out, target="tiny", provenance={}, dtype="float32")


def as_speculators(head: DraftHead, out: Path) -> None:
    export_head(
        head,
        out,
        target="tiny",
        target_architectures=["LlamaForCausalLM"],
        provenance={},
        dtype="float32",
    )


VARIANTS = {
    "classic": HeadVariant(),
    "eagle3.1": named_variant("eagle3.1"),
    "window": named_variant("eagle3", None, 16),
    "eagle3.1-qwen3-window": named_variant("eagle3.1", "qwen3", 16),
    "norm-before-fc-and-residual": HeadVariant(norm_before_fc=True, norm_before_residual=True),
    "p-eagle": named_variant("eagle3", parallel=True),
    "p-eagle-norms-window": named_variant("eagle3.1", None, 16, parallel=True),
    "p-eagle-norms-qwen3": named_variant("eagle3.1", "qwen3", parallel=True),
    "p-eagle-norm-before-fc": HeadVariant(norm_before_fc=True, parallel=True),
}


@pytest.mark.parametrize("export", [as_ours, as_speculators])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_vllms(
    target: Path, tmp_path: Path, name: str, export: Callable[[DraftHead, Path], None]
) -> None:
    head = random_head(target, VARIANTS[name])
    export(head, tmp_path / "head")
    worst, equal = apart(target, tmp_path / "head", head)
    assert worst < TOLERANCE
    assert equal == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm_output": False},
        {"fc_norm": False},
        {"norm_before_residual": True},
        {"sliding_window": 8},
    ],
    ids=str,
)
def test_a_wrong_flag_is_caught(target: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    head = random_head(target, named_variant("eagle3.1", None, 16))
    as_ours(head, tmp_path / "head")
    config: dict[str, Any] = read_json(tmp_path / "head" / "config.json")
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | wrong))
    if wrong == {"fc_norm": False}:  # here vLLM has no parameter for a tensor of the file
        with pytest.raises(Exception, match="fc_norm"):
            apart(target, tmp_path / "head", head)
        return
    worst, _ = apart(target, tmp_path / "head", head)
    assert worst > 100 * TOLERANCE


def test_another_mask_token_is_caught(target: Path, tmp_path: Path) -> None:
    head = random_head(target, VARIANTS["p-eagle"])
    as_ours(head, tmp_path / "head")
    config: dict[str, Any] = read_json(tmp_path / "head" / "config.json")
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"pard_token": 78}))
    worst, _ = apart(target, tmp_path / "head", head)
    assert worst > 100 * TOLERANCE
