"""The command line: settings become options and options settings; what every script does around its `main`."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from prime.errors import InputError, tell
from prime.runs.files import stop_between_writes
from prime.runs.run import Run
from prime.runs.workers import keep_freed_memory, limit_threads, world
from prime.settings import Option, build, defaults, options, recorded
from prime.users.tasks import TASKS

Settings = TypeVar("Settings")


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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add(container: argparse._ActionsContainer, option: Option) -> None:
    about = option.about
    flag = about.get("flag") or f"--{option.name}"
    if option.kind is bool:
        container.add_argument(flag, action="store_true", help=about["help"])
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
    container.add_argument(flag, **more)


def _as_typed(default: Any) -> Any:
    """A default as it would be typed: a list with commas."""
    return ",".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default


def parse(settings_class: type[Settings], doc: str | None, argv: list[str] | None = None) -> Settings:
    """The settings of a command line; `argv` None: of this process."""
    return build(settings_class, vars(parser_of(settings_class, doc).parse_args(argv)))


def open_run(settings: Any, root: Path | str, stage: str, method: str, **more: Any) -> Run:
    """The run directory `root` of a stage; `more` replaces or adds to the recorded settings.

    A directory made before an option came was made with the option left alone.
    """
    return Run(root, stage, method, recorded(settings) | more, defaults(type(settings)).get)


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
        with open(os.devnull, "w") if world().rank else nullcontext(sys.stdout) as output, redirect_stdout(output):
            main(None)
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        hint = "; finished users are kept: make room and run the same command again to go on" if full else ""
        tell(f"{name}: error: {error}{hint}")
        sys.exit(2)
    except KeyboardInterrupt:
        tell(f"{name}: stopped; run the same command again to go on")
        sys.exit(130)
