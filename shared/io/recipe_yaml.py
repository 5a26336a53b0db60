# SPDX-License-Identifier: Apache-2.0
"""A recipe's YAML: plain values, each key once, no alias inside what another alias may repeat."""

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import yaml

_MAX_LEVELS = 100


class RecipeError(ValueError):
    """The text is not YAML that a recipe may hold; the message says why and where."""


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; a typo in a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise RecipeError(f"the key {key.value!r} twice{_line(key.start_mark)}")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        RecipeError: not YAML, a key twice, or aliases inside anchors.
    """
    try:
        _refuse_nested_aliases(text)
        return yaml.load(text, _Loader)
    except RecipeError:
        raise
    except RecursionError as error:
        raise RecipeError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise RecipeError(str(error)) from error
    # What the loader's own constructors raise for a broken date, number or flag.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RecipeError(f"a value that cannot be read: {error!r}") from error


def not_finite(value: Any, at: str = "") -> Iterator[str]:
    """Where in a list or mapping infinity or NaN stands, as `key.0.key`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield at
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            below = f"{at}.{key}".lstrip(".")
            yield from not_finite(key, below)
            yield from not_finite(inner, below)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from not_finite(inner, f"{at}.{index}".lstrip("."))


def _refuse_nested_aliases(text: str) -> None:
    """`b: &b [*a, *a]` doubles with every line: a kilobyte of it would unfold to a terabyte."""
    anchored: list[bool] = []  # for each open collection, whether an alias may repeat it
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) and any(anchored):
            raise RecipeError(f"an alias inside an anchored value{_line(event.start_mark)}")
        if isinstance(event, yaml.CollectionStartEvent):
            anchored.append(event.anchor is not None)
            if len(anchored) > _MAX_LEVELS:
                raise RecipeError(f"nested more than {_MAX_LEVELS} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored.pop()


def _line(mark: Any) -> str:
    return f" (line {mark.line + 1})"
