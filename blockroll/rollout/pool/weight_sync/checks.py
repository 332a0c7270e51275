"""Every check of a weight update. All of them pass before the first weight changes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from blockroll.errors import (
    BucketMissing,
    ChecksumMismatch,
    ManifestMismatch,
    NonFiniteWeights,
    VersionMismatch,
    WeightSyncError,
)
from blockroll.rollout.pool.weight_sync.buckets import (
    Bytes,
    bucket_checksum,
    digest_tensor,
    dtype_name,
    tensor_in,
)
from blockroll.types import TensorSpec, WeightManifest, WeightUpdate


def check_form(update: WeightUpdate) -> None:
    """ManifestMismatch unless every field has its type: what comes over a wire may be anything."""
    manifest = update.manifest
    if update.kind != "full":
        raise WeightSyncError(f"weight updates of kind {update.kind!r} are not served; allowed is 'full'")
    for name, version in (("version", update.version), ("base_version", update.base_version)):
        if not _is_count(version):
            raise VersionMismatch(f"{name} must be an integer of at least 0, got {version!r}")
    if not isinstance(manifest, WeightManifest) or not isinstance(manifest.tensors, tuple):
        raise ManifestMismatch(f"version {update.version} has no manifest with a tuple of tensors")
    checksums = (manifest.checksum, *_items(manifest.bucket_checksums))
    if not isinstance(manifest.bucket_checksums, tuple) or not all(isinstance(x, str) for x in checksums):
        raise ManifestMismatch(f"version {update.version} has checksums that are no text")
    for spec in manifest.tensors:
        if not isinstance(spec, TensorSpec) or not _is_formed(spec):
            raise ManifestMismatch(
                f"version {update.version} has a tensor with a field of a wrong type: {spec!r}; name and "
                "dtype are text, shape is a tuple of counts, bucket and offset are counts"
            )
    names = [spec.name for spec in manifest.tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ManifestMismatch(f"version {update.version} has {twice!r} more than once")


def check_version(update: WeightUpdate, held: int) -> None:
    """VersionMismatch unless the update is newer than what is held, and was made on it or on a later one."""
    if update.version <= held:
        raise VersionMismatch(f"version {update.version} does not follow version {held}, served now")
    if not held <= update.base_version < update.version:
        raise VersionMismatch(
            f"version {update.version} was made on version {update.base_version}, but version {held} is "
            "held: the base must be that or a later one, and before the version itself"
        )


def check_weights(update: WeightUpdate, own: Sequence[tuple[str, Tensor]], *, are_finite: bool) -> None:
    """WeightSyncError unless the update fits the weights `own` and arrived whole; `are_finite`: no NaN."""
    _check_names(update, own)
    buckets = _checked_buckets(update)
    _check_layout(update, own, buckets)
    digest = xxh3_128()
    for spec, (name, target) in zip(update.manifest.tensors, own, strict=True):
        source, data = tensor_in(buckets[spec.bucket], spec, target)
        digest_tensor(digest, name, source, data)
        if are_finite and source.is_floating_point() and not bool(torch.isfinite(source).all()):
            raise NonFiniteWeights(
                f"version {update.version} has NaN or infinity in {name!r}: training has diverged; if it "
                "belongs there, set check_finite_weights=False"
            )
    if digest.hexdigest() != update.manifest.checksum:
        raise ChecksumMismatch(
            f"the tensors of version {update.version} have checksum {digest.hexdigest()}, its manifest says "
            f"{update.manifest.checksum}"
        )


def _check_names(update: WeightUpdate, own: Sequence[tuple[str, Tensor]]) -> None:
    expected = [(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in own]
    given = [(spec.name, spec.shape, spec.dtype) for spec in update.manifest.tensors]
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


def _checked_buckets(update: WeightUpdate) -> list[Bytes]:
    checksums = update.manifest.bucket_checksums
    of = f"of {len(checksums)} of version {update.version}"
    if len(_items(update.buckets)) != len(checksums):
        raise BucketMissing(
            f"version {update.version} has {len(checksums)} buckets, {len(_items(update.buckets))} arrived"
        )
    buckets: list[Bytes] = []
    for index, (bucket, checksum) in enumerate(zip(update.buckets, checksums, strict=True)):
        if not isinstance(bucket, np.ndarray) or bucket.dtype != np.uint8 or bucket.ndim != 1:
            raise BucketMissing(f"bucket {index} {of} never arrived as bytes")
        arrived = bucket_checksum(bucket)
        if arrived != checksum:
            raise ChecksumMismatch(f"bucket {index} {of} has checksum {arrived}, sent was {checksum}")
        buckets.append(bucket)
    return buckets


def _check_layout(update: WeightUpdate, own: Sequence[tuple[str, Tensor]], buckets: Sequence[Bytes]) -> None:
    """Each tensor lies within a bucket, aligned to its elements, and no two share a byte."""
    places: dict[int, list[tuple[int, int, str]]] = {}
    for spec, (name, target) in zip(update.manifest.tensors, own, strict=True):
        if spec.bucket >= len(buckets):
            raise BucketMissing(
                f"{name!r} of version {update.version} lies in bucket {spec.bucket}, there are {len(buckets)}"
            )
        end, size = spec.offset + target.nbytes, buckets[spec.bucket].nbytes
        if end > size:
            raise ManifestMismatch(
                f"{name!r} of version {update.version} ends at byte {end} of bucket {spec.bucket}, which has "
                f"{size}"
            )
        if spec.offset % target.element_size():
            raise ManifestMismatch(
                f"{name!r} of version {update.version} begins at byte {spec.offset}, which is no multiple of "
                f"its {target.element_size()} bytes per element"
            )
        places.setdefault(spec.bucket, []).append((spec.offset, end, name))
    for bucket, taken in places.items():
        taken.sort()
        for (_, end, name), (offset, _, following) in pairwise(taken):
            if offset < end:
                raise ManifestMismatch(
                    f"{name!r} and {following!r} of version {update.version} overlap in bucket {bucket}"
                )


def _is_formed(spec: TensorSpec) -> bool:
    return (
        isinstance(spec.name, str)
        and isinstance(spec.dtype, str)
        and isinstance(spec.shape, tuple)
        and all(map(_is_count, (*spec.shape, spec.bucket, spec.offset)))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()
