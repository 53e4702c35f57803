"""Stage 4, PriME: search weights that merge a few similar sharers' adapters into a personal one, without gradients.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), user_anchor_candidate.json,
        anchor_selection/<task>/, the task adapter, the sharers' adapters
Writes  <output_dir>/users/<user>/evaluations.jsonl   a line per evaluated candidate
        <output_dir>/users/<user>/adapter/            the deployed adapter (PEFT, with a card); none if the base won
        <output_dir>/users/<user>/adapter_full/       --export_full: with the task adapter in it, for the untouched base
        <output_dir>/users/<user>/result.json         weights, scores, predictions of --name; those of the baselines
                                                      best_sharer and uniform beside the ones of prime
Takes   about a minute on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

    python lora_composition_evo.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA --n_sim 3 --opt_type cma --opt_budget 10 \\
        --sim_penalty 0.1 --output_dir ./output/movie_tagging/LoRA-Composition-evo

The method is `prime/merging/evolution.py`, its objective `prime/merging/objective.py`.
--baseline best_sharer and --baseline uniform deploy those two instead, for mia.py to attack (in runs of their own).
--objective nll is LoraHub (Huang et al., 2023); as published with --as_published --opt_type ngopt --opt_budget 40.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prime import settings as opt

FOLDER_HELP = "default ./output/<task_name>/LoRA-Composition-evo, LoraHub, Best-sharer or Uniform, by what is searched"
NAME_HELP = "row of the table; default prime, with --objective nll lorahub, with --baseline that baseline"


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    output_dir: str | None = opt.setting(None, FOLDER_HELP, neutral=True)
    name: str | None = opt.setting(None, NAME_HELP, parse=opt.method_name)
    anchor_dir: str = opt.task_path("./output/<task_name>/Anchor_PEFT/LoRA", "sharers' adapters")
    search: opt.SearchSettings = opt.group()
    fitness: opt.FitnessSettings = opt.group()
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group()
    prompts: opt.HistorySettings = opt.group()
    decoding: opt.DecodingSettings = opt.group()
    anchors: opt.SelectionSettings = opt.group()
    user_idxs: str | None = opt.user_idxs("test users")
    deploy: opt.DeploySettings = opt.group()


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

import torch

from prime.bank.decode import Progress
from prime.bank.lora import merge
from prime.checkpoints import plan
from prime.checkpoints.memory import Work
from prime.engine import Engine, Predictions, load_engine, predict
from prime.errors import tell
from prime.merging.controls import load_sharers
from prime.merging.deploy import export_full, in_form, save_personal
from prime.merging.evolution import Evaluation, best_sharer, check_search, choose, key_of, search_each, sharers_of
from prime.merging.optimizer import first_generation, optimizer_name
from prime.merging.population import Population, Setup
from prime.merging.sharers import Pool, Selection, merging_inputs
from prime.report.found import found_text
from prime.report.methods import REFERENCE, choices
from prime.runs.files import check_own
from prime.runs.inputs import Inputs
from prime.runs.penalties import PENALTY_DIR
from prime.runs.progress import for_each
from prime.runs.run import Run
from prime.runs.workers import open_users, share_users
from prime.seeds import derive_seed
from prime.users.data import User, select_indices, user_cost
from prime.users.tasks import get_task
from prime.users.texts import asked_as_queries, load_candidates, load_test_users, load_texts


@dataclass(frozen=True)
class Stage:
    """What all users are worked on with; a run directory for each penalty."""

    settings: Settings
    setup: Setup
    engine: Engine
    pool: Pool
    runs: Sequence[Run]


def answer_queries(stage: Stage, user: User, weights: Mapping[str, torch.Tensor], progress: Progress) -> Predictions:
    """Answers to the user's queries by named weights of the loaded sharers; what is alike is answered once."""
    settings = stage.settings
    distinct = list({key_of(tensor): tensor for tensor in weights.values()}.values())
    places = {key_of(tensor): place for place, tensor in enumerate(distinct)}
    stage.engine.bank.combine(torch.stack(distinct), settings.search.merge_rule, settings.search.keep_rank)
    methods = {name: places[key_of(tensor)] for name, tensor in weights.items()}
    return predict(stage.engine, stage.setup.texts, user, methods, settings.decoding, settings.seed, progress)


