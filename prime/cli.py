"""The command line: settings become options and options settings; what every script does around its `main`."""

from prime.runs.interrupts import STOPPED  # isort: skip (first: Ctrl-C ends with one line from here on)
import argparse
import difflib
import errno
import gc
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from prime.checkpoints.gguf import model_directory
from prime.errors import InputError, harmless, tell
from prime.runs.files import stop_between_writes
from prime.runs.inputs import Inputs
from prime.runs.run import Run
from prime.runs.workers import keep_freed_memory, limit_threads, world
from prime.settings import (
    BEFORE_THE_OPTION,
    DataSettings,
    ModelSettings,
    Option,
    build,
    defaults,
    options,
    published,
    recorded,
)
from prime.users.identity import task_source
from prime.users.tasks import TASKS, get_task

# No display is needed. A notebook's shell names a backend of its own, which matplotlib would not find here.
os.environ["MPLBACKEND"] = "Agg"
# Threads that wait for each other sleep: where something else runs beside them, spinning takes the cores from the one
# that is waited for. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Settings = TypeVar("Settings")
MODELS = {"llama_model_path", "encoder"}  # options that may name a GGUF file: stages get what it is converted to
AS_PUBLISHED_HELP = "give every option that is not given its value in the published code (docs/stages.md)"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that tell something, and the script's docstring, its lines fitted to the terminal."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fitted(text, width)


class Parser(argparse.ArgumentParser):
    """A wrong option is one line."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("unrecognized arguments:", "lists have commas and no spaces; what is for no option:")
        self.exit(2, f"{self.prog}: error: {harmless(message)} (--help lists all options)\n")


def parser_of(settings_class: type, doc: str | None) -> argparse.ArgumentParser:
    """The parser of a stage's `Settings`; `doc`: what --help begins with."""
    doc = examples_first(doc or "")
    parser = Parser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False)
    groups: dict[str, argparse._ActionsContainer] = {}
    needed = []
    for option in options(settings_class):
        title = option.group or "this stage"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], option)
        if option.required or (option.group, option.name) == ("data", "task_name"):
            needed.append(f"{option.flag} {option.name.upper()}")
    general = parser.add_argument_group("every script")
    general.add_argument("--as_published", action="store_true", help=AS_PUBLISHED_HELP)
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    general.add_argument("-h", "--help", action="help", help="show this help message and exit")
    parser.usage = " ".join(["%(prog)s", *needed, "[option ...]"])
    return parser


def examples_first(doc: str) -> str:
    """A script's docstring with its commands behind the first line."""
    title, *rest = doc.strip().split("\n\n")
    commands = [part for part in rest if part.startswith("    python ")]
    return "\n\n".join([title, *commands, *(part for part in rest if part not in commands)])


def fitted(text: str, width: int) -> str:
    """A docstring with its paragraphs and its entries (`Reads   ...`) wrapped anew; commands stay as they are."""
    return "\n\n".join(part if part.startswith("    ") else _wrapped(part, width) for part in text.split("\n\n"))


