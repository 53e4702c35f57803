"""Stage 3b, for Per-Pcs only: one gate vector per LoRA module and anchor, trained with the anchor's LoRA frozen.

Reads   data/<task>/user_anchor_candidate.json, profile-id2text.json, the task adapter, anchor_user_idx.pt,
        the anchors' adapters (--anchor_path)
Writes  <output_dir>/users/<anchor>/gate.safetensors   module name -> gate [in]
        <output_dir>/users/<anchor>/result.json        losses of the steps
        <output_dir>/noise.key                         --enable_dp only: the secret behind the noise; never share it
Takes   1 to 2 minutes on the demo (16 anchors, 2 CPU cores). Resumes by anchor: run the same command again.

The input of each factor pair is scaled by sigmoid(<x, g>), g starts at 0 (Per-Pcs, Tan et al., EMNLP 2024). Here a
gate sees --epochs passes over the history, without what the adapters held out, cut at --max_step, under a cosine over
just these steps. Published code repeats the history until its step limit, with a cosine over the epochs that turns
back up behind the last of them.

    python train_anchor_gate.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_path ./output/movie_tagging/Anchor_PEFT/LoRA --output_dir ./output/movie_tagging/Anchor_PEFT/gate

--enable_dp protects every single history item, as in train_anchor_peft.py. A gate comes on top of an adapter trained
on the same items: result.json also tells the budget of both together, or that the adapter was not trained privately.
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
    output_dir: str = opt.task_path("./output/<task_name>/Anchor_PEFT/gate", "where the gates go", neutral=True)
    anchor_path: str = opt.task_path("./output/<task_name>/Anchor_PEFT/LoRA", "anchors' adapters")
    anchors_per_batch: int = opt.anchors_per_batch()
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group(without=("device_map",), max_batch_tokens=opt.training_tokens())
    prompts: opt.HistorySettings = opt.group(recent_k=0)
    training: opt.TrainingSettings = opt.group(
        without=("lora_r", "lora_alpha"),
        max_step=opt.setting(50, "steps of a gate at most; 0 = all of --epochs", parse=opt.natural),
        lr=2e-5,
        weight_decay=0.0,
        clip=opt.setting(0.3, "norm at most of a gate's gradient", parse=opt.non_negative),
        batch_size=opt.setting(6, "records of one step of a gate", parse=opt.positive),
        epochs=opt.setting(3, "passes over the records at most", parse=opt.positive, published=50),
        lora_dropout=opt.setting(0.05, "dropout behind the gate", parse=opt.fraction),
    )
    privacy: opt.PrivacySettings = opt.group()
    anchors: opt.SelectionSettings = opt.group()
    user_idxs: str | None = opt.user_idxs("anchors, counted in the order of the anchor file,")


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

from prime.bank.dp import KEY_FILE, Terms, terms_of
from prime.bank.train import Learner
from prime.checkpoints import plan
from prime.checkpoints.identity import adapter_source
from prime.checkpoints.memory import Work
from prime.checkpoints.published import open_adapter
from prime.engine import Engine, load_engine
from prime.errors import InputError, tell
from prime.merging.gates import Gates, gate_file, save_gate
from prime.merging.sharers import Selection, adapter_folder
from prime.runs.files import read_json
from prime.runs.inputs import Inputs
from prime.runs.progress import counted
from prime.runs.run import Run
from prime.runs.workers import open_groups, share_groups
from prime.seeds import derive_seed
from prime.users.data import CANDIDATE_FILE, User, select, user_cost
from prime.users.holdout import trained_records, trained_split
from prime.users.identity import user_sources, wording
from prime.users.tasks import get_task
from prime.users.texts import Texts, load_candidates, load_texts


@dataclass(frozen=True)
class Stage:
    """What all groups of gates are trained with."""

    settings: Settings
    texts: Texts
    engine: Engine
    run: Run
    terms: Terms | None  # of differential privacy
    order: dict[str, int]  # places of the anchors in the anchor file, by id


def learner_of(stage: Stage, anchor: User, place: int) -> Learner:
    settings, training = stage.settings, stage.settings.training
    name, seed = f"anchor {anchor.user_id}", derive_seed("gate", settings.seed, anchor.user_id)
    split = trained_split(settings.anchor_path)._replace(quoting=stage.terms is None)
    records = trained_records(stage.texts, anchor, settings.prompts.recent_k, split)
    if not records:
        raise InputError(f"{name}: an empty history, nothing to train on")
    encoded = stage.engine.encode_records(records)
    if stage.terms is None:
        return Learner(place, name, seed, encoded)
    steps = training.batch_size, training.epochs, training.max_step
    return Learner(place, name, seed, encoded, stage.terms.mechanism(name, seed, encoded, *steps))


def privacy_of(stage: Stage, learner: Learner, anchor: User) -> dict:
    """The gate's guarantee, and that of the gate and the adapter it was trained on together."""
    terms = stage.terms
    if terms is None or learner.mechanism is None:
        return {}
    path = adapter_folder(stage.settings.anchor_path, anchor.user_id).parent / "result.json"
    adapter = read_json(path).get("privacy") if path.exists() else None
    if adapter is None:
        tell(f"{learner.name}: its adapter is not private (--enable_dp); epsilon is the gate's alone")
    return {"privacy": terms.report(learner.mechanism) | terms.together(learner.mechanism, adapter)}


