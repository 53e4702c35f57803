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

--objective nll is LoraHub (Huang et al., 2023); as published it searches with ngopt, 40 candidates, the factor rule,
and starts at the base, which no single sharer may replace:

    python lora_composition_evo.py --objective nll --merge_rule factor --start zero --step 1 --search_only \
        --opt_type ngopt --opt_budget 40 --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt --output_dir ./output/movie_tagging/LoraHub
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
from prime.evolution import STARTS, Evaluation, Population, evolve
from prime.export import export_full, save_personal
from prime.fitness import METRIC_REDUCERS, TRIAL_REDUCERS, Objective
from prime.journal import Journal
from prime.lora import RULES, merge
from prime.runs import Run, derive_seed
from prime.sampling import Sampler
from prime.search import STEP, optimizer_name
from prime.sharers import Pool, add_selection, load_pool

NAMES = {"metric": "prime", "nll": "lorahub"}
FOLDERS = {"metric": "LoRA-Composition-evo", "nll": "LoraHub"}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument(
        "--output_dir", help="default ./output/<task_name>/LoRA-Composition-evo, with --objective nll .../LoraHub"
    )
    parser.add_argument(
        "--name", type=cli.method_name, help="row of the table; default prime, with --objective nll lorahub"
    )
    parser.add_argument("--anchor_dir", help="sharers' adapters; default ./output/<task_name>/Anchor_PEFT/LoRA")
    search = parser.add_argument_group("search")
    search.add_argument("--n_sim", type=cli.natural, default=3, help="most similar sharers to merge; 0 = all")
    search.add_argument("--opt_type", default="cma", help="cma, ngopt, tbpsa, or any optimizer of nevergrad")
    search.add_argument("--opt_budget", type=cli.natural, default=10, help="candidates the search evaluates")
    search.add_argument(
        "--sim_penalty",
        type=cli.non_negative,
        default=0.1,
        help="weight of resembling the sharers; nll generates nothing to compare, so there it is 0 whatever is given",
    )
    search.add_argument(
        "--start",
        choices=STARTS,
        default="ranked",
        help="where the search begins: zero (published), the sharers' average, or one weighted by rank of their losses",
    )
    search.add_argument(
        "--step",
        type=cli.above_zero,
        default=0.3,
        help=f"standard deviation of its first candidates around the start (published: {STEP:g})",
    )
    search.add_argument("--merge_rule", choices=RULES, default="delta", help="factor is the published rule")
    search.add_argument("--piece_merge", action="store_true", help="one weight per sharer and layer")
    search.add_argument(
        "--search_only", action="store_true", help="published selection: a single sharer, known beforehand, cannot win"
    )
    fitness = parser.add_argument_group("fitness")
    fitness.add_argument(
        "--objective",
        choices=("metric", "nll"),
        default="metric",
        help="metric: of generated answers (PriME); nll: cross-entropy of the history's targets plus L1 of the weights "
        "(LoraHub), which does without the sampling, --num_repeat, --m_reduce, --t_reduce and --train_gen_len",
    )
    fitness.add_argument(
        "--fitness",
        choices=("history", "query"),
        default="history",
        help="what candidates answer: the history's records (published), or its items asked as test queries, which "
        "differ in citation; there wrong references come from user_base_LLM.json",
    )
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
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, user: User, n: int, log: Path, journal: Journal,
    progress: Progress,
) -> list[Evaluation]:  # fmt: skip
    """All evaluated candidates of one user, the base first, then the n sharers loaded in the bank.

    What was evaluated before an interruption is in the journal, and is not evaluated again.
    """
    seed = derive_seed(args.seed, user.user_id)
    population = Population(args, texts, engine, user, seed, n, journal, progress)
    if not population.golds:
        print(f"user {user.user_id}: an empty history, nothing to search by; the base is deployed", file=sys.stderr)
    objective = None
    if args.objective == "metric":
        objective = Objective(texts.task, population.golds, args.sim_penalty, args.m_reduce, args.t_reduce)
    return evolve(population, objective, seed, log)


def work_on(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, pool: Pool, index: int, user: User,
    progress: Progress,
) -> None:  # fmt: skip
    started = time.perf_counter()
    sharers, adapters = pool.sharers(index), pool.adapters(index)
    engine.bank.load(adapters)
    log, journal = run.user_dir(user.user_id) / "evaluations.jsonl", Journal(run.journal_path(user.user_id))
    evaluations = search_user(args, texts, engine, user, len(sharers), log, journal, progress)
    single = evaluations[1 : 1 + len(sharers)]
    best_sharer = min(single, key=lambda one: one.unpenalised)
    eligible = [evaluations[0], *evaluations[1 + len(sharers) :]] if args.search_only else evaluations
    best = min(eligible, key=lambda one: one.loss)
    searched = time.perf_counter()

    uniform = torch.full_like(best.weights, 1 / len(sharers))
    engine.bank.combine(torch.stack([best.weights, best_sharer.weights, uniform]), args.merge_rule)
    sampler = Sampler(args.temperature, args.top_p, derive_seed(args.seed, user.user_id))
    # A table has one row of each baseline: merged by the rule of prime, not of its variants.
    methods = {args.name: 0} | ({"best_sharer": 1, "uniform": 2} if args.name == "prime" else {})
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
                "search": round(searched - started + journal.spared, 3),
                "sharers": round(sum(one.seconds for one in single), 3),  # of the search: what best_sharer needs
                "predict": round(time.perf_counter() - searched, 3),
            },
        },
    )
    journal.drop()


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    optimizer_name(args.opt_type)
    args.name = args.name or NAMES[args.objective]
    args.sim_penalty = args.sim_penalty if args.objective == "metric" else 0.0
    args.anchor_dir = args.anchor_dir or f"./output/{args.task_name}/Anchor_PEFT/LoRA"
    texts = cli.load_texts(args)
    if args.fitness == "query":
        texts = cli.asked_as_queries(args, texts)
    users = cli.load_test_users(args, texts.task)
    pool = load_pool(args, cli.load_candidates(args, texts.task), len(users))
    folder = args.output_dir or f"./output/{args.task_name}/{FOLDERS[args.objective]}"
    run = Run(folder, "lora_composition_evo", args.name, cli.settings_of(args))
    todo = cli.open_users(users, args.user_idxs, run.done)
    if todo:
        engine = load_engine(args, task_adapter=args.lora_ckpt)
        cli.for_each(cli.share_users(args, run, todo), len(todo), partial(work_on, args, texts, engine, run, pool))
    if args.export_full:
        export_full(args, run, users)


if __name__ == "__main__":
    cli.run(main)
