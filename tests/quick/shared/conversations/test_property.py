# SPDX-License-Identifier: Apache-2.0
"""Any template, any conversation: the spans spell what was said and its end, or the row is refused.

Templates are put together from choices that families make, sane and not: what ends a turn, what
becomes of reasoning, whether a prompt is added for the answer, how a call is written, and faults
(text added, answers cut, doubled, changed by case). `EYRIE_SOAK=100000` asks for so many pairs.
"""

import dataclasses
import json
import os
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.config import RunConfig
from shared.conversations.reader import ConversationReader, Refused
from shared.prompts.rows import Prompt, Turn
from tests.quick.shared.conversations.gallery import FOLDER, tokenizer_of

PAIRS = int(os.environ.get("EYRIE_SOAK", "600"))
PER_TEMPLATE = 4 if PAIRS < 10_000 else 40
END = "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Choices:
    """What one template does."""

    header: str
    prompt: str  # after the header, when an answer is asked for
    before: str  # put before an answer's content in any case
    end: str
    final: str  # after the whole conversation
    reasoning: str  # "shown", "last", "none"
    calls: str  # "json", "text", "items", "none"
    content: str  # a Jinja expression
    marks: bool
    asks: bool

    def source(self) -> str:
        """The template."""
        think = "{{ '<think>' + m.reasoning_content + '</think>' }}"
        condition = {"shown": "true", "last": "loop.last", "none": "false"}[self.reasoning]
        call = {
            "json": "{{ '<call>' }}{{ c.function | tojson }}{{ '</call>' }}",
            "text": "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}",
            "items": "{{ '<call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
            "{{ ' ' + k + '=' }}{{ v }}{% endfor %}{{ '</call>' }}",
            "none": "",
        }[self.calls]
        header = json.dumps(self.header)
        answer = (
            f"{{% if m.reasoning_content and {condition} %}}{think}{{% else %}}"
            f"{{{{ {json.dumps(self.before)} }}}}{{% endif %}}{{{{ {self.content} }}}}"
            f"{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}"
        )
        opened = f"{{{{ {header}.replace('ROLE', 'assistant') }}}}"
        answer = opened + answer
        if self.marks:
            answer = f"{{% generation %}}{answer}{{% endgeneration %}}"
        asking = f"{opened}{{{{ {json.dumps(self.prompt)} }}}}" if self.asks else ""
        return (
            f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}"
            f"{{{{ {header}.replace('ROLE', m.role) + m.content }}}}{{% endif %}}"
            f"{{{{ {json.dumps(self.end)} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{asking}{{% else %}}"
            f"{{{{ {json.dumps(self.final)} }}}}{{% endif %}}"
        )


TEMPLATES = st.builds(
    Choices,
    header=st.sampled_from(
        ["<|im_start|>ROLE\n", "<|im_start|>ROLE:", "[ROLE] ", "<|user|>ROLE", ""]
    ),
    prompt=st.sampled_from(["", "", "<think>", "<think></think>"]),
    before=st.sampled_from(["", "", " ", "<think></think>", "Answer: "]),
    end=st.sampled_from([END, END + "\n", "\n" + END, " " + END, "\n", " (over)" + END + "\n", ""]),
    final=st.sampled_from(["", "", "<|pad|>", "bye"]),
    reasoning=st.sampled_from(["shown", "last", "none"]),
    calls=st.sampled_from(["json", "text", "items", "none"]),
    content=st.sampled_from(
        [
            *("m.content", "m.content", "m.content | trim", "m.content[:8]", "m.content | upper"),
            *("m.content + m.content", "m.content.split('x')[-1]", "m.content.lstrip('\\n')", "''"),
            *("(m.content if loop.last else '')", "(m.content or 'nothing')"),
            "m.content | replace(' ', '')",
        ]
    ),
    marks=st.booleans(),
    asks=st.booleans(),
)
LETTERS = 'ab xZ1.\n"{é👋'


