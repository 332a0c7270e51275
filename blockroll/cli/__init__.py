"""The command line: demo, generate, train, convert, bench, report, doctor, audit.

A thin edge: it reads options, calls the library and prints. Everything heavy is imported inside the
commands, so that help is quick. A BlockrollError becomes one line on stderr and exit code 2.
"""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import blockroll
from blockroll.cli.audit import audit
from blockroll.cli.conversion import convert
from blockroll.cli.machine import doctor
from blockroll.cli.runs import demo, report, train
from blockroll.cli.speed import bench
from blockroll.cli.texts import generate
from blockroll.errors import BlockrollError

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class _Commands(typer.core.TyperGroup):
    """Turns the library's own errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; `--debug` lets the traceback through."""
        try:
            return super().invoke(ctx)
        except BlockrollError as error:
            if ctx.params.get("debug"):
                raise
            line = Text(f"Error: {error}", style="red")
            Console(stderr=True, soft_wrap=True).print(line)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True, soft_wrap=True).print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rollouts for reinforcement learning, drafted in blocks and verified exactly."""
    if show_version:
        typer.echo(blockroll.__version__)
        raise typer.Exit


for command in (demo, generate, train, convert, bench, report, doctor):
    app.command()(command)
app.add_typer(audit, name="audit")
