"""Stage 4, PriME: search weights that merge a few similar sharers' adapters into a personal one, without gradients.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), user_anchor_candidate.json,
        anchor_selection/<task>/, the task adapter, the sharers' adapters
Writes  <output_dir>/users/<user>/evaluations.jsonl   a line per evaluated candidate
        <output_dir>/users/<user>/adapter/            the deployed adapter (PEFT, with a card); none if the base won
        <output_dir>/users/<user>/adapter_full/       --export_full: with the task adapter in it, for the untouched base
        <output_dir>/users/<user>/result.json         weights, scores, predictions of prime, best_sharer, uniform
Takes   2 to 3 minutes on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

    python lora_composition_evo.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA --n_sim 3 --opt_type cma --opt_budget 10 \\
        --sim_penalty 0.1 --output_dir ./output/movie_tagging/LoRA-Composition-evo
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

from prime import cli
from prime.data import User
from prime.decode import Progress
from prime.engine import Engine, load_engine, predict
from prime.evolution import Evaluation, Population, evolve
from prime.export import export_full, save_personal
from prime.fitness import METRIC_REDUCERS, TRIAL_REDUCERS, Objective
from prime.lora import RULES, merge
from prime.runs import Run, derive_seed
from prime.sampling import Sampler
from prime.search import optimizer_name
from prime.sharers import Pool, add_selection, load_pool


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--output_dir", help="default ./output/<task_name>/LoRA-Composition-evo")
    parser.add_argument("--anchor_dir", help="sharers' adapters; default ./output/<task_name>/Anchor_PEFT/LoRA")
    search = parser.add_argument_group("search")
    search.add_argument("--n_sim", type=cli.natural, default=3, help="most similar sharers to merge; 0 = all")
    search.add_argument("--opt_type", default="cma", help="cma, ngopt, tbpsa, or any optimizer of nevergrad")
    search.add_argument("--opt_budget", type=cli.natural, default=10, help="candidates the search evaluates")
    search.add_argument("--sim_penalty", type=cli.non_negative, default=0.1, help="weight of resembling the sharers")
    search.add_argument("--merge_rule", choices=RULES, default="delta", help="factor is the published rule")
    search.add_argument("--piece_merge", action="store_true", help="one weight per sharer and layer")
    search.add_argument(
        "--search_only", action="store_true", help="published selection: a single sharer, known beforehand, cannot win"
    )
    fitness = parser.add_argument_group("fitness")
    fitness.add_argument("--num_repeat", type=cli.positive, default=1, help="sampled decodings per evaluation")
    fitness.add_argument("--m_reduce", choices=tuple(METRIC_REDUCERS), default="sum", help="of a task's metrics")
    fitness.add_argument("--t_reduce", choices=tuple(TRIAL_REDUCERS), default="mean", help="of the repeats' losses")
    fitness.add_argument("--train_sample", type=cli.natural, default=0, help="history records drawn; 0 = all")
    cli.add_history_decoding(fitness)
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_history(parser)
    cli.add_decoding(parser)
    add_selection(parser)
    cli.add_users(parser, "test users")
    cli.add_export(parser)
    return parser


def search_user(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, user: User, n: int, log: Path, progress: Progress
) -> list[Evaluation]:
    """All evaluated candidates of one user, the base first, then the n sharers loaded in the bank."""
    seed = derive_seed(args.seed, user.user_id)
    population = Population(args, texts, engine, user, seed, n, progress)
    if not population.golds:
        print(f"user {user.user_id}: an empty history, nothing to search by; the base is deployed", file=sys.stderr)
    objective = Objective(texts.task, population.golds, args.sim_penalty, args.m_reduce, args.t_reduce)
    return evolve(population, objective, args.opt_type, args.opt_budget, seed, log)


def work_on(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, pool: Pool, index: int, user: User,
    progress: Progress,
) -> None:  # fmt: skip
    started = time.perf_counter()
    sharers, adapters = pool.sharers(index), pool.adapters(index)
    engine.bank.load(adapters)
    evaluations = search_user(
        args, texts, engine, user, len(sharers), run.user_dir(user.user_id) / "evaluations.jsonl", progress
    )
    single = evaluations[1 : 1 + len(sharers)]
    best_sharer = min(single, key=lambda one: one.unpenalised)
    eligible = [evaluations[0], *evaluations[1 + len(sharers) :]] if args.search_only else evaluations
    best = min(eligible, key=lambda one: one.loss)
    searched = time.perf_counter()

    uniform = torch.full_like(best.weights, 1 / len(sharers))
    engine.bank.combine(torch.stack([best.weights, best_sharer.weights, uniform]), args.merge_rule)
    sampler = Sampler(args.temperature, args.top_p, derive_seed(args.seed, user.user_id))
    methods = {"prime": 0, "best_sharer": 1, "uniform": 2}
    found = predict(engine, texts, user, methods, sampler, args.k_list, args.max_gen_len, progress)

    base_won = best is evaluations[0]
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
        personal = merge(adapters, best.weights, args.merge_rule)
        save_personal(args, run, personal, {"user_id": user.user_id, **choice})
    run.finish(
        user.user_id,
        {
            "user_id": user.user_id,
            "index": index,
            **choice,
            "best_sharer": sharers[single.index(best_sharer)].user_id,
            "predictions": found,
            "seconds": {
                "search": round(searched - started, 3),
                "predict": round(time.perf_counter() - searched, 3),
            },
        },
    )


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    optimizer_name(args.opt_type)
    args.anchor_dir = args.anchor_dir or f"./output/{args.task_name}/Anchor_PEFT/LoRA"
    texts = cli.load_texts(args)
    users = cli.load_test_users(args, texts.task)
    pool = load_pool(args, cli.load_candidates(args, texts.task), len(users))
    folder = args.output_dir or f"./output/{args.task_name}/LoRA-Composition-evo"
    run = Run(folder, "lora_composition_evo", "prime", cli.settings_of(args))
    todo = cli.open_users(users, args.user_idxs, run.done)
    if todo:
        engine = load_engine(args, task_adapter=args.lora_ckpt)
        cli.for_each(todo, partial(work_on, args, texts, engine, run, pool))
    if args.export_full:
        export_full(args, run, users)


if __name__ == "__main__":
    cli.run(main)