def conversation(seed: int) -> Prompt:
    """One to three turns, with reasoning and a tool call now and then."""
    draw = random.Random(seed)

    def words() -> str:
        letters = "".join(draw.choices(LETTERS, k=draw.randint(1, 12)))
        return letters if letters.strip() else letters + "a"

    turns = []
    for index in range(draw.randint(1, 3)):
        answer: dict[str, Any] = {"role": "assistant", "content": words()}
        if draw.random() < 0.4:
            answer["reasoning_content"] = words()
        if draw.random() < 0.25:
            values: list[Any] = [words(), draw.randint(0, 9), True]
            keys = draw.sample(["town", "n", "a"], draw.randint(0, 2))
            arguments = {key: draw.choice(values) for key in keys}
            text = json.dumps(arguments, ensure_ascii=draw.random() < 0.5)
            function = {"name": draw.choice(["weather", "f"]), "arguments": text}
            answer["tool_calls"] = [{"id": f"c{index}", "type": "function", "function": function}]
            answer["content"] = draw.choice(["", answer["content"]])
        turns.append(Turn(({"role": "user", "content": words()},), answer))
    return Prompt("row", tuple(turns))


def squeezed(text: str) -> str:
    return "".join(text.split())


def is_what_was_said(text: str, answer: dict[str, Any], *, keeps: bool) -> bool:
    """Whether `text` is the answer, its own marks and its end, to the letter but for white space."""
    rest, text = squeezed(text), squeezed(text)
    reasoning = squeezed(answer.get("reasoning_content", "")) if keeps else ""
    content = squeezed(answer["content"])
    calls = answer.get("tool_calls", [])
    expected = f"<think>{reasoning}</think>" if reasoning else ""
    starts = {expected + content, expected.removeprefix("<think>") + content}
    start = next(
        (each for each in sorted(starts, key=len, reverse=True) if rest.startswith(each)), None
    )
    if start is None:
        return False
    rest = rest[len(start) :]
    if not calls:
        return rest in ("", squeezed(END))
    name, arguments = calls[0]["function"]["name"], json.loads(calls[0]["function"]["arguments"])
    raw = squeezed(calls[0]["function"]["arguments"])
    spelled = {
        squeezed(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)),
        squeezed(
            json.dumps(
                {"name": name, "arguments": calls[0]["function"]["arguments"]}, ensure_ascii=False
            )
        ),
        name + raw,
        name + squeezed("".join(f"{key}={value}" for key, value in arguments.items())),
    }
    ends = ("", squeezed(END))
    return rest in {f"<call>{each}</call>{end}" for each in spelled for end in ends}


TOKENIZER = tokenizer_of(FOLDER / "chatml.jinja")
TOKENIZER.add_tokens(["<think>", "</think>", "<call>", "</call>"])
OUTCOMES = {"kept": 0, "refused": 0}


@settings(
    max_examples=-(-PAIRS // PER_TEMPLATE),
    deadline=None,
    derandomize="EYRIE_SOAK" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    choices=TEMPLATES,
    seed=st.integers(0, 1 << 30),
    reasoning=st.sampled_from(["keep", "keep", "drop"]),
)
def test_said_and_ended_or_refused(choices: Choices, seed: int, reasoning: str) -> None:
    TOKENIZER.chat_template = choices.source()
    run = RunConfig.model_validate({"target": "t", "reasoning": reasoning})
    reader = ConversationReader(TOKENIZER, run, "allow")
    for number in range(PER_TEMPLATE):
        check(reader, conversation(seed + number), choices, keeps=reasoning == "keep")


def check(reader: ConversationReader, prompt: Prompt, choices: Choices, *, keeps: bool) -> None:
    """One pair."""
    try:
        rows = reader.rows(prompt)
    except Refused:
        OUTCOMES["refused"] += 1
        return
    OUTCOMES["kept"] += 1
    answers = [turn.answer for turn in prompt.turns]
    spans = [(row.input_ids, span) for row in rows for span in row.loss_spans]
    assert len(spans) == len(answers)
    for (ids, (start, end)), answer in zip(spans, answers, strict=True):
        text = TOKENIZER.decode(ids[start:end], clean_up_tokenization_spaces=False)
        assert answer is not None
        assert is_what_was_said(text, answer, keeps=keeps), (text, answer, choices.source())
        assert text.endswith(END) == (END in choices.end)


def test_both_outcomes_came_up() -> None:
    assert min(OUTCOMES.values()) > PAIRS / 20, OUTCOMES
