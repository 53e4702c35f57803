"""reproduce.sh: its own errors, what it tells to do, the commands it runs. Python is a stand-in that takes notes."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import world

DATA = ("user_base_LLM.json", "user_anchor_candidate.json", "test_100/user_test_100.json",
        "test_100/user_test_100_label.json")  # fmt: skip
PYTHON = f"""#!/bin/sh
[ "$1" != -m ] || PYTHONPATH={world.ROOT} exec {sys.executable} "$@"
echo "$@" >> "$NOTES"
for last; do :; done
mkdir -p "$last"
echo "{{}}" > "$last/settings.json"
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """reproduce.sh in a folder of its own, nothing to install, a model and data of one task."""
    for name in ("reproduce.sh", "setup_env.sh", "requirements.lock"):
        shutil.copy(world.ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    shutil.copy(tmp_path / "requirements.lock", tmp_path / ".venv" / "installed-requirements.lock")
    shutil.copytree(world.ROOT / "data" / "tasks", tmp_path / "data" / "tasks")
    for name in DATA:
        world.write(tmp_path / "data" / "movie_tagging" / name, [])
    (tmp_path / "llama").mkdir()
    world.write(tmp_path / "llama" / "wrong.json", {"target": "genre"})
    return tmp_path


def reproduce(here: Path, *words: str) -> subprocess.CompletedProcess:
    call, env = ["bash", str(here / "reproduce.sh"), *words], {"PATH": "/usr/bin:/bin", "NOTES": str(here / "notes")}
    return subprocess.run(call, cwd=here, env=env, capture_output=True, text=True)


def commands(here: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (here / "notes").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--tasks movies", "--tasks: movies is none of all, citation, movie_tagging, "),
        ("--tasks ' '", "--tasks names no task"),
        ("--tasks all --llama_model_path llama --data_dir llama", "--tasks all: "),
        ("--tasks citation --task_file a.json", "--tasks and --task_file: give one of them"),
        ("--task_file nowhere.json", "nowhere.json: no such file"),
        ("--task_file llama/wrong.json", "llama/wrong.json: key 'name': is missing"),
        ("--seed one", "--seed is a whole number from 0, not one"),
        ("--seed -1", "--seed is a whole number from 0, not -1"),
        ("--seed 12345678901234567890", "--seed is a whole number"),
        ("--k 2", "--k is a whole number from 3, not 2"),
        ("--holdout 1", "--holdout is a share from 0 to less than 1, not 1"),
        ("--processes 0", "--processes is a whole number from 1, not 0"),
        ("--methods some", "--methods is prime or all, not some"),
        ("--until mai", "--until names a step"),
        ("--seed", "--seed needs a value"),
        ("--task citation", "there is no option --task; did you mean --tasks? (--help lists all)"),
        ("--output-dir out", "there is no option --output-dir; did you mean --output_dir?"),
        ("--wine red", "there is no option --wine (--help"),
        ("--llama_model_path nowhere --data_dir data", "nowhere: no such directory"),
        ("--llama_model_path llama", "--llama_model_path needs --data_dir"),
        ("--llama_model_path nowhere/model/below --data_dir data", "nowhere/model/below: no such directory"),
        ("--config nowhere.toml", "nowhere.toml: No such file"),
        ("--set mai.seed=1", "no stage is called 'mai' (did you mean mia?)"),
        ("--set", "--set needs a value"),
    ],
)
def test_a_wrong_option_is_one_line_of_its_own(here: Path, words: str, told: str) -> None:
    done = reproduce(here, *shlex.split(words))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and told in line
    assert line.startswith("reproduce.sh: ") or "key 'name'" in line
    assert not (here / "notes").exists()


@pytest.mark.parametrize("name", DATA)
def test_missing_data_is_told_with_the_command_that_makes_it(here: Path, name: str) -> None:
    (here / "data" / "movie_tagging" / name).unlink()
    done = reproduce(here, "--llama_model_path", "llama", "--data_dir", "data")
    told, command = done.stderr.splitlines()
    assert done.returncode == 2 and f"{here}/data/movie_tagging/{name} is not there" in told
    words = shlex.split(command)
    args = world.parser(words[1]).parse_args(words[2:])
    assert args.task_name == "movie_tagging" and args.output_dir == f"{here}/data/movie_tagging"


