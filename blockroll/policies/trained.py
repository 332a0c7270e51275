"""What a checkpoint's config says of the drafts that its weights were trained for."""

from typing import Any

from transformers import PretrainedConfig

from blockroll.errors import InvalidInput


def trained_drafts_of(config: PretrainedConfig) -> dict[str, Any]:
    """The section `blockroll` of a config, empty where there is none; InvalidInput where it is wrong."""
    section: Any = getattr(config, "blockroll", None) or {}
    if not isinstance(section, dict):
        raise InvalidInput(f"the section `blockroll` of a config is a mapping, got {section!r}; leave it out")
    mask, sizes, layouts = (section.get(key) for key in ("mask_token_id", "block_sizes", "layouts"))
    if mask is not None and not (type(mask) is int and 0 <= mask < config.vocab_size):
        raise InvalidInput(
            f"blockroll.mask_token_id of the config is {mask!r}, and must be a token of the vocabulary of "
            f"{config.vocab_size}: correct it, or leave the section out"
        )
    for key, values, kind in (("block_sizes", sizes, int), ("layouts", layouts, str)):
        is_list = isinstance(values, list | tuple) and all(type(each) is kind for each in values)
        if values is not None and not is_list:
            raise InvalidInput(
                f"blockroll.{key} of the config must be a list of {kind.__name__}, got {values!r}"
            )
    return section
