# SPDX-License-Identifier: Apache-2.0
"""Seeded short dialogues of eight kinds: the text that the demo's target learns from.

Comes in: a seed. Goes out: an endless stream of distinct prompts, each with one right answer in one
of several phrasings. It costs about 20 us a dialogue.

The answers are built so that drafting them takes understanding, not copying: facts are looked up
(a town's river), computed (a sum) or re-ordered (notes by day), and what is taken over from the
prompt comes in another order. The surprise: phrasings are drawn at random on purpose. Where two are
equally likely the target's greedy choice hangs on the context, which is what real text is like.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

_TOPICS = yaml.safe_load(Path(__file__).with_name("topics.yaml").read_text(encoding="utf-8"))
_LISTS = ("counts", "names", "things", "items", "colours", "days", "months")
COUNTS, NAMES, THINGS, ITEMS, COLOURS, DAYS, MONTHS = (_TOPICS[name].split() for name in _LISTS)
TOWNS, JOBS, HOBBIES, SEASONS = (_TOPICS[n] for n in ("towns", "jobs", "hobbies", "seasons"))
TASKS, DISHES = _TOPICS["tasks"], _TOPICS["dishes"]
_SAYINGS = _TOPICS["sayings"]  # one alternative of each [this|that] is taken
FILTERS, CHANGES, FOLDS = (_TOPICS[name] for name in ("filters", "changes", "folds"))

_TRIES_A_PROMPT = 1000
# How a question is opened, and the answer's opening that goes with it this often.
_OPENINGS = {
    "": "",
    "Please help me. ": "Of course. ",
    "Hey! ": "Sure thing! ",
    "Quick question: ": "In short: ",
}
_MATCHING_OPENING_SHARE = 0.8


@dataclass(frozen=True)
class Dialogue:
    """One question and its answer."""

    category: str
    prompt: str
    answer: str


def _say(rng: random.Random, template: str, **facts: object) -> str:
    """`template` with one alternative of each `[this|that]` chosen and its `{facts}` filled in."""
    chosen = re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    return chosen.format(**facts)


def _said(rng: random.Random, kind: str, **facts: object) -> tuple[str, str]:
    """The kind's question and its answer."""
    prompt, answer = (_say(rng, _SAYINGS[kind][part], **facts) for part in ("prompt", "answer"))
    return prompt, answer


def _sums(rng: random.Random) -> tuple[str, str]:
    have, change, gain = rng.randint(21, 89), rng.randint(2, 9), rng.random() < 0.5
    total = have + change if gain else have - change
    # The one step that decides the result: the last digit, with or without a carry.
    if gain:
        step = f"The last digits make {have % 10 + change} together, which brings {have} up to {total}."
    elif have % 10 >= change:
        step = f"The last digit drops from {have % 10} to {total % 10}, which leaves {total}."
    else:
        step = f"Down to {have // 10 * 10} it takes {have % 10}, and the rest leads to {total}."
    verb = "[buys|finds|is given] {change} more" if gain else "[sells|loses|gives away] {change}"
    prompt = "{name} has {have} {thing} and " + verb + ". [How many now?|Count them for me.]"
    undone = f"Taking {change} away" if gain else f"Putting {change} back"
    facts = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS), "have": have}
    facts |= {"change": change, "total": total}
    return _say(rng, prompt, **facts), _say(
        rng, _SAYINGS["sums"]["answer"], step=step, undone=undone, **facts
    )


def _people(rng: random.Random) -> tuple[str, str]:
    town, job, hobby = (rng.choice(list(table)) for table in (TOWNS, JOBS, HOBBIES))
    country, river, _, dish, _ = TOWNS[town]
    place, work = JOBS[job]
    facts = {"name": rng.choice(NAMES), "town": town, "job": job, "hobby": hobby, "place": place}
    facts |= {"work": work, "free": HOBBIES[hobby], "country": country, "river": river}
    return _said(rng, "people", dish=dish, **facts)


def _sorting(rng: random.Random) -> tuple[str, str]:
    things, backwards = rng.sample(THINGS, rng.randint(4, 5)), rng.random() < 0.5
    asked = {"way": "z to a" if backwards else "a to z", "things": ", ".join(things)}
    ordered = sorted(things, reverse=backwards)
    first, last = ordered[0], ordered[-1]
    facts = {"first": first, "last": last, "a": first[0].upper(), "b": last[0].upper()}
    facts |= {"where": "after" if backwards else "before", "count": COUNTS[len(things) - 1]}
    return _said(rng, "sorting", ordered=" ".join(ordered), **asked, **facts)