def test_a_task_of_ones_own_is_a_file_with_its_data_beside_it_or_elsewhere(here: Path) -> None:
    """No step is given another name or folder; what is missing is told with the command for a table."""
    file = here / "mine" / "task.json"
    world.write(file, {"name": "songs", "input": "lyrics", "target": "genre", "labels": ["rock", "folk"]})
    done = reproduce(here, "--task_file", "mine/task.json", "--k", "5")
    told, command = done.stderr.splitlines()
    assert done.returncode == 2 and f"{here}/mine/user_base_LLM.json is not there. From a table of yours" in told
    assert f"prepare_data.py --task_file {file} --table FILE --user COLUMN" in command
    world.parser("prepare_data.py").parse_args(shlex.split(command)[2:])
    for folder, words in (("mine", []), ("data/songs", ["--data_dir", "data"])):
        for name in DATA:
            world.write(here / folder / name, [])
        done = reproduce(here, "--task_file", "mine/task.json", *words)
        assert done.returncode == 0, done.stderr
        for script, *options in commands(here):
            args = world.parser(script).parse_args(options)
            assert (args.task_file, args.task_name, args.data_dir) == (str(file), None, str(here / folder))
            assert getattr(args, "fitness", "history") == "history"
        (here / "notes").unlink()
    assert (here / "output/demo/songs/.steps/mia").exists()


def test_all_tasks_are_those_that_there_are_data_of(here: Path) -> None:
    for name in DATA:
        world.write(here / "data" / "citation" / name, [])
    words = ["--llama_model_path", "llama", "--data_dir", "data", "--tasks", "all", "--until", "task_lora"]
    done = reproduce(here, *words)
    assert done.returncode == 0, done.stderr
    asked = [(words[0], words[words.index("--task_name") + 1]) for words in commands(here)]
    assert asked == [(f"{step}.py", task) for task in ("citation", "movie_tagging") for step in STEPS[:2]]


def test_small_data_take_fewer_clusters_and_stage_2_comes_first(here: Path) -> None:
    """So a wrong --k is told before anything is trained."""
    words = ["--llama_model_path", "llama", "--data_dir", "data"]
    for more, found in ((["--k", "7"], ["--k", "7"]), (["--output_dir", "other"], [])):
        done = reproduce(here, *words, *more)
        assert done.returncode == 0, done.stderr
        assert "gen_profile.py --task_name movie_tagging --data_dir" in done.stderr
        run = commands(here)
        (here / "notes").unlink()
        assert [command[0] for command in run] == [
            "history_anchor.py", "task_lora.py", "train_anchor_peft.py", "lora_composition_evo.py", "mia.py",
            "postprocess.py",
        ]  # fmt: skip
        for script, *options in run:
            args = world.parser(script).parse_args(options)
            assert args.task_name == "movie_tagging"
        assert run[0][run[0].index("--k") :][:2] == found if found else "--k" not in run[0]


@pytest.mark.slow
def test_presets_and_set_options_reach_their_stages_and_a_name_of_the_hub_stays_one(here: Path) -> None:
    """What no stage has is one line, before a stage runs; tasks stand with commas."""
    for name in DATA:
        world.write(here / "data" / "citation" / name, [])
    (here / "run.toml").write_text("[reproduce]\ntasks = 'citation,movie_tagging'\n[model]\ndtype = 'bfloat16'\n")
    words = ["--llama_model_path", "some/model", "--data_dir", "data", "--config", "run.toml"]
    wrong = reproduce(here, *words, "--set", "mia.max_recrods=5")
    assert (wrong.returncode, (here / "notes").exists()) == (2, False)
    assert wrong.stderr.splitlines()[-1].endswith("mia has no option 'max_recrods' (did you mean max_records?)")
    done = reproduce(here, *words, "--set", "mia.max_records=5")
    assert done.returncode == 0, done.stderr
    assert "settings of run.toml, --set mia.max_records=5: task_lora --dtype bfloat16; " in done.stdout
    parsed = [(name, world.parser(name).parse_args(options)) for name, *options in commands(here)]
    assert [args.task_name for name, args in parsed if name == "mia.py"] == ["citation", "movie_tagging"]
    for name, args in parsed:
        assert getattr(args, "llama_model_path", "some/model") == "some/model"
        assert getattr(args, "dtype", "bfloat16") == "bfloat16"
        assert getattr(args, "max_records", 5) == 5, name


