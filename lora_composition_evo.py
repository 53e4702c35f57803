"""Stage 4, PriME: search weights that merge a few similar sharers' adapters into a personal one, without gradients.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), user_anchor_candidate.json,
        anchor_selection/<task>/, the task adapter, the sharers' adapters
Writes  <output_dir>/users/<user>/evaluations.jsonl   a line per evaluated candidate
        <output_dir>/users/<user>/adapter/            the deployed adapter (PEFT, with a card); none if the base won
        <output_dir>/users/<user>/adapter_full/       --export_full: with the task adapter in it, for the untouched base
        <output_dir>/users/<user>/result.json         weights, scores, predictions of --name; those of the baselines
                                                      best_sharer and uniform beside the ones of prime
Takes   2 to 3 minutes on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

    python lora_composition_evo.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA --n_sim 3 --opt_type cma --opt_budget 10 \\
        --sim_penalty 0.1 --output_dir ./output/movie_tagging/LoRA-Composition-evo

--baseline best_sharer and --baseline uniform deploy those two instead, for mia.py to attack (in runs of their own).

--objective nll is LoraHub (Huang et al., 2023); as published it searches with ngopt, 40 candidates, the factor rule,
and starts at the base, which no single sharer may replace:

    python lora_composition_evo.py --objective nll --merge_rule factor --start zero --step 1 --search_only \
        --opt_type ngopt --opt_budget 40 --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt --output_dir ./output/movie_tagging/LoraHub
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prime import cli
from prime.bank.decode import Progress
from prime.bank.lora import Adapter, merge
from prime.bank.sampling import Sampler
from prime.checkpoints import plan
from prime.engine import Engine, Predictions, load_engine, predict
from prime.merging.deploy import export_full, save_personal
from prime.merging.evolution import (
    BASELINES,
    Evaluation,
    add_search,
    best_sharer,
    check_search,
    chosen,
    key_of,
    search_user,
)
from prime.merging.optimizer import optimizer_name
from prime.merging.sharers import Pool, add_selection, load_pool
from prime.runs.penalties import alone, open_runs, shared_evaluations, sharing_text
from prime.runs.run import Run
from prime.seeds import derive_seed
from prime.users.data import User

DEFAULTS = {  # --baseline or --objective: --name, folder
    "metric": ("prime", "LoRA-Composition-evo"), "nll": ("lorahub", "LoraHub"),
    "best_sharer": ("best_sharer", "Best-sharer"), "uniform": ("uniform", "Uniform"),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument(
        "--output_dir",
        help="default ./output/<task_name>/LoRA-Composition-evo, with --objective nll .../LoraHub, with --baseline "
        ".../Best-sharer or .../Uniform",
    )
    parser.add_argument(
        "--name",
        type=cli.method_name,
        help="row of the table; default prime, with --objective nll lorahub, with --baseline that baseline",
    )
    parser.add_argument("--anchor_dir", help="sharers' adapters; default ./output/<task_name>/Anchor_PEFT/LoRA")
    add_search(parser)
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_device_map(parser)
    cli.add_history(parser)
    cli.add_decoding(parser)
    add_selection(parser)
    cli.add_users(parser, "test users")
    cli.add_export(parser)
    return parser


def predictions(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, user: User, weights: Mapping[str, torch.Tensor],
    progress: Progress,
) -> Predictions:  # fmt: skip
    """Answers to the user's queries by named weights of the loaded sharers; what is alike is answered once."""
    different = list({key_of(own): own for own in weights.values()}.values())
    places = {key_of(own): place for place, own in enumerate(different)}
    engine.bank.combine(torch.stack(different), args.merge_rule, args.keep_rank)
    sampler = Sampler(args.temperature, args.top_p, derive_seed(args.seed, user.user_id))
    methods = {name: places[key_of(own)] for name, own in weights.items()}
    return predict(engine, texts, user, methods, sampler, args.k_list, args.max_gen_len, progress)


