"""Buckets carry tensors of every dtype unchanged, and notice when they do not."""

from dataclasses import dataclass

import pytest
import torch

from dcpo_openrlhf.weight_sync.buckets import ChecksumError, checksums, pack, plan_buckets, unpack, verify


@dataclass(frozen=True)
class Meta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


TENSORS = {
    "embed": torch.randn(37, 5),
    "half": torch.randn(3, 7).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "bytes": torch.arange(13, dtype=torch.uint8),
    "transposed": torch.randn(6, 4).T,
    "empty": torch.zeros(0, 3),
}
METADATA = [Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def packed(bucket_bytes=10**6):
    pairs = iter(TENSORS.items())
    for bucket in plan_buckets(METADATA, bucket_bytes):
        buffer = torch.full((bucket.nbytes,), 255, dtype=torch.uint8)
        pack(bucket, pairs, buffer)
        yield bucket, buffer


@pytest.mark.parametrize("bucket_bytes", [1, 200, 10**6])
def test_unpack_gives_back_what_was_packed_whatever_the_bucket_size(bucket_bytes):
    received = {}
    buckets = list(packed(bucket_bytes))
    for bucket, buffer in buckets:
        received.update(unpack(bucket, buffer))
        assert bucket.nbytes <= bucket_bytes or len(bucket.names) == 1
    assert list(received) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
    assert [bucket.index for bucket, _ in buckets] == list(range(len(buckets)))
    assert all(bucket.count == len(buckets) for bucket, _ in buckets)


def test_checksum_error_names_bucket_and_tensor():
    ((bucket, buffer),) = packed()
    sent = checksums(bucket, buffer)
    verify(bucket, sent=sent, received=checksums(bucket, buffer.clone()))
    begin = next(begin for name, (begin, _, _) in zip(bucket.names, bucket.slots(), strict=True) if name == "half")
    buffer[begin + 1] += 1
    with pytest.raises(ChecksumError, match=r"bucket 1 of 1 .*half arrived with checksum"):
        verify(bucket, sent=sent, received=checksums(bucket, buffer))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, "ended before embed"),
        ({"embed": torch.zeros(37, 4)}, r"'embed', 'float32', \[37, 4\]"),
        ({"embed": torch.zeros(37, 5, dtype=torch.float16)}, "'embed', 'float16'"),
        ({"other": torch.zeros(37, 5)}, "'other', 'float32'"),
    ],
)
def test_a_source_that_differs_from_its_metadata_is_refused(pairs, message):
    (bucket,) = plan_buckets(METADATA[:1], 10**6)
    with pytest.raises(ValueError, match=message):
        pack(bucket, iter(pairs.items()), torch.empty(bucket.nbytes, dtype=torch.uint8))


def test_a_source_without_tensors_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        plan_buckets([], 100)