def test_the_demo_is_run_with_its_preset_and_nothing_else_is_set(here: Path) -> None:
    for name in DATA:
        world.write(here / "data" / "demo" / "movie_tagging" / name, [])
    done = reproduce(here)
    assert done.returncode == 0, done.stderr
    places = re.compile("task_name|_dir$|_path$|seed|refresh|encoder|lora_ckpt")
    found = {}
    for name, *options in commands(here):
        parser = world.parser(name)
        required = [action for action in parser._actions if action.required]
        plain = parser.parse_args([f"--{action.dest}={(action.choices or 'x')[0]}" for action in required])
        given = vars(parser.parse_args(options)).items() - vars(plain).items()
        found[name.removesuffix(".py")] = {key: value for key, value in given if not places.search(key)}
    assert found == {
        "history_anchor": {"k": 16, "embed": "target"},
        "task_lora": {"lr": 5e-3, "max_gen_len": 48},
        "train_anchor_peft": {"lr": 1e-2, "epochs": 5, "anchors_per_batch": 4, "train_gen_len": 48},
        "lora_composition_evo": {"max_gen_len": 48, "k_list": (1,), "train_gen_len": 48},
        "mia": {"n_sim": 3, "max_records": 20},
        "postprocess": {},
    }


@pytest.mark.slow
def test_all_methods_are_commands_that_parse(here: Path) -> None:
    """On the same sharers; all searches but PriME's own as published, and whatever merges or trains is attacked."""
    done = reproduce(here, "--llama_model_path", "llama", "--data_dir", "data", "--methods", "all")
    assert done.returncode == 0, done.stderr
    parsed = [(name, world.parser(name).parse_args(options)) for name, *options in commands(here)]
    assert [name for name, _ in parsed] == [
        "history_anchor.py", "task_lora.py", "train_anchor_peft.py", "lora_composition_evo.py", "mia.py",
        *["lora_composition_evo.py", "mia.py"] * 2, "train_anchor_gate.py", "lora_composition.py", "mia.py",
        *["lora_composition_evo.py", "mia.py"] * 2, *["train_user_peft.py", "mia.py"] * 2, "postprocess.py",
    ]  # fmt: skip
    searches = (args for name, args in parsed if name == "lora_composition_evo.py")
    prime, best_sharer, uniform, published, lorahub = searches
    assert [args.as_published for args in (prime, best_sharer, uniform, published, lorahub)] == [False] * 3 + [True] * 2
    assert (published.name, published.objective, lorahub.objective) == ("prime_published", "metric", "nll")
    assert (best_sharer.baseline, uniform.baseline, prime.baseline) == ("best_sharer", "uniform", None)
    assert best_sharer.fitness == uniform.fitness == prime.fitness
    assert not prime.search_only and [args.method for name, args in parsed if "user" in name] == ["oppu", "mta"]
    merging = [(name, args) for name, args in parsed if name not in ("history_anchor.py", "train_user_peft.py")]
    sharing = [args for _, args in merging if hasattr(args, "n_sim")]
    assert {(args.anchor_dir, args.n_sim) for args in sharing} == {(prime.anchor_dir, 3)}
    made = {args.output_dir for name, args in parsed[3:] if name in ("lora_composition_evo.py", "lora_composition.py",
            "train_user_peft.py")}  # fmt: skip
    assert {args.exp_dir for name, args in parsed if name == "mia.py"} == made and len(made) == 8


