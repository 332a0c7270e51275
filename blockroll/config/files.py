"""Config files: YAML, and overrides such as `train.steps=10` on top of it."""

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from blockroll.config.checks import from_mapping, shown
from blockroll.config.options import RunConfig
from blockroll.errors import ConfigError


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file (or the defaults) and apply overrides such as `train.steps=10`.

    ConfigError, in one line: a file that is missing, no file, no UTF-8, no YAML or no mapping, a key that
    stands twice, and whatever `RunConfig` refuses.
    """
    values = {} if path is None else read_yaml(Path(path))
    return from_mapping(RunConfig, with_overrides(values, overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file holds an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): "
            "a config is a YAML file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a config file: {error.strerror}") from None
    loaded = _parse(text, str(path))
    if loaded is not None and not isinstance(loaded, Mapping):
        raise ConfigError(f"{path} must hold a mapping of options, got {type(loaded).__name__}")
    return dict(loaded or {})


def with_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The same nested values with overrides such as `train.steps=10` written over them."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"an override is written section.field=value, got {override!r}")
        target = values
        *sections, leaf = key.strip().split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{section!r} in {override!r} is a value, not a section")
        target[leaf] = _parse(text, f"the value in {override!r}")
    return values


class _Loader(yaml.SafeLoader):
    """Plain values only; a key that stands twice in one mapping is refused, not overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key)} stands twice in one section", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else repr(key))
        return super().construct_mapping(node, deep=deep)


# `on` and `off` are words, as options such as `policy.prepack` take them, and no other way to say true.
_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if not (first in "oO" and each[0].endswith(":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str, what: str) -> Any:
    """The value of a YAML text; ConfigError that names `what` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is no valid YAML: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError):
        problem = " ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
        return problem
    return " ".join(str(error).split())
