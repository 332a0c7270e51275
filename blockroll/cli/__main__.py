"""`python -m blockroll.cli`."""

from blockroll.cli import app

app(prog_name="blockroll")
