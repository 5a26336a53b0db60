# SPDX-License-Identifier: Apache-2.0
"""What the TTT loss does not depend on: chunks, packing, order, whether gradients are taken, precision."""

import dataclasses

import pytest
import torch

from shared.contracts.head_variant import HeadVariant
from stages.train.objective import cross_entropy
from stages.train.objective.loss import combine, ttt_loss
from tests.quick.train.objective.cases import (
    LENGTHS,
    VARIANTS,
    config_of,
    gradients,
    make_case,
    pack,
)


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
