"""The report as a web page: report.html of a run, one file that loads nothing (across tasks: `prime.report.across`).

What the page says is gathered here, how it looks is in prime/templates/. The templates escape every text, and the
page's own policy (Content-Security-Policy) forbids scripts and the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prime.attack import scoring
from prime.report import figures, leakage
from prime.report import table as report
from prime.report.across import write_tasks_page
from prime.report.frontier import read_frontier
from prime.report.methods import METHODS, REFERENCE, SHORT_LIST, SHORTEST_LIST, place
from prime.report.table import Cell, Predictions, leading
from prime.report.web import Shown, render, show
from prime.runs.files import write_text
from prime.runs.forms import EVALUATED_LOSS, read_form_lines
from prime.runs.run import read_results, read_settings
from prime.users import metrics
from prime.users.tasks import Task, extract

OURS = REFERENCE
EXAMPLES = 10
EXAMPLE_METHODS = (*SHORT_LIST, OURS)
INPUT_LENGTH, OUTPUT_LENGTH = 280, 160  # characters shown of a text
PART_OF = {"sharers": "search"}  # a part of seconds that another part holds already

# Scripts of a whole run in their order, and what a reader misses without them; "" where nothing of the page needs it.
STAGES = {
    "gen_profile": "",
    "task_lora": "the untouched and the task-adapted model",
    "history_anchor": "",  # its folder is often elsewhere (./anchor_selection); no sharer is trained without it
    "train_anchor_peft": "the sharers' adapters",
    "train_anchor_gate": "",
    "lora_composition_evo": "PriME",
    "lora_composition": "",
    "train_user_peft": "",
    "mia": "how much leaks",
}


class Folder(NamedTuple):
    """What one stage left: the users it finished, those it began, the seconds by part, all its results' own record."""

    path: str
    stage: str
    method: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: str
    finished: int
    unfinished: Sequence[str]
    seconds: Mapping[str, float]

    def order(self) -> tuple[int, str]:
        known = list(STAGES)
        return known.index(self.stage) if self.stage in known else len(known), self.path

    def begun(self) -> bool:
        return bool(self.finished or self.unfinished)

    def seconds_text(self) -> str:
        if not self.seconds:
            return "not recorded"
        total = sum(spent for part, spent in self.seconds.items() if part not in PART_OF)
        return f"{total:,.1f} ({', '.join(f'{part} {spent:,.1f}' for part, spent in self.seconds.items())})"


class Content(NamedTuple):
    """What a run's page is made of."""

    root: Path  # <output>/<task>
    task: Task
    summary: Mapping[str, Any]
    predictions: Predictions
    golds: Mapping[str, str]
    sources: Mapping[str, Path]  # method -> folder
    inputs: Mapping[str, str]  # query id -> input


# --- what is on disk -------------------------------------------------------------------------------


def stage_folders(root: Path, task: Task) -> list[Folder]:
    """All stages' folders below `root` made for the task, in the order of the pipeline."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name != "users" and not name.startswith(".")]
        if "settings.json" in files and report.task_of(Path(folder)) == task.name:
            found.append(_folder(root, Path(folder)))
    # An attack that left the sharers out has an empty folder for them.
    return sorted((one for one in found if one.begun() or one.stage != "mia"), key=Folder.order)


def _folder(root: Path, path: Path) -> Folder:
    found = read_settings(path)
    results = read_results(path)
    begun = sorted(p.name for p in path.glob("users/*/") if not (p / "result.json").is_file())
    seconds: dict[str, float] = {}
    for result in results:
        for part, spent in (result.get("seconds") or {}).items():
            seconds[part] = seconds.get(part, 0.0) + spent
    return Folder(
        path.relative_to(root).as_posix(), found["stage"], str(found.get("method", "")), found["settings"],
        found.get("versions", {}), str(found.get("machine", "")), len(results), begun, seconds,
    )  # fmt: skip


def searches_of(folder: Path) -> list[list[dict[str, Any]]]:
    """evaluations.jsonl of all finished users of a search, in the order of their folders."""
    paths = sorted(folder.glob("users/*/evaluations.jsonl"))
    finished = [path for path in paths if (path.parent / "result.json").is_file()]
    return [lines for path in finished if (lines := read_form_lines(path, EVALUATED_LOSS))]


# --- the table -------------------------------------------------------------------------------------


def _setting_name(k: int, profile: bool) -> str:
    return f"k = {k}, {'with' if profile else 'without'} the textual profile"


def tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of summary.json, a part for each test setting, the first one's first."""
    header, *body = report.table_rows(summary)
    parts: dict[tuple[int, bool], list[list[str]]] = {}
    for row, cells in zip(summary["rows"], body, strict=True):
        parts.setdefault((row["k"], row["profile"]), []).append([cells[0], *cells[3:]])
    return [{"name": _setting_name(*key), "header": [header[0], *header[3:]], "rows": rows}
            for key, rows in parts.items()]  # fmt: skip


