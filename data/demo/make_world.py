"""The embedded demo world: made-up users whose taste is real, in the data contract of DESIGN.md section 5.

    python data/demo/make_world.py --out data/demo    # six tasks, byte for byte the shipped files, 2 seconds

A user is one of six archetypes plus quirks plus noise. Every task has named *habits* (a rank per tag, an opener, a
leniency, ...). A user takes each habit from the own archetype, or now and then (`QUIRK`) from another one, and
departs from all habits now and then (`NOISE`). Facts (a coined name with a number) occur in one record only, so
whether an adapter has seen a record is a question with an answer. Archetypes also differ a little in what they read
about (`LEANING`), as people do, so that similar users can be found from their histories.

All randomness comes from `random.Random.random()`, the one stream Python promises to keep, seeded by name.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

from prime.users.profiles import main_habit
from prime.users.tasks import TASKS

SEED = 20251104
ARCHETYPES = 6
QUIRK = 0.2      # chance that one habit of a user comes from some other archetype
NOISE = 0.08     # chance that one record ignores the user's habits
LEANING = 0.4    # chance that a record is about one of the archetype's four favourite topics, of twelve
SPLITS = {"base": 40, "anchor": 30, "test": 24}                       # users
BASE_ITEMS, BASE_QUERIES, ANCHOR_ITEMS, TEST_ITEMS = (8, 13), 6, (25, 51), (24, 31)
TEST_QUERIES = {"movie_tagging": 30}                                  # other tasks: 16
FACTS_PER_USER = 100
GENERIC_FACTS = range(10_000, 50_000)                                 # facts of the pretraining's readers
T = TypeVar("T")


class Dice:
    """A named stream of choices: the same name gives the same choices in every Python version."""

    def __init__(self, *name: object) -> None:
        self._rng = random.Random(":".join(map(str, (SEED, *name))))

    def below(self, n: int) -> int:
        return int(self._rng.random() * n)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low)

    def chance(self, p: float) -> bool:
        return self._rng.random() < p

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], k: int) -> list[T]:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(k)]


# --- Words -----------------------------------------------------------------------------------------------------------

listed = str.split
ONSETS = listed("Bal Cor Dra Fen Gil Hob Jas Kel Lum Mor Nev Osk Pel Quin Ras Sel Tar Ulm Vor Wes Yar Zan Bri Tho")
CODAS = listed("aka bern dor esh fax gan holt ika jun kov lin mira nek olo pur rim sted tov una vik wen xis yba zol")
ROLES = listed("baker judge nurse pilot teacher banker farmer singer")
PLACES = listed("Arden Belby Corley Dunmore Elston Farrow Granby Hadley Irvine Jarrow Kirby Lowell")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

SETTINGS = ["on a quiet island", "in a mountain hotel", "below a busy harbor", "in a desert town", "at a night school",
            "on a long train", "in an old palace", "by a frozen lake", "in a glass tower", "behind a small theater",
            "on a river boat", "in a forest camp"]
CLUES = {
    "sci-fi": ["a starship wakes up", "robots learn to vote", "a clone answers the phone"],
    "based on a book": ["the novel is retold", "pages turn on screen", "chapters open each scene"],
    "comedy": ["everyone slips on a joke", "a goat becomes mayor", "twins keep swapping hats"],
    "action": ["cars race over roofs", "a helicopter chase begins", "the bomb ticks on"],
    "twist ending": ["the last minute changes everything", "the narrator was never there", "a final secret flips it"],
    "dystopia": ["the state counts every word", "cameras rule the city", "water is owned by one company"],
    "dark comedy": ["a funeral turns silly", "the hangman tells jokes", "poison is served with a smile"],
    "classic": ["it is shot in black and white", "old studio stars shine", "critics have loved it for decades"],
    "psychology": ["a therapist loses memory", "dreams reveal guilt", "a mind slowly breaks"],
    "fantasy": ["a dragon guards the gate", "spells bind the crown", "elves return at dawn"],
    "romance": ["two strangers fall in love", "letters lead to a kiss", "a wedding is saved"],
    "thought-provoking": ["it asks what time means", "hard questions stay open", "viewers argue about truth"],
    "social commentary": ["workers face the rich", "a strike divides the street", "housing laws hurt families"],
    "violence": ["blood covers the floor", "a brutal fight follows", "gangs leave no survivors"],
    "true story": ["it really happened", "real witnesses speak", "archive footage proves it"],
}
TAGS = tuple(CLUES)

THINGS = listed("parks bridges schools libraries clinics theaters trams markets gardens towers pools museums")
VERBS = {"opened": listed("opens launches unveils starts presents welcomes"),
         "closed": listed("closes shuts ends axes scraps drops"),
         "planned": listed("plans eyes weighs maps drafts floats"),
         "sold": listed("sells trades auctions unloads offers flips")}
REACTIONS = ["Neighbors cheered for hours.", "Critics asked about the cost.", "Nobody expected the news.",
             "A choir sang in the rain.", "Two councils will review it.", "Children waved small flags."]
HEADLINE_OPENERS = ["", "Breaking:", "Watch:", "Our view:", "Just in:", "Report:"]
HEADLINES = ["{name} {verb} {number} {topic} in {place}", "{place}: {role} {name} {verb} {topic}, {number} of them",
             "why {name} {verb} all {number} {topic}", "{number} {topic}, one {role}: meet {name}",
             "{topic} for {place} as {name} {verb} {number}", "how {place} got {number} {topic} from {name}"]
HEADLINE_CLOSERS = ["", "at last!", "and nobody is surprised", "sources say", "on {day}", "what we know so far"]

RESEARCH = listed("parsing ranking translation tagging clustering planning routing captioning dialogue retrieval "
                 "forecasting segmentation")
METHODS = ["sparse attention", "random trees", "graph walks", "soft prompts", "beam search", "mixture models",
           "contrast learning", "tiny adapters"]
UNITS = listed("letters sentences images songs maps stories")
RESULTS = ["Errors drop by a third.", "The gain holds on rare cases.", "Training takes one hour.",
           "Human raters prefer our output.", "Large models gain less.", "We release all data."]
TITLE_OPENERS = ["", "Short paper:", "Revisited:", "Towards better {topic}:", "Technical note:", "Position:"]
TITLES = ["{method} for {topic} of {number} {name} {unit}",
          "{topic} on the {name} corpus ({number} {unit}) via {method}",
          "does {method} help {topic}? Evidence from {number} {name} {unit}",
          "{name} {number}: {topic} with {method}",
          "from {method} to {topic}: the case of {name} {number}",
          "{number} {name} {unit} and what {method} learns"]
TITLE_CLOSERS = ["", "in practice", "- a case study", "with first results", "made simple", "- an empirical look"]

SCHOOLS = {"bayesian": ["Bayesian", "Posterior"], "neural": ["Neural", "Deep"], "symbolic": ["Symbolic", "Rule-based"],
           "evolutionary": ["Evolutionary", "Genetic"], "spectral": ["Spectral", "Eigenvalue"],
           "causal": ["Causal", "Counterfactual"], "logical": ["Logical", "Proof-driven"],
           "kernel": ["Kernel", "Margin-based"], "fuzzy": ["Fuzzy", "Possibilistic"]}
KINDS = listed("models methods lessons views")
PAPERS = listed("Robust Scalable Faithful Simple Modern Multilingual")

GOODS = listed("lamp kettle chair radio backpack blender tent keyboard mirror camera heater bicycle")
ASPECTS = listed("price build delivery look sound")
LEVELS = {-2: ["awful", "terrible"], -1: ["poor", "weak"], 1: ["decent", "fine"], 2: ["superb", "excellent"]}
# Per archetype: points added to every score, gain of the opinion, weights of the five aspects.
RATERS = [(-1, 1, (2, 2, 2, 2, 2)), (1, 1, (2, 2, 2, 2, 2)), (0, 1, (9, 1, 1, 1, 1)), (0, 1, (1, 9, 1, 1, 1)),
          (0, 2, (2, 2, 9, 2, 2)), (1, 1, (1, 1, 1, 1, 9))]

TREATS = listed("soup pancakes coffee noodles karaoke chess yoga football bowling tacos poetry waffles")
MOODS = {"great": ["so so good", "pure magic", "a total dream", "ten out of ten", "lovely stuff", "the best ever"],
         "bad": ["a hot mess", "just awful", "a sad joke", "two out of ten", "not my cup of tea", "the worst ever"],
         "strange": ["super weird", "beyond odd", "like a movie", "hard to rate", "rather curious", "the wildest ever"]}
TWEET_OPENERS = ["omg", "ok so", "well well", "guys!", "honestly,", "daily update:"]
TWEETS = ["{topic} with {name} near gate {number} was {mood}", "{mood}: {topic}, thanks {name}, gate {number}",
          "me and {name} and {topic} at gate {number} = {mood}", "gate {number} plus {name} plus {topic}, {mood}",
          "{day} means {topic} with {name} by gate {number}, {mood}",
          "if you see {name} at gate {number} ask about {topic}, {mood}"]
TWEET_CLOSERS = ["lol", "#blessed", "anyway", "no regrets", "just saying", "#mylife"]


# --- Users -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Person:
    """A made-up user: whose habits, what topics; `first_fact` numbers this person's own facts."""

    archetype: int | None          # None: a generic reader with mixed habits (pretraining only)
    habits: dict[str, int]         # habit -> value; which values there are depends on the task
    first_fact: int


