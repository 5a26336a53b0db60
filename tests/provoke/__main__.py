# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.provoke [CASE ...]`: provoke failures and record their logs as fixtures.

Without a name it lists the cases. `all` runs every one; those that start an engine take 10 to 60
seconds each. A case whose log is not diagnosed as it says is reported, and its log is kept.
"""

import sys
import tempfile
from pathlib import Path

from shared.artifacts.provenance import package_versions
from shared.io import files
from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.diagnosis import diagnose
from stages.ops.look.triage.failure_rules import read_rules
from stages.ops.look.triage.fixtures import as_fixture, kept_status, last_lines
from tests.provoke import engines, machine
from tests.provoke.table import CASES, Case
from tests.provoke.world import World
from tests.triage.cases import FIXTURES

MODULES = (machine, engines)  # importing them fills the table


def record(case: Case) -> bool:
    """Run a case and write its fixture; whether triage names what it expects."""
    with tempfile.TemporaryDirectory(prefix="eyrie-provoke-") as name:
        world = World(Path(name) / "w", stages=case.needs)
        case.provoke(world)
        run = world.workspace / "run"
        log = run / "logs" / f"{case.stage}.log"
        has_log = bool(case.stage) and log.exists() and not case.is_console
        if not has_log:
            log = Path(name) / "captured.log"
            log.write_text(world.console)
        status = run / "status" / f"{case.stage}.json"
        header = {
            "expect": case.expect,
            "source": "tests/provoke",
            "case": case.name,
            "stage": case.stage if has_log else None,
            "status": kept_status(files.read_json(status)) if has_log and status.exists() else None,
            "versions": package_versions(),
        }
        text = as_fixture(header, last_lines(log), world.workspace)
        path = FIXTURES / "recorded" / f"{case.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found = diagnose(
            open_case([run if has_log else log], recipe=None, workspace=run, exit_codes={}),
            read_rules(),
        )
        top = found.top.rule if found.top else ""
        sys.stdout.write(
            f"{'ok   ' if top == case.expect else 'WRONG'} {case.name}: exit {world.code}, "
            f"{top or 'nothing'} (expected {case.expect or 'nothing'})\n"
        )
        sys.stdout.flush()
        return top == case.expect


def main(names: list[str]) -> int:
    known = {case.name: case for case in CASES}
    if not names:
        sys.stdout.write("".join(f"{case.name}: {case.expect}\n" for case in CASES))
        return 0
    chosen = list(known) if names == ["all"] else names
    wrong = sum(not record(known[name]) for name in chosen)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
