# SPDX-License-Identifier: Apache-2.0
"""Chat templates that behave as the families' do, and five conversations for each.

The templates are written for this test: each has what its family does to a conversation (what ends a
turn, what becomes of reasoning in history, how a tool call looks, which roles it refuses), and none
of its wording.
"""

import functools
import re
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from shared.prompts.rows import Prompt, Turn
from tests.models import tiny_tokenizer

FOLDER = Path(__file__).parents[3] / "fixtures" / "templates"
_TOKEN = re.compile(r"</?\|?[\w.:-]+\|?>|\[/?(?:INST|gMASK|THINK|ARGS|[A-Z]+_[A-Z]+)\]")
_NOT_SPECIAL = re.compile(
    r"</?(think|tool_call|tool_response|arg_key|arg_value|TOOLCALL|function|parameter|response)>"
)
_DYNAMIC = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
_DYNAMIC += ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_tool|>"]
_DYNAMIC += ["<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _answer(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


_CALL = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"town": "Lyon", "days": 2}'},
}
_RESULT = {
    "role": "tool",
    "tool_call_id": "functions.weather:0",
    "name": "weather",
    "content": "dry",
}
_TOOL = {"name": "weather", "description": "of a town", "parameters": {"type": "object"}}
ROWS = {
    "plain": Prompt("plain", (Turn((_user("Name a river."),), _answer("The Rhone.")),)),
    "multi": Prompt(
        "multi",
        (Turn((_user("One?"),), _answer("First.")), Turn((_user("Two?"),), _answer("Second."))),
    ),
    "system": Prompt(
        "system",
        (Turn(({"role": "system", "content": "Be brief."}, _user("Hi")), _answer("Hello")),),
    ),
    "thinking": Prompt(
        "thinking",
        (
            Turn((_user("Is 91 prime?"),), _answer("No.", reasoning_content="It is 7 * 13.")),
            Turn((_user("Is 97?"),), _answer("Yes.", reasoning_content="Nothing divides it.")),
        ),
    ),
    "tools": Prompt(
        "tools",
        (
            Turn((_user("Rain in Lyon?"),), _answer("", tool_calls=[_CALL])),
            Turn((_RESULT,), _answer("No rain.")),
        ),
        tools=({"type": "function", "function": _TOOL},),
    ),
}


@functools.cache
def _base() -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_tokenizer(Path(folder))


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the template, and a token for each that the template writes."""
    import copy

    template = path.read_text()
    tokenizer = copy.deepcopy(_base())
    written = sorted({*_TOKEN.findall(template), *_DYNAMIC, "<s>", "</s>"})
    plain = [token for token in written if _NOT_SPECIAL.fullmatch(token)]
    special = [token for token in written if token not in plain]
    if path.stem == "vicuna-text":  # its end of turn is no token of the tokenizer
        special = []
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(plain)
    eos = "<|endoftext|>" if path.stem == "phi3" else "</s>"
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
    tokenizer.chat_template = template
    return tokenizer
