"""Packing weights into checksummed buckets, and checking them before a single weight changes.

A bucket is a flat byte array that holds whole tensors one after another. The manifest names every tensor,
where it lies, and the checksum of each bucket (BLAKE2b, 128 bits). Its own checksum covers names, dtypes,
shapes and bytes of all tensors in order: a replica recomputes it from the weights it really holds.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from blockroll.errors import BucketMissing, ChecksumMismatch, ManifestMismatch
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
    """Pack a whole policy; floating tensors are cast to `dtype`, the replicas' own, if it is given."""
    specs: list[TensorSpec] = []
    buckets: list[list[Bytes]] = [[]]
    digest = hashlib.blake2b(digest_size=16)
    filled = 0
    for name, tensor in tensors:
        source = tensor.detach()
        source = source.to(dtype) if dtype is not None and source.is_floating_point() else source
        data = _bytes_of(source)
        if filled and filled + data.nbytes > bucket_bytes:
            buckets.append([])
            filled = 0
        dtype_name = str(source.dtype).removeprefix("torch.")
        specs.append(
            TensorSpec(
                name=name, shape=tuple(source.shape), dtype=dtype_name, bucket=len(buckets) - 1, offset=filled
            )
        )
        _digest_tensor(digest, name, source, data)
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
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        source = tensor.detach()
        _digest_tensor(digest, name, source, _bytes_of(source))
    return digest.hexdigest()


def bucket_checksum(bucket: Bytes) -> str:
    """BLAKE2b of a bucket's bytes, 128 bits in hexadecimal."""
    return hashlib.blake2b(np.ascontiguousarray(bucket).data, digest_size=16).hexdigest()


def check_update(update: WeightUpdate, own: Sequence[tuple[str, Tensor]]) -> None:
    """Raise unless the update fits the weights `own` by name, order, shape and dtype and arrived whole."""
    manifest = update.manifest
    expected = [(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in own]
    given = [(spec.name, spec.shape, spec.dtype) for spec in manifest.tensors]
    if expected != given:
        difference = next(
            (
                f"{mine} here, {theirs} sent"
                for mine, theirs in zip(expected, given, strict=False)
                if mine != theirs
            ),
            f"{len(expected)} tensors here, {len(given)} sent",
        )
        raise ManifestMismatch(f"version {update.version} is for other weights: {difference}")
    num_buckets = len(manifest.bucket_checksums)
    if len(update.buckets) != num_buckets:
        raise BucketMissing(
            f"version {update.version} has {num_buckets} buckets, {len(update.buckets)} arrived"
        )
    for index, (bucket, checksum) in enumerate(zip(update.buckets, manifest.bucket_checksums, strict=True)):
        if not isinstance(bucket, np.ndarray):
            raise BucketMissing(f"bucket {index} of {num_buckets} of version {update.version} never arrived")
        arrived = bucket_checksum(bucket)
        if arrived != checksum:
            raise ChecksumMismatch(
                f"bucket {index} of {num_buckets} of version {update.version} has checksum {arrived}, "
                f"sent was {checksum}"
            )


def load_update(update: WeightUpdate, own: Sequence[tuple[str, Tensor]]) -> None:
    """Copy a checked update into the weights `own`, in place."""
    for spec, (_, target) in zip(update.manifest.tensors, own, strict=True):
        bucket = update.buckets[spec.bucket]
        assert isinstance(bucket, np.ndarray), f"bucket {spec.bucket} was not checked"
        data = bucket[spec.offset : spec.offset + target.nbytes].copy()
        source = torch.from_numpy(data).view(target.dtype).view(target.shape)
        with torch.no_grad():
            target.copy_(source)


def _bytes_of(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _digest_tensor(digest: hashlib.blake2b, name: str, tensor: Tensor, data: Bytes) -> None:
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(data.data)
