"""Writes tales.txt, the text that the example learns: short tales from a seeded grammar.

Run `python examples/data/make_tales.py` to write the file again, byte for byte.
"""

import pathlib
import re

SIZE = 200_000

HEROES = [
    ("Mara", "she", "her", "ferrywoman", "boat"),
    ("Tobin", "he", "his", "baker", "oven"),
    ("Ilse", "she", "her", "clockmaker", "workshop"),
    ("Corin", "he", "his", "shepherd", "hut"),
    ("Nessa", "she", "her", "weaver", "loom"),
    ("Halvard", "he", "his", "lighthouse keeper", "tower"),
    ("Brida", "she", "her", "beekeeper", "orchard"),
    ("Odo", "he", "his", "miller", "mill"),
    ("Petra", "she", "her", "glassblower", "furnace"),
    ("Anselm", "he", "his", "gardener", "greenhouse"),
    ("Runa", "she", "her", "mapmaker", "study"),
    ("Felix", "he", "his", "cobbler", "bench"),
]

LOST = {  # what was missed, and where it was all along
    "the brass key": ["under the third stair", "in the pocket of the old coat", "in a jar of dried beans"],
    "the grey goose": ["asleep behind the woodpile", "on the roof of the chapel", "halfway down the river"],
    "the silver thimble": ["inside a loaf of bread", "at the bottom of the well", "in the nest of a magpie"],
    "the longest ladder": ["leaning on the far side of the barn", "across the stream, as a bridge"],
    "the letter from the north": ["between two pages of the almanac", "under the cat", "in the wrong drawer"],
    "the copper kettle": ["on the neighbour's stove", "in the shed, full of nails", "under a heap of snow"],
    "the little bell": ["around the neck of a goat", "in the drum of the miller's child", "in the tall grass"],
    "the blue lantern": ["hanging in the apple tree", "at the end of the pier", "in the cellar, still burning"],
}

GRAMMAR = {
    "season": ["spring", "summer", "autumn", "winter"],
    "place": ["village of Low Ferry", "town of Harrow Bridge", "valley of the Two Mills", "harbour of Stane"],
    "weather": ["rain fell on the roofs", "mist lay on the water", "the wind came from the sea", "the sky was clear",
                "snow covered the road", "the sun stood low over the hills"],
    "morning": ["early in the morning", "before the bells rang", "just after breakfast", "when the cocks crowed"],
    "animal": ["cat", "dog", "donkey", "crow", "goat", "pony"],
    "colour": ["black", "white", "brown", "spotted", "red"],
    "number": ["two", "three", "four", "five", "six", "seven"],
    "food": ["bread and cheese", "onion soup", "baked apples", "a pot of lentils", "honey cakes", "smoked fish"],
    "spot": ["the market", "the bridge", "the old mill", "the chapel", "the inn", "the edge of the wood", "the pier"],
    "opening": [
        "In the {place} there lived a {trade} called {hero}.",
        "{hero} was a {trade} in the {place}, and everybody knew {poss} {tool}.",
        "Of all the people in the {place}, {hero} the {trade} was the first to rise.",
    ],
    "setting": [
        "One day in {season}, {morning}, {weather}.",
        "It was {season}, and {weather}.",
        "For {number} days that {season} {weather}.",
    ],
    "loss": [
        "When {hero} came to {poss} {tool}, {lost} was gone.",
        "{hero} looked for {lost}, but it was not where it should have been.",
        "\"Who has taken {lost}?\" asked {hero}, and nobody could say.",
    ],
    "search": [
        "First {pron} asked at {spot}, but the people there had seen only a {colour} {animal}.",
        "Then {pron} walked to {spot} and back again, which took {number} hours.",
        "{pron} searched {poss} {tool} from top to bottom and found {number} buttons and a {colour} feather.",
        "At {spot} {pron} met {friend} the {friend_trade}, who was eating {food}.",
        "A {colour} {animal} followed {hero} all the way to {spot}.",
        "{pron} sat down on a stone near {spot} and thought about it for a long time.",
    ],
    "talk": [
        "\"Have you seen {lost}?\" asked {hero}. \"No,\" said {friend}, \"but I will help you to look.\"",
        "\"You are tired,\" said {friend}. \"Eat some {food_plain} with me, and then we shall look together.\"",
        "\"When did you see it last?\" asked {friend}. \"In {season},\" said {hero}, \"or a little before.\"",
        "\"I would give {number} pennies to know where it is,\" said {hero}. {friend} only smiled.",
    ],
    "food_plain": ["bread", "soup", "cheese", "cake", "fish", "porridge"],
    "find": [
        "In the end it was {friend} who found {lost}: it was {where}.",
        "And there it was: {lost}, {where}, as if it had never been anywhere else.",
        "Towards evening a {colour} {animal} led them to {lost}, which was {where}.",
    ],
    "closing": [
        "{hero} thanked {friend} and gave {friend_obj} {food}.",
        "So {hero} the {trade} went home, and {friend} the {friend_trade} went home, and both slept well.",
        "Since then {hero} looks there first.",
        "That night they ate {food} together, and {weather}.",
    ],
}  # fmt: skip


class Picker:
    """A small linear congruential generator: the same text on every Python."""

    def __init__(self, seed):
        self.state = seed

    def __call__(self, options):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return options[(self.state >> 33) % len(options)]


def expand(template, bound, pick):
    """`template` with its {names} replaced: by what this tale has bound, or by a choice from the grammar."""

    def replace(match):
        name = match[1]
        return bound[name] if name in bound else expand(pick(GRAMMAR[name]), bound, pick)

    return re.sub(r"\{(\w+)\}", replace, template)


def tale(pick):
    hero, pron, poss, trade, tool = pick(HEROES)
    friend, friend_pron, _, friend_trade, _ = pick([h for h in HEROES if h[0] != hero])
    lost = pick(list(LOST))
    bound = {"hero": hero, "pron": pron, "poss": poss, "trade": trade, "tool": tool, "lost": lost}
    bound |= {"friend": friend, "friend_trade": friend_trade, "friend_obj": "her" if friend_pron == "she" else "him"}
    bound |= {"where": pick(LOST[lost]), "season": pick(GRAMMAR["season"]), "place": pick(GRAMMAR["place"])}
    searches = [pick(["search", "search", "talk"]) for _ in range(pick([1, 2, 3]))]
    paragraphs = [["opening", "setting", "loss"], [*searches, "talk"], ["find", "closing"]]
    text = [[expand(pick(GRAMMAR[beat]), bound, pick) for beat in beats] for beats in paragraphs]
    sentences = [[s[0].upper() + s[1:] for s in paragraph] for paragraph in text]
    return "\n".join(" ".join(paragraph) for paragraph in sentences) + "\n\n"


def tales(size=SIZE, seed=1):
    pick, text = Picker(seed), ""
    while len(text) < size:
        text += tale(pick)
    return text.rstrip() + "\n"


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("tales.txt").write_text(tales())
