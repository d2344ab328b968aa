import pickle
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from byheart.data.rows import RowPlan, RowPosition, SegmentDataset, collate
from byheart.errors import DataError


class ListedCorpus:
    """Tokens that tell where they come from: document `d` holds `1000 d`, `1000 d + 1`, ..."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.document_ids = [f"doc-{index}" for index in range(len(lengths))]
        self.fingerprint = str(lengths)

    def document(self, index):
        return np.arange(1000 * index, 1000 * index + self.lengths[index]).astype(np.uint32)


def dataset(lengths, **options):
    corpus = ListedCorpus(lengths)
    return SegmentDataset(corpus, RowPlan(corpus.lengths, **options))


def slow_rows(lengths, *, segment_length, num_rows, orders):
    """Twin: step by step, each row holds the segments it still has to read."""
    documents = ((epoch, document) for epoch, order in enumerate(orders) for document in order)
    rows = [[] for _ in range(num_rows)]
    while True:
        for row in rows:
            if not row:
                epoch, document = next(documents, (0, None))
                if document is not None:
                    offsets = range(0, lengths[document] - 1, segment_length)
                    row.extend((document, epoch, offset) for offset in offsets)
        if not any(rows):
            return
        yield [row.pop(0) if row else None for row in rows]


def as_tuple(position):
    return position and (position.document, position.epoch, position.offset)


long_enough = st.lists(st.integers(2, 40), min_size=1, max_size=13)
plans = st.fixed_dictionaries(
    {"segment_length": st.integers(1, 11), "num_rows": st.integers(1, 7)},
    optional={"seed": st.integers(0, 2**40)},
)


@given(long_enough, plans)
def test_one_pass_predicts_every_token_but_the_first_once_and_in_order(lengths, options):
    data = dataset(lengths, **options)
    read = {index: [] for index in range(len(lengths))}
    for index in range(len(data)):
        item = data[index]
        n = int(item["num_tokens"])
        inputs, labels = item["input_ids"][:n], item["labels"][:n]
        assert (item["input_ids"][n:] == 0).all()
        assert (item["labels"][n:] == -100).all()
        if n:
            document = int(inputs[0]) // 1000
            assert item["document_start"] == (len(read[document]) == 0)
            # one document, no gap: so the labels are the inputs moved by one, across segments too
            assert inputs.tolist() == list(range(int(inputs[0]), int(inputs[0]) + n))
            assert labels.tolist() == (inputs + 1).tolist()
            read[document].extend(labels.tolist())
        else:
            assert not item["document_start"]
    for document, labels in read.items():
        assert labels == list(range(1000 * document + 1, 1000 * document + lengths[document]))


@given(long_enough, plans)
def test_a_row_reads_a_document_to_its_end(lengths, options):
    plan = RowPlan(np.array(lengths), num_steps=97, **options)
    for row in range(plan.num_rows):
        before = None
        for step in range(plan.num_steps):
            position = plan.position(step, row)
            if before is not None:
                offset = before.offset + plan.segment_length
                if offset < lengths[before.document] - 1:
                    expected = RowPosition(
                        document=before.document, epoch=before.epoch, offset=offset
                    )
                    assert position == expected
                else:
                    assert position.offset == 0
            before = position
        assert plan.position(0, row).offset == 0


@given(long_enough, plans)
def test_the_plan_equals_a_simulation_step_by_step(lengths, options):
    size = {name: options[name] for name in ("segment_length", "num_rows")}
    one_pass = RowPlan(np.array(lengths), **options)
    order = _order(lengths, one_pass.seed, epoch=0)
    expected = list(slow_rows(lengths, orders=[order], **size))
    assert one_pass.num_steps == len(expected)
    for step, positions in enumerate(expected):
        found = [as_tuple(one_pass.position(step, row)) for row in range(one_pass.num_rows)]
        assert found == positions

    endless = RowPlan(np.array(lengths), num_steps=61, **options)
    orders = (_order(lengths, endless.seed, epoch=epoch) for epoch in count())
    simulation = slow_rows(lengths, orders=orders, **size)
    # read backwards: what a position is does not depend on what was asked before
    expected = [next(simulation) for _ in range(endless.num_steps)]
    for step in reversed(range(endless.num_steps)):
        found = [as_tuple(endless.position(step, row)) for row in range(endless.num_rows)]
        assert found == expected[step]


def _order(lengths, seed, *, epoch):
    if seed is None:
        return list(range(len(lengths)))
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(len(lengths))
    return sorted(range(len(lengths)), key=lambda document: keys[document])


def test_rows_take_documents_as_they_become_free():
    # segments per document: 3, 1, 2, 1
    plan = RowPlan(np.array([13, 4, 9, 3]), segment_length=5, num_rows=2)
    table = [
        [as_tuple(plan.position(step, row)) for row in range(2)] for step in range(plan.num_steps)
    ]
    assert table == [
        [(0, 0, 0), (1, 0, 0)],
        [(0, 0, 5), (2, 0, 0)],
        [(0, 0, 10), (2, 0, 5)],
        [(3, 0, 0), None],
    ]
    assert plan.num_segments_per_epoch == 7
    assert plan.num_steps_per_epoch == 4


def test_the_last_segment_of_a_document_is_padded():
    data = dataset([8, 3], segment_length=5, num_rows=1)
    assert [data[index]["input_ids"].tolist() for index in range(3)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 0, 0, 0],
        [1000, 1001, 0, 0, 0],
    ]
    assert [data[index]["labels"].tolist() for index in range(3)] == [
        [1, 2, 3, 4, 5],
        [6, 7, -100, -100, -100],
        [1001, 1002, -100, -100, -100],
    ]
    assert [int(data[index]["num_tokens"]) for index in range(3)] == [5, 2, 2]
    assert [bool(data[index]["document_start"]) for index in range(3)] == [True, False, True]


@given(long_enough, st.integers(0, 100))
def test_every_epoch_reads_every_document_once_in_an_order_of_its_own(lengths, seed):
    plan = RowPlan(np.array(lengths), segment_length=100, num_rows=1, num_steps=200, seed=seed)
    documents = [plan.position(step, 0).document for step in range(200)]
    epochs = [plan.position(step, 0).epoch for step in range(200)]
    size = len(lengths)
    assert epochs == [step // size for step in range(200)]
    orders = [documents[start : start + size] for start in range(0, 200 - size, size)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 5:
        assert orders[0] != orders[1] or orders[1] != orders[2]


def test_the_shuffle_is_the_same_on_every_machine():
    plan = RowPlan(np.full(7, 2), segment_length=1, num_rows=1, num_steps=14, seed=5)
    documents = [plan.position(step, 0).document for step in range(14)]
    assert documents == [4, 3, 5, 6, 2, 0, 1, 6, 1, 5, 4, 2, 0, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_the_steps_in_order(num_workers):
    data = dataset([23, 5, 41, 17], segment_length=3, num_rows=5, num_steps=13, seed=1)
    # torch warns about workers on machines with few cores
    loader = DataLoader(data, batch_size=5, collate_fn=collate, num_workers=num_workers)
    for step, batch in enumerate(loader):
        assert batch["input_ids"].shape == batch["labels"].shape == (5, 3)
        assert batch["num_tokens"].shape == batch["document_start"].shape == (5,)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["document_start"].dtype == torch.bool
        for row in range(5):
            item = data[step * 5 + row]
            assert all(torch.equal(batch[key][row], item[key]) for key in item)
    assert step == 12


def test_a_pickled_dataset_gives_the_same_items():
    data = dataset([23, 5, 41, 17], segment_length=3, num_rows=5, num_steps=13, seed=1)
    data[31]
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint == data.fingerprint
    for index in range(len(data)):
        assert all(torch.equal(copy[index][key], value) for key, value in data[index].items())


def test_short_documents_are_left_out_and_long_ones_cut():
    data = dataset(
        [2, 20, 7, 6], segment_length=5, num_rows=1, min_document_tokens=7, max_document_tokens=12
    )
    read = [token for index in range(len(data)) for token in data[index]["labels"].tolist()]
    labels = [token for token in read if token != -100]
    assert labels == [*range(1001, 1012), *range(2001, 2007)]
    assert data.plan.num_documents == 2
    assert data.plan.num_segments_per_epoch == 5


def test_a_longer_plan_continues_a_shorter_one():
    options = {"segment_length": 3, "num_rows": 2, "seed": 7}
    short = RowPlan(np.array([11, 5, 17]), num_steps=19, **options)
    long = RowPlan(np.array([11, 5, 17]), num_steps=190, **options)
    assert short.fingerprint == long.fingerprint
    assert short.position(18, 1) == long.position(18, 1)


def test_the_fingerprint_tells_schedules_apart():
    def fingerprint(lengths=(11, 5, 17), **changes):
        options = {"segment_length": 3, "num_rows": 2, "num_steps": 19, "seed": 7} | changes
        return dataset(lengths, **options).fingerprint

    changes = [
        {"segment_length": 5},
        {"num_rows": 3},
        {"num_steps": None},
        {"seed": 8},
        {"seed": None},
        {"min_document_tokens": 7},
        {"max_document_tokens": 13},
        {"lengths": (11, 5, 19)},
    ]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *(fingerprint(**change) for change in changes)}) == 9


def test_positions_name_documents_for_checkpoints():
    data = dataset([8, 3], segment_length=5, num_rows=3)
    assert data.positions_at(0) == [
        {"document": 0, "document_id": "doc-0", "epoch": 0, "offset": 0},
        {"document": 1, "document_id": "doc-1", "epoch": 0, "offset": 0},
        None,
    ]
    assert data.positions_at(1) == [
        {"document": 0, "document_id": "doc-0", "epoch": 0, "offset": 5},
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"min_document_tokens": 1}, "min_document_tokens must be at least 2, got 1"),
        (
            {"min_document_tokens": 7, "max_document_tokens": 5},
            "max_document_tokens must be at least 7, got 5",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RowPlan(np.array([11]), **({"segment_length": 3, "num_rows": 2} | options))


def test_a_corpus_of_short_documents_is_refused():
    with pytest.raises(DataError, match=r"min_document_tokens \(13\) or more, the longest has 11"):
        RowPlan(np.array([5, 11]), segment_length=3, num_rows=2, min_document_tokens=13)
    with pytest.raises(DataError, match="the longest has 0"):
        RowPlan(np.array([], dtype=np.int64), segment_length=3, num_rows=2)


def test_what_the_plan_does_not_have_is_refused():
    data = dataset([8, 3], segment_length=5, num_rows=3)
    with pytest.raises(IndexError, match="step must be between 0 and 1, got 2"):
        data[6]
    with pytest.raises(IndexError, match="step must be between 0 and 1, got -1"):
        data[-1]
    with pytest.raises(IndexError, match="row must be between 0 and 2, got 3"):
        data.plan.position(0, 3)
    with pytest.raises(ValueError, match=r"lengths of the corpus \(2 documents\), got one for"):
        SegmentDataset(ListedCorpus([8, 4]), data.plan)
