# SPDX-License-Identifier: Apache-2.0
"""The fast TTT pass and loss against the plain reference, transformers' layer and literal tables.

Heads here are drawn wide (std 1/sqrt(fan-in), norms spread around 1), so that a forgotten weight or
an index off by one moves every figure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import HeadVariant, named_variant
from shared.target.tensors import FinalNorm
from stages.train.data.batch import Batch
from stages.train.model import DraftHead
from stages.train.objective import cross_entropy
from stages.train.objective.loss import (
    combine,
    ttt_loss,
)
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


@pytest.mark.parametrize(
    ("changes", "num_steps", "output"),
    [
        pytest.param({}, 3, {}, id="grouped-heads-partial-vocabulary"),
        pytest.param({"num_key_value_heads": 4}, 4, {"logit_scale": 0.7}, id="one-head-each"),
        pytest.param({"num_key_value_heads": 1}, 1, {"softcap": 2.0}, id="one-key-head-softcap"),
        pytest.param(
            {"draft_vocab_size": 9}, 5, {"logit_scale": 3.0, "softcap": 4.0}, id="full-vocabulary"
        ),
    ],
)
def test_values_and_gradients_are_the_reference_s(
    changes: dict[str, int], num_steps: int, output: dict[str, float]
) -> None:
    case = make_case(dataclasses.replace(CONFIG, **changes), seed=num_steps, **output)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=num_steps, decay=0.8)
    loss.backward()
    options = {"scale": output.get("logit_scale", 1.0), "softcap": output.get("softcap")}
    expected, expected_grads = reference_loss(case, num_steps=num_steps, decay=0.8, **options)

    assert sums.in_vocab_slots.tolist() == expected["in_vocab_slots"]
    assert sums.counted.tolist() == expected["counted"]
    assert sums.hits.tolist() == expected["hits"]
    assert sum(expected["hits"]) > 0
    if "draft_vocab_size" not in changes:
        assert sum(expected["in_vocab_slots"]) < sum(expected["counted"]), "no argmax fell outside"
    means = [m.detach().item() for m in expected["means"] if m is not None]
    assert (sums.loss / sums.in_vocab_slots).tolist()[: len(means)] == pytest.approx(
        means, abs=1e-5
    )
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert sums.mean_loss(0.8) == pytest.approx(expected["loss"].item(), abs=1e-5)
    for name, grad in gradients(case.head).items():
        torch.testing.assert_close(grad.double(), expected_grads[name], atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_reference_s(name: str) -> None:
    config = config_of(VARIANTS[name])
    case = make_case(config, lengths=(1, 8, 4), answer_share=1.0)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    expected, expected_grads = reference_loss(case, num_steps=3, decay=0.8)
    assert sums.in_vocab_slots.tolist() == expected["in_vocab_slots"]
    assert sums.hits.tolist() == expected["hits"]
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert gradients(case.head).keys() == expected_grads.keys()
    for weight, grad in gradients(case.head).items():
        torch.testing.assert_close(grad.double(), expected_grads[weight], atol=1e-5, rtol=1e-5)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(lengths=(11, 6), seed=3)
    whole, whole_sums = ttt_loss(case.head, case.batch, case.output, num_steps=4, decay=0.9)
    whole.backward()
    expected = gradients(case.head)
    for rows in (4, 12):  # one target, then three
        monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", rows)
        case.head.zero_grad()
        loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=4, decay=0.9)
        loss.backward()
        torch.testing.assert_close(torch.stack(sums), torch.stack(whole_sums), atol=1e-5, rtol=0)
        torch.testing.assert_close(gradients(case.head), expected, atol=1e-5, rtol=1e-5)


def test_a_packed_batch_equals_its_documents_one_by_one() -> None:
    case = make_case(seed=1)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    expected = gradients(case.head)
    case.head.zero_grad()
    losses, parts, start = [], [], 0
    for document in case.documents:
        stop = start + len(document.tokens)
        alone = pack([document], case.batch.in_vocab[start:stop])
        part_loss, part = ttt_loss(
            case.head,
            alone,
            case.output,
            num_steps=3,
            decay=0.8,
            in_vocab_slots=sums.in_vocab_slots,
        )
        part_loss.backward()
        losses.append(part_loss.item())
        parts.append(part)
        start = stop
    assert sum(losses) == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(torch.stack(combine(parts)), torch.stack(sums), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients(case.head), expected, atol=1e-6, rtol=1e-5)


def test_order_of_documents_does_not_matter() -> None:
    case = make_case(seed=2)
    parts = case.batch.in_vocab.split(list(LENGTHS))
    turned = pack(case.documents[::-1], torch.cat(parts[::-1]))
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    other_loss, other = ttt_loss(case.head, turned, case.output, num_steps=3, decay=0.8)
    assert other_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(torch.stack(other), torch.stack(sums), atol=1e-5, rtol=0)


def test_a_guess_outside_the_vocabulary_carries_no_loss_and_is_a_miss() -> None:
    """Even where the draft's best is the best of what is left of the target's distribution."""
    case = make_case(lengths=(40, 30), seed=1)
    inside = dataclasses.replace(case.batch, in_vocab=torch.ones(70, dtype=torch.bool))
    outside = dataclasses.replace(case.batch, in_vocab=torch.zeros(70, dtype=torch.bool))
    _, sums = ttt_loss(case.head, inside, case.output, num_steps=2, decay=0.8)
    assert (sums.hits > 0).all()
    assert torch.equal(sums.in_vocab_slots, sums.counted)
    loss, without = ttt_loss(case.head, outside, case.output, num_steps=2, decay=0.8)
    assert loss.item() == 0.0
    assert torch.equal(without.counted, sums.counted)
    assert not without.hits.any()
    assert not without.in_vocab_slots.any()


@pytest.mark.parametrize("variant", [HeadVariant(), VARIANTS["p-eagle"]], ids=lambda v: v.name)
def test_a_batch_in_which_nothing_counts_gives_zero_and_zero_gradients(
    variant: HeadVariant,
) -> None:
    """Every weight has a gradient: DDP waits for that of each."""
    case = make_case(config_of(variant), answer_share=-1.0)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    assert loss.item() == 0.0
    assert sums.mean_loss(0.8) == 0.0
    assert torch.stack(sums).sum() == 0
    for name, grad in gradients(case.head).items():
        assert grad is not None and not grad.any(), name


def test_no_grad_and_a_frozen_lm_head_take_no_gradient_of_it() -> None:
    case = make_case()
    with torch.no_grad():
        value, _ = ttt_loss(case.head, case.batch, case.output, num_steps=2, decay=0.8)
    assert not value.requires_grad
    case.head.lm_head.requires_grad_(False)
    loss, _ = ttt_loss(case.head, case.batch, case.output, num_steps=2, decay=0.8)
    loss.backward()
    assert loss.item() == pytest.approx(value.item(), abs=1e-6)
    assert case.head.lm_head.weight.grad is None
    assert case.head.fc.weight.grad.any()


@pytest.mark.parametrize("variant", [HeadVariant(), VARIANTS["p-eagle"]], ids=lambda v: v.name)
def test_mixed_precision_stays_close(variant: HeadVariant) -> None:
    sizes = {"hidden_size": 64, "target_hidden_size": 64, "head_dim": 16}
    config = dataclasses.replace(config_of(variant), **sizes)
    case = make_case(config, lengths=(40, 30, 20))
    loss, _ = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    exact = torch.cat([grad.flatten() for grad in gradients(case.head).values()])
    case.head.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    mixed.backward()
    rough = torch.cat([grad.flatten() for grad in gradients(case.head).values()])
    assert rough.dtype == torch.float32
    assert mixed.item() == pytest.approx(loss.item(), rel=0.02)
    assert not torch.equal(rough, exact)
    assert float(torch.cosine_similarity(rough, exact, dim=0)) > 0.995
