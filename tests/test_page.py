"""report.html: what it says, that it is safe and the same each time, and how a real browser shows it."""

import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import postprocess
from prime.errors import InputError
from prime.report import across, leakage
from prime.report.figures.leakage import draw_roc, leakage_sentence
from prime.report.figures.parts import plain
from prime.report.figures.search import best_so_far, draw_traces, usable_losses
from prime.report.figures.trade import TRADED_TITLES, draw_frontier, draw_trade
from prime.report.figures.utility import draw_scores, pair_sentence
from prime.report.frontier import read_frontier
from prime.report.sections.content import Content
from prime.report.sections.leakage import strongest
from prime.report.sections.words import EXAMPLES, base_won
from prime.runs.files import read_json, read_lines
from prime.runs.machine import machine
from prime.runs.run import Run, user_dirname
from prime.users.tasks import TASKS

pytestmark = pytest.mark.slow  # the whole pipeline is run before the first test

TASK = TASKS["movie_tagging"]
SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT, r"$\frac{1$", '"><img src=x onerror=alert(1)>', "名前\n\u202e", "a" * 300,
    *map(str, range(11, 18)),
]  # fmt: skip
SHARERS = ["s1", f"s2 {SCRIPT}", "s3"]
RIGHT = {"base": (0, 1), "task_lora": (1, 1), "best_sharer": (2, 3), "uniform": (2, 2), "prime": (3, 2)}  # of 3


def golds(user: str) -> dict[str, str]:
    return {f"{user}-{i}": TASK.labels[i] for i in range(3)}


def answers(user: str, right: int) -> dict:
    wrong = [f"</td>{SCRIPT}{'long' * 50}", "?", ""]
    given = [gold if i < right else wrong[i] for i, gold in enumerate(golds(user).values())]
    samples = [{"id": key, "output": output} for key, output in zip(golds(user), given, strict=True)]
    return {"k0": samples, "k1-profile": samples}


def predictions(user: str, index: int, *methods: str) -> dict:
    return {method: answers(user, RIGHT[method][index % 2]) for method in methods}


def evaluations(index: int) -> list[dict]:
    """A line for the base, 3 sharers, the start and 5 of a search, of which the third is the best for even users."""
    losses = [-1.0, -1.1, -1.3, -0.9, -1.2, -1.0, -1.25, -1.5 if index % 2 == 0 else -1.2, -1.1, -1.4]
    origins = ["base"] + ["sharer"] * 3 + ["start"] + ["search"] * 5
    return [{"loss": loss, "origin": origin} for loss, origin in zip(losses, origins, strict=True)]


