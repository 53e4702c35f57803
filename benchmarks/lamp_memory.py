"""How much memory and time does prepare_data.py take for official LaMP files of several GB?

Reads   nothing
Writes  <folder>: the official-format files it makes and what they become; removed at the end unless --keep
Takes   about a minute of CPU time per GB

Half of the bytes are people with one question and a history of their own (as LaMP-3), half are people with twenty
questions that each show nearly the whole history again (as LaMP-4), all without user_id. So the index on disk, the
comparison of profiles and the longest questions are all met. Peak memory is the largest resident size of the process.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prime import cli
from prime.settings import positive

ASK = "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
ASK += "further explanation. review: "
LONG_HISTORY = 20_000  # items of one person: a question of about 20 MB
QUESTIONS = 20  # of a person with many


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--megabytes", type=positive, default=2048, help="of the questions' file")
    parser.add_argument("--items", type=positive, default=150, help="of a history, on average")
    parser.add_argument("--longest", type=positive, default=LONG_HISTORY, help="items of the longest history")
    parser.add_argument("--test_users", type=positive, default=100, help="as of prepare_data.py")
    parser.add_argument("--folder", help="where to work; default a new one for temporary files")
    parser.add_argument("--keep", action="store_true", help="leave the files")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    return parser


class Writer:
    """Texts of about 1 KB, no two alike: ten of many sentences and a number."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(self.dice.choices(letters, k=self.dice.randint(2, 9))) for _ in range(5000)]
        self.sentences = [" ".join(self.dice.choices(words, k=16)) + "." for _ in range(5000)]
        self.made = 0

    def item(self) -> dict[str, str]:
        self.made += 1
        return {"text": f"{' '.join(self.dice.choices(self.sentences, k=10))} {self.made}", "score": "4"}

    def history(self, mean: int) -> list[dict[str, str]]:
        return [self.item() for _ in range(self.dice.randint(mean // 2, mean * 3 // 2))]

    def people(self, mean: int, longest: int) -> Iterator[list[list[dict[str, str]]]]:
        """The profiles that each person's questions show, without end: twenty people with one, then one with twenty.

        The first person has the longest history.
        """
        yield [[self.item() for _ in range(longest)]]
        while True:
            for _ in range(QUESTIONS):
                yield [self.history(mean)]
            own = self.history(mean)
            yield [own[:place] + own[place + 1 :] for place in range(QUESTIONS)]


def write_files(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """train_questions.json of the asked size, and train_outputs.json; what is in them."""
    writer, counts = Writer(args.seed), {"people": 0, "questions": 0, "items": 0}
    golds = []
    with open(folder / "train_questions.json", "w", encoding="utf-8") as file:
        for profiles in writer.people(args.items, args.longest):
            counts["people"] += 1
            for profile in profiles:
                name = str(counts["questions"])
                write_question(file, name, writer.item()["text"], profile)
                golds.append({"id": name, "output": "4"})
                counts["questions"] += 1
                counts["items"] += len(profile)
            if file.tell() >= args.megabytes * 2**20:
                break
        file.write("]")
    (folder / "train_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    return counts | {"distinct_items": writer.made - counts["questions"]}


def write_question(file: TextIO, name: str, text: str, profile: Sequence[dict[str, str]]) -> None:
    items = [{**item, "id": f"{name}{place}"} for place, item in enumerate(profile)]
    file.write("[" if name == "0" else ", ")
    json.dump({"id": name, "input": ASK + text, "profile": items}, file)


def convert(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run prepare_data.py; its seconds and peak memory."""
    words = ["--task_name", "product_rating", "--lamp_dir", str(folder), "--output_dir", str(folder / "data")]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "prepare_data.py"), *words, "--test_users", str(args.test_users)]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mb": round(after.ru_maxrss / 1024, 1),
    }


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    made = write_files(folder, args)
    size = (folder / "train_questions.json").stat().st_size
    found = convert(folder, args)
    report = json.loads((folder / "data" / "prepare_report.json").read_text())
    files = report["files"].values()
    return {
        "megabytes": round(size / 2**20, 1), **made, **found,
        "written_megabytes": round(sum(p.stat().st_size for p in (folder / "data").rglob("*.json")) / 2**20, 1),
        "people_right": report["people"] == made["people"],
        "items_right": sum(file["items"] for file in files) == made["distinct_items"],
        "within_2_gb": found["peak_mb"] < 2048,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(folder, args)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
