"""Presets: files and --set become the options of the stages, the last word wins, and a mistake is one line."""

import shlex
import subprocess
from pathlib import Path

import pytest
import world

from presets import options
from prime.errors import InputError
from prime.settings import FitnessSettings, SearchSettings, published

SHIPPED = sorted((world.ROOT / "presets").glob("*.toml"))


def arrays(*words: str) -> dict[str, list[str]]:
    """What bash has after it took the printed lines."""
    lines = list(options.Presets(words).lines())
    names = [line.partition("=")[0] for line in lines]
    script = "\n".join([*lines, *(f'printf "%s\\0" {name} "${{{name}[@]}}" END' for name in names)])
    parts = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
    found: dict[str, list[str]] = {}
    while len(parts) > 1:
        end = parts.index("END")
        found[parts[0]], parts = parts[1:end], parts[end + 1 :]
    return found


def preset(folder: Path, text: str, name: str = "run.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_without_a_model_the_demo_is_set_and_a_set_option_wins() -> None:
    found = arrays("--seed", "3", "--set", "lora_composition_evo.opt_budget=30", "--set", "task_lora.lr=1e-3")
    assert found["words"] == ["--seed", "3"]
    assert found["preset_task_lora"] == ["--lr", "1e-3", "--max_gen_len", "48"]
    assert found["preset_lora_composition_evo"][-2:] == ["--opt_budget", "30"]
    assert found["preset_history_anchor"] == ["--k", "16", "--embed", "target"]
    assert arrays("--k", "7", "--k", "9")["preset_history_anchor"][:2] == ["--k", "9"]
    assert arrays("--as_published")["preset_history_anchor"] == ["--k", "16"]
    assert arrays("--llama_model_path", "x") == arrays("--llama_model_path", "x") | {"preset_mia": [], "told": []}


def test_later_files_win_numbers_keep_their_text_and_lists_get_commas(tmp_path: Path) -> None:
    text = "[reproduce]\ntasks = ['citation', 'movie_tagging']\nseed = 1\n[model]\ndtype = 'bfloat16'\n"
    first = preset(tmp_path, text + "[task_lora]\nlr = 2e-3\nk_list = [1, 2]\ngradient_checkpointing = true\n")
    second = preset(tmp_path, "[reproduce]\nseed = 2\n[task_lora]\ngradient_checkpointing = false\n", "2.toml")
    found = arrays("--llama_model_path", "x", "--config", first, "--config", second, "--seed", "3")
    assert found["preset_task_lora"] == ["--dtype", "bfloat16", "--lr", "2e-3", "--k_list", "1,2"]
    assert found["preset_mia"] == ["--dtype", "bfloat16"] and found["preset_history_anchor"] == []
    assert shlex.join(found["words"]) == (
        "--tasks citation,movie_tagging --seed 1 --seed 2 --llama_model_path x --seed 3"
    )
    assert found["given"] == [first, second]
    assert arrays("--config", first)["preset_task_lora"][-1] == "--gradient_checkpointing"


def test_a_file_may_ask_for_the_published_settings(tmp_path: Path) -> None:
    name = preset(tmp_path, "[reproduce]\nas_published = true\n[mia.unless_published]\nmax_records = 20\n")
    found = arrays("--config", name)
    assert found["words"] == ["--as_published"] and found["preset_mia"] == []
    assert arrays("--config", name, "--set", "mia.max_records=9")["preset_mia"][1] == "9"


def test_rows_as_published_take_how_much_is_asked_and_not_how_it_is_searched() -> None:
    words = [f"lora_composition_evo.{name}={value}" for name, value in published(SearchSettings).items()]
    words += ["lora_composition_evo.opt_budget=30", "lora_composition_evo.train_gen_len=9", "model.chat=off"]
    sets = [word for pair in zip(["--set"] * len(words), words, strict=True) for word in pair]
    found = arrays("--llama_model_path", "x", *sets)
    assert found["preset_alike"] == ["--chat", "off", "--opt_budget", "30", "--train_gen_len", "9"]
    assert found["preset_lorahub"] == ["--chat", "off", "--opt_budget", "30"]
    assert {*published(SearchSettings), *published(FitnessSettings)} <= options.SEARCHED


@pytest.mark.parametrize("text", ["$(touch planted)", "a'b\"c", "two words", "*", "`id`", "a\nb"])
def test_no_value_is_read_by_the_shell(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert arrays("--tasks", text, "--set", f"mia.seed={text}")["preset_mia"][-1] == text
    assert arrays("--tasks", text)["words"][-1] == text and not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[task_lora\nlr = 1", "run.toml: not TOML: "),
        ("lr = 1", "run.toml: no stage is called 'lr'"),
        ("[task_lorra]\nlr = 1", "no stage is called 'task_lorra' (did you mean task_lora?)"),
        ("task_lora = 1", "task_lora is no table"),
        ("[task_lora]\nlr = 2026-01-01", "run.toml: task_lora.lr: a text, a number, "),
        ("[task_lora.lr]\na = 1", "task_lora.lr: a text, a number, "),
        ("[mia]\nunless_published = 1", "mia.unless_published is no table"),
        ("[reproduce]\nsed = 1", "run.toml: reproduce has no option 'sed' (did you mean seed?)"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_is_installed(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        options.main(["--config", preset(tmp_path, text)])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["opt_budget=3", "mia=3", "mia.=3", "mia.seed"])
def test_a_set_without_its_parts_says_how_it_is_written(text: str) -> None:
    with pytest.raises(InputError, match="stage.option=value is expected|no stage is called"):
        options.main(["--set", text])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lora_composition_evo.opt_budgett=3", "has no option 'opt_budgett' (did you mean opt_budget?)"),
        ("lora_composition_evo.opt_budget=many", "lora_composition_evo.opt_budget: 'many' is not a whole number"),
        ("model.dtype=bf16", "model.dtype: 'bf16' is none of auto, float32, "),
        ("task_lora.gradient_checkpointing=yes", "true or false is expected"),
        ("mia.opt_budget=3", "mia has no option 'opt_budget'"),
    ],
)
def test_an_option_that_no_stage_has_is_told_before_anything_runs(text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        options.main(["--check", "--set", text])
    assert str(error.value).startswith(f"--set {text}: ") and told in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_preset_names_options_that_there_are(path: Path) -> None:
    options.main(["--check", "--llama_model_path", "x", "--config", str(path)])
