# SPDX-License-Identifier: Apache-2.0
"""What the demo's dialogues are about: words, and tables of facts that only the answers tell."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COUNTS = _words("one two three four five six seven eight nine")
NAMES = _words("Ada Ben Clara David Elena Felix Greta Hugo Iris Jonas Leo Mara Nils Olga Paul Zoe")
THINGS = _words("apples books cards coins lemons maps pencils ropes shells stamps tickets wheels")
ITEMS = _words("lamp chair table clock kettle mirror carpet basket")
COLOURS = _words("red blue green black white yellow")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday")
MONTHS = _words("January February March April May June July August September")
# Town: its country, river, sight, dish and language; answers use facts that no prompt states.
TOWNS = {
    "Lisbon": ("Portugal", "Tagus", "the yellow trams", "grilled sardines", "Portuguese"),
    "Paris": ("France", "Seine", "the iron tower", "onion soup", "French"),
    "Rome": ("Italy", "Tiber", "the old arena", "fresh pasta", "Italian"),
    "Vienna": ("Austria", "Danube", "the opera house", "apple cake", "German"),
    "Prague": ("Czechia", "Vltava", "the stone bridge", "bread dumplings", "Czech"),
    "Warsaw": ("Poland", "Vistula", "the royal castle", "beet soup", "Polish"),
    "Seville": ("Spain", "Guadalquivir", "the orange court", "cold tomato soup", "Spanish"),
    "Cairo": ("Egypt", "Nile", "the great pyramids", "stewed beans", "Arabic"),
    "Cologne": ("Germany", "Rhine", "the twin spires", "rye bread", "German"),
}
# Job: the place of work, and what is done there.
JOBS = {
    "baker": ("a warm kitchen", "kneads dough before sunrise"),
    "nurse": ("a busy hospital", "looks after the patients"),
    "pilot": ("the airport", "flies small planes across the sea"),
    "teacher": ("a village school", "explains fractions to children"),
    "farmer": ("a hillside farm", "feeds the goats and mends fences"),
    "painter": ("a bright studio", "mixes colours for large portraits"),
}
# Hobby: what it looks like at the weekend.
HOBBIES = {
    "chess": "studies openings at the club",
    "sailing": "takes a small boat out on the lake",
    "music": "plays the cello in a quartet",
    "hiking": "climbs a mountain with old friends",
    "cooking": "tries a new stew on the neighbours",
    "running": "trains for a marathon in the forest",
}
# Season: the weather, and what to pack for it.
SEASONS = {
    "spring": ("mild with short showers", "a light jacket"),
    "summer": ("hot and dry", "sunglasses and a hat"),
    "autumn": ("windy and wet", "an umbrella"),
    "winter": ("cold with early nights", "gloves and a scarf"),
}
# A task as the notes have it: what the plan says of it.
TASKS = {
    "paint the fence": "a fresh coat of colour outside",
    "call the bank": "a talk about the loan",
    "book the hall": "a reservation for the party",
    "print the posters": "a stack of announcements",
    "fix the door": "new hinges and a lock",
    "order the food": "enough to eat for everyone",
    "write the report": "twenty pages ready to read",
}
# Dish: two ingredients as (amount a guest, unit, name), and the method.
DISHES = {
    "lentil soup": ((80, " g of", "lentils"), (1, "", "carrots"), "simmer it for half an hour"),
    "pancakes": ((60, " g of", "flour"), (1, "", "eggs"), "fry them thin in butter"),
    "fried rice": ((90, " g of", "rice"), (2, "", "onions"), "stir it over high heat"),
    "tomato pasta": ((100, " g of", "noodles"), (3, "", "tomatoes"), "cook the sauce down slowly"),
    "bean stew": ((70, " g of", "beans"), (2, "", "peppers"), "soak everything overnight"),
}
# A function's filter, its change of every entry, and its fold: the variable, start and update.
FILTERS = {
    "even": "{x} % 2 == 0",
    "odd": "{x} % 2 == 1",
    "positive": "{x} > 0",
    "larger than {n}": "{x} > {n}",
    "smaller than {n}": "{x} < {n}",
    "divisible by {n}": "{x} % {n} == 0",
}
CHANGES = {
    "squares": "{x} * {x}",
    "cubes": "{x} ** 3",
    "doubles": "2 * {x}",
    "halves": "{x} / 2",
    "digits": "abs({x}) % 10",
}
FOLDS = {
    "sum": ("total", "0", "total += {value}"),
    "product": ("result", "1", "result *= {value}"),
    "list": ("output", "[]", "output.append({value})"),
    "set": ("unique", "set()", "unique.add({value})"),
    "maximum": ("best", "None", "best = {value} if best is None else max(best, {value})"),
}
