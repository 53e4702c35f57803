"""Stage 4b, Per-Pcs (Tan et al., EMNLP 2024): compose a personal adapter out of the sharers' pieces by their gates.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), user_anchor_candidate.json,
        anchor_selection/<task>/, the task adapter, the sharers' adapters (--anchor_dir) and gates (--gate_dir)
Writes  <output_dir>/users/<user>/composition.jsonl   a line per module: the weights of its sharers
        <output_dir>/users/<user>/adapter/            the composed adapter (PEFT, with a card)
        <output_dir>/users/<user>/adapter_full/       --export_full: with the task adapter in it, for the untouched base
        <output_dir>/users/<user>/result.json         weights, scores on the history, predictions of per_pcs
Takes   1 to 2 minutes on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

Each batch of history records walks through the model; every module takes the --topk sharers whose gates its input
resembles most, before it computes (`merging/gates.py`). What the batches composed is averaged. Where the paper
says no more, this follows the published code: a module's input is read where target tokens are predicted, scores are
averaged by record and then over the batch, gates select but do not scale the composed pieces. It departs in three:
sharers who do not share (--shared_ratio) are drawn once per run by its seed, not anew per module; equal scores go to
the more similar sharer; the order of records is drawn by the user's seed. --n_sim is PriME's addition.

    python lora_composition.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --gate_dir ./output/movie_tagging/Anchor_PEFT/gate --anchor_dir ./output/movie_tagging/Anchor_PEFT/LoRA \\
        --n_sim 3 --topk 3 --recent_k 2000 --shared_ratio 1 --agg_temperature 1 \\
        --output_dir ./output/movie_tagging/LoRA-Composition
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class CompositionSettings:
    n_sim: int = opt.setting(0, "most similar sharers to choose from; 0 = all", parse=opt.natural)
    topk: int = opt.setting(3, "sharers that a module is composed of", parse=opt.positive)
    agg_temperature: float = opt.setting(1.0, "of the softmax over scores; 0 = the best", parse=opt.non_negative)
    shared_ratio: float = opt.setting(1.0, "part of the anchors that share", parse=opt.fraction)
    batch_size: int = opt.setting(16, "history records that compose together", parse=opt.positive)
    train_gen_len: int = opt.train_gen_len()


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    output_dir: str = opt.task_path("./output/<task_name>/LoRA-Composition", "where the results go", neutral=True)
    anchor_dir: str = opt.task_path("./output/<task_name>/Anchor_PEFT/LoRA", "sharers' adapters")
    gate_dir: str = opt.task_path("./output/<task_name>/Anchor_PEFT/gate", "sharers' gates")
    composition: CompositionSettings = opt.group()
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group()
    prompts: opt.HistorySettings = opt.group(recent_k=2000)
    decoding: opt.DecodingSettings = opt.group()
    anchors: opt.SelectionSettings = opt.group()
    user_idxs: str | None = opt.user_idxs("test users")
    deploy: opt.DeploySettings = opt.group()


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

import torch

from prime.bank.batching import every_pair
from prime.bank.decode import Progress
from prime.bank.sampling import Sampler
from prime.checkpoints import plan
from prime.checkpoints.memory import Work
from prime.engine import Engine, load_engine, predict
from prime.errors import InputError
from prime.merging import gates
from prime.merging.deploy import export_full, in_form, save_personal
from prime.merging.objective import Objective, Trial
from prime.merging.sharers import Pool, Selection, load_pool, merging_inputs
from prime.runs.files import write_text
from prime.runs.progress import for_each
from prime.runs.run import Run
from prime.runs.workers import open_users, share_users
from prime.seeds import derive_seed
from prime.users.data import User, select, select_indices, user_cost
from prime.users.prompts import Record, history_records
from prime.users.tasks import get_task
from prime.users.texts import Texts, load_candidates, load_test_users, load_texts


@dataclass(frozen=True)
class Stage:
    """What all users are worked on with."""

    settings: Settings
    texts: Texts
    engine: Engine
    run: Run
    pool: Pool


def load_shared(settings: Settings, candidates: Sequence[User], n_test: int) -> Pool:
    """The anchors that share, and for each test user the n_sim nearest of them."""
    composition = settings.composition
    selection = Selection.of(settings.anchors, settings.data.task_name, candidates)
    sharing = sorted(gates.sharing_places(len(selection.places()), composition.shared_ratio, settings.seed))
    size = composition.n_sim or len(sharing)
    if not composition.topk <= size <= len(sharing):
        given = f"--topk {composition.topk}, --n_sim {composition.n_sim}"
        raise InputError(f"{given}: topk <= n_sim <= {len(sharing)}, the number of sharers, is needed")
    return load_pool(selection, settings.model, settings.anchor_dir, n_test, composition.n_sim, sharing)


def compose_user(stage: Stage, user: User, records: Sequence[Record], sharers: Sequence[User]) -> gates.Weights:
    """Compose out of the sharers in the bank; the result is then adapter 0 of the bank."""
    settings, engine, composition = stage.settings, stage.engine, stage.settings.composition
    widths = gates.module_widths(engine.bank)
    files = [gates.gate_path(settings.gate_dir, sharer.user_id) for sharer in sharers]
    stacked = gates.Gates(engine.bank, [gates.load_gate(file, widths) for file in files])
    seed = derive_seed("compose", settings.seed, user.user_id)
    batches = gates.history_batches(engine.encode_records(records), composition.batch_size, seed)
    return gates.compose(engine.bank, stacked, batches, composition.topk, composition.agg_temperature)


def measure(stage: Stage, user: User, records: Sequence[Record], n: int) -> Trial:
    """Utility on the history and similarity to the n sharers, as PriME measures them; the user's adapter is the nth."""
    settings, engine, task = stage.settings, stage.engine, stage.texts.task
    prompts = [engine.encoder.prompt(record.id, record.input) for record in records]
    drafts = [[record.target[:-1]] for record in engine.encode_records(records)]
    noise = derive_seed(derive_seed(settings.seed, user.user_id), "repeat", 0)
    sampler = Sampler(settings.decoding.temperature, settings.decoding.top_p, noise)
    limit = engine.limit(task.history_labels, settings.composition.train_gen_len)
    tokens = engine.answer(prompts, every_pair(range(n + 1), len(prompts)), sampler, limit, drafts)
    answers = []
    for place in range(n + 1):
        answers.append([engine.encoder.text(tokens[place, index]) for index in range(len(prompts))])
    *sharers, personal = answers
    objective = Objective(task, [record.target.strip() for record in records], penalty=0.0)
    (trial,) = objective.trials([personal], [[answers_of_sharer] for answers_of_sharer in sharers])
    return trial


