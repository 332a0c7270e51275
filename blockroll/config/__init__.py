"""Every option of blockroll, and the files they are read from; no torch.

`options` has the fields: one field is one line, its bounds and one sentence. `checks` says what is wrong
with a value, `files` reads YAML and `section.field=value` overrides.
"""

from blockroll.config.checks import by_path, from_mapping, to_mapping
from blockroll.config.files import load_config, read_yaml, with_overrides
from blockroll.config.options import (
    AlignmentConfig,
    Backend,
    ConvertConfig,
    DraftConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    WatchConfig,
    cache_dir,
)

__all__ = [
    "AlignmentConfig",
    "Backend",
    "ConvertConfig",
    "DraftConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "WatchConfig",
    "by_path",
    "cache_dir",
    "from_mapping",
    "load_config",
    "read_yaml",
    "to_mapping",
    "with_overrides",
]
