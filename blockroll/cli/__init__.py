"""The command line: demo, generate, train, convert, bench, report, doctor, audit.

A thin edge: it reads options, calls the library and prints. Everything heavy is imported inside the
commands, so that help is quick. `errors` says what becomes of an error, `options` has what commands share.
"""

from typing import Annotated

import typer

import blockroll
from blockroll.cli.audit import audit
from blockroll.cli.conversion import convert
from blockroll.cli.errors import Commands
from blockroll.cli.examples import epilog
from blockroll.cli.machine import doctor
from blockroll.cli.runs import demo, report, train
from blockroll.cli.speed import bench
from blockroll.cli.texts import generate

app = typer.Typer(
    name="blockroll",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else [levels] in a help text is taken for a style and disappears
    epilog=epilog(""),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(blockroll.__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="BLOCKROLL_DEBUG", help="Show the traceback of an error.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version."),
    ] = False,
) -> None:
    """Rollouts for reinforcement learning, drafted in blocks and verified exactly."""


for command in (demo, generate, train, convert, bench, report, doctor):
    app.command(epilog=epilog(command.__name__))(command)
for registered in audit.registered_commands:
    name = registered.name or getattr(registered.callback, "__name__", "")
    registered.epilog = epilog(f"audit {name}")
app.add_typer(audit, name="audit")
