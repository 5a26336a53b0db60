# SPDX-License-Identifier: Apache-2.0
"""The command line of every stage: fire collects flags, pydantic validates, then the stage runs.

fire calls a function before it rejects a flag that it could not place, ignores annotations, turns
`0.10` into a float and `--resume=false` into a truthy string. So fire only gathers raw texts here,
and nothing runs until the whole configuration stands. A stage's `__main__.py` is a table:

    launch("train", {"run": (TrainConfig, "stages.train.run:run"),
                     "vocab": (VocabConfig, "stages.train.run:vocab")})

The function is named by text so that `--help` never imports it, nor torch.
"""

import itertools
import json
import logging
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from shared import errors
from shared.artifacts.artifact import refusal
from shared.config import CommandConfig, StageConfig
from shared.io.files import check_workspace
from shared.runtime import process
from shared.runtime.log import format_error, logged_to, start_logging
from shared.runtime.status import Status
from shared.settings import build, flag_fields
from shared.usage import help_text

Commands = Mapping[str, tuple[type[CommandConfig], str]]

# Prints the resolved configuration and runs nothing; ops asks each stage so before a run.
PRINT_CONFIG = "--print_config"

logger = logging.getLogger(__name__)

# Errors whose cause other programs printed: the terminal shows their last lines first.
_EXPLAINED_ABOVE = ("bug", "engine-", "out-of-memory")
# torch's message, in a plain RuntimeError, when the CPU has no memory left.
_TORCH_MESSAGE = "DefaultCPUAllocator: can't allocate memory"


def _unexpected(word: str) -> errors.UserError:
    return errors.UserError(
        f"unexpected argument {word!r}.",
        code="argument-unexpected",
        remedy="Every flag is --name value; --help lists them.",
    )


