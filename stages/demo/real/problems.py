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
    "A shelf is {a}0 centimetres long. One of the {thing} takes up {b} centimetres. "
    "How many of them fit on the shelf?",
    "{name} reads a book of {a}0 pages in {b} days, the same number every day. "
    "About how many pages is that in a day?",
    "{name} sells {a} {thing} for {b} coins each and {c} more for {d} coins each. "
    "How many coins does {name} get?",
    "A bus has {a}0 seats. {b} people sit on each of its {c} benches. How many seats are free?",
    "{name} has {a} boxes with {b} {thing} each. {other} has {c} {thing} fewer. "
    "How many {thing} do they have together?",
    "A recipe for {a} people needs {b} eggs. How many eggs does {name} need for {c} times as many "
    "people?",
    "It takes {name} {a} minutes to wash one window and {b} minutes to dry it. "
    "How long do {c} windows take?",
    "The {place} had {a}0 visitors in spring and {b}0 more in summer. "
    "How many visitors came in both seasons?",
    "{name} cuts a rope of {a}0 metres into pieces of {b} metres. "
    "How many whole pieces are there, and how much rope is left?",
    "{name} runs {a} kilometres on each of {b} days, and {other} runs {c} kilometres on each of {d} "
    "days. Who runs further, and by how much?",
    "A class of {a} children shares {b}0 {thing} equally. How many does each child get?",
    "{name} pays {a} coins for a ticket and {b} coins for a drink, and has {c} coins left. "
    "How many coins did {name} have before?",
    "There are {a} rooms in the {place}, and each has {b} lamps. {c} lamps are out. "
    "How many lamps are on?",
    "{name} types {a} words a minute. How many words does {name} type in {b} minutes, with a break of "
    "{c} minutes in the middle?",
    "A farmer has {a} cows, {b} sheep and {c} hens. How many legs do the animals have together?",
    "{name} is {a} years old and {other} is {b} years older. How old will {other} be in {c} years?",
    "A garden is {a} metres long and {b} metres wide. A fence costs {c} coins a metre. "
    "What does a fence all around it cost?",
    "{name} saves {a} coins every week for {b} weeks and then buys {c} {thing} at {d} coins each. "
    "How many coins are left?",
    "{other} plants {a} trees on Monday and twice as many on Tuesday. {b} of them do not grow. "
    "How many trees grow?",
    "The {place} opens at {a} in the morning and sells {b} tickets every hour. "
    "How many tickets has it sold after {c} hours?",
    "A pool fills at {a} litres a minute and leaks {b} litres an hour. How full is it after {c} hours?",
    "{name} buys {a} packs of {thing}. Each pack has {b} inside and costs {c} coins. "
    "What does one of the {thing} cost?",
    "{other} is {a} times as old as {name}, who is {b}. How old are they together?",
    "A clock loses {a} minutes every day. How many minutes has it lost after {b} weeks?",
    "{name} and {other} pick {a} baskets of apples in {b} hours. "
    "How many baskets do they pick in {c} hours?",
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
