"""What a person sees when something is wrong: one line on stderr, advice in it, and an exit code.

Exit code 2: what was asked cannot be done as asked (an option, a file, a folder, a package). 1: it was
begun and failed. 130: Ctrl-C. `--debug`, before or behind the command, or BLOCKROLL_DEBUG=1 lets the
traceback through.
"""

import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from blockroll.cli.names import meant_option
from blockroll.errors import BlockrollError, CheckpointError, InvalidInput, MissingDependency, RunExists

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; shells have 130 after Ctrl-C
ASKED_WRONGLY = (InvalidInput, RunExists, CheckpointError, MissingDependency)

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has the class of click, or its own


class Commands(typer.core.TyperGroup):
    """A group of commands whose errors are one line."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run the command line; `--debug` may stand anywhere before `--`."""
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        if "--debug" in options:
            given.remove("--debug")
            given.insert(0, "--debug")
        with _warnings_in_one_line():
            return super().main(given, *rest, **extra)

    def make_context(self, *arguments: Any, **extra: Any) -> Any:
        """Read the options that stand before the command."""
        with one_line():
            return super().make_context(*arguments, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the command's options and run it."""
        with one_line(is_debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


@contextmanager
def one_line(*, is_debug: bool = False) -> Iterator[None]:
    """Turn every error into one line on stderr and an exit code; `is_debug` lets the library's through."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _say("Interrupted.", style="")
        raise typer.Exit(INTERRUPTED) from None
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        _say(f"Error: {_usage(error)}")
        raise typer.Exit(USAGE) from None
    except Exception as error:  # the boundary of the process: named, on stderr, in the exit code
        if is_debug:
            raise
        _say(f"Error: {_sentence(error)}")
        raise typer.Exit(USAGE if isinstance(error, ASKED_WRONGLY) else FAILED) from None


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """What the library warns of is meant for this person: without the place in the code."""
    usual = warnings.formatwarning

    def in_one_line(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is UserWarning:
            return f"Warning: {' '.join(str(message).split())}\n"
        return usual(message, category, *place, **line)

    warnings.formatwarning = in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _sentence(error: Exception) -> str:
    if isinstance(error, BlockrollError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {error} (in {frame.name}, {frame.filename}:{frame.lineno}; "
        "--debug shows where from)"
    )


def _usage(error: Any) -> str:
    """What is wrong with the command line, and where to read how it is written."""
    path = error.ctx.command_path if error.ctx is not None else "blockroll"
    if type(error).__name__ == "NoSuchOption":
        return f"{path} has no option {error.option_name}; {meant_option(error.option_name, error.ctx)}"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message} ({path} --help says how)"


def _say(message: str, *, style: str = "red") -> None:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(line, style=style))
