# SPDX-License-Identifier: Apache-2.0
"""Which files a folder, a glob or a path means, and which split each belongs to.

Hidden folders (`.cache`, `.ipynb_checkpoints`, `.git`) are not entered; linked ones are. A data set
that `datasets` saved (`save_to_disk`) is read by its own list of files. As on a hub, a file belongs to
the split in its name or its folder's (`data/test-00000-of-00001.parquet`, `test/a.jsonl`) and else to
`train`. Splits are never mixed: where there are several, the recipe says which.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UserError
from shared.io import files
from shared.paths import find_input, places
from shared.prompts import formats
from shared.prompts.subsets import chosen_subset
from shared.prompts.text_files import unreadable

ALL_SPLITS = "all"
_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHOWN = 8  # names in a message
_SHARD = re.compile(r"[-_.]\d{5}-of-\d{5}.*$")
# Files that describe data and hold none.
_ABOUT = {
    "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "manifest.json",
}  # fmt: skip
_ABOUT_SUFFIXES = (".md", ".yaml", ".yml", ".py", ".lock")
_ABOUT_STEMS = ("README", "LICENSE", "LICENCE", "NOTICE", "CITATION")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of a source; `why_not` says why it is not read, and is empty where it is."""

    path: Path
    name: str  # relative to the source's folder
    split: str = ""
    why_not: str = ""


def find(
    pattern: str, split: str | None, workspace: Path, *, label: str, subset: str | None = None
) -> tuple[list[DataFile], list[DataFile]]:
    """The files to read, sorted, and those that look like data and are not read.

    Args:
        split: the split to read, `all`, or None where there is only one.
        subset: the subset to read, of a clone whose README.md lists several.

    Raises:
        UserError: there are no files, several splits and none chosen, or no such split.
    """
    listed = listed_files(pattern, workspace, label=label, subset=subset)
    found = [each for each in listed if not each.why_not]
    unread = [each for each in listed if each.why_not]
    if not found:
        raise UserError(
            f"{label}: expected a file, a folder or a glob with files of "
            f"{', '.join(formats.FORMATS)} at {places(pattern, workspace)}, or a hub data set "
            "(owner/name), "
            f"found {', '.join(f'{each.name} ({each.why_not})' for each in unread[:5]) or 'none'}.",
            code="prompts-not-found",
            remedy="Correct the path, or mount the folder that holds it; several files are a folder or a "
            f"glob. {_content(workspace)}",
            facts={"path": pattern},
        )
    return _of_split(found, split, f"{label}: {pattern}"), unread


def listed_files(
    pattern: str, workspace: Path, *, label: str, subset: str | None = None
) -> list[DataFile]:
    """Every file that a path means, sorted, those that are not read as data marked.

    Raises:
        UserError: a folder cannot be read, or the subset is not there.
    """
    path = find_input(pattern, workspace)
    if path is None:
        return _in_glob(pattern, workspace)
    if path.is_dir():
        return list(_of_subset(path, subset, label))
    return [DataFile(path, files.printable(path.name), _split_of(Path(path.name)))]


