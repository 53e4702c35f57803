"""Stage 4c, baselines that train on test users' own histories, many together: OPPU, and merge-then-adapt.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), profile-id2text.json, the task
        adapter; mta also user_anchor_candidate.json, anchor_selection/<task>/, the sharers' adapters
Writes  <output_dir>/users/<user>/adapter/      the personal adapter (PEFT, with a card)
        <output_dir>/users/<user>/result.json   losses of the steps, predictions of oppu or mta
Takes   2 to 3 minutes on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

oppu: one LoRA per user, trained as an anchor's is (Tan et al., EMNLP 2024, "One PEFT per user").
mta:  the nearest sharers are merged, frozen, and a LoRA of small rank is trained on top (MTA, Li et al., 2025,
      arXiv 2511.20072: merge anchors, then stack an "ultra-low-rank" LoRA). The sharers' mean stands for MTA's fusion
      by similarity, rank 4 for "ultra-low", half of an anchor's 8; the training settings are the anchors'. What is
      deployed is both parts as one adapter, exactly: their factors side by side.

A user without history has nothing to train on: oppu leaves the base to him, mta the merge.

    python train_user_peft.py --method oppu --task_name movie_tagging \\
        --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt --output_dir ./output/movie_tagging/OPPU
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    method: str = opt.setting(help="see above", choices=("oppu", "mta"))
    output_dir: str | None = opt.setting(None, "default ./output/<task_name>/OPPU or Merge-then-adapt", neutral=True)
    anchor_dir: str = opt.task_path("./output/<task_name>/Anchor_PEFT/LoRA", "mta: sharers' adapters")
    n_sim: int = opt.setting(2, "mta: most similar sharers to merge; 0 = all", parse=opt.natural)
    users_per_batch: int = opt.users_per_batch()
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group(without=("device_map",), max_batch_tokens=opt.training_tokens())
    prompts: opt.HistorySettings = opt.group()
    holdout: float = opt.holdout("each user's")
    training: opt.TrainingSettings = opt.group(
        without=("max_step",),
        lr=2e-5,
        clip=1.0,
        lora_r=opt.setting(None, "rank of the adapter; default 8 for oppu, 4 for mta", parse=opt.positive),
        lora_alpha=opt.setting(None, "scale of the adapter times its rank; default the rank", parse=opt.positive),
    )
    decoding: opt.DecodingSettings = opt.group()
    anchors: opt.SelectionSettings = opt.group()
    user_idxs: str | None = opt.user_idxs("test users")
    deploy: opt.DeploySettings = opt.group(without=("export_full",))


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

import torch

from prime.bank.decode import Progress
from prime.bank.lora import Adapter, merge
from prime.bank.train import Learner
from prime.checkpoints import plan
from prime.checkpoints.memory import Work
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.engine import Engine, load_engine, predict
from prime.errors import tell
from prime.merging.deploy import NOT_IN_CARD, PERSONAL, in_form
from prime.merging.sharers import Pool, Selection, load_pool, merging_inputs
from prime.report.methods import choices
from prime.runs.progress import counted, for_each
from prime.runs.run import Run
from prime.runs.workers import open_groups, share_groups
from prime.seeds import derive_seed
from prime.users.data import User, select, user_cost
from prime.users.holdout import Split, trained_records
from prime.users.tasks import get_task
from prime.users.texts import Texts, load_candidates, load_test_users, load_texts

METHODS = choices("train_user_peft")
RANKS = {"oppu": 8, "mta": 4}


@dataclass(frozen=True)
class Stage:
    """What all groups of users are trained with."""

    settings: Settings
    texts: Texts
    engine: Engine
    run: Run
    pool: Pool | None  # of sharers; None: oppu merges nobody
    order: dict[str, int]  # places of the test users in their file, by id

    def split(self) -> Split:
        settings = self.settings
        return Split(settings.holdout, settings.seed, settings.prompts.recent_k)


def learner_of(stage: Stage, user: User, place: int) -> Learner:
    settings = stage.settings
    records = trained_records(stage.texts, user, settings.prompts.recent_k, stage.split())
    if not records:
        tell(f"user {user.user_id}: an empty history, nothing to train on")
    seed = derive_seed(settings.method, settings.seed, user.user_id)
    return Learner(place, f"user {user.user_id}", seed, stage.engine.encode_records(records))


def merged_sharers(pool: Pool, index: int) -> Adapter:
    """The mean update of a test user's sharers."""
    adapters = pool.adapters(index)
    return merge(adapters, torch.full((len(adapters),), 1 / len(adapters)), "delta")


def choice_of(pool: Pool | None, index: int) -> dict:
    """What a user deploys, and whose adapters are in it."""
    if pool is None:
        return {"deployed": "own"}
    sharers = [sharer.user_id for sharer in pool.sharers(index)]
    return {"deployed": "merge", "sharers": sharers, "weights": [1 / len(sharers)] * len(sharers), "rule": "delta"}