def work_on(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, runs: Sequence[Run], pool: Pool, index: int,
    user: User, progress: Progress,
) -> None:  # fmt: skip
    started = time.perf_counter()
    sharers, adapters = pool.sharers(index), pool.adapters(index)
    engine.bank.load(adapters)
    logs = [run.user_dir(user.user_id) / "evaluations.jsonl" for run in runs]
    journal = runs[-1].journal([user.user_id])  # of the run that is finished last
    found = search_user(args, texts, engine, user, len(sharers), logs, journal, progress)
    single = found[0][1 : 1 + len(sharers)]
    leading = best_sharer(found[0], len(sharers))
    best = [chosen(args, evaluations, len(sharers)) for evaluations in found]
    searched = time.perf_counter()

    weights = {f"{args.name} {place}": one.weights for place, one in enumerate(best)}
    # A table has one row of each baseline: merged by the rule of prime, not of its variants, and nothing left out.
    if args.name == "prime" and not args.keep_rank:
        weights |= {"best_sharer": leading.weights}
        weights |= {"uniform": torch.full_like(leading.weights, 1 / len(sharers))}
    answers = predictions(args, texts, engine, user, weights, progress)
    predict_seconds = (time.perf_counter() - searched) / len(runs)

    for place, (run, evaluations, one) in enumerate(zip(runs, found, best, strict=True)):
        own = {f"{args.name} {place}": args.name, "best_sharer": "best_sharer", "uniform": "uniform"}
        # Of several searches side by side, a lone one's seconds are those of its own candidates.
        alone_took = sum(candidate.seconds for candidate in evaluations)
        seconds = {
            "search": searched - started + journal.spared if len(runs) == 1 else alone_took,
            "sharers": sum(one.seconds for one in single),  # of the search: what best_sharer needs
            "predict": predict_seconds,
        }
        told = {
            "best_sharer": sharers[single.index(leading)].user_id,
            "predictions": {own[name]: given for name, given in answers.items() if name in own},
            "seconds": {part: round(spent, 3) for part, spent in seconds.items()},
        }
        deploy(alone(args, place), run, {"user_id": user.user_id, "index": index}, sharers, adapters, one, told)
    journal.drop()


def deploy(
    args: argparse.Namespace, run: Run, who: Mapping[str, Any], sharers: Sequence[User], adapters: Sequence[Adapter],
    best: Evaluation, told: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write what a user deploys, and the result."""
    base_won = not best.weights.any()
    choice = {
        "deployed": "base" if base_won else "merge",
        "sharers": [sharer.user_id for sharer in sharers],
        "weights": best.weights.tolist(),
        "rule": args.merge_rule,
        "loss": best.loss,
        "utility": best.utility,
        "similarity": best.similarity,
        "origin": best.origin,
    }
    if not base_won:
        personal = merge(adapters, best.weights, args.merge_rule, args.keep_rank)
        save_personal(args, run, personal, {"user_id": who["user_id"], **choice})
    run.finish(who["user_id"], {**who, **choice, **told})


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    optimizer_name(args.opt_type)
    name, folder = DEFAULTS[args.baseline or args.objective]
    args.name = args.name or name
    if args.baseline:
        args.opt_budget, args.start = 0, BASELINES[args.baseline]
    args.sim_penalty = args.sim_penalty if args.objective == "metric" else (0.0,)
    args.anchor_dir = args.anchor_dir or f"./output/{args.task_name}/Anchor_PEFT/LoRA"
    if args.plan:
        return plan.show("lora_composition_evo", args)
    texts = cli.load_texts(args)
    if args.fitness == "query":
        texts = cli.asked_as_queries(args, texts)
    users = cli.load_test_users(args, texts.task)
    pool = load_pool(args, cli.load_candidates(args, texts.task), len(users))
    check_search(args, len(pool.ranking[0]))
    runs = open_runs(Path(args.output_dir or f"./output/{args.task_name}/{folder}"), args)
    todo = cli.open_users(users, args.user_idxs, lambda user_id: all(run.done(user_id) for run in runs))
    if todo:
        engine = load_engine(args, task_adapter=args.lora_ckpt)
        work = partial(work_on, args, texts, engine, runs, pool)
        cli.for_each(cli.share_users(args, runs[-1], todo, runs[:-1]), len(todo), work)
    if len(runs) > 1:
        print(sharing_text(shared_evaluations([run.root for run in runs])))
    if args.export_full:
        for place, run in enumerate(runs):
            export_full(alone(args, place), run, users)


if __name__ == "__main__":
    cli.run(main)
