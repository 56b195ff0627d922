"""Rows cross Ray as arrays: outside the pickle, equal on arrival, in memory of their own."""

import pickle
from dataclasses import fields, replace

import numpy as np
import torch

from dcpo_openrlhf.policy.rows import Rows
from dcpo_openrlhf.policy.wire import in_order, received, sent


def rows(dtype: torch.dtype) -> Rows:
    mask = torch.arange(40) < torch.tensor([[30], [40], [12], [5]])
    values = torch.rand(4, 39, 2)
    return Rows(
        torch.randint(0, 150_000, (4, 40), dtype=dtype),
        mask,
        mask[:, 1:],  # not contiguous
        -values[..., 0],
        (values[..., 1], values.sum(-1)),
        scale=torch.rand(4),
        entropy_coefficient=0.5,
        index=torch.tensor([3, 1, 0, 2]),
    )


def over_the_wire(item: object) -> tuple[object, int]:
    """What arrives, from buffers that may not be written to, and the bytes of the pickle without them."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(sent(item), protocol=5, buffer_callback=buffers.append)
    return received(pickle.loads(pickled, buffers=[bytes(b.raw()) for b in buffers])), len(pickled)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_rows_arrive_as_they_were_with_token_ids_that_a_model_reads() -> None:
    for dtype in (torch.int32, torch.long):  # the driver's, and those of old records
        made = rows(dtype)
        arrived, in_band = over_the_wire(made)
        assert isinstance(arrived, Rows)
        expected = replace(made, sequences=made.sequences.long())
        for field in fields(Rows):
            assert same(getattr(arrived, field.name), getattr(expected, field.name)), field.name
        large, large_in_band = over_the_wire(made.take(torch.arange(4).repeat(100)))
        assert isinstance(large, Rows) and len(large) == 400
        assert abs(large_in_band - in_band) < 100, "no token is in the pickle"


def test_what_arrives_has_memory_of_its_own() -> None:
    """A write to the pages of Ray's store would end the process."""
    made = rows(torch.int32)
    arrays = sent(made)
    arrived = received(arrays)
    assert isinstance(arrived, Rows) and arrived.old_logp is not None and made.old_logp is not None
    assert arrays.fields["old_logp"].ctypes.data == made.old_logp.data_ptr(), "sent without a copy"
    arrived.old_logp.fill_(1.0)
    arrived.attention_mask.fill_(False)
    assert bool((made.old_logp <= 0).all()) and bool(made.attention_mask.any())


def test_what_are_no_rows_pass() -> None:
    for item in ([0.8, 1.2], 3, None, "text"):
        assert received(sent(item)) is item


def test_statistics_of_data_ranks_are_put_in_the_order_of_the_rows() -> None:
    whole = {"logp": torch.rand(6, 3), "tempered_logp": torch.rand(6, 3, 2)}
    parts = [{name: v[i].numpy() for name, v in whole.items()} | {"index": np.array(i)} for i in ([4, 0, 1], [2, 5, 3])]
    found = in_order(parts)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], values) for name, values in whole.items())
