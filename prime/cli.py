"""The command line: settings become options and options settings; what every script does around its `main`."""

from prime.runs.interrupts import STOPPED  # isort: skip (first: Ctrl-C ends with one line from here on)
import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

from prime.errors import InputError, harmless, tell
from prime.runs.files import stop_between_writes
from prime.runs.inputs import Inputs
from prime.runs.run import Run
from prime.runs.workers import keep_freed_memory, limit_threads, world
from prime.settings import BEFORE_THE_OPTION, ModelSettings, Option, build, defaults, options, published, recorded
from prime.users.tasks import TASKS

# No display is needed. A notebook's shell names a backend of its own, which matplotlib would not find here.
os.environ["MPLBACKEND"] = "Agg"

Settings = TypeVar("Settings")
AS_PUBLISHED_HELP = "give every option that is not given its value in the published code (docs/stages.md)"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that tell something, and the script's docstring as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def parser_of(settings_class: type, doc: str | None) -> argparse.ArgumentParser:
    """The parser of a stage's `Settings`; `doc`: what --help begins with."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    groups: dict[str, argparse._ActionsContainer] = {"": parser, "data": parser}
    for option in options(settings_class):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)
    parser.add_argument("--as_published", action="store_true", help=AS_PUBLISHED_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add(container: argparse._ActionsContainer, option: Option) -> None:
    about = option.about
    flags = [about.get("flag") or f"--{option.name}", *about.get("aliases", ())]
    if option.kind is bool:
        container.add_argument(*flags, action="store_true", help=about["help"])
        return
    more: dict[str, Any] = {"dest": option.name, "help": about["help"]}
    more |= {"required": True} if option.required else {"default": _as_typed(option.default)}
    choices = tuple(TASKS) if option.name == "task_name" else about.get("choices")
    if choices:
        more["choices"] = choices
    elif about.get("parse") or option.kind in (int, float):
        more["type"] = about.get("parse") or option.kind
    if about.get("metavar"):
        more["metavar"] = about["metavar"]
    container.add_argument(*flags, **more)


def _as_typed(default: Any) -> Any:
    """A default as it would be typed: a list with commas."""
    return ",".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default


def parse(settings_class: type[Settings], doc: str | None, argv: list[str] | None = None) -> Settings:
    """The settings of a command line; `argv` None: of this process."""
    parser = parser_of(settings_class, doc)
    for word in sys.argv[1:] if argv is None else argv:
        flag = "--sample" if word.startswith("--sample") else word.partition("=")[0]
        if flag in ELSEWHERE and flag not in parser._option_string_actions:
            parser.error(f"{word}: {ELSEWHERE[flag]}")
    values = parser.parse_args(argv)
    if values.as_published:
        parser.set_defaults(**published(settings_class))
        values = parser.parse_args(argv)
        chosen = [f"{name} {getattr(values, name)}" for name in published(settings_class)]
        tell(f"as published: {', '.join(chosen) or 'the defaults'}")
    return build(settings_class, vars(values))


def open_run(settings: Any, root: Path | str, stage: str, method: str | None, inputs: Inputs, **more: Any) -> Run:
    """The run directory `root` of a stage; `more` replaces or adds to the recorded settings.

    A directory made before an option came was made with its default, or as `BEFORE_THE_OPTION` says. `inputs` are what
    results depend on beside the settings; model, tokenizer and task adapter are added here.
    """
    if isinstance(model := getattr(settings, "model", None), ModelSettings):
        from prime.checkpoints.identity import model_sources  # the model's libraries, which some scripts do without

        inputs = replace(inputs, shared={**model_sources(model), **inputs.shared})
    before = {} if stage == "gen_profile" else BEFORE_THE_OPTION  # it has always asked through the chat template
    default = (defaults(type(settings)) | before).get
    return Run(root, stage, str(method), recorded(settings) | more, default, inputs, settings.data.refresh)


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
