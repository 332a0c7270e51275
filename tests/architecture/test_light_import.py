"""Importing blockroll is cheap and changes nothing around it. Each test asks a fresh process."""

import subprocess
import sys

HEAVY = ("torch", "ray", "trl", "transformers", "triton", "wandb", "pyarrow", "prometheus_client")


def stdout_of(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_importing_the_config_leaves_torch_unloaded():
    assert stdout_of("import sys, blockroll.config; print('torch' in sys.modules)") == "False"


def test_importing_blockroll_leaves_every_heavy_package_unloaded():
    assert stdout_of(f"import sys, blockroll; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_importing_sets_no_environment_variable():
    # What third-party packages set is theirs: they are imported first.
    code = (
        "import os, torch, transformers, typer\n"
        "before = dict(os.environ)\nimport blockroll.config, blockroll.rollout.engine.engine, blockroll.cli\n"
        "print({key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)})"
    )
    assert stdout_of(code) == "set()"
