"""The bucket sampler: full batches of one size, fair to every index, and resumed exactly."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dopsd.data.dataset import BucketSampler

sizes_of = st.lists(st.sampled_from([(64, 64), (48, 80), (80, 48)]), min_size=1, max_size=25)
batches = st.integers(1, 6)
seeds = st.integers(-5, 5)
quick = hypothesis_settings(max_examples=80, deadline=None)


def one_epoch(sampler: BucketSampler) -> list[list[int]]:
    """The batches up to the first of the next epoch that has any."""
    epoch = sampler.state_dict()["epoch"]
    drawn = []
    while True:
        before = sampler.state_dict()
        batch = next(sampler)
        if sampler.state_dict()["epoch"] != epoch:
            sampler.load_state_dict({**before, "epoch": epoch + 1, "position": 0})
            return drawn
        drawn.append(batch)


@quick
@given(sizes=sizes_of, batch_size=batches, seed=seeds)
def test_batches_are_full_and_of_one_size(sizes, batch_size, seed):
    for batch in islice(BucketSampler(sizes, batch_size, seed), 40):
        assert len(batch) == batch_size
        assert len({sizes[index] for index in batch}) == 1


@quick
@given(sizes=sizes_of, batch_size=batches, seed=seeds, epochs=st.integers(1, 5))
def test_every_index_appears_once_an_epoch_to_within_one(sizes, batch_size, seed, epochs):
    sampler = BucketSampler(sizes, batch_size, seed)
    counts = Counter(index for _ in range(epochs) for batch in one_epoch(sampler) for index in batch)
    bucket = Counter(sizes)
    for index, size in enumerate(sizes):
        # A batch of a bucket smaller than itself must repeat; the bucket then waits until the others have caught up.
        ahead = max(1, -(-(batch_size - 1) // bucket[size]))
        assert epochs <= counts[index] <= epochs + ahead


@quick
@given(count=st.integers(1, 25), batch_size=batches, seed=seeds, length=st.integers(1, 60))
def test_within_a_bucket_counts_never_differ_by_more_than_one(count, batch_size, seed, length):
    drawn = Counter(i for batch in islice(BucketSampler([(8, 8)] * count, batch_size, seed), length) for i in batch)
    counts = [drawn[index] for index in range(count)]
    assert max(counts) - min(counts) <= 1


@quick
@given(sizes=sizes_of, batch_size=batches, seed=seeds, at=st.integers(0, 60))
def test_a_resumed_sampler_continues_the_unbroken_sequence(sizes, batch_size, seed, at):
    unbroken = BucketSampler(sizes, batch_size, seed)
    for _ in range(at):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.state_dict()))  # as a checkpoint keeps it
    resumed = BucketSampler(sizes, batch_size, seed)
    next(resumed)  # wherever it was before
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert list(islice(resumed, 50)) == list(islice(unbroken, 50))


repeated = st.lists(
    st.tuples(st.sampled_from([(64, 64), (48, 80)]), st.integers(1, 4)), min_size=1, max_size=12
)  # (size, repeats) of each index


@quick
@given(drawn=repeated, batch_size=batches, seed=seeds)
def test_an_index_that_repeats_is_drawn_as_its_copies_would_be(drawn, batch_size, seed):
    sizes, repeats = zip(*drawn, strict=True)
    copies = [index for index, times in enumerate(repeats) for _ in range(times)]
    plain = BucketSampler([sizes[index] for index in copies], batch_size, seed)
    sampler = BucketSampler(sizes, batch_size, seed, repeats)
    assert list(islice(sampler, 30)) == [[copies[place] for place in batch] for batch in islice(plain, 30)]
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = BucketSampler(sizes, batch_size, seed, repeats)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 20)) == list(islice(sampler, 20))


def test_repeats_of_one_are_none_and_others_are_another_sequence():
    sizes = [(64, 64)] * 5
    state = BucketSampler(sizes, 2, 0).state_dict()
    assert BucketSampler(sizes, 2, 0, [1] * 5).state_dict() == state
    with pytest.raises(ValueError, match="the examples' sizes or repeats"):
        BucketSampler(sizes, 2, 0, [1, 1, 2, 1, 1]).load_state_dict(state)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        BucketSampler(sizes, 2, 0, [1, 1, 0, 1, 1])


def test_seeds_and_epochs_differ():
    sizes = [(64, 64)] * 32
    sampler = BucketSampler(sizes, 4, 0)
    first, second = one_epoch(sampler), one_epoch(sampler)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(32))
    assert first != second
    assert one_epoch(BucketSampler(sizes, 4, 1)) != first


def test_another_sequence_is_refused():
    sizes = [(64, 64)] * 5
    state = BucketSampler(sizes, 2, 0).state_dict()
    for other in (BucketSampler(sizes, 3, 0), BucketSampler(sizes, 2, 1), BucketSampler(sizes[1:], 2, 0)):
        with pytest.raises(ValueError, match="differs in"):
            other.load_state_dict(state)
    for wrong in ({"epoch": -1}, {"position": 4}, {"position": None}):
        with pytest.raises(ValueError, match="start the run anew"):
            BucketSampler(sizes, 2, 0).load_state_dict({**state, **wrong})


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        BucketSampler([], 4, 0)
    with pytest.raises(ValueError, match="batch_size"):
        BucketSampler([(8, 8)], 0, 0)