def collect_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(positional words, flag -> raw text), gathered by fire and otherwise untouched.

    Raises:
        UserError: words that fire itself would act on (`--` starts fire's own flags).
    """
    import fire
    from fire import decorators

    if "--" in argv:
        raise _unexpected("--")
    words: list[str] = []
    flags: dict[str, str] = {}

    def collect(*args: str, **kwargs: str) -> None:
        words.extend(args)
        flags.update(kwargs)

    fire.Fire(decorators.SetParseFn(str)(collect), command=list(argv), name="eyrie")
    return words, {name.replace("-", "_"): text for name, text in flags.items()}


def _spell_out(argv: Sequence[str], config: type[CommandConfig]) -> list[str]:
    """`--json` alone becomes `--json=true`, so that fire does not take the next word as its value."""
    switches = {
        f"--{name}" for name, field in flag_fields(config).items() if field.annotation is bool
    }
    return [
        f"{word}=true"
        if word.replace("-", "_").replace("__", "--", 1) in switches
        and after.lower() not in ("true", "false")
        else word
        for word, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
    ]


def _parse(
    stage: str, commands: Commands, argv_given: Sequence[str]
) -> tuple[str, CommandConfig | str]:
    """(command, its config), or (command, text) where help or the configuration was asked for."""
    argv = [word for word in argv_given if word != PRINT_CONFIG]
    only_print = len(argv) < len(argv_given)
    is_named = bool(argv) and not argv[0].startswith("-")
    command = argv.pop(0) if is_named else next(iter(commands))
    if command not in commands:
        raise errors.UserError(
            f"unknown command {command!r}.",
            code="command-unknown",
            remedy=errors.nearest(command, commands),
        )
    if "--help" in argv or "-h" in argv:
        return command, help_text(stage, commands, command)
    config = commands[command][0]
    words, flags = collect_flags(_spell_out(argv, config))
    if not is_named and (late := next((word for word in words if word in commands), None)):
        raise errors.UserError(
            f"{late!r}: expected the command before its flags, found it behind.",
            code="command-late",
            remedy=f"Type python -m stages.{stage} {late} and then the flags.",
        )
    rest = words[len(config.positional) :]
    if rest and not config.variadic:
        raise _unexpected(rest[0])
    flags |= dict(zip(config.positional, words, strict=False))
    if rest:
        flags[config.variadic] = json.dumps(rest, ensure_ascii=False)
    built = build(config, flags)
    return command, _resolved(built) if only_print else built


def _resolved(config: CommandConfig) -> str:
    """The configuration as JSON; a stage's with `refusal`, which says if its folder has other settings."""
    values = config.model_dump(mode="json")
    if isinstance(config, StageConfig):
        values["refusal"] = refusal(config)
    return json.dumps(values, indent=2, ensure_ascii=False)


def _is_unread(error: BaseException) -> bool:
    """Whether whoever read the output has left, as `head` does; from here on it goes nowhere."""
    if isinstance(error, SystemExit):  # rich has found it, and says so
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _outcome(error: BaseException) -> errors.EyrieError:
    """Whatever ended the stage, as one of our own errors."""
    if isinstance(error, errors.EyrieError):
        return error
    if _is_unread(error):
        return errors.Stopped("nobody reads the output any more", code="output-unread")
    if isinstance(error, KeyboardInterrupt):
        return errors.Stopped("interrupted", code="interrupted")
    is_torch = type(error).__name__ == "OutOfMemoryError" or _TORCH_MESSAGE in str(error)
    if isinstance(error, MemoryError) or is_torch:
        return errors.UserError(
            f"out of memory ({error}).",
            code="out-of-memory",
            remedy="Lower the batch (train: --micro_batch_tokens, or --recompute_activations true; "
            "dump: --batch_tokens) or run.max_length_tokens.",
        )
    return errors.EyrieError(
        f"a bug in eyrie: {type(error).__name__}: {error}",
        code="bug",
        remedy="Report it with this log; the traceback above this line names the place.",
        facts={"exception": type(error).__name__},
    )


def _log(error: errors.EyrieError) -> None:
    """One record: the problem, and below it the remedy and the facts (read back by `ops triage`)."""
    level = logging.INFO if error.exit_code == errors.EXIT_STOPPED else logging.ERROR
    logger.log(level, "%s", format_error(error))


def _run(
    config: CommandConfig,
    function: str,
    status: Status | None = None,
    replay: Callable[[], None] = lambda: None,
) -> int:
    try:
        process.catch_stop_signals()
        if status:
            status.opened()
        if isinstance(config, StageConfig):
            check_workspace(config.workspace)
        result = pkgutil.resolve_name(function)(config)
    except BaseException as error:  # the one broad handler: outcomes become exit codes here
        outcome = _outcome(error)
        if outcome.exit_code == errors.EXIT_BUG:
            traceback.print_exc()
        if outcome.code.startswith(_EXPLAINED_ABOVE):
            replay()
        _log(outcome)
        if status:
            status.failed(outcome)
        return outcome.exit_code
    if status:
        status.done()
    return int(result or errors.EXIT_DONE)


def launch(
    stage: str,
    commands: Commands,
    argv: Sequence[str] | None = None,
    *,
    unlogged: Collection[str] = (),
) -> NoReturn:
    """Parse, validate, run, and leave with the outcome's exit code.

    Args:
        unlogged: commands that only answer: they do none of a run's work, and leave nothing there.
    """
    start_logging(stage)
    try:
        command, config = _parse(stage, commands, sys.argv[1:] if argv is None else argv)
    except errors.EyrieError as error:
        _log(error)
        sys.exit(error.exit_code)
    if isinstance(config, str):
        sys.stdout.write(config + "\n")
        sys.exit(errors.EXIT_DONE)
    function = commands[command][1]
    if not isinstance(config, StageConfig):
        process.leave(_run(config, function))
    is_stage = command == next(iter(commands))
    name = config.process_name
    recipe = str(config.recipe.absolute()) if config.recipe else None
    Status.about = {"num_shards": config.share.count, "recipe": recipe}
    log = Path(os.devnull) if command in unlogged else config.paths.log(name)
    with logged_to(log, is_quiet=config.is_quiet) as replay:
        if is_stage:  # one log holds every attempt: this line tells them apart
            logger.info("begin: process %d", os.getpid())
        status = Status(config.paths.status(name)) if is_stage else None
        code = _run(config, function, status, replay)
    process.leave(code)
