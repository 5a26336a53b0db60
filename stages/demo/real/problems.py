# SPDX-License-Identifier: Apache-2.0
"""Templates of prompts, three kinds: word problems, short instructions, code tasks.

`{a}` to `{d}` are numbers, the other slots are drawn from `WORDS`. The last quarter of each kind's
templates is held out: prompts for bench share none with the prompts that were trained on.
"""

WORDS = {
    "name": "Amara Bilal Chen Daria Emeka Farah Goran Hana Ivo Jun Kofi Lena Mateo Nadia Omar Priya",
    "other": "Rosa Sami Tara Umar Vera Wei Ximena Yusuf Zora Anders Bruno Carla Dilan Esra Fabio",
    "thing": "pencils oranges stickers marbles eggs bottles candles tiles books postcards buttons",
    "place": "market school library garden harbour museum bakery workshop station theatre farm",
    "topic": "sleep rain bridges bees rivers bread glass maps music trains salt wool paper bicycles",
    "animal": "owl fox turtle whale sparrow horse bat salmon beetle wolf",
    "job": "nurse plumber pilot teacher gardener translator carpenter chemist journalist cook",
    "field": "student river match stock flight sensor recipe survey album invoice parcel tide",
    "noun": "numbers words scores prices dates temperatures names lengths",
    "case": "empty-list single-item negative-number duplicate very-long-list",
}

PROBLEMS = (
    "{name} has {a} {thing} and buys {b} more at the {place}. {other} then takes {c} of them. "
    "How many {thing} does {name} have now?",
    "A box holds {a} {thing}. {name} fills {b} boxes and has {c} {thing} left over. "
    "How many {thing} were there at the start?",
    "{name} reads {a} pages every day. A book has {b} pages, and {c} of them are already read. "
    "How many days does {name} still need?",
    "At the {place}, {thing} cost {a} coins each. {name} buys {b} and pays with {c}00 coins. "
    "How much change does {name} get?",
    "{name} walks {a} minutes to the {place} and {b} minutes back, {c} days a week. "
    "How many minutes is that in a week?",
    "There are {a} rows of chairs with {b} chairs in each row. {c} chairs are broken. "
    "How many people can sit down?",
    "{name} earns {a} coins an hour and works {b} hours a day. After {c} days {name} spends {d} "
    "coins. How many coins are left?",
    "{name} and {other} share {a}0 {thing} so that {name} gets {b} more than {other}. "
    "How many does each of them get?",
    "A train leaves the {place} with {a} people. At the first stop {b} get off and {c} get on. "
    "How many people are on the train?",
    "{name} bakes {a} trays of {b} rolls. {c} rolls burn and the rest go into bags of {d}. "
    "How many full bags are there?",
    "A tank holds {a}0 litres. It loses {b} litres a day and gets {c} litres of rain a day. "
    "How much is in it after {d} days?",
    "{name} is {a} years old and {other} is {b} years older. How old will {other} be in {c} years?",
    "A garden is {a} metres long and {b} metres wide. A fence costs {c} coins a metre. "
    "What does a fence all around it cost?",
    "{name} saves {a} coins every week for {b} weeks and then buys {c} {thing} at {d} coins each. "
    "How many coins are left?",
    "{other} plants {a} trees on Monday and twice as many on Tuesday. {b} of them do not grow. "
    "How many trees grow?",
    "The {place} opens at {a} in the morning and sells {b} tickets every hour. "
    "How many tickets has it sold after {c} hours?",
)

INSTRUCTIONS = (
    "Explain in {a} sentences why {topic} matters to a small town.",
    "Write a short story about a {job} who finds an {animal} in the {place}.",
    "List {a} questions that a {job} should ask before the first day at a {place}.",
    "Give {name} some advice: {other} is late at the {place} for the third time this week.",
    "Describe the {place} at night to someone who has never been there.",
    "What is the difference between {topic} and {thing}? Answer for a child.",
    "Write a polite letter from {name} to {other} about {a} missing {thing}.",
    "Summarise what a {job} does, in {a} bullet points.",
    "Write a dialogue between a {job} and {name} about {topic}.",
    "Name {a} reasons to visit a {place}, and one reason not to.",
    "How would you teach {name} about {topic} in {b} minutes?",
    "Write a poem of {a} lines about an {animal} and {topic}.",
)

CODE = (
    "Write a Python function that returns the {a} largest {field} {noun} of a list.",
    "Write a Python function that counts how often each of the {field} {noun} appears in a list.",
    "Write a Python class that stores {field} {noun} and can undo the last {a} changes.",
    "Explain step by step how to sort {field} {noun} by hand, and then in Python.",
    "Write a Python test for the {case} case of a function that averages {field} {noun}.",
    "Write a Python function that splits a list of {field} {noun} into groups of {a}.",
    "Write a Python program that reads {field} {noun} from a file and prints the smallest {a}.",
    "Write an SQL query that finds the {a} most frequent {field} {noun} in a table.",
)

KINDS = {"problem": PROBLEMS, "instruction": INSTRUCTIONS, "code": CODE}
HELD_OUT_SHARE = 0.25
