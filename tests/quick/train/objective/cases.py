# SPDX-License-Identifier: Apache-2.0
"""Problems for the TTT pass and loss: a head, documents, a target, and the plain reference's result.

Heads here are drawn wide (std 1/sqrt(fan-in), norms spread around 1), so that a forgotten weight or
an index off by one moves every figure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import HeadVariant, named_variant
from shared.target.tensors import FinalNorm
from stages.train.data.batch import Batch
from stages.train.model import DraftHead
from stages.train.objective.target_output import SharesInVocab, TargetOutput
from tests import reference

CONFIG = HeadConfig(
    hidden_size=12,
    target_hidden_size=12,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    vocab_size=9,
    draft_vocab_size=6,
    rms_norm_eps=1e-5,
    rope_theta=50.0,
    max_position_embeddings=128,
    aux_layers=(1, 2, 4),
)
LENGTHS = (1, 9, 2, 3, 12, 5)
VARIANTS = {
    "eagle3.1": named_variant("eagle3.1", None),
    "eagle3.1-qwen3": named_variant("eagle3.1", "qwen3"),
    "norm-before-fc-and-residual": HeadVariant(norm_before_fc=True, norm_before_residual=True),
    "window": HeadVariant(window=4),
    "p-eagle": named_variant("eagle3", parallel=True),
    "p-eagle-norms-qwen3-window": named_variant("eagle3.1", "qwen3", 4, parallel=True),
    "p-eagle-norm-before-residual": HeadVariant(
        norm_before_fc=True, norm_before_residual=True, parallel=True
    ),
}


def config_of(variant: HeadVariant) -> HeadConfig:
    """CONFIG with a variant; a mask token that texts here hold too."""
    return dataclasses.replace(CONFIG, variant=variant, mask_token=3 if variant.parallel else None)


def make_head(config: HeadConfig = CONFIG, *, seed: int = 0) -> DraftHead:
    torch.manual_seed(seed)
    token_ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    partial = config.draft_vocab_size < config.vocab_size
    head = DraftHead(
        config,
        embed_tokens=torch.randn(config.vocab_size, config.hidden_size),
        d2t=token_ids - torch.arange(len(token_ids)) if partial else None,
    )
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(1.0, 0.2)
    return head


class Case(NamedTuple):
    """One problem, packed for the fast path and apart for the reference."""

    head: DraftHead
    batch: Batch
    output: TargetOutput
    documents: list[reference.Document]
    target: dict[str, Tensor]
    token_ids: Tensor


def pack(documents: Sequence[reference.Document], in_vocab: Tensor) -> Batch:
    return Batch(
        input_ids=torch.cat([d.tokens for d in documents]),
        loss_mask=torch.cat([d.answer for d in documents]),
        aux_states=torch.cat([d.states for d in documents]),
        final_states=torch.cat([d.finals for d in documents]),
        offsets=torch.tensor([0, *(len(d.tokens) for d in documents)]).cumsum(0),
        in_vocab=in_vocab,
        sample_ids=(),
    )


def make_case(
    config: HeadConfig = CONFIG,
    *,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
    answer_share: float = 0.75,
    **output: Any,
) -> Case:
    head = make_head(config, seed=seed)
    size = config.hidden_size
    documents = [
        reference.Document(
            tokens=torch.randint(0, config.vocab_size, (length,)),
            states=torch.randn(length, len(config.aux_layers) * size),
            finals=torch.randn(length, size),
            answer=torch.rand(length) < answer_share,  # several turns a document
        )
        for length in lengths
    ]
    target = {"norm": torch.rand(size) + 0.5, "lm_head": torch.randn(config.vocab_size, size) / 2}
    token_ids = head.to_target_ids(torch.arange(config.draft_vocab_size))
    norm = FinalNorm(target["norm"], config.rms_norm_eps)
    whole = TargetOutput(norm, target["lm_head"], **output)
    finals = torch.cat([d.finals for d in documents])
    inside = torch.isin(torch.arange(config.vocab_size), token_ids)
    shares = SharesInVocab(whole, inside)(finals)
    rows = TargetOutput(norm, target["lm_head"][token_ids], **output)
    batch = pack(documents, shares)
    return Case(head, batch, rows, documents, target, token_ids)


def shape_of(config: HeadConfig) -> reference.Shape:
    return reference.Shape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rope_theta,
        config.rms_norm_eps,
        frozenset(name for name, is_set in vars(config.variant).items() if is_set),
        config.variant.window,
        config.mask_token,
    )


def reference_loss(case: Case, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reference's result in float64, and the gradient of its loss for each parameter."""
    weights = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in case.head.named_parameters()
    }
    documents = [
        dataclasses.replace(d, states=d.states.double(), finals=d.finals.double())
        for d in case.documents
    ]
    result = reference.ttt_loss(
        weights,
        shape_of(case.head.config),
        case.head.embed_tokens.double(),
        documents,
        {name: tensor.double() for name, tensor in case.target.items()},
        case.token_ids,
        **options,
    )
    result["loss"].backward()
    return result, {name: tensor.grad for name, tensor in weights.items()}


def gradients(head: DraftHead) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in head.named_parameters()}
