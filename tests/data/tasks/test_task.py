import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from byheart.config import from_dict, to_dict
from byheart.data.tasks import (
    Task,
    TaskConfig,
    collate,
    draw_burn_in,
    pad_questions,
    train_task_tokenizer,
)
from byheart.data.tasks.facts import KEYS, RELATION_ROOMS, ROOMS, VERBS, stranger_sentences
from byheart.data.tasks.facts import NAMES as NAMED
from byheart.data.tokenize import ByteTokenizer

NAMES = ("memorize", "detect", "reason", "capacity")
FORMS = [(name, form) for name in NAMES for form in ("clean", "report")][:-1]


@pytest.fixture
def make(words, numbered):
    def make(name, split="train", seed=0, segment_length=23, form="clean", num_facts=None, **more):
        config = TaskConfig(
            name=name,
            form=form,
            segment_length=segment_length,
            num_facts=num_facts or (3 if name == "capacity" else 1),
            background=numbered,
            **more,
        )
        return Task(config, words, split=split, seed=seed)

    return make


def whole(sample):
    return sample.tokens(0, sample.num_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_document_is_facts_in_unbroken_background_and_a_question(make, words, name):
    task = make(name)
    for index in range(40):
        num_segments = task.min_segments + index % 5
        sample = task.sample(index, num_segments)
        ids = whole(sample)
        assert ids.dtype == np.int32
        assert len(ids) == sample.num_tokens == 23 * num_segments == 23 * sample.num_segments
        question = words.decode(ids[len(ids) - sample.question_length :])
        assert re.fullmatch(r"W(here|hat) is .*\?", question)
        is_background = np.ones(len(ids), dtype=bool)
        is_background[len(ids) - sample.question_length :] = False
        for position, fact in sample.facts:
            np.testing.assert_array_equal(ids[position : position + len(fact)], fact)
            assert is_background[position : position + len(fact)].all()
            is_background[position : position + len(fact)] = False
        # the background goes on behind a fact where it stopped before it
        background = ids[is_background]
        np.testing.assert_array_equal(background, sample.background.read(0, len(background)))
        assert len(set(background.tolist())) == len(background)


@pytest.mark.parametrize("name", NAMES)
def test_fragments_are_parts_of_facts_without_their_beginning(make, words, name):
    task, plain = make(name, fragments=2.0, segment_length=31), make(name, segment_length=31)
    seen = Counter()
    for index in range(60):
        sample = task.sample(index, 1 + index % 3 if name != "capacity" else 3)
        ids = whole(sample)
        taken = np.zeros(len(ids), dtype=bool)
        taken[len(ids) - sample.question_length :] = True
        for position, piece in (*sample.facts, *sample.fragments):
            np.testing.assert_array_equal(ids[position : position + len(piece)], piece)
            assert not taken[position : position + len(piece)].any()
            taken[position : position + len(piece)] = True
        background = ids[~taken]
        np.testing.assert_array_equal(background, sample.background.read(0, len(background)))
        # everything else is as it would be without them
        same = plain.sample(index, sample.num_segments)
        assert (sample.label, sample.question.tolist()) == (same.label, same.question.tolist())
        assert [f.tolist() for _, f in sample.facts] == [f.tolist() for _, f in same.facts]
        if name == "memorize":
            assert sample.fact_positions[0] < 31
        seen["documents"] += 1
        seen["segments"] += sample.num_segments
        seen["fragments"] += len(sample.fragments)
        for _, piece in sample.fragments:
            text = words.decode(piece)
            assert text.split()[0] not in {*KEYS, "The"}
            seen["with a room"] += any(room in text for room in ROOMS)
    assert 0.5 * seen["segments"] < seen["fragments"] < 2.5 * seen["segments"]
    assert seen["with a room"] > seen["fragments"] / 5


@pytest.mark.parametrize("name", ["memorize", "detect", "capacity"])
def test_fragments_tell_all_but_the_person_and_never_follow_one(words, write_lines, name):
    stories = write_lines({"text": " ".join(f"Mary w{i}" for i in range(200))})
    config = TaskConfig(
        name=name, segment_length=23, background=stories, fragments=4.0,
        num_facts=2 if name == "capacity" else 1,
    )  # fmt: skip
    task = Task(config, words, split="train")
    whole_predicates = 0
    for index in range(40):
        sample = task.sample(index, 4)
        for position, fragment in sample.fragments:
            text = words.decode(fragment)
            if position and text.split()[0] in {verb.split()[0] for verb in VERBS}:
                before = words.decode(sample.tokens(position - 1, position))
                assert before not in KEYS
                whole_predicates += any(room in text for room in ROOMS)
    assert whole_predicates > 5


def test_no_fragment_makes_a_fact_of_a_name_behind_a_quotation_mark_or_a_new_line(write_lines):
    rng = np.random.default_rng(0)
    words = [f"{before}{name}" for before in ("\n\n", " \u201c", " ", ' "') for name in NAMED]
    words += [" and then there was more", " of it", " in the garden"]
    stories = write_lines({"text": "".join(rng.choice(words, size=3000))})
    config = TaskConfig(name="detect", segment_length=31, fragments=4.0, background=stories)
    # with other tokens for a name behind something else
    tokenizer = train_task_tokenizer(config, 1024)
    task = Task(config, tokenizer, split="train")
    pattern = re.compile(rf"({'|'.join(NAMED)}) ({'|'.join(VERBS)}) to the ({'|'.join(ROOMS)})")

    def facts_of(sample):
        return pattern.findall(tokenizer.decode(whole(sample)))

    for index in range(40):
        assert len(facts_of(task.sample(index, 4))) == 1
    for step in range(40):
        documents = draw_burn_in(
            task, range(4), (step,), num_beginnings=2, burn_in_segments=5, num_segments=3
        )
        for part in (*documents.beginnings, *documents.endings):
            assert len(facts_of(part)) == len(part.facts)


@pytest.mark.parametrize("name", ["memorize", "detect"])
def test_strangers_look_like_facts_and_are_none(make, words, name):
    task = make(name, strangers=1.0, segment_length=31)
    both, plain = (make(name, segment_length=31, fragments=2.0, strangers=s) for s in (1.0, 0.0))
    strangers = {tuple(ids.tolist()) for ids in words.encode_batch(stranger_sentences())}
    seen = Counter()
    for index in range(60):
        sample, same = task.sample(index, 1 + index % 3), plain.sample(index, 1 + index % 3)
        seen["segments"] += sample.num_segments
        seen["strangers"] += len(sample.fragments)
        for position, sentence in sample.fragments:
            found = sample.tokens(position, position + len(sentence))
            np.testing.assert_array_equal(found, sentence)
            assert tuple(sentence.tolist()) in strangers
            text = words.decode(sentence)
            assert text.split()[0] not in NAMED
            seen["wandering"] += any(f"{verb} to the " in text for verb in VERBS)
        assert (sample.label, sample.question.tolist()) == (same.label, same.question.tolist())
        assert [f.tolist() for _, f in sample.facts] == [f.tolist() for _, f in same.facts]
        # fragments stay what they are beside strangers, of which a short document drops some
        kept, drawn = (
            Counter(tuple(piece.tolist()) for _, piece in made.sample(index, 3).fragments)
            for made in (both, plain)
        )
        for stranger in strangers:
            del kept[stranger]
        assert kept <= drawn
        seen["kept"] += kept.total()
        seen["drawn"] += drawn.total()
    assert 0.5 * seen["segments"] < seen["strangers"] < 1.5 * seen["segments"]
    assert 0 < seen["wandering"] < 0.6 * seen["strangers"]
    assert seen["kept"] > 0.8 * seen["drawn"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strangers": -1.0}, "strangers must be at least 0, got -1"),
        ({"strangers": 1.0, "form": "report"}, "strangers must be 0 for form='report', got 1"),
        ({"strangers": 1.0, "name": "reason"}, "strangers must be 0 for name='reason', got 1"),
        ({"fragments": -1.0}, "fragments must be at least 0, got -1"),
        ({"fragments": float("nan")}, "fragments must be a finite number, got nan"),
        ({"fragments": 1.0, "form": "report"}, "fragments must be 0 for form='report', got 1"),
    ],
)
def test_impossible_fragments_and_strangers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "detect", "segment_length": 9, **settings})


