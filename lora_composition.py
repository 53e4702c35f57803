"""Stage 4b, Per-Pcs (Tan et al., EMNLP 2024): compose a personal adapter out of the sharers' pieces by their gates.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), user_anchor_candidate.json,
        anchor_selection/<task>/, the task adapter, the sharers' adapters (--anchor_dir) and gates (--gate_dir)
Writes  <output_dir>/users/<user>/composition.jsonl   a line per module: the weights of its sharers
        <output_dir>/users/<user>/adapter/            the composed adapter (PEFT, with a card)
        <output_dir>/users/<user>/adapter_full/       --export_full: with the task adapter in it, for the untouched base
        <output_dir>/users/<user>/result.json         weights, scores on the history, predictions of per_pcs
Takes   1 to 2 minutes on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

Each batch of history records walks through the model; every module takes the --topk sharers whose gates its input
resembles most, before it computes (`merging/gates.py`). What the batches composed is averaged. The paper says no more
about three things, where this follows the published code: a module's input is read where target tokens are
predicted, scores are averaged by record and then over the batch, and gates select but do not scale the composed
pieces. It departs from that code in three: sharers who do not share (--shared_ratio) are drawn once per run by its
seed, not anew per module; equal scores go to the more similar sharer; the order of records is drawn by the user's
seed. --n_sim is PriME's addition: it leaves Per-Pcs as many sharers as PriME merges.

    python lora_composition.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --gate_dir ./output/movie_tagging/Anchor_PEFT/gate --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA \\
        --n_sim 3 --topk 3 --recent_k 2000 --shared_ratio 1 --agg_temperature 1 \\
        --output_dir ./output/movie_tagging/LoRA-Composition
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial

import torch

from prime import cli
from prime.bank.batching import every_pair
from prime.bank.decode import Progress
from prime.bank.sampling import Sampler
from prime.checkpoints import plan
from prime.engine import Engine, load_engine, predict
from prime.errors import InputError
from prime.merging.deploy import export_full, save_personal
from prime.merging.gates import (
    Gates,
    Weights,
    compose,
    gate_path,
    history_batches,
    load_gate,
    module_widths,
    sharing_places,
)
from prime.merging.objective import Objective, Trial
from prime.merging.sharers import Pool, add_selection, anchor_users, load_pool
from prime.runs.files import write_text
from prime.runs.run import Run
from prime.seeds import derive_seed
from prime.users.data import User, select
from prime.users.prompts import Record, history_records


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--output_dir", help="default ./output/<task_name>/LoRA-Composition")
    parser.add_argument("--anchor_dir", help="sharers' adapters; default ./output/<task_name>/Anchor_PEFT/LoRA")
    parser.add_argument("--gate_dir", help="sharers' gates; default ./output/<task_name>/Anchor_PEFT/gate")
    group = parser.add_argument_group("composition")
    group.add_argument("--n_sim", type=cli.natural, default=0, help="most similar sharers to choose from; 0 = all")
    group.add_argument("--topk", type=cli.positive, default=3, help="sharers that a module is composed of")
    group.add_argument(
        "--agg_temperature", type=cli.non_negative, default=1.0, help="of the softmax over their scores; 0 = the best"
    )
    group.add_argument("--shared_ratio", type=cli.fraction, default=1.0, help="part of the anchors that share")
    group.add_argument("--batch_size", type=cli.positive, default=16, help="history records that compose together")
    cli.add_history_decoding(group)
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_device_map(parser)
    cli.add_history(parser)
    parser.set_defaults(recent_k=2000)
    cli.add_decoding(parser)
    add_selection(parser)
    cli.add_users(parser, "test users")
    cli.add_export(parser)
    return parser


def load_shared(args: argparse.Namespace, candidates: Sequence[User], n_test: int) -> Pool:
    """The anchors that share, and for each test user the n_sim nearest of them."""
    n = len(anchor_users(args, candidates))
    sharing = sorted(sharing_places(n, args.shared_ratio, args.seed))
    size = args.n_sim or len(sharing)
    if not args.topk <= size <= len(sharing):
        told = f"--topk {args.topk}, --n_sim {args.n_sim}"
        raise InputError(f"{told}: topk <= n_sim <= {len(sharing)}, the number of sharers, is needed")
    return load_pool(args, candidates, n_test, sharing)


def history_of(args: argparse.Namespace, texts: cli.Texts, user: User) -> list[Record]:
    profile = (texts.profiles or {}).get(user.user_id)
    return history_records(user, texts.task, texts.templates, profile, args.recent_k)


def compose_user(
    args: argparse.Namespace, engine: Engine, user: User, records: Sequence[Record], sharers: Sequence[User]
) -> Weights:
    """Compose out of the sharers in the bank; the result is then adapter 0 of the bank."""
    widths = module_widths(engine.bank)
    gates = Gates(engine.bank, [load_gate(gate_path(args.gate_dir, sharer.user_id), widths) for sharer in sharers])
    encoded = [engine.encoder.record(r.id, r.input, r.target) for r in records]
    batches = history_batches(encoded, args.batch_size, derive_seed("compose", args.seed, user.user_id))
    return compose(engine.bank, gates, batches, args.topk, args.agg_temperature)


def measure(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, user: User, records: Sequence[Record], n: int
) -> Trial:
    """Utility on the history and similarity to the n sharers, as PriME measures them; the user's adapter is the nth."""
    prompts = [engine.encoder.prompt(r.id, r.input) for r in records]
    drafts = [[engine.encoder.record(r.id, r.input, r.target).target[:-1]] for r in records]
    sampler = Sampler(args.temperature, args.top_p, derive_seed(derive_seed(args.seed, user.user_id), "repeat", 0))
    limit = engine.limit(texts.task.history_labels, args.train_gen_len)
    answers = engine.answer(prompts, every_pair(range(n + 1), len(prompts)), sampler, limit, drafts)
    *sharers, own = [
        [engine.encoder.text(answers[place, index]) for index in range(len(prompts))] for place in range(n + 1)
    ]
    objective = Objective(texts.task, [record.target.strip() for record in records], penalty=0.0)
    (trial,) = objective.trials([own], [[texts_of] for texts_of in sharers])
    return trial


