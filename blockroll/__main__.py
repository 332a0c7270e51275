"""`python -m blockroll`: the command line."""

from blockroll.cli import app

app(prog_name="blockroll")
