"""Stage 5, membership inference: does a deployed adapter tell whose records went into it?

Reads   --exp_dir of stage 4 (users/*/result.json and adapter/), --anchor_dir of stage 3, --lora_ckpt of stage 1,
        <data_dir>/user_anchor_candidate.json, profile-id2text.json
Writes  <exp_dir>/mia/users/, <exp_dir>/mia/sharers/users/   one result per test user and per sharer
        <exp_dir>/mia_results.json   losses of member and non-member records per test user, the published shape
        <exp_dir>/mia_summary.json   AUROC of every attack beside its blind baseline (on the base); also in users' cards
Takes   one pass over all anchors' records per test user and per anchor: minutes on the demo (2 CPU cores), hours
        with a 7B model on one GPU; --max_records shortens it. Resumes by user: run the same command again.

Members are the records of the sharers merged for a test user, non-members those of all other anchors. Attacked is
what was deployed: the merged adapter (with what merge-then-adapt trained on top), or the base where the base won.
Every sharer's own adapter is attacked too, as it was before any merge. OPPU merges nobody's adapter: it is refused.

    python mia.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA --n_sim 3 \\
        --exp_dir ./output/movie_tagging/LoRA-Composition-evo
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prime import cli, membership
from prime.decode import EncodedRecord, every_pair, score
from prime.engine import Engine, load_engine
from prime.errors import InputError
from prime.lora import load_adapter
from prime.prompts import history_records
from prime.report import attack_table, write_attacks
from prime.runs import Run, read_json, read_results, read_settings
from prime.sharers import adapter_folder
from prime.workers import share

# No attack depends on the gates or on what else is attacked, and the results lie in the experiment's own folder.
NOT_SETTINGS = ("gate_dir", "exp_dir", "skip_sharers")
# Options that make the records what they were when the anchors' adapters were trained.
RECORD_OPTIONS = ("task_name", "recent_k", "prompt_path", "max_length")

Records = Mapping[str, Sequence[EncodedRecord]]  # by anchor id
Tokens = Mapping[str, Sequence[np.ndarray]]  # by anchor id: log-probabilities of each record's target tokens


@dataclass(frozen=True)
class Subject:
    """Somebody's deployed adapter, and whose records are in it."""

    user_id: str
    index: int
    adapter: Path | None  # None: the base was deployed
    members: Sequence[str]  # anchor ids
    neither: Sequence[str] = ()  # sharers of weight 0 or beyond --n_sim: neither members nor non-members


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--exp_dir", required=True, help="output of stage 4, whose adapters are attacked")
    parser.add_argument("--anchor_dir", required=True, help="output of stage 3, the anchors' adapters")
    parser.add_argument("--gate_dir", help="Per-Pcs' gates: has to exist if given; the attack itself reads none")
    parser.add_argument("--n_sim", type=cli.natural, default=0, help="nearest merged sharers that are members; 0 = all")
    parser.add_argument(
        "--max_records", type=cli.natural, default=0, help="records of an anchor, the last ones; 0 = all (published)"
    )
    parser.add_argument("--skip_sharers", action="store_true", help="do not attack the sharers' own adapters once more")
    parser.add_argument("--users_per_batch", type=cli.positive, default=8, help="adapters in the bank together")
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_history(parser)
    return parser


def deployments(exp_dir: Path, n_sim: int) -> list[Subject]:
    """The finished test users of a stage 4 run; its results list the sharers nearest first."""
    results = read_results(exp_dir)
    if not results:
        raise InputError(f"{exp_dir}: no finished users there; run stage 4 first (lora_composition_evo.py)")
    return [deployment(exp_dir, result, n_sim) for result in results]


def deployment(exp_dir: Path, result: Mapping, n_sim: int) -> Subject:
    """What a test user deployed. A sharer of weight 0 is not in it; where the base won, all listed are looked for."""
    user_id = result["user_id"]
    if "sharers" not in result:
        told = "merged no sharer's adapter, so it has no members to look for (--exp_dir)"
        raise InputError(f"{exp_dir}: user {user_id} {told}")
    on_base = result["deployed"] == "base"
    weights = result.get("weights", [1.0] * len(result["sharers"]))
    merged = [s for s, w in zip(result["sharers"], weights, strict=True) if on_base or np.any(w)]
    members = merged[:n_sim] if n_sim else merged
    others = [sharer for sharer in result["sharers"] if sharer not in members]
    adapter = None if on_base else adapter_folder(exp_dir, user_id)
    return Subject(user_id, result["index"], adapter, members, others)


def anchor_records(args: argparse.Namespace, anchors: Sequence[Mapping], engine: Engine) -> Records:
    """The records each anchor's adapter was trained on, checked against what stage 3 wrote down."""
    texts = cli.load_texts(args)
    users = {user.user_id: user for user in cli.load_candidates(args, texts.task)}
    found = {}
    for anchor in anchors:
        name = anchor["user_id"]
        if name not in users:
            raise InputError(f"{args.anchor_dir}: anchor {name} is not in {cli.data_dir(args)}")
        profile = (texts.profiles or {}).get(name)
        records = history_records(users[name], texts.task, texts.templates, profile, args.recent_k)
        if [record.id for record in records] != anchor["record_ids"]:
            raise InputError(
                f"{args.anchor_dir}: anchor {name} was trained on {len(anchor['record_ids'])} other records than the "
                f"{len(records)} of {cli.data_dir(args)}"
            )
        found[name] = [engine.encoder.record(r.id, r.input, r.target) for r in records[-args.max_records :]]
    return found


