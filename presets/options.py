"""Preset files and `--set` to the options of every stage, for reproduce.sh, which takes the lines that are printed.

    python -m presets.options WORD...            reproduce.sh's own words, its `--config FILE` and `--set` among them
    python -m presets.options --check WORD...    the same after the installation: are they options of the stages?

A preset is a TOML file: a table for each stage script with its options by name; `[model]`, of all stages that load
the model; `[reproduce]`, of reproduce.sh itself. A table's `unless_published` is left out with --as_published. Files
and `--set stage.option=value` win over earlier ones. The demo's file comes first where no model is named, that of small
real models with --real.

Printed are shell arrays: `words`, without what was settled here; `preset_STAGE`, options of a stage; `preset_alike` and
`preset_lorahub`, what rows as published take of PriME's (how much is asked, not how it is searched); `given`, the
sources to check; `told`, what was set and by which.
"""

import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prime.errors import InputError, harmless
from prime.runs.files import read_bytes
from prime.settings import FitnessSettings, ModelSettings, Option, PromptSettings, SearchSettings, options

ROOT = Path(__file__).resolve().parent.parent
DEMO, SMALL_REAL = "presets/demo.toml", "presets/small_real.toml"
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # what processors that multiply in bfloat16 say of themselves
FILE_BYTES = 1 << 20
MODEL, OWN, UNLESS_PUBLISHED = "model", "reproduce", "unless_published"
LOADING = ("task_lora", "train_anchor_peft", "train_anchor_gate", "lora_composition_evo", "lora_composition",
           "train_user_peft", "mia")  # fmt: skip
STAGES = ("prepare_data", "history_anchor", *LOADING)
GENERATING = {"num_repeat", "train_gen_len"}  # of a search that generates answers; LoraHub's does not
ASKED = {"n_sim", "sharers", "opt_budget", "train_sample", *GENERATING}  # how much, not how
SEARCHED = {option.name for group in (SearchSettings, FitnessSettings) for option in options(group)} - ASKED

Table = dict[str, str]  # an option's text by its name; "true" of a flag
Tables = dict[str, Table]


# -- reading --------------------------------------------------------------------------------------------------------


def own_options() -> set[str]:
    """Options of reproduce.sh, as its own help names them."""
    return set(re.findall(r"^#   --(\w+)", (ROOT / "reproduce.sh").read_text("utf-8"), re.MULTILINE))


