# SPDX-License-Identifier: Apache-2.0
"""Dump's checks: right states pass, each known fault is caught and named. States by transformers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.contracts import fp8
from shared.errors import OutputError
from shared.target import model as targets
from shared.target.tensors import FinalNorm, read_tensors
from stages.dump.backends.stats import measure
from stages.dump.checks.checks import BadStates, ShardChecks, check_sample, spread
from stages.dump.checks.faults import require_right
from stages.dump.plan import ShardRows, probe_rows
from tests.models import tiny_llama

AUX_LAYERS = (2, 4, 5)
NUM_TOKENS = 40
NUM_ROWS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Untied: a random tied target says the same token for ever, and so agrees with any fault.
    return tiny_llama(tmp_path_factory.mktemp("target") / "tiny", tied=False)


@dataclasses.dataclass
class Greedy:
    """Rows of a prompt and the target's own answer, and what the target says of every token."""

    rows: ShardRows
    states: torch.Tensor  # [T, A+1, H]
    normed: torch.Tensor  # [T, H]: the final state after the norm
    earlier: torch.Tensor  # [T, H]: the state entering the last layer
    logprobs: dict[int, torch.Tensor]  # row -> [T_row-1]

    @property
    def starts(self) -> list[int]:
        return [row * NUM_TOKENS for row in range(NUM_ROWS + 1)]


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Greedy:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(10, 10 + 8 * NUM_ROWS).view(NUM_ROWS, 8)
    final: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: final.append(args[0]))
    with torch.no_grad():
        while ids.shape[1] < NUM_TOKENS:
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        answer = model(ids, output_hidden_states=True)
    hook.remove()
    told = torch.log_softmax(answer.logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    stacked = torch.stack([answer.hidden_states[i] for i in AUX_LAYERS] + [final[-1]], dim=2)
    mask = (torch.arange(NUM_TOKENS) >= 8).long().tolist()
    return Greedy(
        ShardRows([f"row-{i}" for i in range(NUM_ROWS)], ids.tolist(), [mask] * NUM_ROWS),
        stacked.flatten(0, 1).bfloat16(),
        answer.hidden_states[-1].flatten(0, 1).bfloat16(),
        answer.hidden_states[-2].flatten(0, 1).bfloat16(),
        dict(enumerate(told)),
    )


def checks(folder: Path, greedy: Greedy, states: torch.Tensor | None = None) -> ShardChecks:
    config = targets.read_config(folder)
    stored = greedy.states if states is None else states
    return ShardChecks(read_tensors(config), greedy.rows, stored, greedy.starts)


def require(asked: ShardChecks, logprobs: dict[int, torch.Tensor]) -> float | None:
    limits = {"min_agreement": 0.9, "max_logprob_gap": 0.1}
    return require_right("shard 0", asked, asked.agreement(), logprobs, **limits)


def test_rebuilt_logits_are_the_models(folder: Path, greedy: Greedy) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = targets.read_config(folder)
    with torch.no_grad():
        expected = model(torch.tensor(greedy.rows.input_ids)).logits.flatten(0, 1)
    rebuilt = read_tensors(config).logits(greedy.states[:, -1])
    assert float((rebuilt - expected).norm() / expected.norm()) < 0.02


def test_right_states_pass(folder: Path, greedy: Greedy) -> None:
    row = greedy.states[:NUM_TOKENS]
    check_sample(row, num_tokens=NUM_TOKENS, num_states=4)
    asked = checks(folder, greedy)
    assert asked.agreement().share > 0.95
    assert asked.agreement().positions == NUM_ROWS * 32
    assert require(asked, greedy.logprobs) < 0.05
    assert require(asked, {}) is None, "nothing was told, so nothing was measured"


def test_alignment_worked_example(folder: Path) -> None:
    """ids [7, 8, 20, 2], mask [0, 0, 1, 1]: the states at tokens 1 and 2 are asked, no others."""
    config = targets.read_config(folder)
    tensors = read_tensors(config)
    states = torch.zeros(4, 4, config.hidden_size)
    states[1, -1], states[2, -1] = (
        tensors.lm_head[token].float() / tensors.norm.weight.float() for token in (20, 2)
    )
    rows = ShardRows(["a"], [[7, 8, 20, 2]], [[0, 0, 1, 1]])
    agreement = ShardChecks(tensors, rows, states, [0, 4]).agreement()
    assert (agreement.hits, agreement.positions) == (2, 2)


def test_a_rows_first_token_is_not_asked_of_the_row_before(folder: Path) -> None:
    config = targets.read_config(folder)
    states = torch.zeros(4, 4, config.hidden_size)
    rows = ShardRows(["a", "b"], [[7, 8], [9, 5]], [[0, 1], [1, 1]])
    found = ShardChecks(read_tensors(config), rows, states, [0, 2, 4])
    assert found.agreement().positions == 2


def test_spread_worked_example() -> None:
    assert spread(torch.tensor([3, 4, 8, 9, 12]), 2).tolist() == [3, 8]
    assert spread(torch.tensor([3, 4]), 2).tolist() == [3, 4]


def test_probe_rows_worked_example() -> None:
    lengths = [600, 40, 1, 30, 50]
    rows = ShardRows([""] * 5, [[1] * length for length in lengths], [])
    assert probe_rows(rows) == {1, 4}
    assert probe_rows(ShardRows([""] * 2, [[1] * 600, [1] * 700], [])) == {0}


def zeros(greedy: Greedy) -> torch.Tensor:
    states = greedy.states.clone()
    states[3:20, -1] = 0
    return states


def prefix(greedy: Greedy) -> torch.Tensor:
    states = greedy.states.clone()
    for start in greedy.starts[:-1]:
        states[start : start + 16] = 0
    return states


def final_is(state: torch.Tensor, greedy: Greedy) -> torch.Tensor:
    return torch.cat((greedy.states[:, :-1], state[:, None]), dim=1)


FAULTS: dict[str, Callable[[Greedy], torch.Tensor]] = {
    "zero states: 17 of 40 tokens": zeros,
    "a prefix cache: the first 16 tokens": prefix,
    "a missing norm": lambda greedy: final_is(greedy.normed, greedy),
    "a shifted layer": lambda greedy: final_is(greedy.earlier, greedy),
    "layers in a wrong order: slot 1 is": lambda greedy: greedy.states[:, [0, 3, 2, 1]],
    "states shifted by a token: each is stored one token late": lambda greedy: greedy.states.roll(
        1, dims=0
    ),
    "states shifted by a token: each is stored one token early": lambda greedy: greedy.states.roll(
        -1, dims=0
    ),
    "mixed-up requests: its states lie at sample row-": lambda greedy: greedy.states.roll(
        NUM_TOKENS, dims=0
    ),
    "mixed-up requests: the states belong to tokens that": lambda greedy: greedy.states.flip(0),
}


@pytest.mark.parametrize("state_dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught_and_named(
    folder: Path, greedy: Greedy, fault: str, state_dtype: str
) -> None:
    states = FAULTS[fault](greedy).clone()
    if state_dtype == "fp8":
        states[:, :-1] = fp8.decode(*fp8.encode(states[:, :-1]))
    planted = checks(folder, greedy, states)
    with pytest.raises(OutputError, match=f"It looks like {fault}"):
        require(planted, greedy.logprobs)


def test_faults_of_scale_leave_the_argmax_and_are_caught(folder: Path, greedy: Greedy) -> None:
    """What the agreement alone would miss: the target's own softcap, scale or norm is not known."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(greedy.rows.input_ids)
    with torch.no_grad():
        values = 4 * model(ids).logits[:, :-1]

    def told(engine: torch.Tensor) -> dict[int, torch.Tensor]:
        found = torch.log_softmax(engine, -1).gather(-1, ids[:, 1:, None])[..., 0]
        return dict(enumerate(found))

    asked = checks(folder, greedy)
    asked.tensors = dataclasses.replace(asked.tensors, logit_scale=4.0)
    assert require(asked, told(values)) < 0.1
    for engine, fault in (
        (values / 4, r"a logit scale of 0\.25 "),
        (15 * torch.tanh(values / 15), "a softcap of 15"),
    ):
        assert torch.equal(engine.argmax(-1), values.argmax(-1))
        with pytest.raises(OutputError, match=f"It looks like {fault}"):
            require(asked, told(engine))
    offset = checks(folder, greedy)
    tensors = offset.tensors
    offset.tensors = dataclasses.replace(
        tensors, norm=FinalNorm(tensors.norm.weight.float() - 1, tensors.norm.eps)
    )
    with pytest.raises(OutputError, match=r"It looks like a norm that multiplies by weight \+1"):
        require(offset, greedy.logprobs)


def test_answers_of_another_target_are_told_from_wrong_states(folder: Path, greedy: Greedy) -> None:
    ids = [[token + 1 for token in row] for row in greedy.rows.input_ids]
    asked = checks(folder, greedy)
    asked.rows = dataclasses.replace(greedy.rows, input_ids=ids)
    own = asked.gaps({row: torch.empty(0) for row in range(NUM_ROWS)})
    assert own == {}
    with pytest.raises(OutputError, match=r"expected at least 90%.*looks like another target"):
        require(asked, {})


@pytest.mark.parametrize("row", range(NUM_ROWS))
def test_a_gap_that_is_not_a_number_fails_whichever_row_has_it(
    folder: Path, greedy: Greedy, row: int
) -> None:
    reported = {**greedy.logprobs, row: torch.full((NUM_TOKENS - 1,), torch.nan)}
    with pytest.raises(OutputError, match=f"by nan nats on average in sample row-{row}"):
        require(checks(folder, greedy), reported)


@pytest.mark.parametrize("chunk", [1, 7, NUM_TOKENS])
def test_stats_of_parts_are_those_of_the_whole(greedy: Greedy, chunk: int) -> None:
    """Against plain torch over all entries; a layer that is constant, one that holds a NaN."""
    states = greedy.states[:NUM_TOKENS].clone()
    states[:, 1] = states[:1, 1]
    states[5, 2, 3] = torch.nan
    states[9:12, -1] = 0
    parts = [measure(part, states[0]) for part in states.split(chunk)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.joined(part)
    expected = states.abs().amax(dim=(0, 2)).float()
    torch.testing.assert_close(whole.magnitude, expected, rtol=0, atol=0, equal_nan=True)
    assert whole.is_constant.tolist() == [False, True, False, False]
    assert int(whole.filled) == NUM_TOKENS - 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("short", "states_wrong_shape"),
        ("nan", "states_not_finite"),
        ("infinite", "states_not_finite"),
        ("zero layer", "states_zero"),
        ("constant layer", "states_constant"),
    ],
)
def test_planted_faults_fail_the_sample(greedy: Greedy, fault: str, reason: str) -> None:
    planted = greedy.states[:NUM_TOKENS].clone()
    if fault == "short":
        planted = planted[:-1]
    elif fault == "nan":
        planted[3, 1, 5] = torch.nan
    elif fault == "infinite":
        planted[3, 1, 5] = -torch.inf
    elif fault == "zero layer":
        planted[:, 2] = 0
    else:
        planted[:, 2] = planted[:1, 2]
    with pytest.raises(BadStates, match=reason):
        check_sample(planted, num_tokens=NUM_TOKENS, num_states=4)
