# SPDX-License-Identifier: Apache-2.0
"""Settings about reasoning that a target's chat template does not follow are refused or told."""

import logging
from pathlib import Path
from typing import Any

import pytest

from shared.config import RunConfig
from shared.conversations.switches import require_switches
from shared.errors import UserError
from tests.quick.shared.conversations.gallery import FOLDER


def check(tmp_path: Path, template: str, **run: Any) -> None:
    (tmp_path / "chat_template.jinja").write_text((FOLDER / f"{template}.jinja").read_text())
    require_switches(tmp_path, RunConfig(target="t", **run), tmp_path)


@pytest.mark.parametrize("template", sorted(path.stem for path in FOLDER.glob("*.jinja")))
def test_a_run_that_sets_nothing_is_never_refused(tmp_path: Path, template: str) -> None:
    check(tmp_path, template)
    check(tmp_path, template, reasoning="drop")


@pytest.mark.parametrize(
    "template", ["qwen3", "deepseek-v3", "seed-oss", "chatml-marked", "zephyr"]
)
def test_a_switch_that_is_there_or_is_not_needed(
    tmp_path: Path, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    check(tmp_path, template, reasoning="disable")
    assert caplog.text == ""


def test_a_template_that_may_think_without_a_switch_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(tmp_path, "command-a", reasoning="disable")
    assert "set run.reasoning to drop" in caplog.text


@pytest.mark.parametrize("template", ["deepseek-r1", "gpt-oss"])
def test_a_target_that_always_reasons_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError) as refused:
        check(tmp_path, template, reasoning="disable")
    assert refused.value.code == "reasoning-not-disabled"


def test_a_misspelt_variable_is_refused(tmp_path: Path) -> None:
    check(tmp_path, "qwen3", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(UserError, match="enable_thinkin, which it does not read") as refused:
        check(tmp_path, "qwen3", chat_template_kwargs={"enable_thinkin": False})
    assert refused.value.code == "template-variable-unknown"
    assert refused.value.remedy == "Did you mean enable_thinking?"


def test_a_template_that_does_not_parse_is_left_to_the_rendering(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if")
    require_switches(tmp_path, RunConfig(target="t", reasoning="disable"), tmp_path)
