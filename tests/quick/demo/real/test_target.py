# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's names and row order against transformers' own; a model out of the hub's cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from shared.errors import RetryableError, UserError
from stages.demo.real.target import (
    _LAYER_NAMES,
    _WHEEL,
    PACKAGED,
    _from_hub,
    _in_halves,
    _saved_name,
    make_real_target,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one model, offline."""
    snapshot = tmp_path / "cache" / "models--acme--small" / "snapshots" / "c0ffee"
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    for name in ("config.json", "model.safetensors", "onnx/config.json"):
        (snapshot / name).write_text(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_model_of_the_hub_is_copied_without_its_other_formats(cache: Path) -> None:
    out = cache / "target"
    found = make_real_target(out, model="acme/small", revision=None)
    assert (found.source, found.revision) == ("acme/small", "c0ffee")
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "target.json"}
    assert make_real_target(out, model="acme/small", revision=None) == found
    with pytest.raises(UserError, match=r"expected acme/other at .*, found acme/small"):
        make_real_target(out, model="acme/other", revision=None)


def test_another_revision_than_the_folder_s_is_refused(cache: Path) -> None:
    snapshots = cache / "cache" / "models--acme--small" / "snapshots"
    commit = "facade" + 34 * "0"
    (snapshots / commit).mkdir()
    (snapshots / commit / "config.json").touch()
    for tag, each in (("v1", commit), ("v2", "c0ffee")):
        (snapshots.parent / "refs" / tag).write_text(each)
    found = make_real_target(cache / "target", model="acme/small", revision="v2")
    for same in ("v2", "main", "c0ffee", None):
        assert make_real_target(cache / "target", model="acme/small", revision=same) == found
    for other in ("v1", commit):
        with pytest.raises(UserError, match=rf"revision {other} at .*, found .* c0ffee") as refused:
            make_real_target(cache / "target", model="acme/small", revision=other)
        assert refused.value.code == "target-folder-other"
    with pytest.raises(RetryableError):  # no hub says what it is
        make_real_target(cache / "target", model="acme/small", revision="v3")


COMMIT = "c0ffee" + 34 * "0"


def a_target(folder: Path, **more: str) -> Path:
    folder.mkdir(parents=True)
    facts = {"source": "acme/small", "revision": COMMIT, **more}
    (folder / "target.json").write_text(json.dumps(facts))
    return folder


def test_the_same_command_asks_no_hub_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "cache" / "models--acme--small" / "refs" / "v2").write_text("c0ffee")
    found = make_real_target(cache / "target", model="acme/small", revision="v2")
    assert json.loads((cache / "target" / "target.json").read_text())["asked"] == "v2"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "empty"))
    assert make_real_target(cache / "target", model="acme/small", revision="v2") == found
    make_real_target(a_target(cache / "old"), model="acme/small", revision=COMMIT[:7])


def test_where_the_hub_is_silent_a_folder_is_kept_unless_something_says_otherwise(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, named = a_target(cache / "old"), a_target(cache / "named", asked="v2")
    assert make_real_target(old, model="acme/small", revision="v9").revision == COMMIT
    assert f"at revision {COMMIT}, which may be another than v9" in caplog.text
    for folder, revision in ((named, "v9"), (old, "facade1")):
        with pytest.raises(RetryableError):
            make_real_target(folder, model="acme/small", revision=revision)
    with pytest.raises(UserError, match="found acme/small at revision c0ffee"):
        make_real_target(old, model="acme/small", revision="facade" + 34 * "0")


def test_the_package_s_target_is_no_revision_of_the_hub_s(tmp_path: Path) -> None:
    (tmp_path / "target.json").write_text(json.dumps({"source": _WHEEL, "revision": "0"}))
    assert make_real_target(tmp_path, model=PACKAGED, revision=None).source == _WHEEL
    with pytest.raises(UserError, match=rf"at revision v1\.0 at .*, found {_WHEEL} at revision 0"):
        make_real_target(tmp_path, model=PACKAGED, revision="v1.0")


@pytest.mark.parametrize("facts", ['{"parameters": 1}', "[]", "{", '{"source": ["a"]}'])
def test_a_target_of_another_command_is_kept(tmp_path: Path, facts: str) -> None:
    (tmp_path / "target.json").write_text(facts)
    with pytest.raises(UserError, match=r"expected acme/small at .*, found another") as refused:
        make_real_target(tmp_path, model="acme/small", revision=None)
    assert refused.value.code == "target-folder-other"


def test_the_package_stands_for_its_own_model_alone(cache: Path) -> None:
    assert _from_hub(cache, PACKAGED, None) is None
    for model, revision in (("acme/other", None), (PACKAGED, "0" * 40)):
        with pytest.raises(RetryableError, match=model):
            make_real_target(cache / "other", model=model, revision=revision)


def test_every_tensor_of_a_llama_has_its_name() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=32,
    )
    with torch.device("meta"):
        names = {name for name, _ in LlamaForCausalLM(config).named_parameters()}
    gguf = [f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in _LAYER_NAMES]
    gguf += ["token_embd.weight", "output_norm.weight", "output.weight"]
    assert {_saved_name(name) for name in gguf} == names


@pytest.mark.parametrize(
    ("rows", "heads", "expected"), [("abcd", 1, "acbd"), ("abcdefgh", 2, "acbdegfh")]
)
def test_rows_of_a_head_go_from_pairs_to_halves(rows: str, heads: int, expected: str) -> None:
    values = np.array([[ord(letter)] for letter in rows])
    assert "".join(chr(value) for (value,) in _in_halves(values, heads)) == expected