def work_on(stage: Stage, index: int, user: User, progress: Progress) -> None:
    """Search at each penalty, predict with what is chosen, deploy."""
    started = time.perf_counter()
    settings, runs, adapters = stage.settings, stage.runs, stage.pool.adapters(index)
    stage.engine.bank.load(adapters)
    journal = runs[-1].journal([user.user_id])  # of the run that is finished last
    seed = derive_seed(settings.seed, user.user_id)
    population = Population(stage.setup, user, seed, len(adapters), journal, progress)
    if not population.golds:
        deployed = settings.search.baseline or "the base"  # the first of equal losses, see `choose`
        tell(f"user {user.user_id}: an empty history, nothing to search by; {deployed} is deployed")
    logs = [run.user_dir(user.user_id) / "evaluations.jsonl" for run in runs]
    searches = search_each(population, settings.search.sim_penalty, logs)
    best = [choose(evaluations, settings.search) for evaluations in searches]
    searched = time.perf_counter()

    weights = {f"{settings.name} {place}": chosen.weights for place, chosen in enumerate(best)}
    # A table has one row of each baseline: merged by the rule of prime, not of its variants, and nothing left out.
    if settings.name == REFERENCE and not settings.search.keep_rank:
        leading = best_sharer(searches[0]).weights
        weights |= {"best_sharer": leading, "uniform": torch.full_like(leading, 1 / len(adapters))}
    answers = answer_queries(stage, user, weights, progress)
    predict_seconds = (time.perf_counter() - searched) / len(runs)

    singles = sharers_of(searches[0])
    leader = stage.pool.sharers(index)[singles.index(best_sharer(singles))].user_id
    for place, (run, evaluations) in enumerate(zip(runs, searches, strict=True)):
        spent = sum(evaluation.seconds for evaluation in evaluations)  # of several over one memo: its own candidates
        seconds = {
            # Of one search all that it took, also before an interruption (`spared`).
            "search": (searched - started + journal.spared) if len(runs) == 1 else spent,
            "sharers": sum(single.seconds for single in singles),  # of the search: what best_sharer needs
            "predict": predict_seconds,
        }
        predictions = {settings.name: answers[f"{settings.name} {place}"]}
        predictions |= {name: answers[name] for name in ("best_sharer", "uniform") if name in answers}
        rounded = {part: round(value, 3) for part, value in seconds.items()}
        more = {"best_sharer": leader, "predictions": predictions, "seconds": rounded}
        deploy(stage, run, index, user, best[place], more)
    journal.drop()


def deploy(stage: Stage, run: Run, index: int, user: User, best: Evaluation, more: Mapping) -> None:
    """Write what a user deploys, and the result."""
    settings, search, base_won = stage.settings, stage.settings.search, not best.weights.any()
    choice = {
        "deployed": "base" if base_won else "merge",
        "sharers": [sharer.user_id for sharer in stage.pool.sharers(index)],
        "weights": best.weights.tolist(),
        "rule": search.merge_rule,
        "loss": best.loss,
        "utility": best.utility,
        "similarity": best.similarity,
        "origin": best.origin,
    }
    if not base_won:
        merged = merge(stage.pool.adapters(index), best.weights, search.merge_rule, search.keep_rank)
        personal = in_form(merged, settings.deploy.deploy_form)
        save_personal(settings.model, run, personal, {"user_id": user.user_id, **choice})
    run.finish(user.user_id, {"user_id": user.user_id, "index": index, **choice, **more})


def open_runs(settings: Settings, folder: Path, inputs: Inputs) -> list[Run]:
    """A run directory for each penalty: `folder` itself, or penalty-<p> in it where there are several."""
    check_own(folder)
    penalties, runs = settings.search.sim_penalty, []
    for penalty in penalties:
        root = folder / f"{PENALTY_DIR}{penalty:g}" if len(penalties) > 1 else folder
        runs.append(cli.open_run(settings, root, "lora_composition_evo", settings.name, inputs, sim_penalty=penalty))
    return runs


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan: base and sharers, a generation of candidates, or what is predicted with."""
    search, task = settings.search, get_task(settings.data.task)
    n, rank = search.n_sim or plan.PUBLISHED_ANCHORS, plan.rank_of(settings.anchor_dir)
    candidates = max(1 + n, first_generation(n, search.opt_type, search.opt_budget), 2 + len(search.sim_penalty))
    kinds = (task.history_labels, settings.fitness.train_gen_len), (task.labels, settings.decoding.max_gen_len)
    answer = plan.longest_answer(settings.model, *kinds)
    merged_rank = n * rank if search.merge_rule == "delta" else rank
    return [Work("answering", candidates, merged_rank, settings.prompts.max_length, answer, other_ranks=2 * n * rank)]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    data, search, fitness, prompts = settings.data, settings.search, settings.fitness, settings.prompts
    optimizer_name(search.opt_type)
    check_search(search, fitness)
    method = choices("lora_composition_evo")[search.baseline or fitness.objective]
    settings = replace(settings, name=settings.name or method.name)
    if fitness.objective == "nll":
        settings = replace(settings, search=replace(search, sim_penalty=(0.0,)))
    texts = load_texts(data.folder, data.task, prompts.prompt_path, prompts.texts)
    if fitness.fitness == "query":
        texts = asked_as_queries(data.folder, texts)
    users = load_test_users(data.folder, texts.task)
    selection = Selection.of(settings.anchors, data.task_name, load_candidates(data.folder, texts.task))
    pool = load_sharers(selection, settings.model, settings.anchor_dir, users, search, settings.seed)
    inputs = merging_inputs(data.folder, prompts.prompt_path, users, texts, pool)
    runs = open_runs(settings, Path(settings.output_dir or f"./output/{data.task_name}/{method.folder}"), inputs)
    wanted = select_indices(settings.user_idxs, len(users))
    todo = open_users(users, wanted, lambda user_id: all(run.done(user_id) for run in runs))
    if todo:
        engine = load_engine(settings.model, prompts, settings.decoding.max_gen_len)
        setup = Setup(settings.search, fitness, settings.decoding, prompts.recent_k, texts, engine)
        mine = share_users(runs[-1], todo, partial(user_cost, recent_k=prompts.recent_k), runs[:-1])
        for_each(mine, len(todo), partial(work_on, Stage(settings, setup, engine, pool, runs)))
    print(found_text([run.root for run in runs], [users[index].user_id for index in wanted], texts.task, fitness))
    if settings.deploy.export_full:
        for run in runs:
            export_full(settings.model, run, users)


if __name__ == "__main__":
    cli.run(main)
