# SPDX-License-Identifier: Apache-2.0
"""Where an answer's reasoning ends, asked of the target before a server starts."""

import asyncio
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.prompts.rows import Prompt, Turn
from stages.synth.answers import answers, kept
from stages.synth.config import SynthConfig
from tests.quick.shared.conversations.gallery import FOLDER, ROWS, tokenizer_of


def config_of(tmp_path: Path, template: str, **settings: object) -> SynthConfig:
    tokenizer_of(FOLDER / f"{template}.jinja").save_pretrained(tmp_path / "target")
    run = {"target": str(tmp_path / "target"), "reasoning": "drop"}
    return SynthConfig.model_validate(
        {"run": run, "prompts": "p", "workspace": tmp_path, **settings}
    )


@pytest.mark.parametrize(
    ("template", "mark"),
    [("seed-oss", "</seed:think>"), ("magistral", "[/THINK]"), ("gpt-oss", "final<|message|>")],
)
def test_a_mark_that_the_target_never_writes_is_refused(
    template: str, mark: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, template)
    with pytest.raises(UserError) as refused:
        asyncio.run(anext(answers(config, tmp_path / "target", iter([ROWS["plain"]]))))
    assert refused.value.code == "reasoning-end"
    assert refused.value.facts["known"][0].endswith(mark)


def test_keep_masks_what_the_given_mark_ends(tmp_path: Path) -> None:
    config = config_of(tmp_path, "chatml", mode="keep", reasoning_end="(so far)")
    said = {"role": "assistant", "content": "Hm. (so far) No."}
    prompt = Prompt("row", (Turn(({"role": "user", "content": "Well?"},), said),))
    (outcome,) = kept(config, tmp_path / "target", [prompt])
    (row,) = outcome.rows
    tokenizer = tokenizer_of(FOLDER / "chatml.jinja")
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in row.loss_spans] == ["No.<|im_end|>"]