def _wrapped(paragraph: str, width: int) -> str:
    """An entry's text begins behind its last gap of several spaces, and goes on in lines that are indented as far."""
    entries: list[str] = []
    for line in paragraph.splitlines():
        text = line.strip()
        if entries and len(line) - len(text) == _columns(entries[-1])[-1] and _columns(text) == [0]:
            entries[-1] += f" {text}"
        else:
            entries.append(line)
    lines: list[str] = []
    for entry in entries:
        columns = _columns(entry)
        indent = columns[-1]
        if len(entry) > width and indent > width // 2:
            entry, indent = f"{entry[:indent].rstrip()}  {entry[indent:]}", columns[0] + 4
        hanging = " " * indent
        lines += textwrap.wrap(entry, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def _columns(entry: str) -> list[int]:
    """Where the parts of an entry begin: its first one if it is indented, then those behind a gap."""
    return [part.end() for part in re.finditer(r"^ +|(?<=\S) {2,}", entry)] or [0]


def _add(container: argparse._ActionsContainer, option: Option) -> None:
    about = option.about
    flags = [option.flag, *about.get("aliases", ())]
    if option.kind is bool:
        container.add_argument(*flags, action="store_true", help=about["help"])
        return
    more: dict[str, Any] = {"dest": option.name, "help": about["help"]}
    more |= {"required": True} if option.required else {"default": _as_typed(option.default)}
    choices = tuple(TASKS) if (option.group, option.name) == ("data", "task_name") else about.get("choices")
    if choices:
        more["choices"] = choices
    elif about.get("parse") or option.kind in (int, float):
        more["type"] = about.get("parse") or option.kind
    more |= {key: about[key] for key in ("metavar", "nargs") if key in about}
    container.add_argument(*flags, **more)


def _as_typed(default: Any) -> Any:
    """A default as it would be typed: a list with commas."""
    return ",".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default


def check_options(settings_class: type, doc: str | None) -> None:
    """End here at --help and at wrong options of this process: a script calls it before its libraries load.

    Until `run`, nothing is collected: what libraries make while they load stays, and looking through it again and again
    takes a sixth of that time.
    """
    parser = parser_of(settings_class, doc)
    _check_task(parser, settings_class, _read(parser, None))
    gc.disable()


def parse(settings_class: type[Settings], doc: str | None, argv: list[str] | None = None) -> Settings:
    """The settings of a command line; `argv` None: of this process."""
    parser = parser_of(settings_class, doc)
    values = _read(parser, argv)
    if values.as_published:
        parser.set_defaults(**published(settings_class))
        values = parser.parse_args(argv)
        chosen = [f"{name} {getattr(values, name)}" for name in published(settings_class)]
        tell(f"as published: {', '.join(chosen) or 'the defaults'}")
    if _check_task(parser, settings_class, values) and values.task_file:
        values.task_name = get_task(values.task_file).name
    for name in MODELS & vars(values).keys():
        setattr(values, name, model_directory(getattr(values, name)))
    return build(settings_class, vars(values))


def _read(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    for word in sys.argv[1:] if argv is None else argv:
        if problem := _option_problem(word, list(parser._option_string_actions)):
            parser.error(problem)
    return parser.parse_args(argv)


def _option_problem(word: str, known: list[str]) -> str:
    """What is wrong with a word of the command line that looks like an option; "" if nothing is."""
    flag = "--sample" if word.startswith("--sample") else word.partition("=")[0]
    if not re.match("--?[A-Za-z]", flag) or flag in known:
        return ""
    if flag in ELSEWHERE:
        return f"{word}: {ELSEWHERE[flag]}"
    near = difflib.get_close_matches("--" + flag.lstrip("-").replace("-", "_"), known, 1)
    return f"there is no option {flag}" + (f"; did you mean {near[0]}?" if near else "")


def _check_task(parser: argparse.ArgumentParser, settings_class: type, values: argparse.Namespace) -> bool:
    """Whether this script works on a task, which is one: a built-in one or that of a file."""
    needed = any(option.group == "data" for option in options(settings_class))
    if needed and (values.task_name is None) == (values.task_file is None):
        parser.error("one of --task_name (a built-in task) and --task_file (your own) has to be given")
    return needed


def open_run(settings: Any, root: Path | str, stage: str, method: str | None, inputs: Inputs, **more: Any) -> Run:
    """The run directory `root` of a stage; `more` replaces or adds to the recorded settings.

    A directory made before an option came was made with its default, or as `BEFORE_THE_OPTION` says. `inputs` are what
    results depend on beside the settings; task, model, tokenizer and task adapter are added here.
    """
    if isinstance(data := getattr(settings, "data", None), DataSettings):
        inputs = replace(inputs, shared={**task_source(data.task), **inputs.shared})
    if isinstance(model := getattr(settings, "model", None), ModelSettings):
        from prime.checkpoints.identity import model_sources  # the model's libraries, which some scripts do without

        inputs = replace(inputs, shared={**model_sources(model), **inputs.shared})
    before = {} if stage == "gen_profile" else BEFORE_THE_OPTION  # it has always asked through the chat template
    default = (defaults(type(settings)) | before).get
    refresh = getattr(settings, "data", settings).refresh
    return Run(root, stage, str(method), recorded(settings) | more, default, inputs, refresh)


# Options of the published scripts that have no counterpart, and what does their work here.
ELSEWHERE = {
    "--minimize": "the task's metrics know their direction; leave it out",
    "--infer": "test queries are always answered; --k_list says with how many retrieved items",
    "--num_eval_anchors": "--user_idxs says who is worked on",
    "--sample": "a gate sees its whole window of the history (--recent_k); --shared_ratio is the part that shares",
    "--epochs": "nothing is trained here",
    "--secure_rng": "noise is always drawn from a secret key, see --noise_key",
    "--poisson_sample": "differentially private batches are always drawn so",
    "--embedding_filename": "the files are named as published, in --anchor_selection_dir",
}


class _Harmless:
    """A stream for results, in which names out of files (ids) do not steer the terminal."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(harmless(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[list[str] | None], None]) -> None:
    """Run a script: an InputError is one message and exit code 2; `--debug` adds the traceback.

    Ctrl-C and SIGTERM let the write in progress finish, and end with exit code 130 and a line that says how to go on.
    Of several processes the first alone tells its results.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.freeze()  # the libraries' objects are not looked through later either
    gc.enable()
    stop_between_writes()
    limit_threads()
    keep_freed_memory()
    name = Path(sys.argv[0]).name
    try:
        with (
            open(os.devnull, "w") if world().rank else nullcontext(sys.stdout) as results,
            redirect_stdout(_Harmless(results)),
        ):
            main(None)
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        hint = "; finished users are kept: make room and run the same command again to go on" if full else ""
        tell(f"{name}: error: {error}{hint}")
        sys.exit(2)
    except KeyboardInterrupt:
        tell(f"{name}: {STOPPED}")
        sys.exit(130)