def finish_group(stage: Stage, group: Sequence[User]) -> None:
    """Train the gates of a group of anchors together and write those that are not there yet."""
    settings, engine, run = stage.settings, stage.engine, stage.run
    started = time.perf_counter()
    folders = [adapter_folder(settings.anchor_path, anchor.user_id) for anchor in group]
    model = settings.model
    engine.bank.load([open_adapter(folder, model.llama_model_path, model.adapted_base) for folder in folders])
    gates = Gates.zeros(engine.bank)
    learners = [learner_of(stage, anchor, place) for place, anchor in enumerate(group)]
    losses = engine.train(learners, settings.training, "gates", gates.stacks, gates.scaler)
    seconds = round((time.perf_counter() - started) / len(group), 3)
    results = []
    for anchor, learner in zip(group, learners, strict=True):
        name, place = anchor.user_id, learner.slot
        if not run.done(name):
            save_gate(gates.gate(place), gate_file(run.root, name))
        ids = [record.id for record in learner.records]
        result: dict = {"user_id": name, "index": stage.order[name], "record_ids": ids}
        result |= {"losses": losses[place]} | privacy_of(stage, learner, anchor)
        results.append(result | {"seconds": {"train": seconds}})
    run.finish_all(results)


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan; a gate is counted as an adapter in training, though it is smaller."""
    training = replace(settings.training, lora_r=plan.rank_of(settings.anchor_path))
    anchors = settings.anchors_per_batch or plan.PUBLISHED_ANCHORS
    labels = get_task(settings.data.task).history_labels
    answer = plan.answer_tokens(settings.model, labels, plan.UNLABELLED)
    return [plan.training_work(training, anchors, settings.prompts.max_length, answer)]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    data, folder = settings.data, Path(settings.output_dir)
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    selection = Selection.of(settings.anchors, data.task_name, load_candidates(data.folder, texts.task))
    anchors = selection.training_anchors()
    terms = terms_of(settings.privacy, folder, opt.recorded(settings))
    by_user = user_sources(data.folder, CANDIDATE_FILE, anchors, texts)
    for name, sources in by_user.items():
        sources |= adapter_source("adapter", adapter_folder(settings.anchor_path, name))
    once = (KEY_FILE,) if terms else ()  # with another model, the same noise would be in two releases
    inputs = Inputs(wording(texts.templates, settings.prompts.prompt_path), by_user, once)
    run = cli.open_run(settings, folder, "train_anchor_gate", "gates", inputs)
    groups = open_groups(select(anchors, settings.user_idxs), settings.anchors_per_batch, run.done)
    if not groups:
        return
    engine = load_engine(settings.model, settings.prompts)
    stage = Stage(settings, texts, engine, run, terms, {user.user_id: place for place, user in enumerate(anchors)})
    units = share_groups(run, groups, partial(user_cost, recent_k=settings.prompts.recent_k))
    for users in counted(units, sum(map(len, groups)), "anchors trained"):
        finish_group(stage, users)


if __name__ == "__main__":
    cli.run(main)
