# SPDX-License-Identifier: Apache-2.0
"""The demo's target: its dialogues, its folder, its chat template, its refusals."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from shared.errors import UserError
from stages.demo.dialogues import KINDS, Dialogue, dialogues
from stages.demo.make_target import TargetFacts, make_target
from stages.demo.model import END
from stages.demo.training import batches

SMALL = {"steps": 3, "num_prompts": 24, "num_held_out": 8, "hidden_size": 64, "num_layers": 2}


def some(count: int, *, seed: int = 0, category: str | None = None) -> list[Dialogue]:
    stream = dialogues(seed=seed)
    return list(itertools.islice((d for d in stream if category in (None, d.category)), count))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TargetFacts]:
    out = tmp_path_factory.mktemp("made") / "target"
    return out, make_target(out, **SMALL)


@pytest.fixture(scope="module")
def tokenizer(target: tuple[Path, TargetFacts]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(target[0])


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_dialogues_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert some(200, seed=3) == some(200, seed=3)
    assert some(200, seed=3) != some(200, seed=4)


def test_prompts_are_distinct_and_kinds_take_turns() -> None:
    made = some(8000)
    assert len({d.prompt for d in made}) == 8000
    assert [d.category for d in made[:16]] == [*KINDS, *KINDS]
    assert len({d.answer for d in made}) > 7000, "answers must depend on their prompts"


def test_sums_are_right() -> None:
    for d in some(300, category="sums"):
        have, change = (int(n) for n in re.findall(r"\d+", d.prompt))
        gain = re.search(r"buys|finds|is given", d.prompt) is not None
        total = have + change if gain else have - change
        stated = re.search(r"owns (\d+)|means (\d+)", d.answer)
        assert stated is not None
        assert int(stated[1] or stated[2]) == total, d
        assert f"gives {have} again" in d.answer


def test_sorted_words_are_sorted() -> None:
    for d in some(300, category="sorting"):
        asked = d.prompt.rstrip(".").rsplit(": ", 1)[1].split(", ")
        ordered = sorted(asked, reverse="z to a" in d.prompt)
        assert f"{' '.join(ordered)}. " in d.answer, d


def test_records_are_json_with_the_right_total() -> None:
    for d in some(100, category="records"):
        record = json.loads(d.answer[d.answer.index("{") :])
        price = int(re.search(r"(\d+) euros", d.prompt)[1])  # type: ignore[index]
        assert record["total"] == price * record["quantity"], d
        assert record["item"] in d.prompt
        assert record["customer"] in d.prompt


def test_functions_run() -> None:
    for d in some(100, category="code"):
        source, _, note = d.answer[d.answer.index("def ") :].rpartition("\n")
        scope: dict[str, object] = {}
        exec(compile(ast.parse(source), "answer", "exec"), scope)
        function = next(value for name, value in scope.items() if "_" in name and callable(value))
        assert note.endswith(f"{function([])}."), d
        function([-7, 4, 66, 0])


def test_loads_in_transformers_and_answers(target: tuple[Path, TargetFacts]) -> None:
    out, facts = target
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    assert model.num_parameters() == facts.parameters
    assert facts.mean_entropy_nats > 0
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.iterdir()), "readable by others"


@pytest.mark.parametrize(
    "text", ["A sum: 12 + 30.", "na\u00efve \u00e9t\u00e9 \u732b \U0001f40d\n\ttab"]
)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_marks_the_answers_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sort these words."},
        {"role": "assistant", "content": "books coins"},
        {"role": "user", "content": "Thanks. And now?"},
        {"role": "assistant", "content": "That makes two."},
    ]
    got = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = got["input_ids"], got["assistant_masks"]
    marked = [token for token, bit in zip(ids, mask, strict=True) if bit]
    assert tokenizer.decode(marked) == f"books coins{END}That makes two.{END}"
    begun = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert ids[: len(begun)] == begun, "a later turn must begin with the earlier one's ids"


def test_training_rows_are_what_the_chat_template_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    made = some(6)
    ids, labels = next(batches(tokenizer, iter(made), rows=6))
    seen = {tuple(row[row != tokenizer.pad_token_id].tolist()) for row in ids}
    for d in made:
        messages = [
            {"role": "user", "content": d.prompt},
            {"role": "assistant", "content": d.answer},
        ]
        assert tuple(tokenizer.apply_chat_template(messages)["input_ids"]) in seen
    answers = {tokenizer.decode(row[row >= 0]) for row in labels}
    assert answers == {d.answer + END for d in made}


def test_sets_are_disjoint(target: tuple[Path, TargetFacts]) -> None:
    out, _ = target
    prompts, held_out = rows(out / "prompts.jsonl"), rows(out / "held_out.jsonl")
    assert (len(prompts), len(held_out)) == (24, 8)
    both = prompts + held_out
    assert set(both[0]) == {"id", "prompt", "category"}
    assert len({row["id"] for row in both}) == len({row["prompt"] for row in both}) == 32
    assert {row["category"] for row in held_out} == set(KINDS)


def test_a_second_call_finds_it_made_and_others_are_refused(
    target: tuple[Path, TargetFacts], tmp_path: Path
) -> None:
    out, facts = target
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert make_target(out, **SMALL) == facts
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"seed \(was 0, now 1\)"):
        make_target(out, seed=1, **SMALL)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no target\.json"):
        make_target(tmp_path, **SMALL)


@pytest.mark.parametrize("facts", [{"source": "a/b", "revision": "1"}, [], {"arguments": 5}])
def test_a_target_of_another_command_is_kept(tmp_path: Path, facts: object) -> None:
    (tmp_path / "target.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="found another command's"):
        make_target(tmp_path)


def test_equal_seeds_make_equal_weights(target: tuple[Path, TargetFacts], tmp_path: Path) -> None:
    out, _ = target
    make_target(tmp_path / "again", **SMALL)
    for name in ("model.safetensors", "tokenizer.json", "prompts.jsonl", "held_out.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
