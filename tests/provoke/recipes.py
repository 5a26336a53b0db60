# SPDX-License-Identifier: Apache-2.0
"""Wrong flags, recipes, inputs and artifacts: no engine starts, seconds each."""

import fcntl
import os
import sys

from shared.io import files
from tests.models import tiny_llama
from tests.provoke.table import ALL, case, conversations
from tests.provoke.world import World

# Flags, recipes, inputs.


@case("empty-prompts", "no-rows", "synth")
def _(world: World) -> None:
    world.prompts([])
    world.run("synth")


@case("broken-prompts", "too-many-failed-rows", "synth")
def _(world: World) -> None:
    world.prompts(['{"prompt": "Hello"}', '{"prompt": "x"', '{"prompt": ""}'])
    world.run("synth")


@case("unusable-prompts", "no-usable-rows", "synth")
def _(world: World) -> None:
    world.prompts(['{"text": "Hello"}', '{"text": "you"}'])
    world.run("synth")


@case("no-prompts-file", "prompts-missing", "synth")
def _(world: World) -> None:
    world.run("synth", "--prompts", "nowhere.jsonl")


@case("unknown-recipe-key", "recipe-key-unknown", "synth", console=True)
def _(world: World) -> None:
    world.recipe("synth", temprature=0.5)
    world.run("synth")


@case("refused-setting", "setting-refused", "train", console=True)
def _(world: World) -> None:
    world.run("train", "--learning_rate", "fast")


@case("unknown-flag", "flag-unknown", "dump", console=True)
def _(world: World) -> None:
    world.run("dump", "--batch_size", "8")


@case("no-recipe", "recipe-missing", "train", console=True)
def _(world: World) -> None:
    (world.workspace / "recipe.yaml").unlink()
    world.run("train")


@case("hub-unreachable", "hub-unreachable", "synth")
def _(world: World) -> None:
    world.run("synth", "--target", "no-such-organisation/no-such-model")


@case("no-chat-template", "chat-template-missing", "synth")
def _(world: World) -> None:
    (world.target / "chat_template.jinja").unlink(missing_ok=True)
    path = world.target / "tokenizer_config.json"
    values = files.read_json(path)
    values.pop("chat_template", None)
    files.write_json(path, values)
    world.run("synth")


@case("broken-tokenizer", "tokenizer-broken", "synth")
def _(world: World) -> None:
    (world.target / "tokenizer.json").write_text("{}")
    world.run("synth")


@case("broken-target-config", "target-config-broken", "synth")
def _(world: World) -> None:
    (world.target / "config.json").write_text('{"hidden_size": 8}')
    world.run("synth")


@case("cut-weights", "target-weights-broken", "dump")
def _(world: World) -> None:
    path = world.target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5])
    world.run("dump", *conversations(world))


@case("no-weights", "target-weights-missing", "dump")
def _(world: World) -> None:
    (world.target / "model.safetensors").unlink()
    world.run("dump", *conversations(world))


@case("wrong-layer-ids", "aux-layers-bad", "dump", needs=("synth",))
def _(world: World) -> None:
    world.run("dump", "--aux_layers", "5,4,2")


@case("shallow-target", "aux-layers-too-few", "dump", needs=("synth",))
def _(world: World) -> None:
    world.config(num_hidden_layers=4)
    world.run("dump")


@case("other-interpreter", "python-package-missing", "dump", console=True)
def _(world: World) -> None:
    words = ["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", sys.base_prefix + "/bin/python3", "-S"]
    world.command([*words, "-m", "stages.dump", "--recipe", "recipe.yaml"])


# Artifacts and parents.


@case("no-parent", "parent-missing", "dump")
def _(world: World) -> None:
    world.run("dump")


@case("recipe-changed-after", "parent-settings-differ", "dump", needs=("synth",))
def _(world: World) -> None:
    world.run("dump", "--max_length_tokens", "48")


@case("other-configuration", "artifact-of-another-configuration", "train", needs=ALL)
def _(world: World) -> None:
    world.run("train", "--learning_rate", "0.5")


@case("parent-file-cut", "parent-file-changed", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    shard = sorted(world.folder("dump").glob("shard_*.pt"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    world.run("train")


@case("corrupt-shard", "shard-broken", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    shard = sorted(world.folder("dump").glob("shard_*.pt"))[0]
    shard.write_bytes(os.urandom(shard.stat().st_size))
    world.run("train")


@case("corrupt-conversations", "conversations-broken", "dump", needs=("synth",))
def _(world: World) -> None:
    part = sorted(world.folder("synth").glob("part-*.parquet"))[0]
    part.write_bytes(os.urandom(part.stat().st_size))
    world.vouch("synth", part)
    world.run("dump")


@case("answers-bit-flipped", "file-damaged-since", "dump", needs=("synth",))
def _(world: World) -> None:
    part = sorted(world.folder("synth").glob("part-*.parquet"))[0]
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 2] ^= 1
    part.write_bytes(whole)
    world.run("dump")


@case("corrupt-token-counts", "token-counts-broken", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    path = world.folder("dump") / "token_freq.pt"
    path.write_bytes(os.urandom(path.stat().st_size))
    world.vouch("dump", path)
    world.run("train")


@case("corrupt-checkpoint", "checkpoint-broken", "train", needs=ALL)
def _(world: World) -> None:
    (world.folder("train") / "manifest.json").unlink()
    for path in (world.folder("train") / "checkpoints").rglob("*.pt"):
        if not path.is_symlink():
            path.write_bytes(os.urandom(2000))
    world.run("train")


@case("target-replaced", "target-changed-since", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    tiny_llama(world.target, seed=9)
    world.run("train")


@case("two-at-once", "folder-busy", "dump", needs=("synth",))
def _(world: World) -> None:
    path = world.folder("dump") / ".lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        world.run("dump")


@case("too-large-draft-vocabulary", "draft-vocabulary-too-large", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    world.run("train", "--draft_vocab_size", "100000")


@case("other-vocabulary-warm-start", "warm-start-differs", "train", needs=ALL)
def _(world: World) -> None:
    head = world.workspace / "head"
    (world.workspace / "run" / "export").rename(head)
    world.run("train", "--init_from", str(head), "--draft_vocab_size", "64", "--overwrite", "true")