@pytest.mark.parametrize("name", ["memorize", "detect", "capacity"])
def test_the_label_is_the_room_of_the_person_asked_for(make, name):
    task = make(name)
    assert task.labels == ROOMS
    for index in range(30):
        text = task.sample(index, 4).text()
        person = re.search(r"Where is (\w+) \?$", text)[1]
        (room,) = re.findall(rf"\b{person} [a-z ]+ to the (\w+) \.", text)
        assert task.labels[task.sample(index, 4).label] == room


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_sample_depends_on_seed_split_index_and_length_alone(make, name, form):
    task, twin = (make(name, form=form, segment_length=40) for _ in range(2))
    first = whole(task.sample(3, 4))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    twin.sample(0, 5).text()
    np.testing.assert_array_equal(whole(twin.sample(3, 4)), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    others = [task.sample(4, 4), make(name, form=form, segment_length=40, seed=1).sample(3, 4)]
    for other in [*others, task.sample(3, 5)]:
        assert whole(other)[: len(first)].tolist() != first.tolist()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_any_piece_is_that_of_the_whole_document(make, name, form):
    task = make(name, form=form, segment_length=29)
    for index in range(10):
        sample = task.sample(index, 7)
        ids = whole(sample)
        pieces = [sample.tokens(i, min(i + 13, len(ids))) for i in range(0, len(ids), 13)]
        np.testing.assert_array_equal(np.concatenate(pieces), ids)
        for position in sample.fact_positions:
            low, high = max(0, position - 2), position + 3
            np.testing.assert_array_equal(sample.tokens(low, high), ids[low:high])
        assert len(sample.tokens(5, 5)) == 0


def test_a_document_of_millions_of_tokens_is_read_at_its_end(make):
    sample = make("detect").sample(0, 10**7)
    end = sample.tokens(sample.num_tokens - 23, sample.num_tokens)
    assert len(end) == 23
    np.testing.assert_array_equal(end[-sample.question_length :], sample.question)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_label_is_about_equally_likely(make, name, split):
    task = make(name, split=split)
    counts = Counter(task.sample(index, task.min_segments).label for index in range(600))
    assert len(counts) == task.num_labels == 6
    # five standard deviations of a binomial draw
    assert all(abs(count - 100) < 46 for count in counts.values())


@pytest.mark.parametrize("name", NAMES)
def test_held_out_facts_never_occur_in_training(make, name):
    seen = {}
    for split in ("train", "validation"):
        task = make(name, split=split)
        samples = [task.sample(index, task.min_segments) for index in range(400)]
        # of `reason` the pair is held out, not the sentence
        seen[split] = {
            key for s in samples
            for facts in [[tuple(fact.tolist()) for _, fact in s.facts]]
            for key in ([frozenset(facts)] if name == "reason" else facts)
        }  # fmt: skip
    assert not seen["train"] & seen["validation"]


def test_a_fact_begins_at_any_token_and_may_cross_a_boundary(make):
    task = make("detect", segment_length=16)
    positions = Counter(task.sample(index, 3).fact_positions[0] for index in range(2000))
    # 48 tokens, 4 of them the question, 6 or 7 the fact
    assert set(range(38)) <= set(positions) <= set(range(39))
    straddling = sum(positions[start] for start in (11, 12, 13, 14, 15))
    assert straddling == pytest.approx(2000 * 5 / 38, rel=0.2)
    counts = [positions[start] for start in range(38)]
    assert max(counts) < 2.5 * min(counts)


def test_memorize_keeps_its_fact_in_the_first_segment(make):
    task = make("memorize", segment_length=16)
    positions = Counter(task.sample(index, 5).fact_positions[0] for index in range(1000))
    assert set(positions) == set(range(16))
    assert max(task.sample(i, 1).fact_positions[0] for i in range(200)) == 16 - 4 - 6


def test_either_fact_of_reason_may_come_first(make):
    task = make("reason")
    positions = [task.sample(index, 4).fact_positions for index in range(300)]
    assert sum(first < second for first, second in positions) == pytest.approx(150, abs=40)


def test_sixty_four_facts_need_enough_segments(make):
    task = make("capacity", num_facts=64, segment_length=32)
    # 64 facts of at most 7 tokens and a question of 4
    assert task.min_segments == -(-(64 * 7 + 4) // 32) == 15
    assert len(task.sample(0, 15).fact_positions) == 64
    with pytest.raises(
        ValueError, match=r"at least 15 \(num_facts 64, segment_length 32\), got 14"
    ):
        task.sample(0, 14)


def test_collate_pads_on_the_right(make):
    task = make("detect")
    samples = [task.sample(0, 2), task.sample(1, 1)]
    batch = collate(samples, pad_id=7)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [46, 23]
    assert batch["input_ids"][0].tolist() == whole(samples[0]).tolist()
    assert batch["input_ids"][1].tolist() == [*whole(samples[1]).tolist(), *[7] * 23]
    assert batch["labels"].tolist() == [sample.label for sample in samples]
    assert pad_questions(samples) == samples
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        collate([])


def test_bytes_will_do_for_a_tokenizer(numbered):
    config = TaskConfig(name="detect", segment_length=60, background=numbered)
    sample = Task(config, ByteTokenizer(), split="train").sample(0, 9)
    assert re.search(r" \w+ [\w ]+ to the \w+\.", sample.text())
    assert re.search(r" Where is \w+\?$", sample.text())


def test_nothing_from_outside_is_needed():
    config = TaskConfig(name="reason", segment_length=54)
    tokenizer = train_task_tokenizer(config)
    assert tokenizer.vocab_size == 4096
    for word in [*KEYS, *ROOMS, "north", "south", "west", "east", "Where", "What", "travelled"]:
        assert len(tokenizer.encode(f" {word}")) == 1
    task = Task(config, tokenizer, split="validation")
    assert task.labels == RELATION_ROOMS
    text = task.sample(0, 12).text()
    assert len(re.findall(r" The \w+ is \w+ of the \w+\.", text)) == 2


def test_a_small_tokenizer_is_the_same_every_time(numbered, write_lines):
    story = {"facts": ["A sits.", "B sits."], "question": "Who zigzags?", "answer": "A"}
    facts = write_lines(*[story] * 50, name="facts.jsonl")
    config = TaskConfig(name="reason", segment_length=99, facts=facts, background=numbered)
    first, second = (train_task_tokenizer(config, 600) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_a_config_survives_json():
    config = TaskConfig(name="capacity", segment_length=54, num_facts=16, background="books")
    assert from_dict(TaskConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"name": "recall"},
            "name must be one of 'memorize', 'detect', 'reason', 'capacity', got 'recall'",
        ),
        ({"form": "raw"}, "form must be one of 'clean', 'report', got 'raw'"),
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
        ({"name": "capacity", "num_facts": 65}, "num_facts must be between 1 and 64, got 65"),
        ({"name": "capacity", "num_facts": 0}, "num_facts must be between 1 and 64, got 0"),
        ({"num_facts": 2}, "num_facts must be 1 for name='detect', got 2"),
        ({"facts": "qa4.jsonl"}, "facts must be None for name='detect', got 'qa4.jsonl'"),
        ({"num_questions": 2}, "num_questions must be 1 for name='detect', got 2"),
        ({"name": "reason", "num_questions": 0}, "num_questions must be at least 1, got 0"),
        ({"form": "report", "any_length": True}, "any_length must be false for form='report'"),
        ({"name": "capacity", "form": "report"}, "form must be 'clean' for name='capacity'"),
    ],
)
def test_a_config_out_of_range_is_refused(settings, problem):
    plain = {"name": "detect", "segment_length": 54} | settings
    with pytest.raises(ValueError, match=problem):
        from_dict(TaskConfig, plain)