def work_on(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, pool: Pool, index: int, user: User,
    progress: Progress,
) -> None:  # fmt: skip
    started = time.perf_counter()
    sharers, adapters = pool.sharers(index), pool.adapters(index)
    records = history_of(args, texts, user)
    engine.bank.load(adapters)
    weights = compose_user(args, engine, user, records, sharers)
    personal = engine.bank.adapter(0)
    composed = time.perf_counter()

    engine.bank.load([*adapters, personal])
    score = measure(args, texts, engine, user, records, len(sharers))
    measured = time.perf_counter()
    sampler = Sampler(args.temperature, args.top_p, derive_seed(args.seed, user.user_id))
    method = {"per_pcs": len(sharers)}
    found = predict(engine, texts, user, method, sampler, args.k_list, args.max_gen_len, progress)

    choice = {
        "deployed": "merge",
        "sharers": [sharer.user_id for sharer in sharers],
        "weights": torch.stack(list(weights.values())).mean(0).tolist(),
        "rule": "factor",
        "utility": score.utility,
        "similarity": score.similarity,
    }
    lines = [json.dumps({"module": name, "weights": own.tolist()}) + "\n" for name, own in weights.items()]
    write_text(run.user_dir(user.user_id) / "composition.jsonl", "".join(lines))
    save_personal(args, run, personal, {"user_id": user.user_id, **choice})
    seconds = {
        "compose": round(composed - started, 3),
        "measure": round(measured - composed, 3),
        "predict": round(time.perf_counter() - measured, 3),
    }
    run.finish(
        user.user_id, {"user_id": user.user_id, "index": index, **choice, "predictions": found, "seconds": seconds}
    )


def check_inputs(args: argparse.Namespace, pool: Pool, users: Sequence[User]) -> None:
    """InputError for sharers without gate and users without history, all of them at once."""
    places = sorted({place for row in pool.ranking for place in row})
    files = [gate_path(args.gate_dir, pool.anchors[place].user_id) for place in places]
    problems = [f"{file}: no such gate; run train_anchor_gate.py" for file in files if not file.is_file()]
    problems += [f"user {user.user_id}: an empty history, nothing to compose by" for user in users if not user.profile]
    if problems:
        raise InputError.many(problems)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.anchor_dir = args.anchor_dir or f"./output/{args.task_name}/Anchor_PEFT/LoRA"
    args.gate_dir = args.gate_dir or f"./output/{args.task_name}/Anchor_PEFT/gate"
    if args.plan:
        return plan.show("lora_composition", args)
    texts = cli.load_texts(args)
    users = cli.load_test_users(args, texts.task)
    pool = load_shared(args, cli.load_candidates(args, texts.task), len(users))
    check_inputs(args, pool, select(users, args.user_idxs))
    folder = args.output_dir or f"./output/{args.task_name}/LoRA-Composition"
    run = cli.open_run(args, folder, "lora_composition", "per_pcs")
    todo = cli.open_users(users, args.user_idxs, run.done)
    if todo:
        engine = load_engine(args, task_adapter=args.lora_ckpt)
        cli.for_each(cli.share_users(args, run, todo), len(todo), partial(work_on, args, texts, engine, run, pool))
    if args.export_full:
        export_full(args, run, users)


if __name__ == "__main__":
    cli.run(main)