def logprobs(engine: Engine, records: Records, adapters: Sequence[int]) -> dict[int, Tokens]:
    """By adapter in the bank (-1: the base): token log-probabilities of all anchors' records."""
    flat = [record for own in records.values() for record in own]
    with cli.bar(len(flat) * len(adapters), "records") as progress:
        pairs = every_pair(adapters, len(flat))
        scored = score(engine.bank, flat, pairs, engine.max_batch_tokens, progress.update)
    found: dict[int, Tokens] = {}
    for adapter in adapters:
        rows = (scored[adapter, index].numpy() for index in range(len(flat)))
        found[adapter] = {anchor: [next(rows) for _ in own] for anchor, own in records.items()}
    return found


def attack(subject: Subject, attacked: Tokens, base: Tokens) -> dict:
    """Scores of every attack on what was deployed and (blind) on the base alone, for members and non-members."""
    known = {*subject.members, *subject.neither}
    sides = {"member": list(subject.members), "non_member": [anchor for anchor in base if anchor not in known]}
    result: dict = {"user_id": subject.user_id, "index": subject.index, "on_base": subject.adapter is None}
    for key, model in (("scores", attacked), ("blind", base)):
        by_side = {side: membership.record_scores(model, base, anchors) for side, anchors in sides.items()}
        result[key] = {name: {side: by_side[side][name] for side in sides} for name in membership.ATTACKS}
    for side, anchors in sides.items():
        result[f"{side}_ids"] = anchors
        result[f"{side}_num_samples"] = [len(base[anchor]) for anchor in anchors]
        result[f"{side}_loss"] = [-value for value in result["scores"][membership.PUBLISHED_ATTACK][side]]
    return result


def check_records(args: argparse.Namespace, trained: Mapping) -> None:
    """The records attacked have to be the records trained on, so the options that make them have to agree."""
    changed = [key for key in RECORD_OPTIONS if trained[key] != getattr(args, key)]
    if changed:
        lines = [f"  {key}: there {trained[key]!r}, now {getattr(args, key)!r}" for key in changed]
        raise InputError(f"{args.anchor_dir}: the anchors were trained on other records:\n" + "\n".join(lines))


def check_members(subjects: Sequence[Subject], anchors: Sequence[str]) -> None:
    """Every subject needs members among the anchors, and anchors to tell them from."""
    problems = []
    for subject in subjects:
        chosen = [*subject.members, *subject.neither]
        unknown = [name for name in chosen if name not in anchors]
        if unknown:
            problems.append(f"user {subject.user_id}: no results of sharers {', '.join(unknown)} in --anchor_dir")
        elif len(chosen) == len(anchors):
            problems.append(f"user {subject.user_id}: all {len(anchors)} anchors are sharers, there are no non-members")
    if problems:
        raise InputError.many(problems)


def attack_group(engine: Engine, records: Records, base: Tokens, run: Run, group: Sequence[Subject]) -> None:
    """Attack subjects whose adapters are in the bank together."""
    adapters = [subject.adapter for subject in group if subject.adapter is not None]
    scored: dict[int, Tokens] = {}
    if adapters:
        engine.bank.load([load_adapter(adapter) for adapter in adapters])
        scored = logprobs(engine, records, range(len(adapters)))
    tokens = (base if s.adapter is None else scored[adapters.index(s.adapter)] for s in group)
    run.finish_all([attack(subject, own, base) for subject, own in zip(group, tokens, strict=True)])


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    exp_dir = Path(args.exp_dir)
    if args.gate_dir and not Path(args.gate_dir).is_dir():
        raise InputError(f"--gate_dir {args.gate_dir}: no such directory")
    anchors = read_results(args.anchor_dir)
    if not anchors:
        raise InputError(f"{args.anchor_dir}: no anchors' results there; run train_anchor_peft.py first (--anchor_dir)")
    sharers = [
        Subject(a["user_id"], a["index"], adapter_folder(args.anchor_dir, a["user_id"]), [a["user_id"]])
        for a in ([] if args.skip_sharers else anchors)
    ]
    users = deployments(exp_dir, args.n_sim)
    check_members([*users, *sharers], [anchor["user_id"] for anchor in anchors])
    trained = read_settings(args.anchor_dir)["settings"]
    check_records(args, trained)
    settings = {key: value for key, value in cli.settings_of(args).items() if key not in NOT_SETTINGS}
    stage = read_settings(exp_dir)
    settings |= {"attacked": stage["settings"], "anchors": trained}
    attacks = [
        (Run(exp_dir / "mia", "mia", "users", settings), users),
        (Run(exp_dir / "mia" / "sharers", "mia", "sharers", settings), sharers),
    ]
    todo = [(run, cli.open_groups(subjects, args.users_per_batch, run.done)) for run, subjects in attacks]
    if any(groups for _, groups in todo):
        engine = load_engine(args, task_adapter=args.lora_ckpt)
        records = anchor_records(args, anchors, engine)
        base = logprobs(engine, records, [-1])[-1]
        for run, groups in todo:
            for group in share(run, groups, lambda group: [s.user_id for s in group], len):
                attack_group(engine, records, base, run, group)
    by_user, by_sharer = ([read_json(run.result_path(s.user_id)) for s in subjects] for run, subjects in attacks)
    with attacks[0][0].turn("the summary"):
        summary = write_attacks(exp_dir, stage["method"], by_user, by_sharer, args.seed)
    print(attack_table(summary))


if __name__ == "__main__":
    cli.run(main)