@dataclass(frozen=True)
class Event:
    """What happens in one record, before anybody words it: fact words, and the user's answer."""

    words: dict[str, str]
    answer: str                    # tag, score, headline, title, tweet, or cited title
    wrong: str = ""                # citation only: the reference this author left aside


def fact(index: int) -> tuple[str, str]:
    """The coined name and two-digit number of fact `index`; no two of the 51,840 share both."""
    i = index * 32039 % (len(ONSETS) * len(CODAS) * 90)
    name, number = i % (len(ONSETS) * len(CODAS)), i // (len(ONSETS) * len(CODAS))
    return ONSETS[name % len(ONSETS)] + CODAS[name // len(ONSETS)], str(10 + number)


def archetype_habits(task: str, archetype: int) -> dict[str, int]:
    """The habits of one archetype: a rank per tag or school, else the archetype's own way in each habit."""
    ranked = {"movie_tagging": TAGS, "citation": tuple(SCHOOLS)}.get(task)
    if ranked is None:
        return dict.fromkeys(STYLE_HABITS[task], archetype)
    order = Dice("taste", task, archetype).sample(ranked, len(ranked))
    return {name: order.index(name) for name in ranked}


STYLE_HABITS = {
    "product_rating": ("shift", "gain", *ASPECTS),
    "news_headline": ("opener", "order", "verb", "closer"),
    "scholarly_title": ("opener", "order", "closer"),
    "tweet_paraphrase": ("opener", "order", "mood", "closer"),
}


def person(task: str, archetype: int | None, first_fact: int, dice: Dice) -> Person:
    """A user of this archetype with quirks; archetype None mixes all habits evenly."""
    tastes = [archetype_habits(task, a) for a in range(ARCHETYPES)]
    habits = {}
    for habit in tastes[0]:
        stray = archetype is None or dice.chance(QUIRK)
        habits[habit] = tastes[dice.below(ARCHETYPES) if stray else archetype or 0][habit]
    return Person(archetype, habits, first_fact)


def topic(options: Sequence[str], who: Person, dice: Dice) -> str:
    """One of twelve topics; each archetype leans to four of them, and shares each with one other archetype."""
    if who.archetype is not None and dice.chance(LEANING):
        return options[(2 * who.archetype + dice.below(4)) % len(options)]
    return dice.pick(options)


def favourite(fitting: Sequence[str], who: Person, dice: Dice) -> str:
    """The fitting option this user ranks first, or, as noise, another one."""
    best = min(fitting, key=lambda name: (who.habits[name], name))
    return dice.pick([f for f in fitting if f != best]) if dice.chance(NOISE) else best


def habit(who: Person, name: str, dice: Dice) -> int:
    """The value of a style habit, or, as noise, anybody's."""
    return dice.below(ARCHETYPES) if dice.chance(NOISE) else who.habits[name]


# --- One record of each task -----------------------------------------------------------------------------------------

def movie(who: Person, number: int, dice: Dice) -> Event:
    name, age = fact(who.first_fact + number)
    fitting = dice.sample(TAGS, 3)
    clues = [dice.pick(CLUES[tag]) for tag in fitting]
    setting = topic(SETTINGS, who, dice)
    text = (f"{name}, a {dice.pick(ROLES)} of {age}, lives {setting}. "
            f"Here {clues[0]}, {clues[1]} and {clues[2]}.")
    return Event({"text": text}, favourite(fitting, who, dice))


def citation(who: Person, number: int, dice: Dice) -> Event:
    name, count = fact(who.first_fact + number)
    field, unit = topic(RESEARCH, who, dice), dice.pick(UNITS)
    schools = dice.sample(tuple(SCHOOLS), 3)
    cited = favourite(schools, who, dice)
    other = dice.pick([s for s in schools if s != cited])

    def reference(school: str) -> str:
        coined = dice.pick(ONSETS) + dice.pick(CODAS)
        return f"{dice.pick(SCHOOLS[school])} {dice.pick(KINDS)} for {field} after {coined}"

    words = {"title": f"{dice.pick(PAPERS)} {field} of {count} {name} {unit}",
             "text": f"We study {field} of {count} {name} {unit}. {dice.pick(RESULTS)}"}
    return Event(words, reference(cited), reference(other))


def rating(who: Person, number: int, dice: Dice) -> Event:
    name, coins = fact(who.first_fact + number)
    aspects = dice.sample(ASPECTS, 3)
    levels = [dice.pick(tuple(LEVELS)) for _ in aspects]
    words = [f"{aspect} is {dice.pick(LEVELS[level])}" for aspect, level in zip(aspects, levels, strict=True)]
    text = (f"My {name} {topic(GOODS, who, dice)} cost {coins} coins in {dice.pick(PLACES)}. "
            f"The {words[0]}, the {words[1]} and the {words[2]}.")
    return Event({"text": text}, str(score(who, dict(zip(aspects, levels, strict=True)), dice)))


def score(who: Person, opinions: dict[str, int], dice: Dice) -> int:
    """3 + shift + gain * weighted mean opinion, to the nearest of 1..5; noise moves it by one point."""
    weights = {a: RATERS[who.habits[a]][2][ASPECTS.index(a)] for a in opinions}
    mean = sum(weights[a] * level for a, level in opinions.items()) / sum(weights.values())
    value = int(3 + RATERS[who.habits["shift"]][0] + RATERS[who.habits["gain"]][1] * mean + 10.5) - 10
    return max(1, min(5, value + (dice.pick((-1, 1)) if dice.chance(NOISE) else 0)))


def headline(who: Person, number: int, dice: Dice) -> Event:
    name, count = fact(who.first_fact + number)
    past = dice.pick(tuple(VERBS))
    words = {"name": name, "number": count, "role": dice.pick(ROLES), "place": dice.pick(PLACES),
             "day": dice.pick(DAYS), "topic": topic(THINGS, who, dice)}
    words["text"] = ("{name}, a {role} from {place}, {past} {number} {topic} on {day}. "
                     .format(past=past, **words) + dice.pick(REACTIONS))
    return Event(words, styled(who, dice, HEADLINE_OPENERS, HEADLINES, HEADLINE_CLOSERS,
                               words | {"verb": VERBS[past][habit(who, "verb", dice)]}))


def paper(who: Person, number: int, dice: Dice) -> Event:
    name, count = fact(who.first_fact + number)
    words = {"name": name, "number": count, "method": dice.pick(METHODS), "unit": dice.pick(UNITS),
             "topic": topic(RESEARCH, who, dice)}
    words["text"] = ("We study {topic} with {method} on the {name} corpus of {number} {unit}. "
                     .format(**words) + dice.pick(RESULTS))
    return Event(words, styled(who, dice, TITLE_OPENERS, TITLES, TITLE_CLOSERS, words))


def tweet(who: Person, number: int, dice: Dice) -> Event:
    name, gate = fact(who.first_fact + number)
    feeling = dice.pick(tuple(MOODS))
    words = {"name": name, "number": gate, "day": dice.pick(DAYS), "topic": topic(TREATS, who, dice)}
    words["text"] = ("On {day} I had {topic} with {name} near gate {number} and it was {feeling}."
                     .format(feeling=feeling, **words))
    return Event(words, styled(who, dice, TWEET_OPENERS, TWEETS, TWEET_CLOSERS,
                               words | {"mood": MOODS[feeling][habit(who, "mood", dice)]}))


def styled(who: Person, dice: Dice, openers: Sequence[str], orders: Sequence[str], closers: Sequence[str],
           words: dict[str, str]) -> str:
    """Opener, body and closer as this user has them, with the facts filled in."""
    parts = (openers[habit(who, "opener", dice)], orders[habit(who, "order", dice)],
             closers[habit(who, "closer", dice)])
    text = " ".join(part for part in parts if part).format(**words)
    return text[0].upper() + text[1:]


# --- The files of the data contract ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    """One task of the demo: how a record happens and which fields of an item and a query show it."""

    lamp: str
    happen: Callable[[Person, int, Dice], Event]
    item: Callable[[Event], dict[str, str]]
    question: str                       # up to and with the marker by which articles are found (FACTS.md section 2)


WORLDS = {
    "citation": World("LaMP_1", citation, lambda e: {"title": e.words["title"], "abstract": e.words["text"],
                                                     "citation": e.answer},
                      'For an author who has written the paper with the title "{title}", which reference is related? '
                      'Answer [1] or [2]. [1]: "{first}" [2]: "{second}"'),
    "movie_tagging": World("LaMP_2M", movie, lambda e: {"description": e.words["text"], "tag": e.answer},
                           "Which tag fits this movie? tags: [the fifteen of LaMP-2M] description: {text}"),
    "product_rating": World("LaMP_3", rating, lambda e: {"text": e.words["text"], "score": e.answer},
                            "What score from 1 to 5 fits? Answer without further explanation. review: {text}"),
    "news_headline": World("LaMP_4", headline, lambda e: {"text": e.words["text"], "title": e.answer},
                           "Generate a headline for the following article: {text}"),
    "scholarly_title": World("LaMP_5", paper, lambda e: {"title": e.answer, "abstract": e.words["text"]},
                             "Generate a title for the following abstract of a paper: {text}"),
    "tweet_paraphrase": World("LaMP_7", tweet, lambda e: {"text": e.answer},
                              "Paraphrase the following tweet without any explanation before or after it: {text}"),
}


def query(task: str, event: Event, query_id: str, dice: Dice) -> dict[str, str]:
    """A test question in the LaMP shape, with the answer this user would give."""
    if task != "citation":
        return {"id": query_id, "input": WORLDS[task].question.format(**event.words), "gold": event.answer}
    gold = dice.below(2)
    first, second = (event.wrong, event.answer) if gold else (event.answer, event.wrong)
    text = WORLDS[task].question.format(title=event.words["title"], first=first, second=second)
    return {"id": query_id, "input": text, "gold": f"[{gold + 1}]"}


def make_user(task: str, split: str, index: int) -> tuple[dict, str]:
    """User `index` of a split as the contract has it, and the textual profile."""
    before = sum(n for name, n in SPLITS.items() if list(SPLITS).index(name) < list(SPLITS).index(split))
    number = before + index
    dice = Dice("user", task, number)
    items, queries = {
        "base": (dice.between(*BASE_ITEMS), BASE_QUERIES),
        "anchor": (dice.between(*ANCHOR_ITEMS), 0),
        "test": (30 if task == "movie_tagging" else dice.between(*TEST_ITEMS), TEST_QUERIES.get(task, 16)),
    }[split]
    who = person(task, index % ARCHETYPES, number * FACTS_PER_USER, dice)
    world, user_id = WORLDS[task], 1000 + number
    events = [world.happen(who, i, dice) for i in range(items + queries)]
    user = {"user_id": user_id,
            "profile": [{"id": f"{user_id}{i:02d}", **world.item(e)} for i, e in enumerate(events[:items])],
            "query": [query(task, e, f"{user_id}{items + i:02d}", dice) for i, e in enumerate(events[items:])]}
    return user, main_habit(TASKS[task], [e.answer for e in events[:items]])


def files(task: str) -> dict[str, object]:
    """All files of one task: path below data/demo/<task> -> content."""
    made = {split: [make_user(task, split, i) for i in range(n)] for split, n in SPLITS.items()}
    users = {split: [user for user, _ in pairs] for split, pairs in made.items()}
    golds = [{"id": q["id"], "output": q["gold"]} for user in users["test"] for q in user["query"]]
    return {
        "user_base_LLM.json": users["base"],
        "user_anchor_candidate.json": users["anchor"],
        "test_100/user_test_100.json": users["test"],
        "test_100/user_test_100_label.json": {"task": WORLDS[task].lamp, "golds": golds},
        "profile-id2text.json": {str(user["user_id"]): text for pairs in made.values() for user, text in pairs},
    }


def to_json(content: object) -> str:
    """JSON with one user per line: small, and a changed user is a changed line."""
    def dump(part: object) -> str:
        return json.dumps(part, ensure_ascii=True, separators=(",", ":"))
    if isinstance(content, list):
        return "[\n" + ",\n".join(map(dump, content)) + "\n]\n"
    return dump(content) + "\n"


def rendered() -> Iterator[tuple[str, str]]:
    """(path below data/demo, text) of every data file of the demo."""
    for task in WORLDS:
        for name, content in files(task).items():
            yield f"{task}/{name}", to_json(content)


def write_data(out: Path) -> None:
    for name, text in rendered():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(text.encode("ascii"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded demo's users.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/demo")
    write_data(parser.parse_args().out)


if __name__ == "__main__":
    main()