def test_a_task_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match=r"segment_length must be at least 11 .* got 10"):
        make("memorize", segment_length=10)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        make("memorize", seed=-1)
    task = make("memorize")
    with pytest.raises(ValueError, match=r"num_segments must be at least 1 .* got 0"):
        task.sample(0, 0)
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        task.sample(-1, 1)
    with pytest.raises(ValueError, match=r"num_tokens \(23\), got 20 and 24"):
        task.sample(0, 1).tokens(20, 24)


@pytest.mark.parametrize("form", ["clean", "report"])
def test_a_lesson_has_hard_stories_alone_asked_directly(make, words, form):
    more = {"fragments": 2.0} if form == "clean" else {}
    task = make("reason", form=form, segment_length=31, **more)
    kinds = {True: set(), False: set()}
    for lesson in (task.lesson(), task):
        for index in range(60):
            sample = lesson.sample(index, 2)
            sentences = [*(fact for _, fact in sample.facts), sample.question]
            ends = [words.decode(ids).rstrip(" .?").split()[-1] for ids in sentences]
            assert lesson is task or not sample.fragments
            kinds[lesson is task].add((ends[0] == ends[1], ends[2] in ends[:2]))
    everything = {(hard, direct) for hard in (True, False) for direct in (True, False)}
    assert kinds == {False: {(True, True)}, True: everything}
    with pytest.raises(ValueError, match=r"A lesson needs stories of 'reason'.* name='detect'"):
        make("detect", form=form).lesson()


