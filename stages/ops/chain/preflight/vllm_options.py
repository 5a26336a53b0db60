# SPDX-License-Identifier: Apache-2.0
"""The options of the vLLM that an interpreter has, read from vLLM's source: importing it takes 10 s and more.

Run as a script by that interpreter, it prints them as JSON. What a version of vLLM keeps elsewhere is left
out, so that nothing is held to a list that is not whole.
"""

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The server's own options, in older versions of vLLM and since 0.32.
_SERVERS = ("entrypoints/openai/cli_args.py", "entrypoints/launchers/cli_args.py")
_LONGEST = "MAX_SPEC_LEN"


def read(folder: Path) -> dict[str, Any]:
    """`engine`, `speculative` and `server`: names, with underscores; `longest_draft`: tokens."""
    engine = _tree(folder / "engine" / "arg_utils.py")
    servers = [tree for name in _SERVERS if (tree := _tree(folder / name)).body]
    sampler = _tree(folder / "v1" / "sample" / "rejection_sampler.py")
    own = list(_fields(engine, "EngineArgs"))
    found = {
        "engine": own,
        "speculative": list(_fields(_tree(folder / "config" / "speculative.py"), "Speculative")),
        "longest_draft": next(_longest(sampler), None),
    }
    if own and servers:
        found["server"] = sorted({name for tree in (engine, *servers) for name in _server(tree)})
    return {key: value for key, value in found.items() if value}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")


def _fields(tree: ast.Module, prefix: str) -> Iterator[str]:
    """The annotated names of the classes whose names begin so."""
    for each in tree.body:
        if isinstance(each, ast.ClassDef) and each.name.startswith(prefix):
            for line in each.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id


def _server(tree: ast.Module) -> Iterator[str]:
    """Fields of all classes, and flags that stand in the code."""
    yield from _fields(tree, "")
    for node in ast.walk(tree):
        text = str(node.value) if isinstance(node, ast.Constant) else ""
        name = text[2:].replace("-", "_")
        if text.startswith("--") and name.isidentifier():
            yield name


def _longest(tree: ast.Module) -> Iterator[int]:
    for line in tree.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == _LONGEST:
            yield int(ast.literal_eval(line.value))


if __name__ == "__main__":
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    sys.stdout.write(json.dumps(read(Path(next(iter(places)))) if places else {}) + "\n")
