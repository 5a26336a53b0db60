# SPDX-License-Identifier: Apache-2.0
"""The subsets of a clone of a hub data set, which its README.md lists with their files.

Worked example, the head of such a page; a subset has a pattern, several, or one for each split:

    ---
    configs:
    - config_name: en
      data_files: en/*.jsonl
    - config_name: fr
      data_files: [{split: train, path: fr/train-*}]
    ---
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.errors import UserError
from shared.io import files


@dataclasses.dataclass(frozen=True)
class Subset:
    """One subset, and the patterns of its files with the split of each ("" where names tell it)."""

    name: str
    patterns: tuple[tuple[str, str], ...]

    def split_of(self, name: str) -> str | None:
        """The split that a file belongs to here; None if it is no file of this subset."""
        for split, pattern in self.patterns:
            if any(fnmatch.fnmatchcase(name, p) for p in (pattern, pattern.replace("**/", ""))):
                return split
        return None


def chosen_subset(folder: Path, name: str | None, label: str) -> Subset | None:
    """The subset to read; None where the folder has no such list.

    Raises:
        UserError: there is none of that name, or several and none chosen.
    """
    configs = _configs(folder / "README.md")
    named = {str(each.get("config_name", "default")): each for each in configs}
    defaults = [key for key, each in named.items() if each.get("default") is True]
    if name is None and not named:
        return None
    wanted = name or [*defaults, *(named if len(named) == 1 else ["default"])][0]
    if wanted in named:
        return Subset(wanted, tuple(_patterns(named[wanted])))
    raise UserError(
        f"{label}: {folder}: expected {f'the subset {name!r}' if name else 'one subset'}, found "
        f"{', '.join(named) or 'none'} in README.md.",
        code="prompts-subset",
        remedy="Set the source's `subset` to one of them." if named else "Take `subset` out.",
        facts={"path": str(folder), "subsets": list(named)},
    )


def _configs(readme: Path) -> list[Mapping[str, Any]]:
    """What the head of a README lists; nothing where it has no head, or none that can be read."""
    if not readme.is_file():
        return []
    head, _, rest = files.read_text(readme).removeprefix("\ufeff").lstrip().partition("---\n")
    try:
        facts = yaml.safe_load(rest.partition("\n---")[0]) if not head else None
    except yaml.YAMLError:
        return []
    configs = facts.get("configs") if isinstance(facts, dict) else None
    listed = configs if isinstance(configs, list) else []
    return [each for each in listed if isinstance(each, dict)]


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    listed = config.get("data_files")
    folder = str(config.get("data_dir") or ".").removeprefix("./").strip("/")
    prefix = "" if folder in ("", ".") else f"{folder}/"
    if not listed:
        yield "", f"{prefix}*"
    for each in listed if isinstance(listed, list) else [listed] if listed else []:
        split, paths = ("", each) if isinstance(each, str) else ("", "")
        if isinstance(each, dict):
            split, paths = str(each.get("split", "")), each.get("path", "")
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, prefix + str(path).removeprefix("./")
