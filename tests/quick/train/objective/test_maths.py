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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import HeadVariant, named_variant
from shared.errors import UserError
from shared.target.tensors import FinalNorm
from stages.train.data.batch import Batch, counted_slots, make_plan
from stages.train.kernels.fused import LOSSES
from stages.train.model import DraftHead
from stages.train.objective import cross_entropy
from stages.train.objective.cross_entropy import SlotLosses, to_slots, to_targets
from stages.train.objective.loss import (
    combine,
    step_weights,
    ttt_loss,
)
from stages.train.objective.target_output import TargetOutput, target_argmax
from tests import reference
from tests.heads import draft_logits

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
    best = target_argmax(
        torch.cat([d.finals for d in documents]),
        norm=norm,
        lm_head=target["lm_head"],
    )
    rows = TargetOutput(norm, target["lm_head"][token_ids], **output)
    batch = pack(documents, torch.isin(best, token_ids))
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
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_reference_s(name: str) -> None:
    config = dataclasses.replace(CONFIG, variant=VARIANTS[name])
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


def test_the_worked_example_of_eagle_3_1() -> None:
    """model.py's second table, slot 2: what fc and the next steps are fed."""
    head = make_head(dataclasses.replace(CONFIG, variant=VARIANTS["eagle3.1"]))
    fed: list[Tensor] = []
    for module in (head.fc, head.midlayer.hidden_norm):
        module.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    tokens, states = torch.randint(0, 9, (6,)), torch.randn(6, 36)
    slot = torch.tensor([2])
    with torch.no_grad():
        outputs = head(tokens, states, offsets=torch.tensor([0, 6]), slots=slot, num_steps=3)
        logits = head.lm_head(head.to_lm_head(outputs[0]))
    by_fc, step_0, step_1, step_2 = fed
    g2 = states[2].view(3, 12)
    rms = g2 / (g2.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = torch.cat([rms[i] * head.fc_norm[i].weight for i in range(3)])
    torch.testing.assert_close(by_fc[2], expected)
    torch.testing.assert_close(step_0[2], head.fc.weight @ expected)
    for output, following in ((outputs[0], step_1), (outputs[1], step_2)):
        torch.testing.assert_close(output, following)
        scaled = (output[0] / head.norm.weight).square().mean()
        assert scaled.item() == pytest.approx(1, abs=1e-4), "not the normed state"
    torch.testing.assert_close(logits, outputs[0] @ head.lm_head.weight.t())


@pytest.mark.parametrize("name", LOSSES[1:])
def test_every_loss_is_the_reference_s(name: str) -> None:
    case = make_case(lengths=(8, 4), answer_share=1.0)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=2, decay=0.8, loss=name)
    loss.backward()
    expected, expected_grads = reference_loss(case, num_steps=2, decay=0.8, loss=name)
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert sums.mean_loss(0.8) == pytest.approx(expected["loss"].item(), abs=1e-5)
    for weight, grad in gradients(case.head).items():
        torch.testing.assert_close(grad.double(), expected_grads[weight], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("lk", 0.5108, [-0.2, -0.2, 0.4]),
        ("tv", 0.4, [-0.12, -0.12, 0.24]),
        ("lk_hybrid", 0.5636, [-0.1498, -0.1167, 0.2664]),
    ],
)
def test_the_worked_example_of_losses(name: str, value: float, gradient: list[float]) -> None:
    """cross_entropy.py's: p = [0.5, 0.3, 0.2] against q = [0.2, 0.2, 0.6]."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.2, 0.2, 0.6]]).double()
    target = TargetOutput(lambda states: states, torch.eye(3).double())  # type: ignore[arg-type]
    hidden = q.log()[None].requires_grad_()
    ones = torch.ones(1, 1).double()
    loss, losses, _ = SlotLosses.apply(hidden, torch.eye(3).double(), ones, p.log(), target, name)
    loss.backward()
    assert loss.item() == losses.item() == pytest.approx(value, abs=1e-4)
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad.flatten(), torch.tensor(gradient).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_distribution_that_nothing_is_accepted_of_gives_no_nan(name: str) -> None:
    target = TargetOutput(lambda states: states, torch.eye(2))  # type: ignore[arg-type]
    hidden = torch.tensor([[[200.0, 0.0]]]).requires_grad_()
    finals = torch.tensor([[0.0, 200.0]])
    loss, _, _ = SlotLosses.apply(hidden, torch.eye(2), torch.ones(1, 1), finals, target, name)
    loss.backward()
    assert hidden.grad is not None
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


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


def test_the_worked_example_of_a_chain() -> None:
    """model.py's table: what slot 2 of [x0 .. x5] can see at each step, told by gradients."""
    head = make_head()
    tokens = torch.tensor([3, 7, 1, 2, 8, 5])  # distinct
    states = torch.randn(6, 36, requires_grad=True)
    head.embed_tokens = head.embed_tokens.clone().requires_grad_()
    offsets = torch.tensor([0, 6])
    outputs = head(tokens, states, offsets=offsets, slots=torch.tensor([2]), num_steps=3)
    seen_tokens = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    for output, expected in zip(outputs, seen_tokens, strict=True):
        to_states, to_embeddings = torch.autograd.grad(
            output.sum(), (states, head.embed_tokens), retain_graph=True
        )
        assert to_states.abs().sum(1).nonzero().flatten().tolist() == [0, 1, 2]
        assert to_embeddings[tokens].abs().sum(1).nonzero().flatten().tolist() == expected


