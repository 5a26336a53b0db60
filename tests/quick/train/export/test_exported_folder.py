# SPDX-License-Identifier: Apache-2.0
"""The exported folder: its card, what it may replace, and the damage that is found in it."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.contracts.exported_head import check_export
from shared.contracts.head_variant import named_variant
from shared.errors import OutputError, UserError
from stages.train.export.hf import export_head, require_replaceable
from tests.quick.train.export.small_head import CONFIG, export, make_head


def test_the_card_has_a_command_that_parses(tmp_path: Path) -> None:
    export(make_head(), tmp_path / "head")
    card = (tmp_path / "head" / "README.md").read_text()
    command = next(line for line in card.splitlines() if "vllm serve" in line)
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", "models/small"]
    assert json.loads(words[words.index("--speculative-config") + 1]) == {
        "method": "eagle3",
        "model": "head",
        "num_speculative_tokens": 3,
    }
    assert '"steps": 7' in card
    assert "--default-chat-template-kwargs" not in words


def test_the_card_of_a_copy_from_the_hub_names_the_hubs_model(tmp_path: Path) -> None:
    origin = {"source": "acme/small", "revision": "c0ffee"}
    (tmp_path / "target.json").write_text(json.dumps(origin))
    export(make_head(), tmp_path / "head", target_folder=tmp_path)
    card = (tmp_path / "head" / "README.md").read_text()
    assert 'base_model: "acme/small"' in card
    assert "draft head for acme/small" in card
    assert "vllm serve acme/small --speculative-config" in card
    assert "models/small" not in card


@pytest.mark.parametrize(
    ("origin", "made"),
    [
        (None, "a folder named `mine`. No"),
        ({"source": "pack==1.0", "revision": "0a"}, "a folder named `mine`, made from pack==1.0."),
        ({"facts": {}, "arguments": {}}, "a folder named `mine`. No"),
    ],
    ids=["nothing known", "a package", "another file of that name"],
)
def test_the_card_of_a_local_target_says_so(
    tmp_path: Path, origin: dict[str, Any] | None, made: str
) -> None:
    (tmp_path / "mine").mkdir()
    if origin:
        (tmp_path / "mine" / "target.json").write_text(json.dumps(origin))
    export(make_head(), tmp_path / "head", target_folder=tmp_path / "mine")
    card = (tmp_path / "head" / "README.md").read_text()
    assert made in card
    assert "draft head for the local model mine" in card
    assert "vllm serve TARGET --speculative-config" in card
    assert "base_model" not in card
    assert "models/small" not in card
    assert str(tmp_path) not in card


def test_the_cards_command_drafts_as_the_head_does(tmp_path: Path) -> None:
    variant = named_variant(parallel=True)
    export(make_head(dataclasses.replace(CONFIG, variant=variant, mask_token=0)), tmp_path / "head")
    card = (tmp_path / "head" / "README.md").read_text()
    words = shlex.split(next(line for line in card.splitlines() if "vllm serve" in line))
    assert json.loads(words[words.index("--speculative-config") + 1])["parallel_drafting"] is True


def test_the_cards_command_has_the_template_switches_of_the_training(tmp_path: Path) -> None:
    switches = {"enable_thinking": False, "persona": "it's"}
    serving = {"default-chat-template-kwargs": switches, "trust-remote-code": True}
    serving |= {"chat-template": "my.jinja", "revision": "v1"}
    export(make_head(), tmp_path / "joe's", serving=serving)
    card = (tmp_path / "joe's" / "README.md").read_text()
    words = shlex.split(next(line for line in card.splitlines() if "vllm serve" in line))
    assert json.loads(words[words.index("--default-chat-template-kwargs") + 1]) == switches
    assert json.loads(words[words.index("--speculative-config") + 1])["model"] == "joe's"
    assert "--trust-remote-code" in words and words[words.index("--revision") + 1] == "v1"
    assert words[words.index("--chat-template") + 1] == "TEMPLATE"
    assert "`TEMPLATE` is the file of the chat template that the run was given, `my.jinja`" in card
    (tmp_path / "mine").mkdir()
    export(make_head(), tmp_path / "head", serving=serving, target_folder=tmp_path / "mine")
    assert "--revision" not in (tmp_path / "head" / "README.md").read_text()


def test_the_card_names_the_folder_where_it_will_be(tmp_path: Path) -> None:
    export_head(make_head(), tmp_path / "new", target="t", provenance={}, name="heads/best")
    assert '"model": "heads/best"' in (tmp_path / "new" / "README.md").read_text()


def test_a_broken_head_leaves_the_older_folder_as_it_was(tmp_path: Path) -> None:
    head = make_head()
    export(head, tmp_path / "head")
    before = {p.name: p.read_bytes() for p in (tmp_path / "head").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "README.md"}
    with torch.no_grad():
        head.fc.weight[0, 0] = torch.nan
    with pytest.raises(OutputError, match=r"fc\.weight: holds NaN"):
        export(head, tmp_path / "head")
    assert {p.name: p.read_bytes() for p in (tmp_path / "head").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]], ids=["hf", "speculators"])
def test_only_an_earlier_export_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architectures: list[str] | None
) -> None:
    out, run = tmp_path / "head", tmp_path / "run"
    require_replaceable(out, run)  # nothing there
    export(make_head(), out, target_architectures=architectures)
    require_replaceable(out, run)
    (out / "notes.txt").write_text("mine")
    monkeypatch.chdir(out)
    for path in (out, Path()):
        with pytest.raises(UserError, match=r"--output: .* found notes\.txt"):
            require_replaceable(path, run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("no head beside it")
    with pytest.raises(UserError, match=r"found README\.md"):
        require_replaceable(tmp_path / "mine", run)
    (tmp_path / "link").symlink_to(out)
    for path in (out / "notes.txt", tmp_path / "link", Path("/")):
        with pytest.raises(UserError, match=r"--output: .* found "):
            require_replaceable(path, run)


def test_a_finished_run_keeps_its_export_from_others(tmp_path: Path) -> None:
    out = tmp_path / "export"
    export(make_head(), out)
    for name in ("manifest.json", "identity.json"):
        (out / name).write_text("{}")
    require_replaceable(out, out)
    with pytest.raises(UserError, match=r"found identity\.json") as refused:
        require_replaceable(out, tmp_path / "another" / "export")
    assert refused.value.code == "export-folder-taken"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda out: (out / "README.md").unlink(), "no README.md"),
        (lambda out: (out / "README.md").write_text("# A model"), "another README.md"),
        (lambda out: (out / "README.md").write_bytes(b"\xff"), "README.md"),
        (lambda out: (out / "config.json").write_text('{"model_type": "llama"}'), "config.json"),
        (lambda out: (out / "config.json").write_text("[]"), "config.json"),
        (lambda out: (out / "config.json").write_text("{"), "config.json"),
        (lambda out: (out / "config.json").unlink(), "no config.json"),
    ],
    ids=["no card", "another card", "no text", "a target", "a list", "no JSON", "no config"],
)
def test_a_model_that_is_no_export_of_ours_is_not_replaced(
    tmp_path: Path, change: Callable[[Path], Any], found: str
) -> None:
    export(make_head(), tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(UserError, match=rf"an earlier export .* found .*{found}") as refused:
        require_replaceable(tmp_path / "model", tmp_path / "run")
    assert refused.value.code == "export-folder-taken"


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda w: w.pop("midlayer.hidden_norm.weight"), "hidden_norm.weight: expected"),
    "extra": (lambda w: w.update({"embed_tokens.weight": torch.ones(2)}), "no such tensor"),
    "shape": (lambda w: w.update({"fc.weight": w["fc.weight"][:, 1:]}), r"\(16, 47\)"),
    "dtype": (lambda w: w.update({"norm.weight": w["norm.weight"].half()}), "float16"),
    "no mapping": (lambda w: w.pop("d2t"), "d2t: expected"),
    "rolled mapping": (lambda w: w.update({"d2t": w["d2t"].roll(1)}), "ascending ids"),
    "infinity": (lambda w: w["norm.weight"].fill_(torch.inf), "norm.weight: holds NaN or infinity"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    export(make_head(), tmp_path / "head")
    path = tmp_path / "head" / "model.safetensors"
    weights = load_file(path)
    change, message = DAMAGE[damage]
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    with pytest.raises(OutputError, match=message):
        check_export(tmp_path / "head")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", True),
        ("use_cache", None),
        ("num_hidden_layers", 2),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("torch_dtype", "int8"),
    ],
)
def test_an_edited_config_is_named(tmp_path: Path, key: str, value: Any) -> None:
    config = export(make_head(), tmp_path / "head")
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(OutputError, match="expected"):
        check_export(tmp_path / "head")


def test_a_folder_that_is_no_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OutputError, match="expected an exported draft head"):
        check_export(tmp_path)
