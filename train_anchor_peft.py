"""Stage 3: one LoRA adapter for each anchor user, on the task-adapted base; many are trained together.

Reads   data/<task>/user_anchor_candidate.json, profile-id2text.json, the task adapter, anchor_user_idx.pt
Writes  <output_dir>/users/<anchor>/adapter/      PEFT directory with a card
        <output_dir>/users/<anchor>/result.json   losses, and scores on the own history before and after
        <output_dir>/noise.key                    --enable_dp, --init secret: the secret behind it; never share it
Takes   about 2 minutes on the demo (16 anchors, 2 CPU cores). Resumes by anchor: run the same command again.

    python train_anchor_peft.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --output_dir ./output/movie_tagging/Anchor_PEFT/LoRA

--distill public shares a fresh adapter that learned the answers to public prompts instead (prime/merging/distil.py).

--enable_dp protects every single history item (docs/privacy.md says what that covers). It trains on one record per
item, without records that quote other items, and the card then carries the guarantee, but no scores on the history.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    output_dir: str = opt.task_path("./output/<task_name>/Anchor_PEFT/LoRA", "where the adapters go", neutral=True)
    anchors_per_batch: int = opt.anchors_per_batch()
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group(without=("device_map",), max_batch_tokens=opt.training_tokens())
    prompts: opt.HistorySettings = opt.group(recent_k=0)
    holdout: float = opt.holdout("each anchor's")
    training: opt.TrainingSettings = opt.group(without=("max_step",), lr=2e-5, clip=1.0)
    privacy: opt.PrivacySettings = opt.group()
    init: str = opt.setting(
        "seed",
        "initial A: of the run's seed and the anchor's id, by which anybody finds his part of a merge again; of a "
        "secret key (--noise_key); or shared: one A for all, frozen, so that merges add up at its rank",
        choices=("seed", "secret", "shared"),
    )
    distil: opt.DistilSettings = opt.group()
    train_gen_len: int = opt.train_gen_len()
    anchors: opt.SelectionSettings = opt.group()
    user_idxs: str | None = opt.user_idxs("anchors, counted in the order of the anchor file,")


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

from prime.bank.dp import KEY_FILE, Mechanism, Terms, key_file, terms_of
from prime.bank.secret import KEY_BYTES, load_key, stream
from prime.bank.train import Learner
from prime.checkpoints import plan
from prime.checkpoints.memory import Work
from prime.checkpoints.peft import save_adapter
from prime.engine import Engine, load_engine
from prime.errors import InputError
from prime.merging.answering import greedy_answers, history_scores
from prime.merging.distil import answered, public_records
from prime.merging.sharers import Selection, initial_seed
from prime.runs.inputs import Inputs, Source, digest_of
from prime.runs.progress import counted
from prime.runs.run import Run
from prime.runs.workers import open_groups, share_groups
from prime.seeds import derive_seed
from prime.users.data import BASE_FILE, CANDIDATE_FILE, User, load_users, select, user_cost
from prime.users.holdout import Split, trained_records
from prime.users.identity import user_sources, wording
from prime.users.prompts import Record
from prime.users.tasks import get_task
from prime.users.texts import Texts, load_candidates, load_texts


@dataclass(frozen=True)
class Stage:
    """What all groups of anchors are trained with."""

    settings: Settings
    texts: Texts
    engine: Engine
    run: Run
    terms: Terms | None  # of differential privacy
    order: dict[str, int]  # places of the anchors in the anchor file, by id
    key: bytes | None = None  # that initial A are drawn from; None: from seeds
    public: Sequence[Record] = ()  # what sharers distil on; none: they share what they trained


class Anchor:
    """One anchor in training: the records as texts and as ids, and how they are kept private."""

    def __init__(self, stage: Stage, user: User):
        settings, terms = stage.settings, stage.terms
        split = Split(settings.holdout, settings.seed, settings.prompts.recent_k, quoting=terms is None)
        self.user, self.name, self.held_out = user, f"anchor {user.user_id}", split.told(user)
        self.records: list[Record] = trained_records(stage.texts, user, settings.prompts.recent_k, split)
        if not self.records:
            raise InputError(f"{self.name}: an empty history, nothing to train on")
        self.encoded = stage.engine.encode_records(self.records)
        self.seed = derive_seed("anchor", settings.seed, user.user_id)
        self.initial: int | bytes = initial_seed(settings.init, settings.seed, user.user_id)
        if stage.key:
            self.initial = stream(stage.key, KEY_BYTES, "initial", user.user_id)
        training = settings.training
        self.mechanism: Mechanism | None = None
        if terms:
            steps = training.batch_size, training.epochs
            self.mechanism = terms.mechanism(self.name, self.seed, self.encoded, *steps)
        self.distilled: dict = {}  # what was learned in place of the history
        self.privacy = {"privacy": terms.report(self.mechanism)} if terms and self.mechanism else {}

    def learner(self, place: int) -> Learner:
        return Learner(place, self.name, self.seed, self.encoded, self.mechanism)

    def card(self, task: str, scores: dict) -> dict:
        """What is published with the adapter; scores of a private one would tell of its history without noise."""
        about = {"task": task, "user_id": self.user.user_id, "records": len(self.records)}
        return about | self.held_out | self.distilled | (self.privacy or {"scores_on_history": scores})


def distilled(stage: Stage, anchor: Anchor, place: int) -> Learner:
    """The learner of what an anchor's adapter, in the bank at its place, answers to public prompts."""
    pairs = [(place, index) for index in range(len(stage.public))]
    answers = greedy_answers(stage.engine, stage.texts, stage.public, pairs, stage.settings.train_gen_len)
    learned = answered(stage.public, answers, anchor.records)
    if not learned.records:
        raise InputError(f"{anchor.name}: no answer to a public prompt is left to learn from")
    anchor.distilled = learned.told()
    return Learner(place, anchor.name, derive_seed("distil", anchor.seed), stage.engine.encode_records(learned.records))