def test_as_published_reaches_every_stage_and_what_suits_the_demo_better_is_left_out(here: Path) -> None:
    for name, folder in product(DATA, ("data/demo", "data")):
        world.write(here / folder / "citation" / name, [])
    for more in (["--llama_model_path", "llama", "--data_dir", "data"], []):
        done = reproduce(here, *more, "--tasks", "citation", "--as_published")
        assert done.returncode == 0, done.stderr
    for name, *options in commands(here):
        args = world.parser(name).parse_args(options)
        assert args.as_published, name
        assert getattr(args, "embed", "history") == "history" and getattr(args, "max_records", 0) == 0
        assert getattr(args, "fitness", "history") == "history"


STEPS = ["history_anchor", "task_lora", "train_anchor_peft", "lora_composition_evo", "mia", "postprocess"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        ("", []),
        ("data/movie_tagging/test_100/user_test_100_label.json", STEPS),
        ("llama/model.safetensors", STEPS[1:]),
        ("output/movie_tagging/anchor_selection/anchor_user_idx.pt", STEPS[2:4] + ["postprocess"]),
        ("output/movie_tagging/task-base_LLM/adapter_model.safetensors", STEPS[2:]),
        ("output/movie_tagging/Anchor_PEFT/LoRA/users/a/adapter/adapter_model.safetensors", STEPS[3:]),
        ("output/movie_tagging/LoRA-Composition-evo/users/a/result.json", STEPS[4:]),
        ("output/movie_tagging/LoRA-Composition-evo/users/a/adapter/card.json", []),
        ("output/movie_tagging/LoRA-Composition-evo/users/a/seconds.json", []),
    ],
)
def test_a_step_is_done_again_where_what_it_reads_has_changed(here: Path, changed: str, redone: list[str]) -> None:
    words = ["--llama_model_path", "llama", "--data_dir", "data", "--output_dir", "output"]
    assert reproduce(here, *words).returncode == 0
    assert [name for name, *_ in commands(here)] == [f"{step}.py" for step in STEPS]
    if changed:
        world.write(here / changed, ["changed"])
    (here / "notes").unlink()
    done = reproduce(here, *words)
    found = [name.removesuffix(".py") for name, *_ in commands(here)] if (here / "notes").exists() else []
    assert done.returncode == 0 and found == redone
    assert all(f"{step}: finished before, skipped" in done.stdout for step in STEPS if step not in redone)
    for name, *options in commands(here) if found else ():
        assert ("--refresh" in options) == (name != "postprocess.py")
    again = reproduce(here, *words)
    assert again.stdout.count("finished before, skipped") == len(STEPS)


@pytest.mark.slow
def test_after_a_step_that_failed_every_step_looks_whether_its_files_are_there(here: Path) -> None:
    """An adapter that was deleted after its result: the step that reads it fails, its own makes it again."""
    words = ["--llama_model_path", "llama", "--data_dir", "data", "--output_dir", "output"]
    assert reproduce(here, *words).returncode == 0
    python = here / ".venv" / "bin" / "python"
    whole = python.read_text()
    python.write_text(whole.replace("#!/bin/sh\n", '#!/bin/sh\ncase "$1" in lora_comp*) exit 2;; esac\n'))
    world.write(here / "output/movie_tagging/Anchor_PEFT/LoRA/users/a/adapter/adapter_model.safetensors", ["changed"])
    assert reproduce(here, *words).returncode == 2
    python.write_text(whole)
    (here / "notes").unlink()
    assert reproduce(here, *words).returncode == 0
    assert [name for name, *_ in commands(here)] == [f"{step}.py" for step in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "code"), [("mia", 2), ("mia", 137), ("mia", 130), ("lora_composition_evo", 2)])