def test_documents_that_follow_each_other_differ_in_their_question_alone(make, words):
    task = make("reason", num_questions=4, segment_length=31, fragments=1.0)
    alone = make("reason", segment_length=31, fragments=1.0)
    for body in range(20):
        group = [task.sample(4 * body + number, 2) for number in range(4)]
        texts = [words.decode(whole(sample)[: -sample.question_length]) for sample in group]
        questions = {words.decode(sample.question) for sample in group}
        assert len(set(texts)) == 1
        assert len(questions) == 4
        # the room that each fact begins with is asked for by both directions
        asked = [words.decode(fact).split()[1] for _, fact in group[0].facts]
        assert sorted(task.labels[sample.label] for sample in group) == sorted(asked * 2)
        # the first is what it is without the others
        first = alone.sample(body, 2)
        np.testing.assert_array_equal(whole(first), whole(group[0]))
    pairs = [task.lesson().sample(index, 1) for index in range(4)]
    texts = [words.decode(whole(sample)[: -sample.question_length]) for sample in pairs]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert pairs[0].label != pairs[1].label


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_any_length_end_in_their_last_segment(make, words, name):
    task = make(name, any_length=True, segment_length=31)
    lengths = set()
    for index in range(80):
        num_segments = 3 if name == "capacity" else 1 + index % 3
        sample = task.sample(index, num_segments)
        ids = whole(sample)
        assert sample.num_segments == num_segments == -(-len(ids) // 31)
        assert len(ids) - sample.question_length >= 31 * (num_segments - 1)
        for position, fact in sample.facts:
            np.testing.assert_array_equal(ids[position : position + len(fact)], fact)
        assert words.decode(ids).endswith("?")
        lengths.add(len(ids) - 31 * (num_segments - 1))
    assert max(lengths) == 31
    assert len(lengths) > 9


def test_as_many_questions_are_asked_as_there_are(make, words, tmp_path):
    facts = tmp_path / "facts.jsonl"
    records = [
        {
            "facts": ["Mary went to the garden.", f"{name} went to the office."],
            "question": f"Where is {KEYS[number]}?",
            "answer": f"a{number}",
        }
        for name in KEYS[10:50]
        for number in range(3)
    ]
    facts.write_text("\n".join(map(json.dumps, records)))
    task = make("reason", facts=str(facts), num_questions=9, segment_length=40)
    samples = [task.sample(index, 1) for index in range(90)]
    names = [words.decode(sample.facts[1][1]).split()[0] for sample in samples]
    groups = [names[start : start + 3] for start in range(0, 90, 3)]
    assert all(len(set(group)) == 1 for group in groups)
    # three questions, and then other facts
    assert len({group[0] for group in groups}) > 9
    labels = [{sample.label for sample in samples[start : start + 3]} for start in range(0, 90, 3)]
    assert max(map(len, labels)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_documents_with_shared_beginnings_have_their_facts_in_one_of_two_parts(make, name):
    task = make(name, fragments=1.0, any_length=True)
    least = task.min_segments
    kinds = Counter()
    for step in range(12):
        documents = draw_burn_in(
            task,
            range(8 * step, 8 * step + 8),
            (0, step),
            num_beginnings=3,
            burn_in_segments=least + 8,
            num_segments=least + 1,
        )
        assert documents.groups == [0, 0, 0, 1, 1, 1, 2, 2]
        assert len(documents.beginnings) == 3
        for beginning in documents.beginnings:
            # whole segments, so that the ending begins with the next
            assert len(whole(beginning)) == 23 * (least + 8)
            assert beginning.question_length == 0
        for index, (ending, group) in enumerate(
            zip(documents.endings, documents.groups, strict=True), 8 * step
        ):
            beginning, alone = documents.beginnings[group], task.sample(index, least + 1)
            kinds[bool(beginning.facts)] += 1
            kinds["fragments"] += bool(beginning.fragments)
            assert ending.num_tokens == alone.num_tokens
            if beginning.facts:
                source = task.sample(8 * step + documents.groups.index(group), least + 8)
                assert ending.facts == ()
                assert beginning.fact_positions == source.fact_positions
                assert ending.label == source.label
                np.testing.assert_array_equal(ending.question, source.question)
            else:
                assert ending.fact_positions == alone.fact_positions
                assert ending.label == alone.label
            ids = whole(ending)
            np.testing.assert_array_equal(ids[len(ids) - ending.question_length :], ending.question)
    assert min(kinds[True], kinds[False], kinds["fragments"]) > 24
    assert kinds["fragments"] < 72


def test_no_more_beginnings_than_documents(make):
    documents = draw_burn_in(
        make("detect"), [5, 6], (0,), num_beginnings=4, burn_in_segments=1, num_segments=1
    )
    assert documents.groups == [0, 1]
    assert len(documents.beginnings) == 2
