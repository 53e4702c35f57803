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
white-box   the controlled set, attacked by what the deployed *file* falls apart into (prime/attack/pieces.py)

OPPU merges nobody's adapter: its members are each user's own records, its non-members the other test users', and
train_user_peft.py --holdout gives the controlled set; --anchor_dir is not read.

    python mia.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA --n_sim 3 \\
        --exp_dir ./output/movie_tagging/LoRA-Composition-evo

`python mia.py --adapter A --members FILE --non_members FILE --help`: an audit of any adapter, without a pipeline.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prime import settings as opt
from prime.attack import audit_settings
from prime.attack.audit_settings import AuditSettings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """No attack depends on the gates or on what else is attacked, and the results lie in the experiment's folder."""

    data: opt.DataSettings = opt.group()
    exp_dir: str = opt.setting(help="output of stage 4, whose adapters are attacked", neutral=True)
    anchor_dir: str = opt.setting(help="output of stage 3, the anchors' adapters")
    gate_dir: str | None = opt.setting(
        None, "Per-Pcs' gates: has to exist if given; the attack itself reads none", neutral=True
    )
    n_sim: int = opt.setting(0, "nearest merged sharers that are members; 0 = all", parse=opt.natural)
    max_records: int = opt.setting(0, "records of an anchor, the last ones; 0 = all (published)", parse=opt.natural)
    references: int = opt.setting(4, "anchors' adapters that RMIA compares with; 0 = no RMIA", parse=opt.natural)
    skip_sharers: bool = opt.setting(False, "do not attack the sharers' own adapters once more", neutral=True)
    users_per_batch: int = opt.setting(8, "adapters in the bank together", parse=opt.positive, neutral=True)
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group()
    prompts: opt.HistorySettings = opt.group(
        recent_k=opt.setting(opt.RECENT_K, "items of an anchor that are attacked, the last; 0 = all", parse=opt.natural)
    )
    anchors: opt.SelectionSettings = opt.group(
        anchor_idx_path=opt.setting(None, "whose adapters an imported --anchor_dir holds", neutral=True),
        anchor_selection_dir=opt.setting(None, "the same: outputs of stage 2", neutral=True),
    )


def asked(words: Sequence[str]) -> tuple[type, str | None]:
    """Settings and help of a command line: an audit's where it names an option that only an audit has."""
    of_audit = {"--adapter", "--members", "--non_members"} & {word.partition("=")[0] for word in words}
    return (AuditSettings, audit_settings.__doc__) if of_audit else (Settings, __doc__)


if __name__ == "__main__":
    cli.check_options(*asked(sys.argv[1:]))  # --help and wrong options end here, before the libraries load

from prime.attack.evidence import References, Scorer, attack_group, attack_of, owned_records
from prime.attack.pieces import KINDS
from prime.attack.scoring import ATTACKS
from prime.attack.subjects import (
    Owners,
    Subject,
    check_members,
    deployments,
    imported_owners,
    own_subjects,
    read_owners,
    trained_alone,
    with_members,
)
from prime.attack.white_box import Files, taken_apart
from prime.checkpoints import plan
from prime.checkpoints.memory import Work
from prime.engine import load_engine
from prime.errors import InputError
from prime.merging.deploy import add_attacks
from prime.merging.sharers import Selection
from prime.report.audit import audited
from prime.report.leakage import attack_table, write_attacks
from prime.runs.files import read_json
from prime.runs.inputs import Inputs
from prime.runs.progress import counted
from prime.runs.run import Run, read_settings
from prime.runs.workers import open_groups, share_groups
from prime.users.data import CANDIDATE_FILE, TEST_FILE, User
from prime.users.identity import all_of, wording
from prime.users.tasks import get_task
from prime.users.texts import Texts, load_candidates, load_test_users, load_texts

Groups = Sequence[Sequence[Subject]]  # whose adapters are in the bank together


@dataclass(frozen=True)
class Stage:
    """Whose records are attacked, and with whose adapters as references."""

    settings: Settings
    owners: Owners
    users: Sequence[User]  # who the owners may be
    texts: Texts
    references: References
    files: Files

    def inputs(self, subjects: Sequence[Subject]) -> Inputs:
        """What the results of these subjects depend on."""
        data, owners = self.settings.data, set(self.owners.ids)
        file = data.folder / (TEST_FILE if self.owners.are_test_users else CANDIDATE_FILE)
        attacked = [user for user in self.users if user.user_id in owners]
        shared = wording(self.texts.templates, self.settings.prompts.prompt_path)
        shared |= all_of("attacked histories", file, attacked, self.texts)
        by_user = {}
        for subject in subjects:
            others = {name: self.owners.adapter(name) for name in self.references.pool(subject)}
            apart = self.files.sources(subject) if subject in self.files.subjects else {}
            by_user[subject.user_id] = subject.sources(others | apart)
        return Inputs(shared, by_user)


