# SPDX-License-Identifier: Apache-2.0
"""A rule's texts, filled in for one case: nothing is claimed of a recipe that nobody gave."""

import functools
import types
from collections.abc import Mapping
from typing import Any

import jinja2

from stages.ops.look.triage.case import Case

# Rules are ours; their values are no templates. Compiling a template costs a millisecond.
_template = functools.cache(jinja2.Environment(autoescape=False).from_string)
# What to lower where memory is short: the first of these that the recipe sets.
_LOAD = {
    "synth": ("synth.concurrency",),
    "dump": ("dump.batch_tokens",),
    "train": ("train.micro_batch_tokens", "train.batch_tokens"),
}


class Words:
    """What a rule's texts may use."""

    def __init__(self, case: Case, stage: str | None) -> None:
        self._case = case
        self._stage = stage

    def now(self, key: str) -> str:
        """` (now 2048)` where the recipe sets the key, else nothing."""
        value = self._case.setting(key)
        return "" if value is None else f" (now {value})"

    def half(self, *keys: str) -> str:
        """`--batch_tokens 4096` of the recipe's 8192, else `a lower --batch_tokens`."""
        for key in keys:
            value = self._case.setting(key)
            if isinstance(value, int) and value > 1:
                return f"--{keys[0].partition('.')[2]} {value // 2}"
        return f"a lower --{keys[0].partition('.')[2]}"

    def double(self, name: str) -> str:
        """`--tensor_parallel_size 4` of the stage's 2, else `a higher --tensor_parallel_size`."""
        value = self._case.setting(f"{self._stage}.{name}")
        return f"--{name} {value * 2}" if isinstance(value, int) else f"a higher --{name}"

    def less(self) -> str:
        """What takes less memory in this stage."""
        keys = _LOAD.get(self._stage or "")
        return self.half(*keys) if keys else "a smaller batch, or a lower concurrency"

    def engine(self, option: str) -> str:
        """An option of vLLM, as the stage's recipe or vLLM's command line takes it."""
        name, _, value = option.partition(" ")
        section = {"synth": "synth.server_args", "bench": "bench.engine_args"}.get(
            self._stage or ""
        )
        if section is None:
            return f"--{name.replace('_', '-')} {value}".rstrip()
        return f"{section}: {{{name}: {value or 'true'}}}"

    def version(self) -> str:
        """How this stage gets another vLLM."""
        if self._stage is None:
            return "another version of vLLM"
        return f"another vLLM ({self._stage.upper()}_VLLM_VERSION)"


def render(
    template: str, case: Case, stage: str | None, seen: Mapping[str, str] | None = None
) -> str:
    """The text, on one line."""
    words = Words(case, stage)
    names = ("now", "half", "double", "less", "engine", "version")
    values: dict[str, Any] = {name: getattr(words, name) for name in names}
    values |= {
        # Not a dict: a group may be called as one of its methods is.
        "seen": types.SimpleNamespace(**(seen or {})),
        "stage": stage or "the stage",
        "run": case.root or "the workspace",
    }
    return " ".join(_template(template).render(values).split())
