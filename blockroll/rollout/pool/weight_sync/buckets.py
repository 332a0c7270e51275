"""Packing weights into checksummed buckets.

A bucket is a flat byte array that holds whole tensors one after another, each aligned to its elements. The
manifest names every tensor, where it lies, and the checksum of each bucket. Its own checksum covers names,
dtypes, shapes and bytes of all tensors in order: a replica recomputes it from the weights it really holds.

Checksums are XXH3 with 128 bits. They find what broke on the way, every tensor five times an update: they say
nothing against somebody who wants to deceive, and are read as fast as memory.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from blockroll.errors import InvalidInput
from blockroll.types import TensorSpec, WeightManifest, WeightUpdate

ADAPTER_PREFIX = "draft_adapter"
DEFAULT_BUCKET_BYTES = 64 * 2**20

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
NamedTensors = Iterable[tuple[str, Tensor]]


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What an update carries: parameters (tied ones once) and persistent buffers, in model order."""
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within DDP and `torch.compile`, whose names are the policy's own.

    InvalidInput for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"weights come from a torch module, the learner's model, got {type(model).__name__}; of a policy "
            "give its .model, and load a folder or a state dict into a model first"
        )
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def named_adapter_weights(adapter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What an update carries behind a policy's weights, if it carries its drafts too."""
    yield from adapter.named_parameters(prefix=ADAPTER_PREFIX)


def make_update(
    tensors: NamedTensors,
    *,
    version: int,
    base_version: int,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> WeightUpdate:
    """Pack a whole policy; floating tensors are cast to `dtype`, the replicas' own, if it is given.

    InvalidInput for a tensor without data.
    """
    specs: list[TensorSpec] = []
    buckets: list[list[Bytes]] = [[]]
    digest = xxh3_128()
    filled = 0
    for name, tensor in tensors:
        if tensor.is_meta:
            raise InvalidInput(
                f"{name!r} is on the meta device and holds no data: load the model's weights, or gather what "
                "is sharded or offloaded, before they are published"
            )
        source = tensor.detach()
        source = source.to(dtype) if dtype is not None and source.is_floating_point() else source
        data = _bytes_of(source)
        padding = -filled % source.element_size()
        if filled and filled + padding + data.nbytes > bucket_bytes:
            buckets.append([])
            filled = padding = 0
        if padding:
            buckets[-1].append(np.zeros(padding, np.uint8))
            filled += padding
        specs.append(
            TensorSpec(
                name=name,
                shape=tuple(source.shape),
                dtype=dtype_name(source.dtype),
                bucket=len(buckets) - 1,
                offset=filled,
            )
        )
        digest_tensor(digest, name, source, data)
        buckets[-1].append(data)
        filled += data.nbytes
    packed = tuple(np.concatenate(parts) if parts else np.empty(0, np.uint8) for parts in buckets)
    manifest = WeightManifest(
        tensors=tuple(specs),
        bucket_checksums=tuple(bucket_checksum(bucket) for bucket in packed),
        checksum=digest.hexdigest(),
    )
    return WeightUpdate(
        version=version, base_version=base_version, kind="full", manifest=manifest, buckets=packed
    )


def weights_checksum(tensors: NamedTensors) -> str:
    """Checksum of names, dtypes, shapes and bytes, in order: equal to the manifest's if the weights are."""
    digest = xxh3_128()
    for name, tensor in tensors:
        source = tensor.detach()
        digest_tensor(digest, name, source, _bytes_of(source))
    return digest.hexdigest()


def bucket_checksum(bucket: Bytes) -> str:
    """XXH3 of a bucket's bytes, 128 bits in hexadecimal."""
    return xxh3_128(np.ascontiguousarray(bucket).data).hexdigest()


def load_update(update: WeightUpdate, own: Sequence[tuple[str, Tensor]]) -> None:
    """Copy a checked update into the weights `own`, in place. An error leaves some of them changed."""
    for spec, (_, target) in zip(update.manifest.tensors, own, strict=True):
        bucket = update.buckets[spec.bucket]
        assert isinstance(bucket, np.ndarray), f"bucket {spec.bucket} was not checked"
        with torch.no_grad():
            target.copy_(tensor_in(bucket, spec, target)[0])


def tensor_in(bucket: Bytes, spec: TensorSpec, target: Tensor) -> tuple[Tensor, Bytes]:
    """The tensor that a bucket holds for this target, on the CPU, and its bytes."""
    data: Bytes = bucket[spec.offset : spec.offset + target.nbytes].copy()
    return torch.from_numpy(data).view(target.dtype).view(target.shape), data


def dtype_name(dtype: torch.dtype) -> str:
    """As manifests and options say it: `float32`."""
    return str(dtype).removeprefix("torch.")


def _bytes_of(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def digest_tensor(digest: xxh3_128, name: str, tensor: Tensor, data: Bytes) -> None:
    """Let a checksum of weights take in one tensor."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(data.data)
