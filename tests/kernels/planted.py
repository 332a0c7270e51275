"""Kernels with one line of them wrong, which the tests of the right ones must find."""

import importlib.util
import sys
from pathlib import Path


def planted(folder, module, right, wrong):
    """A module of kernels with one piece of its source replaced, loaded from a file of its own."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, (
        f"{right!r} is in {module.__name__} {source.count(right)} times, not once"
    )
    name = f"planted_{abs(hash((module.__name__, right, wrong)))}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
