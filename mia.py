"""Stage 5, membership inference: does a deployed adapter tell whose records went into it?

Reads   --exp_dir of stage 4 (users/*/result.json and adapter/), --anchor_dir of stage 3, --lora_ckpt of stage 1,
        <data_dir>/user_anchor_candidate.json, profile-id2text.json
Writes  <exp_dir>/mia/users/, <exp_dir>/mia/sharers/users/   one result per test user and per sharer
        <exp_dir>/mia_results.json   losses of member and non-member records per test user, the published shape
        <exp_dir>/mia_summary.json   every attack beside its blind baseline (on the base); AUROCs also in users' cards
        <exp_dir>/mia_roc.json, mia_roc.png, mia_roc.svg   ROC curves
Takes   one pass over all anchors' records per test user and per anchor: minutes on the demo (2 CPU cores), hours
        with a 7B model on one GPU; --max_records shortens it. Resumes by user: run the same command again.

Attacked is what was deployed: the merged adapter (with what merge-then-adapt trained on top), or the base where the
base won. Every sharer's own adapter is attacked too, as it was before any merge. Members and non-members come in sets:

published   records of the sharers merged for a test user, against those of all other anchors
controlled  trained records of these sharers, against records of the same sharers that train_anchor_peft.py --holdout
            left out: what is told apart is memory, not that sharers resemble the user
user        sharers against all other anchors, by the mean score of their records

OPPU merges nobody's adapter: its members are each user's own records, its non-members the other test users', and
train_user_peft.py --holdout gives the controlled set; --anchor_dir is not read.

    python mia.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA --n_sim 3 \\
        --exp_dir ./output/movie_tagging/LoRA-Composition-evo
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prime import cli
from prime.attack.scoring import ATTACKS
from prime.attack.subjects import (
    Owners,
    References,
    Scorer,
    Subject,
    attack_group,
    check_members,
    deployments,
    own_subjects,
    owned_records,
    read_owners,
    trained_alone,
    with_members,
)
from prime.checkpoints import plan
from prime.engine import load_engine
from prime.errors import InputError
from prime.merging.deploy import add_attacks
from prime.report.leakage import attack_table, write_attacks
from prime.runs.files import read_json
from prime.runs.run import Run, read_settings
from prime.runs.workers import share

# No attack depends on the gates or on what else is attacked, and the results lie in the experiment's own folder.
NOT_SETTINGS = ("gate_dir", "exp_dir", "skip_sharers")

Groups = Sequence[Sequence[Subject]]  # whose adapters are in the bank together


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--exp_dir", required=True, help="output of stage 4, whose adapters are attacked")
    parser.add_argument("--anchor_dir", required=True, help="output of stage 3, the anchors' adapters")
    parser.add_argument("--gate_dir", help="Per-Pcs' gates: has to exist if given; the attack itself reads none")
    parser.add_argument("--n_sim", type=cli.natural, default=0, help="nearest merged sharers that are members; 0 = all")
    parser.add_argument(
        "--max_records", type=cli.natural, default=0, help="records of an anchor, the last ones; 0 = all (published)"
    )
    parser.add_argument(
        "--references", type=cli.natural, default=4, help="anchors' adapters that RMIA compares with; 0 = no RMIA"
    )
    parser.add_argument("--skip_sharers", action="store_true", help="do not attack the sharers' own adapters once more")
    parser.add_argument("--users_per_batch", type=cli.positive, default=8, help="adapters in the bank together")
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_device_map(parser)
    cli.add_history(parser)
    return parser


def attack_open(args: argparse.Namespace, owners: Owners, todo: Sequence[tuple[Run, Groups]]) -> None:
    """Attack the groups of subjects that hold one without a result."""
    texts = cli.load_texts(args)
    load: Callable = cli.load_test_users if owners.folder == Path(args.exp_dir) else cli.load_candidates
    engine = load_engine(args, task_adapter=args.lora_ckpt)
    records = owned_records(args, owners, load(args, texts.task), texts, engine)
    references = References.draw(owners.ids, args.references, args.seed)
    # In the references' order, so that with --skip_sharers few other owners are scored beside them.
    scorer = Scorer(engine, records, args.users_per_batch, [owners.adapter(name) for name in references.order])
    for run, groups in todo:
        for group in share(run, groups, lambda group: [s.user_id for s in group], len):
            started = time.perf_counter()
            results = attack_group(scorer, owners, references, group)
            seconds = {"attack": round((time.perf_counter() - started) / len(group), 3)}
            run.finish_all([result | {"seconds": seconds} for result in results])


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.plan:
        return plan.show("mia", args)
    exp_dir = Path(args.exp_dir)
    if args.gate_dir and not Path(args.gate_dir).is_dir():
        raise InputError(f"--gate_dir {args.gate_dir}: no such directory")
    alone = trained_alone(exp_dir)
    owners = read_owners(exp_dir if alone else args.anchor_dir, args)
    users = own_subjects(owners) if alone else deployments(exp_dir, args.n_sim)
    sharers = [] if alone or args.skip_sharers else own_subjects(owners)
    users = with_members(users, owners)
    check_members([*users, *sharers], owners.ids)
    stage = read_settings(exp_dir)
    settings = {key: value for key, value in cli.settings_of(args).items() if key not in NOT_SETTINGS}
    settings |= {"attacked": stage["settings"], "anchors": dict(owners.settings), "attacks": list(ATTACKS)}
    attacks = [
        (Run(exp_dir / "mia", "mia", "users", settings, args.parser.get_default), users),
        (Run(exp_dir / "mia" / "sharers", "mia", "sharers", settings, args.parser.get_default), sharers),
    ]
    todo = [(run, cli.open_groups(subjects, args.users_per_batch, run.done)) for run, subjects in attacks]
    if any(groups for _, groups in todo):
        attack_open(args, owners, todo)
    by_user, by_sharer = ([read_json(run.result_path(s.user_id)) for s in subjects] for run, subjects in attacks)
    with attacks[0][0].turn("the summary"):
        summary = write_attacks(exp_dir, stage["method"], by_user, by_sharer, args.seed)
        add_attacks(exp_dir, summary["per_user"])
    print(attack_table(summary))


if __name__ == "__main__":
    cli.run(main)