def test_rotary_positions_count_within_the_document_and_with_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slot t of a document stands at t at step 0 and at t + k at step k, as in the engine.

    Values cannot tell: the embedding is relative, so a shifted document gives the same output.
    """
    head, asked = make_head(), []
    table = head.rotary.table

    def watched_table(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        asked.append(positions.tolist())
        return table(positions, dtype)

    monkeypatch.setattr(head.rotary, "table", watched_table)
    tokens, offsets = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 3, 7])
    head(tokens, torch.randn(7, 36), offsets=offsets, slots=torch.tensor([1, 4, 5]), num_steps=3)
    assert asked == [[0, 1, 2, 0, 1, 2, 3], [2, 2, 3], [3, 3, 4]]


def test_the_worked_example_of_counted_slots() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1])
    counted = counted_slots(mask, torch.tensor([0, 6, 9]), 2)
    assert counted.int().tolist() == [[0, 1, 1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5),
    num_steps=st.integers(1, 5),
)
def test_counted_slots_follow_their_definition(documents: list[list[bool]], num_steps: int) -> None:
    offsets = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0)
    counted = counted_slots(torch.tensor([bit for d in documents for bit in d]), offsets, num_steps)
    empty = torch.empty(0)
    for step in range(num_steps):
        expected = [
            reference.counts(
                reference.Document(torch.zeros(len(d)), empty, empty, torch.tensor(d)), slot, step
            )
            for d in documents
            for slot in range(len(d))
        ]
        assert counted[step].tolist() == expected


def test_slot_4_at_step_1_is_decided_by_the_argmax_at_token_6() -> None:
    case = make_case(lengths=(9,), answer_share=2.0)
    for token in range(9):
        in_vocab = torch.ones(9, dtype=torch.bool)
        in_vocab[token] = False
        rows = make_plan(dataclasses.replace(case.batch, in_vocab=in_vocab), 2)
        assert rows.slots[4] == 4
        assert bool(rows.in_vocab_slots[1, 4]) == (token != 6)
        assert bool(rows.counted[1, 4])


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


def test_the_worked_example_of_the_soft_target() -> None:
    """Slots [2, 3, 4]; slot 3 at step 1 is scored against p_5, the third row of finals."""
    torch.manual_seed(0)
    hidden, lm_head, finals = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(3, 4)
    target = TargetOutput(FinalNorm(torch.ones(4), 1e-6), torch.randn(5, 4))
    _, entropy, _ = SlotLosses.apply(hidden, lm_head, torch.ones(2, 3), finals, target)
    p_5 = target.logits(finals[2:3]).softmax(-1)[0]
    log_q = (lm_head @ hidden[1, 1]).log_softmax(-1)
    assert float(entropy[1, 1]) == pytest.approx(-float(p_5 @ log_q), abs=1e-6)


def test_the_worked_example_of_columns_by_target() -> None:
    by_slot = torch.tensor([[1, 2, 3], [4, 5, 6]])
    by_target = to_targets(by_slot)
    assert by_target.tolist() == [[1, 2, 3], [0, 4, 5]]
    assert to_slots(by_target).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_the_worked_example_of_step_weights() -> None:
    weights = step_weights(torch.tensor([4, 2, 0]), 0.5)
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 0.0])


def test_loss_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 6)  # two targets a chunk
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    lm_head = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 5, dtype=torch.float64).tril(2)  # no target for row 4 beyond step 0
    weights = weights * (torch.arange(5) + torch.arange(3)[:, None] < 5)
    finals = torch.randn(5, 4, dtype=torch.float64)
    target = TargetOutput(
        FinalNorm(torch.ones(4), 1e-6), torch.randn(6, 4, dtype=torch.float64), 1.3, 5.0
    )

    def loss(*inputs: Tensor) -> Tensor:
        return SlotLosses.apply(*inputs, weights, finals, target)[0] * 1.7

    assert torch.autograd.gradcheck(loss, (hidden, lm_head), fast_mode=True)


def test_target_argmax_does_not_depend_on_chunks() -> None:
    torch.manual_seed(0)
    finals, norm, lm_head = torch.randn(11, 8), torch.rand(8) + 0.5, torch.randn(30, 8)
    expected = [int((lm_head @ reference.rms_norm(y, norm, 1e-6)).argmax()) for y in finals]
    for rows in (1, 4, 100):
        best = target_argmax(finals, norm=FinalNorm(norm, 1e-6), lm_head=lm_head, chunk_rows=rows)
        assert best.tolist() == expected


def test_a_batch_in_which_nothing_counts_gives_zero_and_zero_gradients() -> None:
    case = make_case(answer_share=-1.0)
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


def test_mixed_precision_stays_close() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=64, target_hidden_size=64, head_dim=16)
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


def test_the_gradient_of_lm_head_adds_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk is 0.3 % off, since states are rounded; a bfloat16 sum of 267 chunks was 1.7 %."""
    torch.manual_seed(0)
    rows, vocabulary, size = 8000, 512, 32
    target = TargetOutput(FinalNorm(torch.ones(size), 1e-6), torch.randn(vocabulary, size) / 2)
    hidden, finals = torch.randn(1, rows, size), torch.randn(rows, size)
    weights = torch.full((1, rows), 1 / rows)

    def gradient(states: Tensor, chunk_rows: int) -> Tensor:
        monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk_rows)
        lm_head = (target.lm_head / 2).requires_grad_()
        SlotLosses.apply(states, lm_head, weights, finals, target)[0].backward()
        assert lm_head.grad is not None
        return lm_head.grad

    exact = gradient(hidden, rows)
    whole, chunked = (
        float((gradient(hidden.bfloat16(), chunk_rows) - exact).norm() / exact.norm())
        for chunk_rows in (rows, 30)
    )
    assert 0 < whole < 0.01
    assert chunked < 2 * whole


