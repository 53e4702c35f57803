"""Official-format LaMP files made on the spot: people with histories and questions, as LaMP's server ships them.

Item ids are the question's id and a number from 0, so they differ between questions that show the same item, and the
same id stands for other items elsewhere: as in the official files.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASK = {
    "citation": 'For an author who has written the paper with the title "{title}", which reference is related? '
    'Just answer with [1] or [2] without explanation. [1]: "{first}" [2]: "{second}"',
    "movie_tagging": "Which tag does this movie relate to among the following tags? Just answer with the tag name "
    "without further explanation. tags: [sci-fi, comedy, romance] description: {text}",
    "news_categorize": "Which category does this article relate to among the following categories? Just answer with "
    "the category name without further explanation. categories: [sports, politics] article: {text}",
    "product_rating": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
    "or 5 without further explanation. review: {text}",
    "news_headline": "Generate a headline for the following article: {text}",
    "scholarly_title": "Generate a title for the following abstract of a paper: {text}",
    "tweet_paraphrase": "Paraphrase the following tweet without any explanation before or after it: {text}",
}
LAMP = {
    "citation": "LaMP_1", "movie_tagging": "LaMP_2", "news_categorize": "LaMP_2", "product_rating": "LaMP_3",
    "news_headline": "LaMP_4", "scholarly_title": "LaMP_5", "tweet_paraphrase": "LaMP_7",
}  # fmt: skip


def words(dice: random.Random, n: int = 8) -> str:
    return " ".join(f"w{dice.randrange(10**6)}" for _ in range(n))


def item(task: str, dice: random.Random) -> dict[str, Any]:
    """A history item without its id; no two are alike."""
    text, title = words(dice), words(dice, 3)
    return {
        "citation": {"title": title, "abstract": text},
        "movie_tagging": {"tag": dice.choice(["sci-fi", "comedy", "romance"]), "description": text},
        "news_categorize": {"text": text, "title": title, "category": dice.choice(["sports", "politics"])},
        "product_rating": {"text": text, "score": str(dice.randint(1, 5))},
        "news_headline": {"text": text, "title": title},
        "scholarly_title": {"title": title, "abstract": text},
        "tweet_paraphrase": {"text": text},
    }[task]


def asked(task: str, target_item: dict[str, Any], dice: random.Random) -> tuple[str, str]:
    """(input, gold) of a question about an item."""
    if task == "citation":
        gold = dice.randrange(2)
        first, second = words(dice, 3), words(dice, 3)
        return ASK[task].format(title=target_item["title"], first=first, second=second), f"[{gold + 1}]"
    source = {"movie_tagging": "description", "scholarly_title": "abstract"}.get(task, "text")
    target = {"movie_tagging": "tag", "news_categorize": "category", "product_rating": "score"}.get(task, "title")
    if task == "tweet_paraphrase":
        return ASK[task].format(text="said otherwise: " + target_item["text"][::-1]), target_item["text"]
    return ASK[task].format(text=target_item[source]), target_item[target]


@dataclass
class Files:
    """Rows of the four files of a task, to be changed by a test before they are written."""

    task: str
    questions: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"train": [], "dev": []})
    golds: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"train": [], "dev": []})

    def ask(self, part: str, name: Any, text: str, gold: Any, profile: list[dict[str, Any]], **more: Any) -> dict:
        items = [{**shown, "id": f"{name}{place}"} for place, shown in enumerate(profile)]
        question = {"id": name, "input": text, "profile": items, **more}
        self.questions[part].append(question)
        self.golds[part].append({"id": name, "output": gold})
        return question

    def write(self, folder: Path, apart: bool = False) -> Path:
        for part in ("train", "dev"):
            if not self.questions[part]:
                continue
            place = folder / part if apart else folder
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{part}_questions.json").write_text(json.dumps(self.questions[part]))
            golds = {"task": LAMP[self.task], "golds": self.golds[part]}
            (place / f"{part}_outputs.json").write_text(json.dumps(golds))
        return folder


def user_split(task: str, people: int = 12, seed: int = 0, shown_alike: bool = True, ids: bool = False) -> Files:
    """People with 4 to 4 + `people` items and 1 to 4 questions each, of one part.

    `shown_alike`: every question of a person repeats the same profile; otherwise each leaves out what it asks itself
    and shows what the others ask. `ids`: with user_id, an integer.
    """
    dice, made, number = random.Random(f"{task}{seed}"), Files(task), 1
    for person in range(people):
        history = [item(task, dice) for _ in range(4 + person)]
        targets = [item(task, dice) for _ in range(1 + person % 4)]
        for place, target in enumerate(targets):
            others = [] if shown_alike else targets[:place] + targets[place + 1 :]
            part = "dev" if person % 3 == 0 else "train"
            more = {"user_id": 1000 + person} if ids else {}
            made.ask(part, str(number), *asked(task, target, dice), history + others, **more)
            number += 1
    return made


def time_split(task: str, people: int = 12, seed: int = 0, ids: bool = True) -> Files:
    """People whose items are dated; a train question after some of them and a dev question after one more, or two."""
    dice, made = random.Random(f"time{task}{seed}"), Files(task)
    for person in range(people):
        history = []
        for month in range(8 + person):
            date = f"20{10 + month // 12}-{1 + month % 12:02d}-{1 + month % 28:02d}"
            history.append({**item(task, dice), "date": date})
        more = {"user_id": str(person)} if ids else {}
        for part, ahead in (("train", 2), ("dev", 1)):
            target, shown = history[-ahead], history[:-ahead]
            made.ask(part, f"{person}{ahead}", *asked(task, target, dice), dice.sample(shown, len(shown)), **more)
    return made


def of_the_demo(task: str, source: Path, people: int = 16, items: int = 12) -> Files:
    """People of the embedded demo as official files of the user split: their last two items are asked."""
    made, dice, number = Files(task), random.Random(0), 1
    for user in json.loads((source / "user_anchor_candidate.json").read_text())[:people]:
        history = user["profile"]  # with ids, which `ask` replaces
        for target in history[-2:]:
            part, shown = "train" if number % 3 else "dev", history[-2 - items : -2]
            made.ask(part, str(number), *asked(task, target, dice), shown)
            number += 1
    return made