def as_text(where: str, value: Any) -> str:
    """A value as it would be typed: a list with commas."""
    if isinstance(value, list):
        return ",".join(as_text(where, part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise InputError(f"{where}: a text, a number, true, false or a list of these is expected")
    return str(value)


def check_table(source: str, stage: str) -> None:
    known = [OWN, MODEL, *STAGES]
    if stage not in known:
        raise InputError(f"{source}: no stage is called {stage!r}{meant(stage, known)}; there are {', '.join(known)}")


def meant(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def read_preset(path: Path, name: str) -> Tables:
    """The tables of a file, by stage or `stage.unless_published`; a number keeps the text it is written with."""
    try:
        content = tomllib.loads(read_bytes(path, FILE_BYTES).decode("utf-8"), parse_float=str)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not TOML: {error}") from None
    tables: Tables = {}
    for stage, table in content.items():
        check_table(name, stage)
        if not isinstance(table, dict):
            raise InputError(f"{name}: {stage} is no table; [{stage}] with its options below is expected")
        unless = table.pop(UNLESS_PUBLISHED, {})
        if not isinstance(unless, dict):
            raise InputError(f"{name}: {stage}.{UNLESS_PUBLISHED} is no table of options")
        tables[stage] = {key: as_text(f"{name}: {stage}.{key}", value) for key, value in table.items()}
        tables[f"{stage}.{UNLESS_PUBLISHED}"] = {
            key: as_text(f"{name}: {stage}.{key}", value) for key, value in unless.items()
        }
    return tables


def read_set(text: str) -> Tables:
    """`lora_composition_evo.opt_budget=30`"""
    key, sign, value = text.partition("=")
    stage, dot, name = key.partition(".")
    if not sign or not dot or not name:
        raise InputError(f"--set {text}: stage.option=value is expected, such as lora_composition_evo.opt_budget=30")
    check_table(f"--set {text}", stage)
    return {stage: {name: value}}


def parted(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The `--config` and `--set` of a command line, and its other words."""
    given, others, waiting = [], [], iter(words)
    for word in waiting:
        if word not in ("--config", "--set"):
            others.append(word)
            continue
        value = next(waiting, None)
        if value is None:
            raise InputError(f"{word} needs a value")
        given.append((word, value))
    return given, others


def as_words(table: Table) -> list[str]:
    """Options as they are typed."""
    words: list[str] = []
    for name, value in table.items():
        words += [] if value == "false" else [f"--{name}"] if value == "true" else [f"--{name}", value]
    return words


class Presets:
    """What files and `--set` say, the last of them winning, and the words of the command line."""

    def __init__(self, words: Sequence[str]):
        given, self.words = parted(words)
        self.given: list[tuple[str, Tables]] = []
        for word, value in given:
            path = Path(os.environ.get("CALLED_FROM", "."), value)
            read = (f"--set {value}", read_set(value)) if word == "--set" else (value, read_preset(path, value))
            self.given.append(read)
        self.sources = list(self.given)
        if "--real" in self.words:
            fast = {MODEL: {"dtype": "bfloat16"}} if multiplies_bf16() else {}
            self.sources[:0] = [(SMALL_REAL, read_preset(ROOT / SMALL_REAL, SMALL_REAL)), ("this processor", fast)]
        for _, tables in reversed(self.sources):
            self.words = [*as_words(tables.get(OWN, {})), *self.words]
        if not {"--llama_model_path", "--real"} & set(self.words):
            self.sources.insert(0, (DEMO, read_preset(ROOT / DEMO, DEMO)))

    def tables(self, stage: str) -> Iterator[Table]:
        """What each source says of a stage."""
        names = (stage,) if "--as_published" in self.words else (stage, f"{stage}.{UNLESS_PUBLISHED}")
        for _, tables in self.sources:
            yield from (tables[name] for name in names if name in tables)

    def of(self, stage: str) -> Table:
        """The options of a stage, the last word on each."""
        merged: Table = {}
        for table in (*(self.tables(MODEL) if stage in LOADING else ()), *self.tables(stage)):
            merged |= table
        if stage == "history_anchor" and "--k" in self.words[:-1]:
            last = len(self.words) - 1 - self.words[::-1].index("--k")
            merged["k"] = self.words[last + 1]
        return merged

    def lines(self) -> Iterator[str]:
        yield array("words", self.words)
        for stage in STAGES:
            yield array(f"preset_{stage}", as_words(self.of(stage)))
        asked = {name: text for name, text in self.of("lora_composition_evo").items() if name not in SEARCHED}
        yield array("preset_alike", as_words(asked))
        yield array("preset_lorahub", as_words({name: asked[name] for name in asked if name not in GENERATING}))
        yield array("given", (name for name, _ in self.given))
        names = ", ".join(name for name, tables in self.sources if tables)
        chosen = "; ".join(f"{stage} {' '.join(as_words(self.of(stage)))}" for stage in STAGES if self.of(stage))
        yield array("told", [harmless(f"settings of {names}: {chosen}")] if names else [])


def multiplies_bf16() -> bool:
    """Whether this processor does; elsewhere bfloat16 is slower than float32."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return False
    return bool(BF16 & set(text.split()))


def array(name: str, words: Iterable[str]) -> str:
    """A line of bash."""
    return f"{name}=({shlex.join(words)})"


# -- checking -------------------------------------------------------------------------------------------------------


def known_options(stage: str) -> dict[str, Option]:
    """A stage's options by name; its script is imported, and so the libraries it needs."""
    if stage == MODEL:
        return {option.name: option for group in (ModelSettings, PromptSettings) for option in options(group)}
    sys.path.insert(0, str(ROOT))
    script = __import__(stage)
    return {option.name: option for option in options(script.Settings)}


def problem(option: Option, text: str) -> str:
    """What is wrong with an option's value; "" if nothing."""
    if option.kind is bool:
        return "" if text in ("true", "false") else "true or false is expected"
    choices = option.about.get("choices")
    if choices:
        return "" if text in choices else f"{text!r} is none of {', '.join(choices)}"
    parse = option.about.get("parse") or (option.kind if option.kind in (int, float) else str)
    try:
        parse(text)
    except Exception as error:  # argparse's own kind among them
        return str(error)
    return ""


def check(source: str, stage: str, table: Table) -> None:
    known = dict.fromkeys(own_options()) if stage == OWN else known_options(stage)
    for name, text in table.items():
        if name not in known:
            raise InputError(f"{source}: {stage} has no option {name!r}{meant(name, known)}")
        option = known[name]
        if option and (wrong := problem(option, text)):
            raise InputError(f"{source}: {stage}.{name}: {wrong}")


def main(words: Sequence[str]) -> None:
    if words and words[0] == "--check":
        for source, tables in Presets(words[1:]).given:
            for stage, table in tables.items():
                check(source, stage.removesuffix(f".{UNLESS_PUBLISHED}"), table)
        return
    presets = Presets(words)
    for source, tables in presets.given:
        check(source, OWN, tables.get(OWN, {}))
    print("\n".join(presets.lines()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(harmless(f"reproduce.sh: {error}"))
