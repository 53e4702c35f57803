"""Stage 1: adapt the base model to the task, and predict with and without that adaptation.

Reads   data/<task>/user_base_LLM.json (training), test_100/user_test_100.json, profile-id2text.json
Writes  <output_dir>/adapter_config.json + adapter_model.safetensors   the task adapter (PEFT); later stages fold it in
        <output_dir>/train_log.json                                    loss of every step
        <output_dir>/users/<user>/result.json                          test predictions of `base` and `task_lora`
Takes   1 to 2 minutes on the demo (2 CPU cores). Resumes: run the same command again.

    python task_lora.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --output_dir ./output/movie_tagging/task-base_LLM
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    output_dir: str = opt.task_path("./output/<task_name>/task-base_LLM", "where the results go", neutral=True)
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group(without=("lora_ckpt", "device_map"), max_batch_tokens=opt.training_tokens())
    prompts: opt.PromptSettings = opt.group()
    training: opt.TrainingSettings = opt.group(without=("max_step",))
    decoding: opt.DecodingSettings = opt.group()
    user_idxs: str | None = opt.user_idxs("test users")


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

import torch

from prime.bank.decode import Progress
from prime.bank.train import Learner
from prime.checkpoints import plan
from prime.checkpoints.memory import Work
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.engine import Engine, load_engine, predict
from prime.errors import InputError
from prime.runs.files import write_json
from prime.runs.inputs import Inputs
from prime.runs.progress import for_each
from prime.runs.run import Run
from prime.runs.workers import open_users, share_users
from prime.seeds import derive_seed
from prime.users.data import BASE_FILE, TEST_FILE, User, load_users, select_indices, user_cost
from prime.users.identity import all_of, user_sources, wording
from prime.users.prompts import task_records
from prime.users.tasks import get_task
from prime.users.texts import Texts, load_test_users, load_texts

MADE_ONCE = ("adapter_config.json", "adapter_model.safetensors", "train_log.json")


def load_base_users(data_dir: Path, texts: Texts) -> list[User]:
    """Those whose queries the task adapter learns."""
    path = data_dir / BASE_FILE
    users = load_users(path, texts.task, need_queries=True, need_golds=True)
    if not any(user.queries for user in users):
        raise InputError(f"{path}: no user has a query to train on")
    return users


def train_task_adapter(settings: Settings, texts: Texts, engine: Engine, users: list[User], folder: Path) -> None:
    records = []
    for user in users:
        records += task_records(user, texts.task, texts.templates, texts.profile_of(user.user_id))
    training = settings.training
    learner = Learner(0, "task adapter", derive_seed("task", settings.seed), engine.encode_records(records))
    engine.bank.allocate([learner.seed], training.lora_r, training.lora_alpha)
    losses = engine.train([learner], training, "task adapter")[0]
    write_json(folder / "train_log.json", {"records": len(records), "loss": losses})
    save_adapter(engine.bank.adapter(0), folder, settings.model.base)


def predict_user(
    settings: Settings, texts: Texts, engine: Engine, run: Run, index: int, user: User, progress: Progress
) -> None:
    """Predictions of the untouched model (bank row 0, zero weight) and of the task-adapted one (row 1)."""
    started = time.perf_counter()
    methods = {"task_lora": 1, "base": 0}
    predictions = predict(engine, texts, user, methods, settings.decoding, settings.seed, progress)
    seconds = {"predict": round(time.perf_counter() - started, 3)}
    result = {"user_id": user.user_id, "index": index, "predictions": predictions, "seconds": seconds}
    run.finish(user.user_id, result)


def planned(settings: Settings) -> list[Work]:
    """The largest passes, for --plan."""
    training, longest = settings.training, settings.prompts.max_length
    labels = get_task(settings.data.task).labels
    answer = plan.answer_tokens(settings.model, labels, settings.decoding.max_gen_len)
    return [
        plan.training_work(training, 1, longest, answer),
        Work("answering", 2, training.lora_r, longest, answer, other_ranks=training.lora_r),
    ]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    if settings.model.plan:
        return plan.show(settings.model, *planned(settings))
    folder, data_dir = Path(settings.output_dir), settings.data.folder
    texts = load_texts(data_dir, settings.data.task, settings.prompts.prompt_path, settings.prompts.texts)
    base_users, users = load_base_users(data_dir, texts), load_test_users(data_dir, texts.task)
    shared = wording(texts.templates, settings.prompts.prompt_path)
    shared |= all_of("base users", data_dir / BASE_FILE, base_users, texts, trained_on=True)
    inputs = Inputs(shared, user_sources(data_dir, TEST_FILE, users, texts, asked=True), MADE_ONCE)
    run = cli.open_run(settings, folder, "task_lora", "task_lora", inputs)
    todo = open_users(users, select_indices(settings.user_idxs, len(users)), run.done)
    trained = folder / "adapter_config.json"
    if trained.exists() and not todo:
        return
    engine = load_engine(settings.model, settings.prompts, settings.decoding.max_gen_len)
    with run.turn("the task adapter"):
        if not trained.exists():
            train_task_adapter(settings, texts, engine, base_users, folder)
    engine.bank.load([load_adapter(folder)])
    engine.bank.combine(torch.tensor([[0.0], [1.0]]), "delta")
    for_each(share_users(run, todo, user_cost), len(todo), partial(predict_user, settings, texts, engine, run))


if __name__ == "__main__":
    cli.run(main)
