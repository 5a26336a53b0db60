# SPDX-License-Identifier: Apache-2.0
"""The settings of an export are those that its checkpoint was trained with.

No tensor shows a window, a norm's place or the chat template that was learnt from: with the settings of
another recipe the weights would load, and the head would compute something else, or be served so.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from shared.artifacts.unfinished import IDENTITY, started_identity
from shared.errors import UserError
from shared.expected import wrong
from stages.train.commands import ExportConfig
from stages.train.export import warm_start

# The export's own choice (the draft length on its card), and how the dump was read.
_FREE = ("train.walk_tokens", "train.follow")
# What the head computes with; of the rest the training's value is taken, and told.
_OF_HEAD = frozenset(
    {
        *("run.aux_layers", "run.draft_vocab_size", "train.intermediate_size"),
        *("train.variant", "train.layer", "train.draft_window", "train.parallel_drafting"),
        *("train.init_from", "train.init_vocabulary"),
        *("run.reasoning", "run.chat_template", "run.chat_template_kwargs"),
    }
)
# What the dump's conversations were rendered with.
_CHAT = ("reasoning", "chat_template", "chat_template_kwargs", "trust_remote_code")

logger = logging.getLogger(__name__)


def as_trained(config: ExportConfig, checkpoint: Path) -> tuple[ExportConfig, dict[str, Any]]:
    """The config with the training's settings, and the training's identity.

    Args:
        checkpoint: `<training>/checkpoints/<name>.pt`, or a copy of one of this run's.

    Raises:
        UserError: no training, one that cannot be understood, a given setting of the head that differs
            from the training's, or the head that it began with has changed.
    """
    training, trained = _training(config, checkpoint)
    wanted = {
        key: value for key, value in config.with_defaults(trained).items() if _is_setting(key)
    }
    require_same(config, wanted, training)
    run = config.run.model_copy(update=_of_section("run", wanted))
    settings = config.model_copy(update={**_of_section("train", wanted), "run": run})
    try:  # lists of JSON become tuples again
        config = ExportConfig.model_validate(settings.model_dump(warnings=False))
    except pydantic.ValidationError as error:
        raise UserError(
            f"{training / IDENTITY}: expected the settings of a training, found others: "
            f"{'; '.join(map(wrong, error.errors()))}.",
            code="training-identity",
            remedy="Restore the file, or train anew with --overwrite.",
            facts={"folder": str(training)},
        ) from error
    found = warm_start.fingerprint(config).get("init_from")
    if found != trained.get("input.init_from"):
        raise UserError(
            f"train.init_from: {config.init_from} is not the head any more that this training began with.",
            code="export-init-from-changed",
            remedy="Restore it: the head's settings are read from its config.json.",
            facts={"init_from": config.init_from},
        )
    return config, trained


def chat_settings(dump: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `run` that the conversations of a dump, given by its manifest, were rendered with."""
    identity = dump["identity"]
    return {name: identity[f"run.{name}"] for name in _CHAT if f"run.{name}" in identity}


def require_same(config: ExportConfig, wanted: Mapping[str, Any], made: Path) -> None:
    """Refuse a given setting of the head that is not as `made`; tell where another one differs.

    Args:
        wanted: `section.name` -> the value of what was made.

    Raises:
        UserError: with each such setting.
    """
    differing = dict(_differing(config, wanted))
    if refused := [text for key, text in differing.items() if key in _OF_HEAD]:
        raise UserError(
            f"{made} was made with other settings than this export is given: {', '.join(refused)}.",
            code="export-settings",
            remedy="Give the recipe of the training, or leave these settings out.",
            facts={"differing": refused},
        )
    if differing:
        logger.warning("as it was trained, not as given: %s", ", ".join(differing.values()))


def _training(config: ExportConfig, checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """(the folder of the training that a checkpoint is of, its identity)."""
    own = config.paths.stage("train")
    for folder in (checkpoint.absolute().parent.parent, own):
        identity = started_identity(folder)
        if identity is not None and any(key.startswith("train.") for key in identity):
            return folder, identity
    raise UserError(
        f"expected a training in {own}, found none.",
        code="training-missing",
        remedy="Train first, or give the run.name of the training.",
        facts={"folder": str(own)},
    )


def _is_setting(key: str) -> bool:
    return key.startswith(("run.", "train.")) and key not in _FREE


def _of_section(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = (key.partition(".") for key in settings)
    return {name: settings[f"{section}.{name}"] for first, _, name in found if first == section}


def _differing(config: ExportConfig, wanted: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each setting that was given and is not as wanted; `auto` agrees with what it came to."""
    given = {f"train.{name}" for name in config.model_fields_set}
    given |= {f"run.{name}" for name in config.run.model_fields_set}
    values = config.model_dump(mode="json")
    own = {f"run.{name}": value for name, value in values["run"].items()} | config.identity()
    for key in sorted(own.keys() & given & wanted.keys()):
        if own[key] not in (wanted[key], "auto"):
            yield key, f"{key} {wanted[key]!r}, not {own[key]!r}"