def attack_open(stage: Stage, todo: Sequence[tuple[Run, Groups]]) -> None:
    """Attack the groups of subjects that hold one without a result."""
    settings, owners, references, prompts = stage.settings, stage.owners, stage.references, stage.settings.prompts
    engine = load_engine(settings.model, prompts)
    limits = prompts.recent_k, settings.max_records
    records = owned_records(owners, stage.users, stage.texts, engine.encoder, *limits)
    # In the references' order, so that with --skip_sharers few other owners are scored beside them.
    adapters = [owners.adapter(name) for name in references.order]
    scorer = Scorer(engine, records, settings.users_per_batch, adapters, settings.model.llama_model_path)
    for run, groups in todo:
        for subjects in counted(share_groups(run, groups, lambda _: 1), sum(map(len, groups)), "adapters attacked"):
            started = time.perf_counter()
            attack = attack_of(scorer, owners, references, subjects)
            results = attack_group(scorer, attack, subjects)
            for result, subject in zip(results, subjects, strict=True):
                if subject in stage.files.subjects:
                    result["white_box"] = taken_apart(scorer, attack, stage.files, subject, result["scores"])
            seconds = {"attack": round((time.perf_counter() - started) / len(subjects), 3)}
            run.finish_all([result | {"seconds": seconds} for result in results])


def owners_of(settings: Settings, alone: bool, everybody: Sequence[User]) -> Owners:
    """Whose records are attacked: the anchors, or the users of a method that trained everybody alone."""
    folder = Path(settings.exp_dir if alone else settings.anchor_dir)
    owners = read_owners(folder, opt.recorded(settings), are_test_users=alone)
    if owners:
        return owners
    return imported_owners(folder, Selection.of(settings.anchors, settings.data.task_name, everybody).anchors())


def results_of(run: Run, subjects: Sequence[Subject]) -> list[dict]:
    return [read_json(run.result_path(subject.user_id)) for subject in subjects]


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan."""
    labels = get_task(settings.data.task).history_labels
    answer = plan.answer_tokens(settings.model, labels, plan.UNLABELLED)
    adapters, rank = settings.users_per_batch, plan.rank_of(settings.exp_dir)
    return [Work("scoring", adapters, rank, settings.prompts.max_length, answer, other_ranks=adapters * rank)]


def main(argv: list[str] | None = None) -> None:
    settings: Settings | AuditSettings = cli.parse(*asked(sys.argv[1:] if argv is None else argv), argv)
    if isinstance(settings, AuditSettings):
        return print(audited(settings))
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    data, exp_dir = settings.data, Path(settings.exp_dir)
    if settings.gate_dir and not Path(settings.gate_dir).is_dir():
        raise InputError(f"--gate_dir {settings.gate_dir}: no such directory")
    alone = trained_alone(exp_dir)
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    everybody = (load_test_users if alone else load_candidates)(data.folder, texts.task)
    owners = owners_of(settings, alone, everybody)
    users = own_subjects(owners) if alone else deployments(exp_dir, settings.n_sim)
    sharers = [] if alone or settings.skip_sharers else own_subjects(owners)
    users = with_members(users, owners)
    check_members([*users, *sharers], owners.ids)
    references = References.draw(owners.ids, settings.references, settings.seed)
    files = Files(owners, [] if alone else users, settings.model.llama_model_path)
    stage = Stage(settings, owners, everybody, texts, references, files)
    attacked = read_settings(exp_dir)
    about = {"attacked": attacked["settings"], "anchors": dict(owners.settings), "attacks": [*ATTACKS, *KINDS]}
    of_users = cli.open_run(settings, exp_dir / "mia", "mia", "users", stage.inputs(users), **about)
    of_sharers = cli.open_run(settings, exp_dir / "mia" / "sharers", "mia", "sharers", stage.inputs(sharers), **about)
    todo = []
    for run, subjects in ((of_users, users), (of_sharers, sharers)):
        todo.append((run, open_groups(subjects, settings.users_per_batch, run.done)))
    if any(groups for _, groups in todo):
        attack_open(stage, todo)
    by_user, by_sharer = results_of(of_users, users), results_of(of_sharers, sharers)
    with of_users.turn("the summary"):
        summary = write_attacks(exp_dir, attacked["method"], by_user, by_sharer, settings.seed)
        add_attacks(exp_dir, summary["per_user"])
    print(attack_table(summary))


if __name__ == "__main__":
    cli.run(main)