def write_search(root: Path) -> None:
    run = Run(root / "LoRA-Composition-evo", "lora_composition_evo", "prime",
              {"task_name": TASK.name, "seed": 7, "anchor_dir": f"'\"{SCRIPT}", "search_only": False})  # fmt: skip
    for index, user in enumerate(HOSTILE):
        run.user_dir(user).mkdir(parents=True)
        lines = [json.dumps(one) for one in evaluations(index)]
        (run.user_dir(user) / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
        run.finish(user, {
            "user_id": user, "index": index, "deployed": "merge", "sharers": SHARERS, "weights": [0.8, -0.3, 0.1],
            "predictions": predictions(user, index, "prime", "best_sharer", "uniform"),
            "seconds": {"search": 2.0, "sharers": 0.5, "predict": 1.0},
        })  # fmt: skip
    run.user_dir("17b").mkdir()  # begun, and interrupted


def write_attack(root: Path) -> None:
    """Members score higher, by 1 under loss and by 3 under calibrated."""
    noise = np.random.default_rng(0)
    sizes = {"member": [10, 10], "non_member": [20, 20], "held_out": [5, 5]}

    def scores(**shifts: float) -> dict:
        return {
            attack: {side: list(noise.normal(shift * (side == "member"), 1, sum(n))) for side, n in sizes.items()}
            for attack, shift in shifts.items()
        }

    results = [
        {"user_id": user, "on_base": False}
        | {"scores": scores(loss=1, calibrated=3), "blind": scores(loss=0, calibrated=0)}
        | {f"{side}_num_samples": n for side, n in sizes.items()}
        | {f"{side}_{what}": [] for side in sizes for what in ("ids", "loss")} for user in HOSTILE
    ]  # fmt: skip
    folder = root / "LoRA-Composition-evo"
    (folder / "mia_summary.json").write_text(json.dumps(leakage.summarise_attacks("prime", results, results[:2], 0)))
    leakage.write_roc(folder, "prime", results, results[:2])


def write_frontier(root: Path) -> None:
    """Two penalties and the base; nobody attacked the controlled set."""

    def point(label: str, penalty: float | None, accuracy: float, auroc: float) -> dict:
        values = {"accuracy": accuracy, "auroc": auroc}
        told = {key: {"mean": value, "low": value - 0.1, "high": value + 0.1} for key, value in values.items()}
        unknown = {"controlled_auroc": None, "similarity": None}
        return {"method": "prime", "label": label, "penalty": penalty, **unknown, **told}

    points = [point("penalty 0", 0.0, 0.5, 0.8), point("penalty 1", 1.0, 0.4, 0.6), point("base", None, 0.3, 0.5)]
    path = root / "Penalties" / "frontier.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"metric": "accuracy", "points": points}))


def write_run(output: Path) -> list[str]:
    """A run of two stages and an attack, with hostile text in all that a user supplies; arguments of postprocess.py."""
    root, test = output / TASK.name, output.parent / "data" / "test_100"
    run = Run(root / "task-base_LLM", "task_lora", "task_lora", {"task_name": TASK.name, "seed": 7})
    for index, user in enumerate(HOSTILE[:-1]):  # one user is missing
        found = predictions(user, index, "base", "task_lora")
        run.finish(user, {"user_id": user, "index": index, "predictions": found})
    write_search(root)
    write_attack(root)
    write_frontier(root)
    test.mkdir(parents=True)
    asked = f"Which tag? ] description: {SCRIPT} a film"
    users = [{"user_id": user, "profile": [], "query": [{"id": key, "input": asked} for key in golds(user)]}
             for user in HOSTILE]  # fmt: skip
    (test / "user_test_100.json").write_text(json.dumps(users))
    labels = [{"id": key, "output": gold} for user in HOSTILE for key, gold in golds(user).items()]
    (test / "user_test_100_label.json").write_text(json.dumps({"task": "LaMP_2M", "golds": labels}))
    return ["--task_name", TASK.name, "--data_dir", str(test.parent), "--output_dir",
            str(root / "LoRA-Composition-evo")]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<output> after postprocess.py."""
    output = tmp_path_factory.mktemp("report") / "output"
    postprocess.main(write_run(output))
    return output


class Reader(HTMLParser):
    """Tags with attributes, and the text outside of the style sheet."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def run_page(written: Path) -> Reader:
    return Reader(written / TASK.name / "report.html")


# --- what it says


def test_every_row_of_the_table_is_there_with_its_interval(written: Path) -> None:
    text = run_page(written).text
    summary = read_json(written / TASK.name / "summary.json")
    for row in summary["rows"]:
        value = row["accuracy"]
        assert row["method"] in text
        assert f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in text
    assert "k = 1, with the textual profile" in text


def test_sentences_are_computed_from_the_run(written: Path) -> None:
    """By hand: even users have 3 of 3 right by prime and 2 by best_sharer, odd ones 2 and 3. The last, an odd one, is
    not compared, since task_lora lacks him.
    """
    text = " ".join(run_page(written).text.split())
    assert "Against best_sharer, prime is better for 6 of 11 users, as good for 0, worse for 5" in text
    assert "Against task_lora, prime is better for 11 of 11 users, as good for 0, worse for 0" in text
    assert "a candidate of the search for 12" in text  # the best of odd users is the search's last, -1.4
    assert "The last 2 of 10 evaluations still improved 6 of 12 users" in text
    assert "Of 12 users who merge, 12 give the most similar sharer the weight largest in size; 33% of all" in text


def test_what_failed_and_what_was_not_run_is_told(written: Path) -> None:
    text = " ".join(run_page(written).text.split())
    assert "task_lora: partial, 11 of 12 users." in text and "Every row is of the 11 users that all rows" in text
    assert f"LoRA-Composition-evo: 1 begun and not finished ({user_dirname('17b')})" in text
    assert "train_anchor_peft.py has not run" in text and "rows that no stage has made: rag" not in text
    assert "lorahub, mta, per_pcs, prime_published, oppu" in text


def test_what_was_run_is_told(written: Path) -> None:
    text = " ".join(run_page(written).text.split())
    assert "36.0 (search 24.0, sharers 6.0, predict 12.0)" in text  # the sharers' are a part of the search's
    assert f"Machine: {machine()}." in text
    assert "torch" in text and "--seed" in text and f"'\"{SCRIPT}" in text


def test_leakage_stands_beside_its_blind_baseline(written: Path) -> None:
    text = " ".join(run_page(written).text.split())
    sets = read_json(written / TASK.name / "LoRA-Composition-evo" / "mia_summary.json")["sets"]
    assert set(sets) == {"published", "controlled", "user"}
    for found in (one["attacks"][attack] for one in sets.values() for attack in ("loss", "calibrated")):
        for key in ("auroc", "blind_auroc"):
            assert f"{found[key]['mean']:.3f} [{found[key]['low']:.3f}, {found[key]['high']:.3f}]" in text
    assert "sharers, unmerged" in text
    sentence = re.search(r"the published attack catches ([\d.]+)% of .*?, attack calibrated most, ([\d.]+)%", text)
    assert sentence and float(sentence[1]) < float(sentence[2])


def test_the_frontier_tells_what_the_penalty_costs_and_buys(written: Path) -> None:
    text = " ".join(run_page(written).text.split())
    told = f"accuracy 0.500 to 0.400 and {TRADED_TITLES['auroc']} 0.800 to 0.600"
    assert f"From penalty 0 to 1: {told}." in text


def test_the_strongest_attack_stands_beside_the_published_one() -> None:
    """By how far it lies above its blind baseline, which the highest AUROC here does not."""

    def attack(auroc: float, blind: float = 0.5) -> dict:
        return {"auroc": {"mean": auroc}, "blind_auroc": {"mean": blind}}

    both = {"loss": attack(0.6), "zlib": attack(0.8, 0.8), "rmia": attack(0.7)}
    chosen = strongest({"prime": both, "oppu": {"loss": attack(0.9), "zlib": attack(0.8)}})
    assert {who: list(by) for who, by in chosen.items()} == {"prime": ["loss", "rmia"], "oppu": ["loss"]}


def test_ten_examples_evenly_spaced(written: Path) -> None:
    tags = run_page(written).tags
    shown = [attrs for tag, attrs in tags if tag == "td" and attrs.get("data-name") == "gold"]
    assert len(shown) == EXAMPLES < len(HOSTILE)
    for method in RIGHT:
        assert len([1 for tag, attrs in tags if attrs.get("data-name") == method]) == EXAMPLES


def test_a_search_that_may_not_deploy_a_sharer_is_told_so() -> None:
    """Under --search_only the winner told is the one deployed: never a single sharer."""
    candidates = ((-1.0, "base"), (-1.3, "sharer"), (-1.2, "search"))
    search = [{"loss": loss, "origin": origin} for loss, origin in candidates]
    assert "a single sharer for 1" in draw_traces([search], search_only=False)[1]
    assert "a candidate of the search for 1" in draw_traces([search], search_only=True)[1]


def test_every_figure_is_in_the_page_and_beside_it_with_its_sentence(written: Path) -> None:
    reader, folder = run_page(written), written / TASK.name / "figures"
    images = [attrs for tag, attrs in reader.tags if tag == "img"]
    stems = {path.stem for path in folder.iterdir()}
    assert {"scores-accuracy", "scores-f1", "paired-base", "paired-best_sharer", "search-prime", "weights-prime",
            "leakage-published", "leakage-controlled", "roc-published", "roc-user",
            "utility-leakage", "frontier-Penalties-auroc"} <= stems  # fmt: skip
    assert len(images) == len(stems) and "search-best_sharer" not in stems
    assert all((folder / f"{stem}.png").read_bytes()[:4] == b"\x89PNG" for stem in stems)
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 40 for image in images)
    links = {attrs["href"] for tag, attrs in reader.tags if tag == "a"}
    assert {f"figures/{stem}.{kind}" for stem in stems for kind in ("png", "svg")} <= links