def test_frequencies_stay_in_float32_when_the_head_does_not() -> None:
    head = make_head()
    positions = torch.tensor([0, 1, 1001])
    before = head.rotary.table(positions, torch.float32)
    head.to(torch.bfloat16)
    torch.testing.assert_close(head.rotary.table(positions, torch.float32), before, atol=0, rtol=0)


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"] if s else "default")
def test_step_0_is_a_llama_layer_of_transformers_with_a_wider_input(
    scaling: dict[str, Any] | None,
) -> None:
    """The oracle nobody here wrote: transformers' attention, MLP, norms and rotary embedding."""
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    head, layer = make_head(config), None
    llama = LlamaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope_theta=50.0,
        rope_scaling=scaling,
        attn_implementation="eager",
    )
    layer = modeling_llama.LlamaDecoderLayer(llama, 0)
    for name, width in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12)):
        setattr(layer.self_attn, name, nn.Linear(24, width, bias=False))
    weights = {
        name: tensor
        for name, tensor in head.midlayer.state_dict().items()
        if "hidden_norm" not in name
    }
    layer.load_state_dict(weights)

    tokens, states = torch.randint(0, 9, (21,)), torch.randn(20, 36)
    output = head(
        tokens, states, offsets=torch.tensor([0, 20]), slots=torch.arange(20), num_steps=1
    )[0]

    residual = head.fc(states)
    norm = modeling_llama.LlamaRMSNorm(12, 1e-5)
    norm.load_state_dict(head.midlayer.hidden_norm.state_dict())
    inputs = torch.cat([layer.input_layernorm(head.embed_tokens[tokens[1:]]), norm(residual)], -1)
    rotary = modeling_llama.LlamaRotaryEmbedding(llama)(inputs[None], torch.arange(20)[None])
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    attended, _ = layer.self_attn(inputs[None], position_embeddings=rotary, attention_mask=mask)
    middle = residual + attended[0]
    expected = middle + layer.mlp(layer.post_attention_layernorm(middle))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_draft_logits_of_every_slot_are_the_reference_s() -> None:
    case = make_case(lengths=(10,))
    document, shape = case.documents[0], shape_of(CONFIG)
    weights = {name: p.detach() for name, p in case.head.named_parameters()}
    with torch.no_grad():
        logits = draft_logits(case.head, document.tokens, document.states[:8], num_steps=2)
    assert logits.shape == (2, 8, 6)
    for slot in range(8):
        chain = reference.chain(weights, shape, case.head.embed_tokens, document, slot, 2)
        expected = torch.stack([reference.logits(weights, shape, h) for h in chain])
        torch.testing.assert_close(logits[:, slot], expected, atol=1e-5, rtol=1e-5)


