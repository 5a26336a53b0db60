# SPDX-License-Identifier: Apache-2.0
"""Every error that the product raises, in one table made from the code: `python -m tests.error_table`.

In: the syntax trees of shared/ and stages/. Out: `stages/ops/look/triage/ERRORS.md`, a row for each
code: its exit code, what it reports, what to do, where it is raised. What is filled in at run time is
shown by its name in the source, in capitals.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from shared import errors

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "stages" / "ops" / "look" / "triage" / "ERRORS.md"
_METHODS = frozenset(("join", "get", "name", "exists", "items", "values", "keys", "strip"))
_PLAIN = frozenset(
    ("self", "str", "len", "sorted", "list", "repr", "map", "min", "max", "os", "type")
)
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.EyrieError)
}
_HEAD = """# Errors

Every error of ours, made from the code by `python -m tests.error_table`. The code is what programs read:
it is in the log's record (`[code] problem`) and in `status/<stage>.json`; the words may change. A word in
capitals is filled in when the error occurs.

| code | exit | what it reports | what to do | where |
|---|---|---|---|---|
"""
# Where the error has no remedy of its own, or one that only the moment knows.
_USUAL = {
    1: "Report it with the log.",
    2: "Change what the message names; unchanged it fails again.",
    3: "Look at what the message names: the stage's own output failed its checks.",
    75: "Run the same command again.",
    143: "Run the same command again to continue.",
}


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
    problem: str
    remedy: str


def _text(node: ast.expr | None) -> str | None:
    """A text of the source; what is filled in shows as its name, in capitals."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(p.value) if isinstance(p, ast.Constant) else _label(p) for p in node.values
        )
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    return None


def _label(node: ast.expr) -> str:
    """The last name in an expression: `{', '.join(self.known)}` gives KNOWN."""
    names = [
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name)
        or (isinstance(part, ast.Attribute) and part.attr not in _METHODS)
    ]
    # `self.folder`: the attribute is met first.
    named = [name for name in names if name not in _PLAIN]
    return named[0].strip("_").upper() if named else "VALUE"


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
                    problem = _text(node.args[0]) if node.args else ""
                    yield Raised(place, node.lineno, name, code, problem or "", remedy or "")


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
        exits = sorted({CLASSES[p.kind].exit_code for p in places if p.kind in CLASSES})
        codes = " ".join(map(str, exits)) or "by its cause"
        usual = _USUAL[exits[0] if exits else 2]
        problem = next((place.problem for place in places if place.problem), "see the message")
        remedy = next((place.remedy for place in places if place.remedy), usual)
        where = ", ".join(sorted({place.place for place in places}))
        lines.append(f"| {code} | {codes} | {_cell(problem)} | {_cell(remedy)} | {where} |")
    return _HEAD + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    missing = without_code()
    rows = sum(line.startswith("| ") for line in table().splitlines()) - 1
    sys.stdout.write(f"{TABLE}: {rows} codes, {len(missing)} places without\n")
    sys.stdout.write("".join(f"  {place}\n" for place in missing))