def test_an_attack_that_fails_does_not_cost_the_report(here: Path, step: str, code: int) -> None:
    """The steps after it run, the exit code tells; what is stopped, and every other step that fails, ends the job."""
    words = ["--llama_model_path", "llama", "--data_dir", "data", "--output_dir", "output"]
    python = here / ".venv" / "bin" / "python"
    whole = python.read_text()
    python.write_text(whole.replace("#!/bin/sh\n", f'#!/bin/sh\ncase "$1" in {step}.py) exit {code};; esac\n'))
    done = reproduce(here, *words)
    goes_on = step == "mia" and code != 130
    ran = [name.removesuffix(".py") for name, *_ in commands(here)]
    assert done.returncode == code and ran == (STEPS[:4] + STEPS[5:] if goes_on else STEPS[: STEPS.index(step)])
    assert ("mia: failed with exit code" in done.stderr) == goes_on
    assert done.stderr.endswith("failed: [movie_tagging] mia. The same command tries it again.\n") == goes_on
    python.write_text(whole)
    (here / "notes").unlink()
    assert reproduce(here, *words).returncode == 0
    again = [name.removesuffix(".py") for name, *_ in commands(here)]
    assert again == (STEPS[STEPS.index(step) :] if code == 130 else STEPS)


WORDS = ["--llama_model_path", "llama", "--data_dir", "data", "--output_dir", "output", "--processes", "3"]
RANKED = ["history_anchor.py of ", *(f"task_lora.py {rank} of 3" for rank in range(3))]


def ranked(here: Path, then: str) -> None:
    """Python takes notes of its rank, then does `then`."""
    python = here / ".venv" / "bin" / "python"
    note = 'echo "$1 $RANK of $WORLD_SIZE" | tr -s " " >> "$NOTES"\n'
    python.write_text(PYTHON.replace('echo "$@" >> "$NOTES"\n', note + then))


def test_processes_share_a_step_and_one_that_fails_fails_it(here: Path) -> None:
    ranked(here, '[ "$1 $RANK" != "task_lora.py 1" ] || exit 7\n')
    assert reproduce(here, *WORDS).returncode == 7
    assert sorted((here / "notes").read_text().splitlines()) == RANKED


def test_one_signal_stops_all_processes_of_a_step(here: Path) -> None:
    ranked(here, '[ "$1" != task_lora.py ] || exec sleep 600\n')
    env = {"PATH": "/usr/bin:/bin", "NOTES": str(here / "notes")}
    with subprocess.Popen(["bash", str(here / "reproduce.sh"), *WORDS], cwd=here, env=env) as running:
        for _ in range(600):
            time.sleep(0.1)
            if (here / "notes").exists() and len((here / "notes").read_text().splitlines()) == len(RANKED):
                break
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 130
    assert sorted((here / "notes").read_text().splitlines()) == RANKED


@pytest.mark.parametrize("place", [".steps", ".steps/mia", "Anchor_PEFT", "LoRA-Composition-evo/users"])
def test_no_link_below_the_output_is_followed(here: Path, place: str) -> None:
    victim, planted = here / "victim", here / "output" / "movie_tagging" / place
    victim.mkdir()
    planted.parent.mkdir(parents=True)
    planted.symlink_to(victim)
    done = reproduce(here, "--llama_model_path", "llama", "--data_dir", "data", "--output_dir", "output")
    assert done.returncode == 2 and f"{place} is a link" in done.stderr
    assert not list(victim.iterdir()) and not (here / "notes").exists()


@pytest.mark.slow
def test_rows_as_published_are_asked_as_their_sharers_were_trained(here: Path) -> None:
    for more, asked in (([], ("faithful", "auto")), (["--as_published"], None)):
        words = ["--llama_model_path", "llama", "--data_dir", "data", "--methods", "all"]
        assert reproduce(here, *words, *more, "--output_dir", f"out{len(more)}").returncode == 0
        for name, *options in commands(here):
            if "prime_published" in options and f"out{len(more)}" in " ".join(options):
                args = world.parser(name).parse_args(options)
                given = ("--texts" in options, "--chat" in options)
                assert args.as_published and given == (asked is not None,) * 2
                assert asked is None or (args.texts, args.chat) == asked


def test_help_tells_every_option(here: Path) -> None:
    told = reproduce(here, "--help").stdout
    taken = re.findall(r"^        (--\w+)\) ", (here / "reproduce.sh").read_text(), re.MULTILINE)
    assert {"--tasks", "--k", "--until"} <= set(taken) and all(f"  {option} " in told for option in taken)
    assert "set -euo" not in told and "before the model trains" in told
