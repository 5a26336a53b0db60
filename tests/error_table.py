# SPDX-License-Identifier: Apache-2.0
"""Every error that the product raises, in one table made from the code: `python -m tests.error_table`.

In: the syntax trees of shared/ and stages/. Out: `stages/ops/look/triage/ERRORS.md`, a row for each
code: its exit code, what it reports, what to do, where it is raised. What is filled in at run time is
shown by its name in the source, in capitals.
"""

import ast
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shared import errors

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "stages" / "ops" / "look" / "triage" / "ERRORS.md"
_METHODS = frozenset(("join", "get", "name", "exists", "items", "values", "keys", "strip"))
_PLAIN = frozenset(
    (
        *("self", "str", "len", "sorted", "list", "repr", "map", "min", "max", "os", "type"),
        *("decimal", "filesize", "files", "float", "getattr"),
        *("hide_key", "printable", "splitlines"),
    )
)
_SHOWN = {"getuid": "UID", "getgid": "GID", "st_uid": "OWNER", "strerror": "ERROR"}
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
        parts = [
            p.value if isinstance(p, ast.Constant) else f"\0{_label(p)}\0" for p in node.values
        ]
        return "".join(map(str, parts)).replace("\0\0", " ").replace("\0", "")
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(filter(None, (_text(node.left), _text(node.right)))) or None
    if isinstance(node, ast.Starred):
        return _label(node.value)
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.List):
        return " ".join(filter(None, map(_text, node.args[0].elts)))  # of "\n".join([...])
    return None


@dataclasses.dataclass(frozen=True)
class _Source:
    """What an error's text may come from: the functions of its module, the calls of all modules."""

    functions: Sequence[ast.FunctionDef]
    calls: Mapping[str, Sequence[ast.Call]]

    def problem(self, node: ast.expr) -> str:
        """As `_text`; a variable as the function around it makes it, or is given it."""
        return _text(node) or next(filter(None, (*self._made(node), *self._given(node))), "")

    def remedy(self, node: ast.expr | None) -> str:
        """As `problem`, but what a caller gives is one remedy of several."""
        return "" if node is None else _text(node) or next(filter(None, self._made(node)), "")

    def _around(self, node: ast.expr) -> tuple[str, ast.FunctionDef | None]:
        """(the variable in an expression, the innermost function around it)."""
        name = next((each.id for each in ast.walk(node) if isinstance(each, ast.Name)), "")
        inside = [f for f in self.functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
        return name, max(inside, key=lambda f: f.lineno, default=None)

    def _made(self, node: ast.expr) -> Iterator[str | None]:
        """Its assignments, its default, what is appended to it."""
        name, function = self._around(node)
        if function is None:
            return
        for each in ast.walk(function):
            if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == name:
                yield _text(each.value)
        arguments, defaults = function.args.args, function.args.defaults
        for argument, default in zip(arguments[-len(defaults) :], defaults, strict=False):
            if argument.arg == name:
                yield _text(default)
        for each in reversed(list(ast.walk(function))):
            if isinstance(each, ast.Call) and ast.unparse(each.func) == f"{name}.append":
                yield _text(each.args[0])

    def _given(self, node: ast.expr) -> Iterator[str | None]:
        """What the callers of the function give."""
        name, function = self._around(node)
        for call in self.calls.get(function.name, ()) if function else ():
            names = [argument.arg for argument in function.args.args] if function else []
            given = dict(zip(names, call.args, strict=False))
            given |= {keyword.arg or "": keyword.value for keyword in call.keywords}
            yield _text(given.get(name))


def _label(node: ast.expr) -> str:
    """The last name in an expression: `{', '.join(self.known)}` gives KNOWN, counted(n, "row") N rows."""
    node = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "counted":
        return f"{_label(node.args[0])} {_text(node.args[1])}s"
    names = [
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name)
        or (isinstance(part, ast.Attribute) and part.attr not in _METHODS)
    ]
    # `self.folder`: the attribute is met first.
    named = [name for name in names if name not in _PLAIN]
    return _SHOWN.get(named[0], named[0].strip("_").upper()) if named else "VALUE"


@functools.cache
def raised() -> Sequence[Raised]:
    """All places that call one of our exceptions."""
    return tuple(_raised())


def _raised() -> Iterator[Raised]:
    nodes = {
        path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for folder in ("shared", "stages")
        # The first that makes an error gives its words: vLLM, which most have, before TensorRT-LLM.
        for path in sorted(
            (ROOT / folder).rglob("*.py"), key=lambda each: ("trtllm" in str(each), each)
        )
    }
    calls: dict[str, list[ast.Call]] = {}
    for node in itertools.chain.from_iterable(nodes.values()):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls.setdefault(node.func.id, []).append(node)
    for path, own in nodes.items():
        source = _Source([each for each in own if isinstance(each, ast.FunctionDef)], calls)
        place = str(path.relative_to(ROOT))
        for node in own:
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            # A class that is a variable (`kind(...)`) is known by its parts.
            if name in CLASSES or {"code", "remedy"} <= given.keys():
                problem = source.problem(node.args[0]) if node.args else ""
                code, remedy = _text(given.get("code")), source.remedy(given.get("remedy"))
                yield Raised(place, node.lineno, name, code, problem, remedy)


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