def test_the_page_across_tasks_has_the_folders_named_after_their_task(written: Path, tmp_path: Path) -> None:
    reader = Reader(written / "report.html")
    assert TASK.name in reader.text and f"{TASK.name}/report.html" in [a.get("href") for _, a in reader.tags]
    summary = read_json(written / TASK.name / "summary.json")
    for name in (TASK.name, "elsewhere", "news_headline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "news_headline" / "summary.json").write_text(json.dumps(dict(summary, task="news_headline")))
    assert list(across.task_summaries(tmp_path)) == [TASK.name, "news_headline"]


def test_a_run_outside_a_task_folder_leaves_its_parent_alone(written: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine" / "run"
    shutil.copytree(written / TASK.name / "task-base_LLM", root / "task-base_LLM")
    data = written.parent / "data"
    postprocess.main(["--task_name", TASK.name, "--data_dir", str(data), "--output_dir", str(root / "task-base_LLM")])
    assert [path.name for path in root.parent.iterdir()] == ["run"]
    text = " ".join(Reader(root / "report.html").text.split())
    assert "There is no row of prime to compare with" in text and "No row of the table was attacked" in text


# --- safe, and the same each time


def test_hostile_text_stays_text(written: Path) -> None:
    for path in (written / "report.html", written / TASK.name / "report.html"):
        reader = Reader(path)
        assert not {tag for tag, _ in reader.tags} & {"script", "iframe", "object", "embed", "form"}
        for tag, attrs in reader.tags:
            assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
            for name in ("src", "href"):
                assert not re.match(r"(https?:|//|javascript:|file:)", attrs.get(name) or "")
    text = run_page(written).text
    assert SCRIPT in text and HOSTILE[2] in text and f"</td>{SCRIPT}" in text  # told, as it stands
    assert "alert(1)" not in re.sub(r"&lt;.*?&gt;", "", (written / TASK.name / "figures/weights-prime.svg").read_text())


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    root = tmp_path / TASK.name
    shutil.copytree(written / TASK.name, root, ignore=shutil.ignore_patterns("report.html", "figures", "summary.*"))
    data = written.parent / "data"
    stage = root / "LoRA-Composition-evo"
    postprocess.main(["--task_name", TASK.name, "--data_dir", str(data), "--output_dir", str(stage)])
    for name in ("report.html", *(f"figures/{path.name}" for path in (root / "figures").iterdir())):
        assert (root / name).read_bytes() == (written / TASK.name / name).read_bytes(), name
    assert (tmp_path / "report.html").read_bytes() == (written / "report.html").read_bytes()


def test_a_broken_trace_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"loss": 1}\n{"loss": ')
    with pytest.raises(InputError, match="evaluations.jsonl: line 2: not JSON"):
        read_lines(path)


DAMAGED = [
    ("mia_roc.json", '"curves"', '"curve"', "mia_roc.json: curves is missing"),
    ("mia_roc.json", '"fpr": [0.0', '"fpr": [1.5', r"curves\[0\].fpr\[0\] is 1.5, expected a number from 0 to 1"),
    ("mia_roc.json", '"fpr": [0.0, ', '"fpr": [', r"curves\[0\]: not as many true positive rates as false ones"),
    ("mia_summary.json", '"tpr_at_fpr"', '"x"', r"attacks.'loss'.tpr_at_fpr is missing"),
    ("mia_summary.json", '"loss": {"auroc"', '"los": {"auroc"', "a set without the attack loss"),
    ("frontier.json", '"penalty": 0.0', '"penalty": "0"', r"points\[0\].penalty is a text"),
    ("frontier.json", '"metric": "accuracy"', '"metric": "MAE"', "metric is 'MAE'; movie_tagging has accuracy, f1"),
    ("frontier.json", '"auroc": {"mean": 0.8', '"auroc": {"mean": 1e300', r"auroc.mean is 1e\+300, expected"),
    ("frontier.json", '"high": 0.6', '"hi": 0.6', r"points\[0\].accuracy.high is missing"),
]


@pytest.mark.parametrize(("name", "old", "new", "told"), DAMAGED)
def test_a_damaged_file_is_one_clear_error(
    written: Path, tmp_path: Path, name: str, old: str, new: str, told: str
) -> None:
    """What the page reads beside the stages' results; whole, it is read."""
    read = {"mia_roc.json": leakage.read_curves, "mia_summary.json": leakage.read_attacks,
            "frontier.json": partial(read_frontier, task=TASK)}[name]  # fmt: skip
    whole = json.dumps(read_json(next((written / TASK.name).glob(f"*/{name}"))))
    path = tmp_path / name
    path.write_text(whole)
    read(path)
    assert old in whole
    path.write_text(whole.replace(old, new))
    with pytest.raises(InputError, match=told) as error:
        read(path)
    assert str(path) in str(error.value)


def test_users_who_merge_nothing_are_told(tmp_path: Path) -> None:
    run = Run(tmp_path / "evo", "lora_composition_evo", "prime", {})
    content = Content(tmp_path, TASK, {}, {}, {}, {"prime": run.root}, {})
    told = []
    for index, deployed in enumerate(("base", "merge")):
        run.finish(str(index), {"user_id": str(index), "index": index, "deployed": deployed})
        told += base_won(content)
    assert told[0].startswith("Nobody's adapters are merged: for all of 1 user the base won the search")
    assert told[1:] == ["For 1 of 2 users the base won the search: nothing is merged."]
    assert base_won(content._replace(sources={})) == []


def test_penalties_that_deploy_alike_are_told_and_drawn_as_one() -> None:
    """As a real frontier of three users gave it: their numbers lay on each other."""
    same = {"mean": 0.5, "low": 0.4, "high": 0.6}
    points = [{"label": f"penalty {p}", "penalty": p, "accuracy": same, "similarity": same} for p in (0.0, 0.1, 0.5)]
    points.append({**points[0], "label": "best sharer (AUROC: of all sharers)", "penalty": None})
    made, sentence = draw_frontier(points, "accuracy")
    assert sentence == "From penalty 0 to 0.5 nothing changes: accuracy 0.500 and similarity to the sharers 0.500."
    assert [text.get_text() for text in made.axes[0].texts] == ["0, 0.1, 0.5"]
    inside(made)


def test_the_legend_of_the_roc_lies_beside_its_curves() -> None:
    curves = {f"attack {i}": ([0.0, 0.5, 1.0], [0.0, 0.9, 1.0]) for i in range(7)}
    rates = {rate: {"mean": 0.5, "low": 0.4, "high": 0.6} for rate in ("0.1", "0.01")}
    made, _ = draw_roc(curves, {**dict.fromkeys(curves, rates), "loss": rates}, "prime")
    inside(made)


def inside(made: Figure) -> None:
    """Legends lie within the figure and outside of its axes."""
    made.canvas.draw()
    drawn = made.canvas.get_renderer()
    (box,) = [legend.get_window_extent(drawn) for legend in made.legends]
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= made.bbox.x1 and box.y1 <= made.bbox.y1
    assert not any(box.overlaps(axes.get_tightbbox(drawn)) for axes in made.axes)


def test_best_so_far_leaves_out_what_may_not_win() -> None:
    origins = ("base", "sharer", "search", "search")
    lines = [{"loss": loss, "origin": origin} for loss, origin in zip((-1.0, -3.0, -0.5, -2.0), origins, strict=True)]
    assert best_so_far(usable_losses(lines, search_only=False)).tolist() == [0, -2, -2, -2]
    assert best_so_far(usable_losses(lines, search_only=True)).tolist() == [0, 0, 0, -1]


def test_rows_alike_are_told_as_such() -> None:
    """Where everybody deploys the base no row is best, none lies between, and no difference is minus nothing."""

    score = {"mean": 0.5, "low": 0.25, "high": 0.75}
    rows = [{"method": name, "accuracy": score, "auroc": score, "blind_auroc": None} for name in ("base", "prime")]
    assert draw_scores(rows, "accuracy", "prime")[1] == "All rows are alike: accuracy 0.500 [0.250, 0.750]."
    assert draw_trade(rows, "accuracy", "prime")[1].startswith("All are alike: prime (")
    none = {"mean": 0.0, "low": 0.0, "high": 0.0}
    pair = {"method": "base", "accuracy": none, "better": 0, "equal": 3, "worse": 0}
    assert "-0.000" not in pair_sentence(pair, "accuracy", "prime")


def test_leakage_is_ranked_above_its_blind_baseline() -> None:
    """oppu has the highest AUROC, but the base's is as high; the base itself gives nothing away."""

    def flat(mean: float) -> dict:
        return {"mean": mean, "low": mean, "high": mean}

    attacked = [("prime", flat(0.7), flat(0.5)), ("oppu", flat(0.9), flat(0.85))]
    told = leakage_sentence(attacked)
    assert told.startswith("Most leaks prime: AUROC 0.700") and "(+0.200); least leaks oppu, +0.050 above" in told
    rows = [{"method": name, "accuracy": flat(a), "auroc": auroc, "blind_auroc": blind}
            for a, (name, auroc, blind) in zip((0.5, 0.6), attacked, strict=True)]  # fmt: skip
    rows.append({"method": "base", "accuracy": flat(0.4), "auroc": flat(0.85), "blind_auroc": None})
    told = draw_trade(rows, "accuracy", "prime")[1]
    assert "least leakage: base (" in told and "prime (accuracy 0.500, AUROC 0.700, +0.200 above blind) lies" in told


def test_prime_stands_beside_the_gold(written: Path) -> None:
    names = [attrs["data-name"] for _, attrs in run_page(written).tags if attrs.get("data-name")]
    assert names[:4] == ["user", "input", "gold", "prime"]


def test_names_are_drawn_as_they_are() -> None:
    assert plain("a$b\nc") == r"a\$b c" and plain("\U00020000x") == "?x"
    assert plain("abcdef", 4) == "abc…"


# --- a real browser

# Pairs of sibling blocks that share more than a pixel; what scrolls inside its own container is left out.
OVERLAPS = """() => {
  const block = e => !['inline', 'none', 'contents'].includes(getComputedStyle(e).display) && e.getClientRects().length;
  const found = [];
  for (const parent of [document.body, ...document.querySelectorAll('main, main *')]) {
    if (parent.closest('.scroll table')) continue;
    const boxes = [...parent.children].filter(block).map(e => [e, e.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      const w = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (w > 1 && h > 1) found.push([a.tagName, b.tagName, w, h]);
    }));
  }
  return found;
}"""
PRIME = """() => [...document.querySelectorAll('td[data-name=prime]')].map(e => e.getBoundingClientRect())
  .map(box => [box.left, box.right])"""
IMAGES = "() => [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; the tests say so where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here (.ci/run installs it): the page is not shown in a real browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=0)
        yield started
        started.close()


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", [f"{TASK.name}/report.html", "report.html"])
def test_a_browser_shows_it_whole(written: Path, browser, name: str, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.set_default_timeout(0)  # a busy machine may take its time
    told: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    address = (written / name).as_uri()
    tab.goto(address)
    for opened in (False, True):
        tab.evaluate("open => document.querySelectorAll('details').forEach(d => d.open = open)", opened)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(OVERLAPS) == []
    assert all(0 <= left < right <= width for left, right in tab.evaluate(PRIME))
    images = tab.evaluate(IMAGES)
    assert images and all(complete and natural > 0 and 250 < shown <= width for complete, natural, shown in images)
    assert told == [] and [url for url in asked if not url.startswith("data:")] == [address]
    tab.close()
