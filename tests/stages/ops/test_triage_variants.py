# SPDX-License-Identifier: Apache-2.0
"""The known failures' logs, altered as other programs, collectors and terminals alter them."""

import random
from pathlib import Path

import pytest

from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.diagnosis import diagnose
from stages.ops.look.triage.failure_rules import read_rules
from tests.triage.cases import read_cases
from tests.triage.variants import VARIANTS


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_nine_of_ten_logs_of_the_same_failures_are_still_right(
    variant: str, tmp_path: Path
) -> None:
    rules = read_rules()
    cases = [case for case in read_cases() if case.expect]
    wrong = {}
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        log = VARIANTS[variant](case.log, random.Random(f"{variant} {case.name}"))
        path = case.lay_out(folder, log)
        found = diagnose(
            open_case([path], recipe=None, workspace=path.parent, exit_codes={}), rules
        ).top
        if found is None or found.rule != case.expect:
            wrong[case.name] = found and found.rule
    assert len(wrong) <= len(cases) / 10, wrong