def work_on(stage: Stage, index: int, user: User, progress: Progress) -> None:
    """Compose, measure, predict, deploy."""
    started = time.perf_counter()
    settings, texts, engine, run = stage.settings, stage.texts, stage.engine, stage.run
    sharers, adapters = stage.pool.sharers(index), stage.pool.adapters(index)
    profile = texts.profile_of(user.user_id)
    records = history_records(user, texts.task, texts.templates, profile, settings.prompts.recent_k)
    engine.bank.load(adapters)
    weights = compose_user(stage, user, records, sharers)
    personal = in_form(engine.bank.adapter(0), settings.deploy.deploy_form)
    composed = time.perf_counter()

    engine.bank.load([*adapters, personal])
    score = measure(stage, user, records, len(sharers))
    measured = time.perf_counter()
    predictions = predict(engine, texts, user, {"per_pcs": len(sharers)}, settings.decoding, settings.seed, progress)

    choice = {
        "deployed": "merge",
        "sharers": [sharer.user_id for sharer in sharers],
        "weights": torch.stack(list(weights.values())).mean(0).tolist(),
        "rule": "factor",
        "utility": score.utility,
        "similarity": score.similarity,
    }
    lines = [json.dumps({"module": name, "weights": tensor.tolist()}) + "\n" for name, tensor in weights.items()]
    write_text(run.user_dir(user.user_id) / "composition.jsonl", "".join(lines))
    save_personal(settings.model, run, personal, {"user_id": user.user_id, **choice})
    finished = time.perf_counter()
    seconds = {"compose": composed - started, "measure": measured - composed, "predict": finished - measured}
    seconds = {part: round(value, 3) for part, value in seconds.items()}
    result = {"user_id": user.user_id, "index": index, **choice, "predictions": predictions, "seconds": seconds}
    run.finish(user.user_id, result)


def check_inputs(settings: Settings, pool: Pool, users: Sequence[User]) -> None:
    """InputError for sharers without gate and users without history, all of them at once."""
    places: set[int] = set()
    for row in pool.ranking:
        places |= set(row)
    files = [gates.gate_path(settings.gate_dir, pool.anchors[place].user_id) for place in sorted(places)]
    problems = [f"{file}: no such gate; run train_anchor_gate.py" for file in files if not file.is_file()]
    problems += [f"user {user.user_id}: an empty history, nothing to compose by" for user in users if not user.profile]
    if problems:
        raise InputError.many(problems)


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan: the composed adapter is measured beside its sharers."""
    task, n = get_task(settings.data.task), settings.composition.n_sim or plan.PUBLISHED_ANCHORS
    kinds = (task.history_labels, settings.composition.train_gen_len), (task.labels, settings.decoding.max_gen_len)
    answer = plan.longest_answer(settings.model, *kinds)
    rank = plan.rank_of(settings.anchor_dir)
    return [Work("answering", n + 1, rank, settings.prompts.max_length, answer, other_ranks=n * rank)]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    data, recent_k = settings.data, settings.prompts.recent_k
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    users = load_test_users(data.folder, texts.task)
    pool = load_shared(settings, load_candidates(data.folder, texts.task), len(users))
    check_inputs(settings, pool, select(users, settings.user_idxs))
    inputs = merging_inputs(data.folder, settings.prompts.prompt_path, users, texts, pool)
    for index, sources in enumerate(inputs.by_user.values()):
        for sharer in pool.sharers(index):
            sources |= gates.gate_source(settings.gate_dir, sharer.user_id)
    run = cli.open_run(settings, settings.output_dir, "lora_composition", "per_pcs", inputs)
    todo = open_users(users, select_indices(settings.user_idxs, len(users)), run.done)
    if todo:
        engine = load_engine(settings.model, settings.prompts, settings.decoding.max_gen_len)
        mine = share_users(run, todo, partial(user_cost, recent_k=recent_k))
        for_each(mine, len(todo), partial(work_on, Stage(settings, texts, engine, run, pool)))
    if settings.deploy.export_full:
        export_full(settings.model, run, users)


if __name__ == "__main__":
    cli.run(main)