def test_rope_is_read_in_both_spellings() -> None:
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_position_embeddings": 256,
    }
    scaling = {"rope_type": "linear", "factor": 2.0}
    older = HeadConfig.from_json(
        sizes | {"rope_theta": 5e5, "rope_scaling": scaling}, aux_layers=(2,), draft_vocab_size=9
    )
    newer = HeadConfig.from_json(
        sizes | {"rope_parameters": scaling | {"rope_theta": 5e5}},
        aux_layers=(2,),
        draft_vocab_size=9,
    )
    assert older == newer
    assert (older.rope_theta, older.rope_scaling) == (5e5, scaling)
    assert (older.head_dim, older.num_key_value_heads) == (16, 4)
    plain = HeadConfig.from_json(
        sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        aux_layers=(2,),
        draft_vocab_size=9,
    )
    assert plain.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"draft_vocab_size": 10}, "draft-vocab-size"),
        ({"num_key_value_heads": 3}, "head-shape"),
        ({"num_attention_heads": 8}, "head-shape"),
        ({"head_dim": 5}, "head-shape"),
        ({"target_hidden_size": 16}, "head-shape"),
    ],
)
def test_a_head_that_engines_cannot_serve_is_refused(changes: dict[str, int], code: str) -> None:
    with pytest.raises(UserError) as refused:
        dataclasses.replace(CONFIG, **changes)
    assert refused.value.code == code


def test_embeddings_and_vocabulary_must_fit() -> None:
    with pytest.raises(UserError, match=r"\[9, 12\].*found \[8, 12\]"):
        DraftHead(CONFIG, embed_tokens=torch.zeros(8, 12))
    with pytest.raises(UserError, match="d2t"):
        DraftHead(CONFIG, embed_tokens=torch.zeros(9, 12))
    rows = torch.randn(6, 12)
    head = DraftHead(CONFIG, embed_tokens=torch.zeros(9, 12), d2t=torch.full((6,), 3), lm_head=rows)
    assert torch.equal(head.lm_head.weight, rows)
    assert head.to_target_ids(torch.tensor([0, 5])).tolist() == [3, 8]
    assert head.t2d.tolist() == [False] * 3 + [True] * 6
