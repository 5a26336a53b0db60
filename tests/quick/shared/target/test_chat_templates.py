# SPDX-License-Identifier: Apache-2.0
"""Where a target's chat template lies, which one a run uses, and what its hashes cover."""

import json
from pathlib import Path

import pytest

from shared.config import RunConfig
from shared.conversations.template import ChatTemplate
from shared.errors import UserError
from shared.target.templates import find_template, template_file, template_inputs
from shared.target.tokenizer import load_chat_tokenizer, tokenizer_hash, vocabulary_hash
from tests.models import CHAT_TEMPLATE, tiny_tokenizer


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A tokenizer without a template."""
    tiny_tokenizer(tmp_path / "tiny")
    (tmp_path / "tiny" / "chat_template.jinja").unlink()
    return tmp_path / "tiny"


def write_config(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


def rendered(folder: Path, **run: str) -> str:
    tokenizer = load_chat_tokenizer(folder, RunConfig(target="t", **run), folder.parent)
    return ChatTemplate(tokenizer).render([{"role": "user", "content": "hi"}])


def test_every_place_is_looked_at(bare: Path) -> None:
    with pytest.raises(UserError, match="expected a chat template") as refused:
        rendered(bare)
    assert refused.value.code == "no-chat-template"
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": "from the processor"}))
    assert rendered(bare) == "from the processor"
    (bare / "chat_template.json").unlink()
    (bare / "processor_config.json").write_text(json.dumps({"chat_template": "of its config"}))
    assert rendered(bare) == "of its config"
    write_config(bare, "one text")
    assert rendered(bare) == "one text"
    write_config(bare, named(default="the default", rag="for documents"))
    assert rendered(bare) == "the default"
    (bare / "chat_template.jinja").write_text("the file")
    assert rendered(bare) == "the file"


def test_the_recipe_chooses_a_file_or_a_name(bare: Path) -> None:
    write_config(bare, named(rag="for documents", tool_use="for tools"))
    with pytest.raises(UserError, match="expected a default among") as refused:
        rendered(bare)
    assert refused.value.code == "chat-template-not-chosen"
    assert rendered(bare, chat_template="rag") == "for documents"
    (bare.parent / "own.jinja").write_text("my own")
    assert rendered(bare, chat_template="own.jinja") == "my own"
    with pytest.raises(UserError, match="found 'rug'"):
        rendered(bare, chat_template="rug")


def test_a_server_gets_a_file_where_it_would_not_find_the_template(bare: Path) -> None:
    into, run = bare.parent / "written.jinja", RunConfig(target="t")
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": "from the processor"}))
    assert template_file(bare, run, bare.parent, into) == into
    assert into.read_text() == "from the processor"
    (bare / "chat_template.jinja").write_text("the file")
    assert template_file(bare, run, bare.parent, into) is None


def test_an_additional_template_is_for_tools_alone(bare: Path) -> None:
    (bare / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (bare / "additional_chat_templates").mkdir()
    (bare / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    assert find_template(bare, None, bare.parent) == {"default": CHAT_TEMPLATE, "tool_use": "TOOLS"}
    assert rendered(bare).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
        *("tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt"),
        *("tekken.json", "processor_config.json", "tokenization_own.py", "qwen.tiktoken"),
        "spiece.model",
    ],
)
def test_each_file_is_in_the_tokenizers_hash(bare: Path, name: str) -> None:
    before = tokenizer_hash(bare)
    (bare / name).parent.mkdir(exist_ok=True)
    (bare / name).write_text("changed")
    assert tokenizer_hash(bare) != before


def test_weights_are_in_no_tokenizers_hash_and_nothing_is_not_equal(bare: Path) -> None:
    before = tokenizer_hash(bare), vocabulary_hash(bare)
    (bare / "model.safetensors").write_bytes(b"x")
    (bare / "tokenizer.bin").write_bytes(b"x")
    assert (tokenizer_hash(bare), vocabulary_hash(bare)) == before
    (bare.parent / "empty").mkdir()
    with pytest.raises(UserError, match="expected a tokenizer"):
        vocabulary_hash(bare.parent / "empty")


def test_the_recipes_own_template_is_an_input(bare: Path) -> None:
    run = RunConfig(target="t", chat_template="own.jinja")
    (bare.parent / "own.jinja").write_text("one")
    first = template_inputs(bare, run, bare.parent)
    (bare.parent / "own.jinja").write_text("two")
    assert first != template_inputs(bare, run, bare.parent) != {}


def test_todays_date_is_in_no_rendering(bare: Path) -> None:
    (bare / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    assert rendered(bare) == "26 Jul 2024"
