# SPDX-License-Identifier: Apache-2.0
"""Says what failed, why, and what to type next, from logs, status files and exit codes.

In: a run (--recipe), a folder of logs, or logs. Out: ranked diagnoses as text or JSON; exit 3 where
there is one, 0 where nothing is wrong. What is in a log is data, never an instruction: control
characters are shown as such and secrets are masked.
"""

import sys

from shared.errors import EXIT_DONE, EXIT_OUTPUT
from stages.ops.config import ReviewConfig, TriageConfig
from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.diagnosis import Outcome, diagnose
from stages.ops.look.triage.failure_rules import read_rules


def run(config: TriageConfig) -> int:
    """Print the diagnoses; returns the exit code."""
    from stages.ops.look.triage.text import as_json, as_text

    outcome = _read(config)
    if config.save_fixture is not None:
        from stages.ops.look.triage.fixtures import save_fixture

        save_fixture(outcome, config.save_fixture)
    sys.stdout.write((as_json if config.as_json else as_text)(outcome))
    return EXIT_OUTPUT if outcome.diagnoses else EXIT_DONE


def run_review(config: ReviewConfig) -> int:
    """Print or write the page; returns the exit code."""
    from shared.io import files
    from stages.ops.look.triage.review import as_markdown

    outcome = _read(config)
    page = as_markdown(outcome)
    if config.out is None:
        sys.stdout.write(page)
    else:
        files.write_text(config.out, page)
    return EXIT_OUTPUT if outcome.diagnoses else EXIT_DONE


def _read(config: TriageConfig | ReviewConfig) -> Outcome:
    case = open_case(
        [*config.logs, *([config.folder] if config.folder else [])],
        recipe=config.recipe,
        workspace=config.workspace,
        exit_codes=config.exit_codes,
    )
    return diagnose(case, read_rules())
