# SPDX-License-Identifier: Apache-2.0
"""The draft head's layer against transformers' own and a plain reference; what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from shared.contracts.head_config import HeadConfig
from shared.errors import UserError
from stages.train.model import DraftHead
from tests import reference
from tests.heads import draft_logits
from tests.quick.train.objective.cases import (
    CONFIG,
    VARIANTS,
    config_of,
    make_case,
    make_head,
    shape_of,
)


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


def test_the_worked_example_of_p_eagle() -> None:
    """model.py's last table, slot 2: what later steps are fed, and what they see."""
    head = make_head(config_of(VARIANTS["p-eagle"]))
    tokens = torch.tensor([3, 7, 1, 2, 8, 5])  # 3 is the mask token
    states = torch.randn(6, 36, requires_grad=True)
    head.embed_tokens = head.embed_tokens.clone().requires_grad_()
    offsets, slot = torch.tensor([0, 6]), torch.tensor([2])
    fed: list[Tensor] = []
    head.fc.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    outputs = head(tokens, states, offsets=offsets, slots=slot, num_steps=3)
    assert torch.equal(fed[1], head.mask_hidden)
    for step, output in enumerate(outputs):
        inputs = (states, head.embed_tokens, head.mask_hidden)
        to_states, to_embeddings, to_mask = torch.autograd.grad(
            output.sum(), inputs, retain_graph=True, materialize_grads=True
        )
        assert to_states.abs().sum(1).nonzero().flatten().tolist() == [0, 1, 2]
        assert to_embeddings.abs().sum(1).nonzero().flatten().tolist() == sorted(
            {7, 1, 2} | ({3} if step else set())
        )
        assert bool(to_mask.any()) == (step > 0)
    later = tokens.clone()
    later[4:] = 0  # what the head drafts is nothing that it is fed
    again = head(later, states, offsets=offsets, slots=slot, num_steps=3)
    torch.testing.assert_close(again, outputs, atol=0, rtol=0)


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


SIZES = {  # of a config.json
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}


def test_rope_is_read_in_both_spellings() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    older = HeadConfig.from_json(
        SIZES | {"rope_theta": 5e5, "rope_scaling": scaling}, aux_layers=(2,), draft_vocab_size=9
    )
    newer = HeadConfig.from_json(
        SIZES | {"rope_parameters": scaling | {"rope_theta": 5e5}},
        aux_layers=(2,),
        draft_vocab_size=9,
    )
    assert older == newer
    assert (older.rope_theta, older.rope_scaling) == (5e5, scaling)
    assert (older.head_dim, older.num_key_value_heads) == (16, 4)
    plain = HeadConfig.from_json(
        SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        aux_layers=(2,),
        draft_vocab_size=9,
    )
    assert plain.rope_scaling is None


def test_the_mask_token_is_the_stated_one_else_the_last() -> None:
    found = [
        HeadConfig.from_json(
            SIZES | stated, aux_layers=(2,), draft_vocab_size=9, variant=VARIANTS["p-eagle"]
        ).mask_token
        for stated in ({}, {"pard_token": 0}, {"ptd_token_id": 7, "mask_token_id": 8})
    ]
    assert found == [99, 0, 8]
    plain = HeadConfig.from_json(SIZES | {"pard_token": 0}, aux_layers=(2,), draft_vocab_size=9)
    assert plain.mask_token is None


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"draft_vocab_size": 10}, "draft-vocab-size"),
        ({"num_key_value_heads": 3}, "head-shape"),
        ({"num_attention_heads": 8}, "head-shape"),
        ({"head_dim": 5}, "head-shape"),
        ({"target_hidden_size": 16}, "head-shape"),
        ({"mask_token": 0}, "head-shape"),
        ({"variant": VARIANTS["p-eagle"]}, "head-shape"),
        ({"variant": VARIANTS["p-eagle"], "mask_token": 9}, "head-shape"),
    ],
)
def test_a_head_that_engines_cannot_serve_is_refused(changes: dict[str, Any], code: str) -> None:
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
