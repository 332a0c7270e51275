"""Kernels with one line of them wrong, which the tests of the right ones must find."""

import importlib
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


SAMPLER = (  # each behind those that it imports
    "rows.fused_reading", "rows.fused_sources", "rows.fused_cut", "rows.fused_draw", "rows.fused_laws",
    "block_verify.fused", "draft_draw.fused",
)  # fmt: skip


def plant_in_sampler(folder, monkeypatch, module, right, wrong):
    """Doors of the sampler run copies of its kernels, of which one module has a piece replaced."""
    made = {}
    for name in SAMPLER:
        source = Path(importlib.import_module(f"blockroll.kernels.{name}").__file__).read_text()
        if name == module:
            assert source.count(right) >= 1, f"{right!r} is not in {name}"
            source = source.replace(right, wrong)
        for other, copy in made.items():
            source = source.replace(f"from blockroll.kernels.{other} import", f"from {copy.__name__} import")
        path = folder / f"{name.replace('.', '_')}_{folder.name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        made[name] = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made[name])
    for op in ("block_verify", "draft_draw"):
        package = importlib.import_module(f"blockroll.kernels.{op}")
        monkeypatch.setattr(package, "fused", made[f"{op}.fused"])