def predict_user(stage: Stage, results: Sequence[dict], place: int, user: User, progress: Progress) -> None:
    """Predict with the adapter at `place` of the bank; the result file comes last."""
    started = time.perf_counter()
    settings, methods = stage.settings, {stage.settings.method: place}
    predictions = predict(stage.engine, stage.texts, user, methods, settings.decoding, settings.seed, progress)
    seconds = results[place]["seconds"] | {"predict": round(time.perf_counter() - started, 3)}
    stage.run.finish(user.user_id, results[place] | {"predictions": predictions, "seconds": seconds})


def learn_group(stage: Stage, group: Sequence[User]) -> list[dict]:
    """Train a group of test users together; what will be in their results, while their adapters are on disk."""
    started = time.perf_counter()
    settings, engine, run, pool = stage.settings, stage.engine, stage.run, stage.pool
    learners = [learner_of(stage, user, place) for place, user in enumerate(group)]
    frozen = [merged_sharers(pool, stage.order[user.user_id]) for user in group] if pool else []
    seeds, training = [learner.seed for learner in learners], settings.training
    engine.bank.allocate(seeds, training.lora_r, training.lora_alpha, frozen)
    losses = engine.train(learners, training, "users")
    seconds = {"train": round((time.perf_counter() - started) / len(group), 3)}
    results = []
    for place, user in enumerate(group):
        index = stage.order[user.user_id]
        ids = [record.id for record in learners[place].records]
        about = {"user_id": user.user_id, **choice_of(pool, index), **stage.split().told(user)}
        if not run.done(user.user_id):
            card: dict = {"task": settings.data.task_name, "method": settings.method}
            card |= {"task_adapter": settings.model.lora_ckpt}
            folder = run.user_dir(user.user_id) / PERSONAL
            card |= {key: value for key, value in about.items() if key not in NOT_IN_CARD} | {"records": len(ids)}
            personal = in_form(engine.bank.adapter(place), settings.deploy.deploy_form)
            save_adapter(personal, folder, settings.model.adapted_base, card)
        results.append(about | {"index": index, "record_ids": ids, "losses": losses[place], "seconds": seconds})
    return results


def finish_group(stage: Stage, group: Sequence[User]) -> None:
    """Train a group of test users, or go on where that is done, and predict for those who are not finished."""
    run = stage.run
    journal = run.journal([user.user_id for user in group])
    results = journal.call("trained", partial(learn_group, stage, group))
    stage.engine.bank.load([load_adapter(run.user_dir(user.user_id) / PERSONAL) for user in group])
    todo = [(place, user) for place, user in enumerate(group) if not run.done(user.user_id)]
    for_each(todo, len(todo), partial(predict_user, stage, results))
    journal.drop()


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan."""
    training, longest = settings.training, settings.prompts.max_length
    users = settings.users_per_batch or plan.PUBLISHED_ANCHORS
    answer = plan.answer_tokens(settings.model, get_task(settings.data.task).labels, settings.decoding.max_gen_len)
    sharers = (settings.n_sim or plan.PUBLISHED_ANCHORS) if settings.method == "mta" else 0
    merged_rank = sharers * plan.rank_of(settings.anchor_dir)
    return [
        replace(plan.training_work(training, users, longest, answer), other_ranks=users * merged_rank),
        Work("answering", users, training.lora_r + merged_rank, longest, answer),
    ]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    rank = settings.training.lora_r or RANKS[settings.method]
    training = replace(settings.training, lora_r=rank, lora_alpha=settings.training.lora_alpha or rank)
    settings = replace(settings, training=training)
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    data = settings.data
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    users = load_test_users(data.folder, texts.task)
    pool = None
    if settings.method == "mta":
        selection = Selection.of(settings.anchors, data.task_name, load_candidates(data.folder, texts.task))
        pool = load_pool(selection, settings.model, settings.anchor_dir, len(users), settings.n_sim)
    folder = settings.output_dir or f"./output/{data.task_name}/{METHODS[settings.method].folder}"
    inputs = merging_inputs(data.folder, settings.prompts.prompt_path, users, texts, pool)
    run = cli.open_run(settings, Path(folder), "train_user_peft", settings.method, inputs)
    groups = open_groups(select(users, settings.user_idxs), settings.users_per_batch, run.done)
    if not groups:
        return
    engine = load_engine(settings.model, settings.prompts, settings.decoding.max_gen_len)
    order = {user.user_id: index for index, user in enumerate(users)}
    stage = Stage(settings, texts, engine, run, pool, order)
    units = share_groups(run, groups, partial(user_cost, recent_k=settings.prompts.recent_k))
    for users_of_group in counted(units, sum(map(len, groups)), "users trained"):
        finish_group(stage, users_of_group)


if __name__ == "__main__":
    cli.run(main)