def _code(rng: random.Random) -> tuple[str, str]:
    kept, change, fold = (rng.choice(list(table)) for table in (FILTERS, CHANGES, FOLDS))
    argument, x = rng.choice(("values", "numbers", "data", "items")), rng.choice("xnv")
    n = rng.randint(2, 99)
    variable, start, update = FOLDS[fold]
    wanted = f"the {fold} of the {change} of all entries that are {kept.format(n=n)}"
    lines = [
        f"def {fold}_{change}({argument}):",
        f"    {variable} = {start}",
        f"    for {x} in {argument}:",
        f"        if {FILTERS[kept].format(x=x, n=n)}:",
        f"            {update.format(value=CHANGES[change].format(x=x))}",
        f"    return {variable}",
        _say(rng, "[An empty input gives|With nothing to loop over you get] ") + f"{start}.",
    ]
    return _say(rng, _SAYINGS["code"]["prompt"], argument=argument, wanted=wanted), "\n".join(lines)


def _travel(rng: random.Random) -> tuple[str, str]:
    start, town = rng.sample(list(TOWNS), 2)
    season, days = rng.choice(list(SEASONS)), rng.randint(3, 9)
    hour, ride = rng.randint(6, 12), rng.randint(2, 9)
    country, river, sight, dish, language = TOWNS[town]
    weather, packed = SEASONS[season]
    facts = {"country": country, "river": river, "sight": sight, "dish": dish, "packed": packed}
    facts |= {"language": language, "weather": weather, "nights": COUNTS[days - 2]}
    asked = {"start": start, "town": town, "season": season, "days": days, "hour": hour}
    return _said(rng, "travel", ride=ride, arrival=hour + ride, **asked, **facts)


def _notes(rng: random.Random) -> tuple[str, str]:
    count = rng.randint(2, 3)
    days = rng.sample(range(len(DAYS)), count)
    notes = list(zip(days, rng.sample(NAMES, count), rng.sample(list(TASKS), count), strict=True))
    listed = "; ".join(f"{who} will {task} on {DAYS[day]}" for day, who, task in notes)
    prompt = _say(rng, "[Turn my notes into a plan|Order these notes by day]: {it}.", it=listed)
    notes.sort()
    parts = [f"{DAYS[day]} brings {TASKS[task]}, thanks to {who}" for day, who, task in notes]
    plan = _say(rng, "[; then |; after that ]").join(parts)
    idle = COUNTS[len(DAYS) - count - 1]
    return prompt, _say(rng, _SAYINGS["notes"]["answer"], plan=plan, idle=idle, who=notes[0][1])


def _cooking(rng: random.Random) -> tuple[str, str]:
    dish, guests = rng.choice(list(DISHES)), rng.randint(2, 9)
    facts = {"name": rng.choice(NAMES), "day": rng.choice(DAYS), "count": COUNTS[guests - 1]}
    asked = {"dish": dish, "guests": guests, "hour": (hour := rng.randint(5, 9))}
    *parts, method = DISHES[dish]
    amounts = " and ".join(f"{amount * guests}{unit} {label}" for amount, unit, label in parts)
    found = {"amounts": amounts, "begin": hour - 1, "method": method}
    return _said(rng, "cooking", **asked, **found, **facts)


def _records(rng: random.Random) -> tuple[str, str]:
    name, town, item = (rng.choice(list(pool)) for pool in (NAMES, TOWNS, ITEMS))
    colour, count, price = rng.choice(COLOURS), rng.randint(2, 9), rng.randint(2, 9)
    month, day = rng.randrange(len(MONTHS)), rng.randint(10, 28)
    facts = {"name": name, "town": town, "item": item, "colour": colour, "price": price}
    record = {"due": f"{month + 1:02d}-{day}", "item": item, "colour": colour, "quantity": count}
    record |= {"total": count * price, "customer": name, "country": TOWNS[town][0]}
    asked = _say(
        rng,
        _SAYINGS["records"]["prompt"],
        count=COUNTS[count - 1],
        month=MONTHS[month],
        day=day,
        **facts,
    )
    return asked, json.dumps(record)


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sums": _sums,
    "people": _people,
    "sorting": _sorting,
    "code": _code,
    "travel": _travel,
    "notes": _notes,
    "cooking": _cooking,
    "records": _records,
}


def dialogues(*, seed: int) -> Iterator[Dialogue]:
    """Endless dialogues, the kinds in turn, no prompt twice; equal seeds give equal streams.

    Raises:
        RuntimeError: a kind has run out of new prompts (each has some ten thousand or more).
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    for category in itertools.cycle(KINDS):
        for _ in range(_TRIES_A_PROMPT):
            question, answer = KINDS[category](rng)
            opening = rng.choice(list(_OPENINGS))
            matching = rng.random() < _MATCHING_OPENING_SHARE
            reply = _OPENINGS[opening] if matching else rng.choice(list(_OPENINGS.values()))
            if opening + question not in seen:
                break
        else:
            raise RuntimeError(f"no new prompt of kind {category} in {_TRIES_A_PROMPT} tries")
        seen.add(opening + question)
        yield Dialogue(category=category, prompt=opening + question, answer=reply + answer)
