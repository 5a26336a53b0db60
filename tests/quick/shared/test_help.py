# SPDX-License-Identifier: Apache-2.0
"""What --help says of every command: how a value is written, its unit, its default."""

import re

import pytest

from shared.config import CommandConfig, StageConfig
from shared.settings import build
from shared.usage import help_text
from stages.bench import config as bench
from stages.demo import config as demo
from stages.dump import config as dump
from stages.ops import config as ops
from stages.synth import config as synth
from stages.train import commands
from stages.train import config as train

COMMANDS = [
    value
    for module in (synth, dump, train, commands, bench, ops, demo)
    for value in vars(module).values()
    if isinstance(value, type)
    and issubclass(value, CommandConfig)
    and value.__module__ == module.__name__
    and not value.__name__.startswith("_")
]
UNITS = {"s": "second", "minutes": "minute", "tokens": "token", "bytes": "byte", "steps": "step"}


def entries(config: type[CommandConfig]) -> dict[str, str]:
    """Flag -> what stands at it, in one line."""
    found: dict[str, str] = {}
    for line in help_text("x", {"run": (config, "x:y")}, "run").splitlines():
        if match := re.match(r"  [ *] --(\w+) (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif found and line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
    return found


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__name__)
def test_a_flag_s_value_unit_and_default_are_told_once(config: type[CommandConfig]) -> None:
    found = entries(config)
    assert "workspace" in found
    for name, text in found.items():
        assert not re.search(r"\(\)|,\)|default: \{\}|VALUE\b(?!\})", text), text
        assert not re.search(r"(?i)default.*default: none", text), text
        if unit := UNITS.get(name.rpartition("_")[2]):
            assert unit in text.lower(), text


def test_a_list_is_written_as_a_flag_takes_it() -> None:
    found = entries(bench.BenchConfig)
    assert found["concurrency"] == "INTEGER,... Requests in flight; one or a list. [default: 1]"
    flags = {"target": "t", "concurrency": "1,8", "num_speculative_tokens": "2"}
    config = build(bench.BenchConfig, flags)
    assert (config.concurrency, config.num_speculative_tokens) == ((1, 8), (2,))
    assert entries(ops.RunChainConfig)["only"].endswith("[default: synth,dump,train,bench]")
    assert entries(synth.SynthConfig)["sources"].startswith("'[{KEY: VALUE}]' Several sources")


@pytest.mark.parametrize(
    "config",
    [commands.VocabConfig, commands.CheckHeadConfig, commands.ExportConfig, dump.ParityConfig],
)
def test_a_small_command_lists_the_flags_that_it_uses(config: type[CommandConfig]) -> None:
    found = entries(config)
    assert {"recipe", "draft_vocab_size"} < found.keys()
    unused = {"epochs", "learning_rate", "overwrite", "trackers", "follow", "patience_s"}
    assert not (unused | {"layout", "writers", "window_shards", "num_shards"}) & found.keys()


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__name__)
def test_stars_and_a_recipe_are_explained_where_there_are_some(config: type[CommandConfig]) -> None:
    page = help_text("x", {"run": (config, "x:y")}, "run")
    assert ("* changes the result." in page) == ("\n  * --" in page)
    assert ("A flag overrides the recipe" in page) == issubclass(config, StageConfig)