def _content(workspace: Path) -> str:
    """A sentence by which a person sees whether this is the intended folder."""
    is_readable = workspace.is_dir() and os.access(workspace, os.R_OK)
    names = sorted(files.printable(p.name) for p in workspace.iterdir()) if is_readable else []
    shown = ", ".join(names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")
    return (
        f"The workspace {workspace} holds {shown or 'nothing'}; if that is not yours, check "
        "EYRIE_WORKSPACE or --workspace."
    )


def _split_of(name: Path) -> str:
    """The split that a file's relative name says, else `train`.

    Worked example: data/test_sft-00000-of-00001.parquet is test_sft; test/a.jsonl, test1.jsonl and
    split=test/a.jsonl are test, a.dev.jsonl is validation; contest.jsonl is train.
    """
    prefix = _SHARD.sub("", name.name)
    for word in (prefix, *reversed(name.parts[:-1])):
        parts = re.split(r"[-_. =\d]+", word.lower())
        keyword = next((_KEYWORDS[part] for part in parts if part in _KEYWORDS), None)
        if keyword is not None:
            return prefix if word == prefix != name.name else keyword
    return "train"


def _of_split(found: list[DataFile], split: str | None, where: str) -> list[DataFile]:
    splits = sorted({each.split for each in found})
    if split == ALL_SPLITS or (split is None and len(splits) == 1):
        return found
    chosen = [each for each in found if split in (each.split, each.path.name.split(".")[0])]
    if chosen:
        return chosen
    raise UserError(
        f"{where}: expected {'one split' if split is None else f'the split {split!r}'}, found "
        f"{', '.join(splits)}.",
        code="prompts-split",
        remedy=f"Set the source's `split` to one of them, or to {ALL_SPLITS!r}; or give the files of one.",
        facts={"splits": splits},
    )


def _in_glob(pattern: str, workspace: Path) -> list[DataFile]:
    roots = [Path("/")] if Path(pattern).is_absolute() else [workspace, Path.cwd()]
    for root in roots:
        try:
            paths = sorted(root.glob(pattern.lstrip("/")))
        except (OSError, ValueError, NotImplementedError):  # no pattern, or a name too long
            continue
        seen: set[Path] = set()
        if paths:
            return [each for path in paths for each in _matched(path, seen)]
    return []


def _of_subset(folder: Path, name: str | None, label: str) -> Iterator[DataFile]:
    """A folder's files, those of other subsets marked."""
    subset = chosen_subset(folder, name, label)
    for each in _walk(folder, "", set()):
        split = subset.split_of(each.name) if subset else ""
        if subset and split is None and not each.why_not:
            yield dataclasses.replace(each, why_not=f"not of subset {subset.name}: README.md")
        else:
            yield dataclasses.replace(each, split=split or each.split)


def _matched(path: Path, seen: set[Path]) -> Iterator[DataFile]:
    """What one match of a glob stands for: a file, or all of a folder."""
    if path.is_dir():
        yield from _walk(path, f"{files.printable(path.name)}/", seen)
    else:
        yield from _file(path, "", seen)


def _walk(folder: Path, prefix: str, seen: set[Path], split: str = "") -> Iterator[DataFile]:
    """Every file below `folder` in order of names, each once, hidden ones left out.

    Args:
        prefix: what stands before a file's name, "" or "folder/".
        seen: where links led before.
        split: the split that all of them belong to, where something else than names says so.
    """
    if folder.resolve() in seen:  # a link back up, or a second one to the same folder
        return
    seen.add(folder.resolve())
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, "a folder", error.strerror) from error
    names = {entry.name for entry in entries}
    if {"state.json", "dataset_info.json"} <= names:
        yield from _saved(folder, prefix, split)
        return
    for entry in entries:
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            inner = entry.name if "dataset_dict.json" in names else split
            yield from _walk(entry, f"{prefix}{files.printable(entry.name)}/", seen, inner)
        else:
            yield from _file(entry, prefix, seen, split)


def _file(path: Path, prefix: str, seen: set[Path], split: str = "") -> Iterator[DataFile]:
    name = f"{prefix}{files.printable(path.name)}"
    if not path.is_file():
        yield DataFile(path, name, why_not="a link to nothing, or no plain file")
    elif path.name in _ABOUT or path.stem in _ABOUT_STEMS or path.suffix in _ABOUT_SUFFIXES:
        return
    elif not formats.is_data(path):
        yield DataFile(path, name, why_not=f"none of {', '.join(formats.FORMATS)}")
    elif path.resolve() in seen:
        yield DataFile(path, name, why_not="the same file as one before")
    else:
        seen.add(path.resolve())
        yield DataFile(path, name, split or _split_of(Path(name)))


def _saved(folder: Path, prefix: str, split: str) -> Iterator[DataFile]:
    """The files of a saved data set, in its own order; others beside them are caches."""
    state = files.read_json(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list):
        raise unreadable(folder / "state.json", "a list of _data_files", "none")
    for each in listed:
        name = Path(str(each.get("filename") if isinstance(each, dict) else each)).name
        yield DataFile(folder / name, f"{prefix}{name}", split or state.get("_split") or "train")
