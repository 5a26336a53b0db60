# SPDX-License-Identifier: Apache-2.0
"""Every error that the product raises, in one table made from the code: `python -m tests.error_table`.

In: the syntax trees of shared/ and stages/. Out: `stages/ops/look/triage/ERRORS.md`, a row for each
code: its exit code, where it is raised, what to do. A part that is put together at run time is shown
as `...`.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from shared import errors

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "stages" / "ops" / "look" / "triage" / "ERRORS.md"
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.EyrieError)
}
_HEAD = """# Errors

Every error of ours, made from the code by `python -m tests.error_table`. The code is what programs read:
it is in the log's record (`[code] problem`) and in `status/<stage>.json`; the words may change.

| code | exit | where | what to do |
|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Raised:
    """One place that makes an error.

    Attributes:
        code: "" where none is given; None where it is a variable of the place.
    """

    place: str
    line: int
    kind: str
    code: str | None
    remedy: str


def _text(node: ast.expr | None) -> str | None:
    """A text of the source; what is filled in shows as `...`."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    return None


def raised() -> Iterator[Raised]:
    """All places that call one of our exceptions."""
    for folder in ("shared", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                # A class that is a variable (`kind(...)`) is known by its parts.
                if name in CLASSES or {"code", "remedy"} <= given.keys():
                    code, remedy = _text(given.get("code")), _text(given.get("remedy"))
                    yield Raised(place, node.lineno, name, code, remedy or "")


def without_code() -> list[str]:
    """`file:line` of each error without a code."""
    return [f"{each.place}:{each.line}" for each in raised() if each.code == ""]


def table() -> str:
    """The page."""
    rows: dict[str, list[Raised]] = {}
    for each in raised():
        if each.code:
            rows.setdefault(each.code, []).append(each)
    lines = []
    for code, places in sorted(rows.items()):
        exits = sorted({str(CLASSES[p.kind].exit_code) for p in places if p.kind in CLASSES})
        where = ", ".join(sorted({place.place for place in places}))
        remedy = next((place.remedy for place in places if place.remedy), "").replace("|", "\\|")
        lines.append(f"| {code} | {' '.join(exits) or '...'} | {where} | {remedy} |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    missing = without_code()
    sys.stdout.write(f"{TABLE}: {table().count('| ') // 4} codes, {len(missing)} places without\n")
    sys.stdout.write("".join(f"  {place}\n" for place in missing))
