# SPDX-License-Identifier: Apache-2.0
"""Options of vLLM that a stage sets itself: a recipe that gives one anew would have something else measured.

vLLM takes an option under several names, and each of them must be refused.
"""

from collections.abc import Iterable, Mapping

from shared.config import SecretValueError

# Other names of an option, vLLM's short flags among them.
_ALIASES = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "sc": "speculative-config",
    "spec-method": "speculative-config",
    "spec-model": "speculative-config",
    "spec-tokens": "speculative-config",
}


def plain_name(given: str) -> str:
    """An option's name as vLLM's flags have it, without the dashes before it.

    Worked example: `max_num_seqs`, `max-num-seqs` and `--max-num-seqs` are `max-num-seqs`.
    """
    return given.lstrip("-").replace("_", "-")


def field_name(given: str) -> str:
    """An option's name as the fields of vLLM's classes have it: `max_num_seqs`."""
    return plain_name(given).replace("-", "_")


def refuse_own(options: Iterable[str], own: Mapping[str, str]) -> None:
    """Refuse options that are the stage's own to set.

    Worked example: with `own` = {"max-model-len": "run.max_length_tokens"} the names `max_model_len`,
    `--max-model-len`, `max-model` (vLLM's parser takes the beginning of a name, however short, that no other
    name has) and `max-model-len.x` (a key inside an option) are refused.

    Args:
        own: the options' names, with dashes -> what sets them.

    Raises:
        SecretValueError: an option's value may be a key; the message names the option alone.
    """
    for given in options:
        option = _option(given)
        if (name := _own_name(option, own)) is not None:
            short = "" if name == option else f" ({name})"
            raise SecretValueError(
                f"expected no option that the stage sets itself, found {given}{short}, which is set by "
                f"{own[name]}"
            )


def _option(given: str) -> str:
    """The option that a name means: without `no-`, and without what is inside it."""
    return plain_name(given).partition(".")[0].removeprefix("no-")


def _own_name(name: str, own: Mapping[str, str]) -> str | None:
    """The name in `own` of an option, of its alias or of a beginning of either."""
    names = {each: each for each in own}
    names |= {alias: option for alias, option in _ALIASES.items() if option in own}
    if name in names:
        return names[name]
    return next((names[each] for each in names if each.startswith(name)), None)
