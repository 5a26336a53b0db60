# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a setting is said in plain words, whatever kind of value it takes."""

import re
from typing import Any

import pydantic
import pytest

from shared.config import RunConfig, Section
from shared.errors import UserError
from shared.wrong_settings import Given, refuse
from tests.quick.shared.test_help import COMMANDS

ODD: tuple[Any, ...] = (
    *("x", "1.5", "9" * 5000, "1e400"),
    *(-1, 0, 1.5, 10**30, float("nan"), None, True),
    *([], ["x"], [-1], [0, 1], [1, 1], [None], [{}], [{"path": 3}], [{"wheight": 1}]),
    *({"a": 1}, {"path": 3}, {1: 2}),
)
# Pydantic's words, and its names for the kinds of a value that may be of several.
ITS_WORDS = re.compile(
    r"(?i)\binput\b|a valid|instance|parse string|Value error|permitted|\[key\]|constrained|literal|[Tt]uple"
)


def refusal(model: type[Section], name: str, value: object) -> UserError | None:
    try:
        model.model_validate({name: value})
    except pydantic.ValidationError as error:
        return refuse(error, Given({name: value}, (), "r.yaml", "x."), model)
    return None


@pytest.mark.parametrize("model", [RunConfig, *COMMANDS], ids=lambda model: model.__name__)
def test_none_of_pydantic_s_words_reaches_the_reader(model: type[Section]) -> None:
    seen = 0
    own = {name: field for name, field in model.model_fields.items() if name != "run"}
    for name, field in own.items():
        for value in ODD:
            refused = refusal(model, field.alias or name, value)
            for line in refused.problem.splitlines() if refused else ():
                if re.match(rf"(--|x\.){field.alias or name}\b", line):
                    seen += 1
                    assert not ITS_WORDS.search(line), line
    assert seen > 5