def train_group(stage: Stage, group: Sequence[Anchor], learners: Sequence[Learner]) -> list[list[float | None]]:
    """Train fresh adapters in the bank; each learner's losses."""
    training, shared = stage.settings.training, stage.settings.init == "shared"
    seeds = [anchor.initial for anchor in group]
    stage.engine.bank.allocate(seeds, training.lora_r, training.lora_alpha, frozen_a=shared)
    return stage.engine.train(learners, training, "anchors")


def finish_group(stage: Stage, users: Sequence[User]) -> None:
    """Train a group of anchors together, and write the adapters and results that are not there yet."""
    settings, engine, run = stage.settings, stage.engine, stage.run
    group = [Anchor(stage, user) for user in users]
    started = time.perf_counter()
    losses = train_group(stage, group, [anchor.learner(place) for place, anchor in enumerate(group)])
    if stage.public:
        train_group(stage, group, [distilled(stage, anchor, place) for place, anchor in enumerate(group)])
    seconds = round((time.perf_counter() - started) / len(group), 3)
    histories = [anchor.records for anchor in group]
    reports = history_scores(engine, stage.texts, histories, settings.train_gen_len)
    results = []
    for place, (anchor, report) in enumerate(zip(group, reports, strict=True)):
        name = anchor.user.user_id
        if not run.done(name):
            card = anchor.card(settings.data.task_name, report)
            save_adapter(engine.bank.adapter(place), run.user_dir(name) / "adapter", settings.model.adapted_base, card)
        ids = [record.id for record in anchor.records]
        result: dict = {"user_id": name, "index": stage.order[name], "record_ids": ids}
        result |= anchor.held_out | anchor.distilled | {"losses": losses[place], "history": report} | anchor.privacy
        results.append(result | {"seconds": {"train": seconds}})
    run.finish_all(results)


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan."""
    training, longest = settings.training, settings.prompts.max_length
    anchors = settings.anchors_per_batch or plan.PUBLISHED_ANCHORS
    labels = get_task(settings.data.task).history_labels
    answer = plan.answer_tokens(settings.model, labels, settings.train_gen_len)
    return [
        plan.training_work(training, anchors, longest, answer),
        Work("answering", anchors, training.lora_r, longest, answer),
    ]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    data, folder = settings.data, Path(settings.output_dir)
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    selection = Selection.of(settings.anchors, data.task_name, load_candidates(data.folder, texts.task))
    anchors = selection.training_anchors()
    secret = settings.init == "secret"
    terms = terms_of(settings.privacy, folder, opt.recorded(settings), other_use=secret)
    shared = wording(texts.templates, settings.prompts.prompt_path)
    once = (KEY_FILE,) if terms or secret else ()  # with another model, the same noise would be in two releases
    public: list[Record] = []
    if settings.distil.distill:
        path = Path(settings.distil.public_prompts or data.folder / BASE_FILE)
        public = public_records(load_users(path, texts.task), texts, settings.distil.public_records, settings.seed)
        shared["public prompts"] = Source(digest_of([record.input for record in public]), str(path))
    inputs = Inputs(shared, user_sources(data.folder, CANDIDATE_FILE, anchors, texts), once)
    run = cli.open_run(settings, folder, "train_anchor_peft", "anchors", inputs)
    groups = open_groups(select(anchors, settings.user_idxs), settings.anchors_per_batch, run.done)
    if not groups:
        return
    engine = load_engine(settings.model, settings.prompts)
    order = {user.user_id: place for place, user in enumerate(anchors)}
    key = load_key(key_file(settings.privacy, folder)) if secret else None
    stage = Stage(settings, texts, engine, run, terms, order, key, public)
    units = share_groups(run, groups, partial(user_cost, recent_k=settings.prompts.recent_k))
    for users in counted(units, sum(map(len, groups)), "anchors trained"):
        finish_group(stage, users)


if __name__ == "__main__":
    cli.run(main)
