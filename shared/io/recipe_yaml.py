# SPDX-License-Identifier: Apache-2.0
"""YAML that a stranger may have written: small when unfolded, every key once.

Aliases let a kilobyte stand for a terabyte (`b: [*a, *a]`, again and again), and the plain loader keeps
the last of two equal keys in silence. So the parsed nodes are counted before a value is made of them.
"""

from collections.abc import Hashable
from typing import Any

import yaml

_MOST_NODES = 100_000
_MOST_LEVELS = 100


class RecipeError(ValueError):
    """The text is no YAML that we take; the message says why and where."""


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        RecipeError: not YAML, a key twice, or too much of it.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise RecipeError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise RecipeError(str(error)) from error
    # What the loader's own constructors raise for a broken date, number or flag.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"a value that is none: {error!r}") from error


def _count(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(nodes below `node` with every alias written out, levels); each node is looked at once."""
    if id(node) in known:
        if not known[id(node)][0]:
            raise RecipeError(f"an alias that contains itself{_place(node)}")
        return known[id(node)]
    known[id(node)] = (0, 0)
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _require_distinct(node)
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    found = [_count(part, known) for part in below]
    size = 1 + sum(nodes for nodes, _ in found)
    levels = 1 + max((deep for _, deep in found), default=0)
    if size > _MOST_NODES:
        raise RecipeError(f"more than {_MOST_NODES} values when aliases are written out")
    if levels > _MOST_LEVELS:
        raise RecipeError(f"nested more than {_MOST_LEVELS} levels deep")
    known[id(node)] = (size, levels)
    return size, levels


def _require_distinct(node: yaml.MappingNode) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise RecipeError(f"the key {key.value!r} twice{_place(key)}")
            seen.add((key.tag, key.value))


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
