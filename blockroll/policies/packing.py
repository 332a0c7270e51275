"""When a forward of a model is packed: `Packing` leaves out rows that would make a rectangle of the batch."""

from torch import nn

# Rows that packing must save on a CPU. Measured with one thread and compiled layers: as dear as padding at
# about 6 rows in a policy of 1.6M parameters (float32), and at 12 in one of 135M (bfloat16).
_LEAST_SAVED_ON_CPU = 12
# Elsewhere, reasoned and not measured: in the time of the few small kernels that packing takes in a layer, a
# GPU does so many multiply-adds.
_LAYER_COST = 4_000_000_000


def least_saved_rows(model: nn.Module, num_layers: int) -> int:
    """Rows that a packed forward must leave out to take less time than a padded one."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if not weights or weights[0].device.type == "cpu":
        return _LEAST_SAVED_ON_CPU
    return -(-num_layers * _LAYER_COST // max(sum(weight.numel() for weight in weights), 1))