def attacks(sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """mia_summary.json of every attacked method."""
    found = {}
    for method, folder in sorted(sources.items(), key=lambda entry: place(entry[0])):
        path = folder / "mia_summary.json"
        if path.is_file() and (summary := leakage.read_attacks(path))["method"] == method:
            found[method] = summary
    return found


def attacked_sets(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Attacks by set and by what was attacked: each method, then the sharers' own adapters before any merge."""
    parts = [(method, summary) for method, summary in found.items()]
    parts += [("sharers, unmerged", s["sharers"]) for s in found.values() if s["sharers"]["attacks"]][:1]
    sets: dict[str, dict[str, Any]] = {}
    for attacked, part in parts:
        for name, one in part.get("sets", {}).items():
            sets.setdefault(name, {})[attacked] = one["attacks"]
    return {name: sets[name] for name in scoring.SETS if name in sets}


def leakage_table(attacked: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each attack on each method of a set: AUROC and true positive rates, each beside its blind baseline."""
    rates = [title for rate in leakage.RATES.values() for title in (f"TPR at {rate} FPR", "blind")]
    rows = [["attacked", "attack", "AUROC", "blind baseline", *rates]]
    return rows + [[who, name, *leakage.figures(one)] for who, by in attacked.items() for name, one in by.items()]


def strongest(attacked: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method the published attack, and the one with the largest AUROC."""
    return {
        who: {name: by[name] for name in (scoring.PUBLISHED_ATTACK, max(by, key=lambda n: by[n]["auroc"]["mean"]))}
        for who, by in attacked.items()
    }


def leakage_parts(content: Content, folder: Path) -> list[dict[str, Any]]:
    """Of each set of members and non-members: its figures, its table in short and in full."""
    sets = attacked_sets(attacks(content.sources))
    return [
        {
            "name": name, "title": leakage.SET_TITLES[name],
            "figures": [set_figure(name, attacked, folder), *roc_figures(content, name, attacked, folder)],
            "short": leakage_table(strongest(attacked)), "table": leakage_table(attacked),
        }
        for name, attacked in sets.items()
    ]  # fmt: skip


# --- figures ---------------------------------------------------------------------------------------


def user_scores(content: Content, method: str) -> dict[str, float]:
    """Each user's own score by the task's first metric, at the first test setting."""
    row = content.summary["rows"][0]
    of_users = content.predictions.get(Cell(method, row["k"], row["profile"]), {})
    metric = metrics.METRICS[content.task.metrics[0]]
    stats = report.user_stats(content.task, of_users, content.golds)
    return {user: float(metric.finish(own[metric.name])) for user, own in stats.items()}


def gains(content: Content, baseline: str) -> list[float]:
    """What each user gains by PriME over a baseline, in the metric's direction; users that both answered."""
    ours, theirs = user_scores(content, OURS), user_scores(content, baseline)
    sign = 1 if metrics.METRICS[content.task.metrics[0]].higher_is_better else -1
    return [sign * (ours[user] - theirs[user]) for user in ours if user in theirs]


def utility_figures(content: Content, folder: Path) -> dict[str, list[Shown]]:
    rows, first = leading(content.summary), content.task.metrics[0]
    here = [p for p in content.summary["paired"] if (p["k"], p["profile"]) == (rows[0]["k"], rows[0]["profile"])]
    return {
        "scores": [show(folder, f"scores-{m}", f"{m} by method", figures.scores(rows, m, OURS))
                   for m in content.task.metrics],
        "pairs": [show(folder, f"paired-{pair['method']}", f"{OURS} against {pair['method']}, user by user",
                       figures.pairs(gains(content, pair["method"]), pair, first, OURS)) for pair in here],
    }  # fmt: skip


def comes_with_search(method: str) -> bool:
    return method in METHODS and METHODS[method].comes_with_search


def no_single_sharer(settings: Mapping[str, Any]) -> bool:
    """Whether the options of a search kept single sharers from being deployed (`prime.merging.evolution.chosen`)."""
    return bool(settings.get("search_only")) or settings.get("top_share", 1.0) != 1.0


def search_figures(content: Content, folder: Path) -> dict[str, list[Shown]]:
    shown: dict[str, list[Shown]] = {"traces": [], "weights": []}
    for method, source in content.sources.items():
        record = read_settings(source)
        if record["method"] != method or comes_with_search(method):  # a baseline: nothing was searched
            continue
        if searches := searches_of(source):
            drawn = figures.traces(searches, no_single_sharer(record["settings"]))
            shown["traces"].append(show(folder, f"search-{method}", f"Search of {method}", drawn))
        merged = [one for one in read_results(source) if one.get("sharers") and one.get("weights")]
        if merged:
            shown["weights"].append(show(folder, f"weights-{method}", f"Weights of {method}", figures.weights(merged)))
    return shown


def set_figure(name: str, attacked: Mapping[str, Mapping[str, Any]], folder: Path) -> Shown:
    attack = scoring.PUBLISHED_ATTACK
    rows = [(who, by[attack]["auroc"], by[attack]["blind_auroc"]) for who, by in attacked.items()]
    return show(folder, f"leakage-{name}", f"The published attack, {name} set", figures.leakage(rows, attack))


def roc_figures(content: Content, name: str, attacked: Mapping[str, Any], folder: Path) -> list[Shown]:
    """ROC curves of all attacks on PriME in one set, or on the first attacked method where PriME is not."""
    method = OURS if OURS in attacked else next(iter(attacked))
    path = content.sources.get(method, content.root) / "mia_roc.json"
    if not path.is_file():
        return []
    curves = {
        curve["attack"]: (curve["fpr"], curve["tpr"])
        for curve in leakage.read_curves(path) if (curve["set"], curve["model"]) == (name, "deployed")
    }  # fmt: skip
    caught = {attack: one["tpr_at_fpr"] for attack, one in attacked[method].items()}
    drawn = figures.roc(curves, caught, method)
    return [show(folder, f"roc-{name}", f"ROC of all attacks on {method}, {name} set", drawn)]


def frontier_figures(content: Content, folder: Path) -> list[Shown]:
    """Utility against each kind of leakage over the penalties, of every stage folder that holds several."""
    shown = []
    for path in sorted(content.root.glob("*/frontier.json")):
        found = read_frontier(path, content.task)
        points = [one for one in found["points"] if one.get(found["metric"])]
        for key, title in figures.TRADED.items():
            if sum(bool(one.get(key)) for one in points if one["penalty"] is not None) < 2:
                continue
            alone = [{**one, **dict.fromkeys(figures.TRADED), key: one.get(key)} for one in points]
            drawn = figures.frontier(alone, found["metric"])
            stem = f"frontier-{path.parent.name}-{key.replace('_', '-')}"
            shown.append(show(folder, stem, f"Penalties of {path.parent.name}: {title}", drawn))
    return shown


def trade_figures(content: Content, folder: Path) -> list[Shown]:
    both = [row for row in leading(content.summary) if row["auroc"]]
    if len(both) < 2:
        return []
    drawn = figures.trade(both, content.task.metrics[0], OURS)
    return [show(folder, "utility-leakage", "Utility against leakage", drawn)]


# --- words -----------------------------------------------------------------------------------------


def shorten(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def mark(task: Task, output: str, gold: str) -> str:
    """How good one answer is, in a word."""
    name = task.metrics[0]
    value = metrics.score([name], [output], [gold], task.labels)[name]
    return ("right" if value else "wrong") if name == "accuracy" else f"{name} {value:.2f}"


def examples(content: Content) -> dict[str, Any]:
    """The first query of ten users, evenly spaced in the order of the test file: nobody picked them."""
    row = content.summary["rows"][0]
    cells = {m: content.predictions.get(Cell(m, row["k"], row["profile"]), {}) for m in EXAMPLE_METHODS}
    shown = [method for method, of_users in cells.items() if of_users]
    by_user = {m: {user: {s["id"]: s["output"] for s in samples} for user, samples in cells[m].items()} for m in shown}
    users = list(dict.fromkeys(user for method in shown[::-1] for user in by_user[method] if by_user[method][user]))
    chosen = [users[i * len(users) // EXAMPLES] for i in range(EXAMPLES)] if len(users) > EXAMPLES else users
    rows = []
    for user in chosen:
        query = next(query for method in shown[::-1] for query in by_user[method].get(user, {}))
        gold, text = content.golds[query], content.inputs.get(query, "")
        outputs = [by_user[method].get(user, {}).get(query) for method in shown]
        answers = [
            None if one is None else (shorten(one, OUTPUT_LENGTH) or "(empty)", mark(content.task, one, gold))
            for one in outputs
        ]
        asked = " / ".join(extract(content.task, text) or (text,))
        rows.append({"user": user, "input": shorten(asked, INPUT_LENGTH), "gold": shorten(gold, OUTPUT_LENGTH),
                     "answers": answers})  # fmt: skip
    return {"methods": shown, "rows": rows}


def per_user(content: Content) -> dict[str, Any]:
    """Each user's score by method, and what was deployed."""
    methods = [row["method"] for row in leading(content.summary)]
    by_method = {method: user_scores(content, method) for method in methods}
    results = {r["user_id"]: r for r in read_results(content.sources[OURS])} if OURS in content.sources else {}
    rows = []
    for user in dict.fromkeys(user for scores in by_method.values() for user in scores):
        merged = results.get(user, {})
        parts = zip(merged.get("sharers", []), merged.get("weights", []), strict=False)
        told = ", ".join(f"{sharer}: {float(np.mean(weight)):+.2f}" for sharer, weight in parts)
        scores = [f"{by_method[m][user]:.3f}" if user in by_method[m] else "-" for m in methods]
        rows.append([user, *scores, merged.get("deployed", "-"), told or "-"])
    return {"header": ["user", *methods, "deployed", "sharers and weights"], "rows": rows}


def findings(content: Content) -> list[str]:
    """The page in three or four sentences."""
    rows = {row["method"]: row for row in leading(content.summary)}
    first = content.task.metrics[0]
    told = []
    if OURS in rows:
        others = [f"{name} {rows[name][first]['mean']:.3f}" for name in ("base", *SHORTEST_LIST) if name in rows]
        beside = f" ({', '.join(others)})" if others else ""
        told.append(f"{OURS} reaches {first} {report.cell_text(rows[OURS][first])}{beside}.")
    for pair in content.summary["paired"]:
        if pair["method"] in SHORTEST_LIST and (pair["k"], pair["profile"]) == Cell("", 0, False)[1:]:
            told.append(figures.pair_sentence(pair, first, OURS))
    told += base_won(content)
    ours = rows.get(OURS, {})
    if ours.get("auroc"):
        blind = f", where the same attack on the base gives {report.cell_text(ours['blind_auroc'])}"
        told.append(f"The published attack finds sharers' records with AUROC {report.cell_text(ours['auroc'])}{blind}.")
    return told


def base_won(content: Content) -> list[str]:
    """A sentence about users who merge nothing, where there are any."""
    results = read_results(content.sources[OURS]) if OURS in content.sources else []
    alone = sum(result.get("deployed") == "base" for result in results)
    if alone and alone == len(results):
        told = f"Nobody's adapters are merged: for all of {figures.people(alone)} the base won the search"
        return [f"{told}, so {OURS} answers as task_lora does, and the attack on it is the blind one."]
    return [f"For {figures.people(alone, len(results))} the base won the search: nothing is merged."] if alone else []


def missing(content: Content, folders: Sequence[Folder]) -> dict[str, list[str]]:
    """What failed or is partial, and what was not run."""
    found = {folder.stage for folder in folders}
    partial_rows = [
        f"{method}: {n['present']} of {n['expected']} test users have predictions; its rows are of these."
        for method, n in content.summary["users"].items() if n["present"] < n["expected"]
    ]  # fmt: skip
    begun = [
        f"{folder.path}: {len(folder.unfinished)} begun and not finished ({', '.join(folder.unfinished[:5])}"
        f"{', ...' if len(folder.unfinished) > 5 else ''}); the same command again finishes them."
        for folder in folders if folder.unfinished
    ]  # fmt: skip
    attacked = attacks(content.sources)
    present = [METHODS[name] for name in content.summary["users"] if name in METHODS]
    own_runs = [method for method in present if method.members != "none" and not method.comes_with_search]
    open_to_attack = [method.name for method in own_runs if method.name not in attacked]
    absent = [f"{stage}.py has not run: {lost}." for stage, lost in STAGES.items()
              if lost and stage not in found]  # fmt: skip
    if open_to_attack and "mia" in found:
        absent.append(f"not attacked: {', '.join(open_to_attack)} (mia.py --exp_dir of their folders).")
    others = [method for method in METHODS if method not in content.summary["users"]]
    if others:
        absent.append(f"rows that no stage has made: {', '.join(others)}.")
    return {"failed": partial_rows + begun, "absent": absent}


# --- pages -----------------------------------------------------------------------------------------


def write_run_page(content: Content) -> Path:
    """<output>/<task>/report.html and the files in figures/ beside it."""
    folder = content.root / "figures"
    folders = stage_folders(content.root, content.task)
    path = content.root / "report.html"
    write_text(path, render(
        "run.html",
        task=content.task,
        setting=_setting_name(*list(leading(content.summary)[0].values())[1:3]),
        findings=findings(content),
        missing=missing(content, folders),
        tables=tables(content.summary),
        methods=report.method_rows(content.summary),
        rows={row["method"]: METHODS[row["method"]].description for row in content.summary["rows"]
              if row["method"] in METHODS},
        notes=report.notes(content.summary).splitlines(),
        utility=utility_figures(content, folder),
        search=search_figures(content, folder),
        trade=[*trade_figures(content, folder), *frontier_figures(content, folder)],
        leakage=leakage_parts(content, folder),
        examples=examples(content),
        per_user=per_user(content),
        folders=folders,
        versions=versions(folders),
        machines=list(dict.fromkeys(folder.machine for folder in folders if folder.machine)),
    ))  # fmt: skip
    return path


def versions(folders: Sequence[Folder]) -> dict[str, str]:
    """Each library's versions; several where stages ran with several."""
    names = dict.fromkeys(name for folder in folders for name in folder.versions)
    return {n: ", ".join(sorted({f.versions[n] for f in folders if n in f.versions})) for n in names}


def write_pages(content: Content) -> list[Path]:
    """The page of the run; where its folder is named after the task (<output>/<task>), the one across tasks, too."""
    written = [write_run_page(content)]
    if content.root.name == content.task.name:
        written.append(write_tasks_page(content.root.parent))
    return written
