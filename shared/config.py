# SPDX-License-Identifier: Apache-2.0
"""Configuration: environment = the machine, recipe = the run, flag = this invocation.

Every stage's config is a pydantic model on `StageConfig`; a field is *identity* (it changes the result, so
it is part of the fingerprint) or *operational* (it does not). `settings.py` fills it.
A recipe is one YAML file with the section `run` and one section a stage:

    run:   {name: demo, target: targets/demo}
    synth: {prompts: targets/demo/prompts.jsonl}
"""

import contextlib
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from pydantic.fields import FieldInfo

from shared.io import recipe_yaml
from shared.paths import RunPaths
from shared.runtime.process import Share

_MAX_NAME_BYTES = 200  # file systems take 255 bytes; a temporary name is longer than the final one


def identity(default: Any, doc: str, **constraints: Any) -> Any:
    """A field that changes the result."""
    return pydantic.Field(
        default, description=doc, json_schema_extra={"kind": "identity"}, **constraints
    )


def operational(default: Any, doc: str, **constraints: Any) -> Any:
    """A field that changes how the work is done, not what comes out."""
    return pydantic.Field(
        default, description=doc, json_schema_extra={"kind": "operational"}, **constraints
    )


def kind_of(field: FieldInfo) -> str:
    """'identity', 'operational', or '' for a field that is neither (the invocation's own)."""
    extra = field.json_schema_extra
    return str(extra.get("kind", "")) if isinstance(extra, dict) else ""


class Section(pydantic.BaseModel):
    """A strict, frozen part of a recipe; its numbers are finite, since JSON has no others."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @pydantic.field_validator("*")
    @classmethod
    def _is_finite_within(cls, value: Any) -> Any:
        """Also where a mapping holds anything."""
        if (found := next(recipe_yaml.not_finite(value), None)) is not None:
            raise ValueError(f"expected finite numbers, found another at {found}")
        return value


# The keys of `run` that decide what the target's server answers: synth and bench consume them.
SERVED_KEYS = (
    "target",
    "target_revision",
    "max_length_tokens",
    "reasoning",
    "chat_template",
    "chat_template_kwargs",
    "seed",
    "trust_remote_code",
)


class RunConfig(Section):
    """What all stages of a run must agree on."""

    name: str = operational("run", "Name of the run: its folder in the workspace.")
    target: str = identity(..., "Target model: a folder (workspace first) or a hub id.")
    target_revision: str | None = identity(None, "Hub revision of the target.")
    target_train: str | None = identity(
        None,
        "The original of a quantised run.target: dump and train use it, synth and bench do not.",
    )
    aux_layers: tuple[int, ...] | None = identity(
        None, "Layers whose states feed the draft head, in vLLM's numbering. Default: 2, L//2, L-3."
    )
    max_length_tokens: int = identity(2048, "Longest row, prompt and answer, in tokens.", ge=8)
    draft_vocab_size: int = identity(32000, "Tokens that the draft head can propose.", ge=1)
    reasoning: Literal["keep", "drop", "disable"] = identity(
        "keep",
        "keep: train on the reasoning; drop: mask it out of the loss; disable: pass "
        "enable_thinking=false to the chat template, in every stage.",
    )
    chat_template: str | None = identity(
        None,
        "Chat template to use instead of the target's default: a file (workspace first), or the "
        "name of one of the target's named templates.",
    )
    chat_template_kwargs: dict[str, Any] = identity(
        {}, "Variables for the chat template, the same wherever a stage renders it."
    )
    seed: int = identity(0, "Seed of everything random.", ge=0, lt=2**32)
    trust_remote_code: bool = identity(
        False, "Run the target's own Python code in every stage. Only for a target that you trust."
    )

    @pydantic.field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
            raise ValueError("a run's name is one folder name, printable, without separators")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise ValueError(f"a run's name has at most {_MAX_NAME_BYTES} bytes")
        return name

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What every rendering of the chat template gets: `chat_template_kwargs` over `reasoning`."""
        disabled = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}
        return {**(disabled if self.reasoning == "disable" else {}), **self.chat_template_kwargs}


class CommandConfig(Section):
    """The settings of every command.

    Attributes:
        positional: fields that may be given without their flags, in this order.
        variadic: the field that takes all further words.
        groups: headings of --help, each with the names of its flags separated by spaces.
        lists_all: whether --help has flags beside those of `groups`; false: only the recipe sets them.
    """

    positional: ClassVar[tuple[str, ...]] = ()
    variadic: ClassVar[str] = ""
    groups: ClassVar[Mapping[str, str]] = {}
    lists_all: ClassVar[bool] = True

    workspace: Path = pydantic.Field(
        default_factory=lambda: Path(os.environ.get("EYRIE_WORKSPACE", "workspace")),
        description="The folder that the stages share; the default is $EYRIE_WORKSPACE.",
    )


class StageConfig(CommandConfig):
    """The settings of every stage."""

    section: ClassVar[str] = ""
    consumes: ClassVar[tuple[str, ...]] = ()

    recipe: Path | None = pydantic.Field(None, description="The recipe, a YAML file.")
    overwrite: bool = pydantic.Field(
        False,
        description="Replace this stage's finished artifact, or one of another configuration. "
        "Unfinished work of this configuration is continued.",
    )
    run: RunConfig = pydantic.Field(description="The recipe's section run.")

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.workspace, self.run.name)

    @property
    def share(self) -> Share:
        """The part of the stage's work that this process does: all of it, but for `ShardedConfig`."""
        return Share()

    @property
    def process_name(self) -> str:
        """What this process's log and status file are called."""
        share = self.share
        return self.section if share.count == 1 else f"{self.section}-{share.index}"

    @property
    def is_quiet(self) -> bool:
        """Whether another process on this terminal reports the same work."""
        return False

    def identity(self) -> dict[str, Any]:
        """The resolved identity keys that this stage consumes, as `section.key` -> JSON value."""
        own = self.model_dump(mode="json")
        keys = {f"run.{key}": own["run"][key] for key in self.consumes}
        for name, field in type(self).model_fields.items():
            if kind_of(field) == "identity":
                keys[f"{self.section}.{name}"] = own[name]
        return keys

    def with_defaults(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """An earlier identity, with the default of each setting that is younger than it.

        So an artifact outlives the settings that are added later, one inside another (a source's
        `weight`) included: their defaults keep what was before them.
        """
        whole = dict(found)
        for key in self.identity():
            section, _, name = key.partition(".")
            fields = (RunConfig if section == "run" else type(self)).model_fields
            if (field := fields.get(name)) is None:
                continue
            value = found.get(key, field.get_default(call_default_factory=True))
            adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(field.annotation or Any)
            with contextlib.suppress(pydantic.ValidationError):  # no default, or a value of old
                whole[key] = adapter.dump_python(adapter.validate_python(value), mode="json")
        return whole


def is_plain_url(url: str) -> bool:
    """Whether it is an address and no more: http(s), a host, a port, a path; nothing secret."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises where it is no number, as in user:password%40host
    except ValueError:
        return False
    is_bare = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and is_bare


def number_from(variable: str, default: int = 0, *, least: int = 0) -> int:
    """The number that a variable of the machine's environment holds.

    Raises:
        ValueError: it holds something else, or less than `least`.
    """
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"${variable}: expected a number from {least}, found {text!r}")
    return int(text)


class SecretValueError(ValueError):
    """Raised by a validator whose value may hold a secret: messages do not repeat the value."""
