# SPDX-License-Identifier: Apache-2.0
"""Every error that our own stages raise is known to triage: read from their sources, so none is forgotten."""

import ast
import re
from pathlib import Path

import pytest

from stages.ops.look.triage.failure_rules import read_rules
from stages.ops.look.triage.log_scan import Scanner

ROOT = Path(__file__).resolve().parents[5]
ERRORS = {"UserError", "OutputError", "RetryableError", "fault", "kind"}
# Whose text is another error's, which is known by itself; and commands that keep no log.
EXEMPT = {"stages/bench/measure/in_process.py", "stages/ops/"}
RULES = read_rules()
SCANNER = Scanner(RULES)


# What stands in a message for an expression whose source holds the word; else a number.
STAND_INS = {
    "base_url": "http://127.0.0.1:8000",
    r"error\.code": "404",
    "summary": "in=7 ok=6",
    "what": "run.target",
    "SECTIONS": "run, synth",
    "SUPPORTED": ">=0.28",
    "version": "0.32.0",
    "loss": "nan",
    "finished": "a finished",
    "_exit_codes": " (exit codes -9)",
    "fault": "a missing norm: x",
    "shortfalls": "acceptance length 1.500 is 0.600 under the gate 2.1",
    "missed": "acceptance length 1.500 is 0.600 under the gate 2.1",
    r"', '\.join\(SUFFIXES": ".json, .jsonl",
    "then": "Export the head again.",
    "sorted": "['a']",
    r"list\(": "[1, 2]",
    "error$": "not a list or mapping",
    "shape": "[1, 2]",
    "wanted": "[1, 2]",
    "aux_layers": "[1, 2]",
    "unknown": "['a']",
    "told": "vLLM 0.32.0 could not start capturing /m: x ",
}


def _stand_in(part: ast.FormattedValue) -> str:
    source = ast.unparse(part.value)
    if part.format_spec and "%" in ast.unparse(part.format_spec):
        return "50.0%"
    if part.conversion == ord("r"):
        return "'x'"
    found = (text for word, text in STAND_INS.items() if re.search(rf"\b_?{word}", source))
    return next(found, "7")


def _shown(node: ast.expr) -> str:
    """What the message may look like."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _stand_in(part) if isinstance(part, ast.FormattedValue) else _shown(part)
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _shown(node.left) + _shown(node.right)
    return ""


def _raised() -> list[tuple[str, str]]:
    found = []
    for folder in ("shared", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = str(path.relative_to(ROOT))
            if any(where.startswith(exempt) for exempt in EXEMPT):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = ast.unparse(node.func).split(".")[-1]
                if name in ERRORS and (text := _shown(node.args[0])):
                    found.append((f"{where}:{node.lineno}", text))
    return found


RAISED = _raised()


def test_the_sources_were_read() -> None:
    assert len(RAISED) > 100


@pytest.mark.parametrize(("where", "text"), RAISED, ids=[where for where, _ in RAISED])
def test_an_error_of_ours_is_known(where: str, text: str) -> None:
    found = SCANNER.scan_text(text.splitlines()[0], Path("log"), stage=None)
    known = {hit.rule.id for hit in found.hits if hit.rule.role != "benign"}
    assert known, f"no rule knows: {text}"
