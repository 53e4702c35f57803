"""`--as_published`: what it sets, and that the documentation's table is all of it."""

from pathlib import Path
from typing import Any

import pytest
import world

from prime import settings as opt
from prime.users.texts import load_texts

# Published settings of each stage, as the paper's code and announcement have them.
LORA = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.05, "batch_size": 6, "epochs": 3, "max_length": 3000}
DECODING = {"temperature": 0.1, "top_p": 0.9, "max_gen_len": 100, "k_list": (1, 2, 4)}
TRAINED = {"weight_decay": 0.01, "min_lr": 0.0, "lr_schedule": "published"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "task_lora.py": LORA | TRAINED | DECODING | {"lr": 1e-4, "clip": 0.3},
    "history_anchor.py": {"encoder": "microsoft/deberta-v3-large", "embed": "history", "k": 50},
    "train_anchor_peft.py": LORA | TRAINED | {"lr": 2e-5, "clip": 1.0, "recent_k": 0},
    "train_anchor_gate.py": TRAINED
    | {"lr": 2e-5, "weight_decay": 0.0, "clip": 0.3, "max_step": 50, "epochs": 50, "recent_k": 0},
    "lora_composition.py": DECODING | {"topk": 3, "recent_k": 2000, "shared_ratio": 1.0, "agg_temperature": 1.0},
    "lora_composition_evo.py": DECODING
    | {
        "n_sim": 3, "opt_type": "cma", "opt_budget": 10, "sim_penalty": (0.1,), "merge_rule": "factor",
        "start": "zero", "step": 0.5, "search_only": True, "fitness": "history", "unknown_answers": "alike",
        "objective": "metric", "m_reduce": "sum", "keep_rank": 0, "piece_merge": False, "num_repeat": 1,
    },
    "mia.py": {"recent_k": 50, "max_records": 0},
}  # fmt: skip
REQUIRED = {
    "--lora_ckpt": "task", "--exp_dir": "exp", "--anchor_dir": "anchors", "--llama_model_path": "model",
}  # fmt: skip
SCRIPTS = [*PUBLISHED, "train_user_peft.py", "postprocess.py", "prepare_data.py", "gen_profile.py"]


def settings_of(name: str, *more: str) -> Any:
    words = [name, "--task_name", "movie_tagging", *more]
    for option in opt.options(world.script(name).Settings):
        flag = f"--{option.name}"
        if option.required and flag in REQUIRED:
            words += [flag, REQUIRED[flag]]
    return world.settings(words)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_switch_sets_what_was_published(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = opt.recorded(settings_of(name, "--as_published"))
    assert {key: recorded[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    told = capsys.readouterr().err
    changed = opt.published(world.script(name).Settings)
    assert all(f"{key} {value}" in told for key, value in changed.items())
    assert all(recorded[key] == value != option_default(name, key) for key, value in changed.items())


def option_default(name: str, key: str) -> Any:
    return next(option.default for option in opt.options(world.script(name).Settings) if option.name == key)


def test_what_is_given_goes_before_what_was_published() -> None:
    settings = settings_of("lora_composition_evo.py", "--as_published", "--merge_rule", "delta", "--step", "0.7")
    assert (settings.search.merge_rule, settings.search.step, settings.search.start) == ("delta", 0.7, "zero")


def test_the_table_of_differences_is_all_of_the_switch() -> None:
    text = (world.ROOT / "docs/stages.md").read_text(encoding="utf-8")
    table = text[text.index("## What differs from the published code") : text.index("## The demo's settings")]
    for name in SCRIPTS:
        for key, value in opt.published(world.script(name).Settings).items():
            assert (f"--{key}`" if value is True else f"--{key} {value}") in table, (name, key)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("lora_composition_evo.py", "--minimize"),
        ("lora_composition.py", "--sample_size"),
        ("lora_composition.py", "--epochs"),
        ("train_anchor_peft.py", "--secure_rng"),
        ("history_anchor.py", "--embedding_filename"),
    ],
)
def test_a_published_option_without_a_counterpart_is_answered_in_one_line(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        settings_of(name, option, "3")
    assert stopped.value.code == 2 and f"{option}: " in capsys.readouterr().err.splitlines()[-1]


def test_published_names_and_values_are_taken() -> None:
    words = ["--max_seq_len", "500", "--m_reduce", "max", "--t_reduce", "sum", "--train_sample", "0.5"]
    settings = settings_of("lora_composition_evo.py", *words)
    assert settings.prompts.max_length == 500 and settings.fitness.train_sample == 0.5
    assert (settings.fitness.m_reduce, settings.fitness.t_reduce) == ("max", "sum")


def test_the_published_profile_file_is_read(tmp_path: Path) -> None:
    world.write(tmp_path / "profile-id2text-gpt-4o-mini.json", {"7": "likes films"})
    assert load_texts(tmp_path, "movie_tagging", None).profile_of("7") == "likes films"
