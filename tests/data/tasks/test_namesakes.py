import re
from collections import Counter

import numpy as np
import pytest

from byheart.data.tasks import Task, TaskConfig, train_task_tokenizer
from byheart.data.tasks.facts import NAMES, ROOMS
from byheart.data.tasks.namesakes import add_namesakes
from byheart.data.tasks.streams import read_background
from byheart.recipes.tasks import rmt_detect

STORY = (
    "Then Anse laughed. Poor Anse, thought Mink; was Anse's hat red? Twice, Mink and the Mayor "
    "saw Rose, and then Rose, a rose in her hair, saw Mink. “Go,” said Rose. Mars was far. Mars! "
    "On Mars no man is Anse. Here, Mr. Ames and Mr. Ames and Mr. Ames met the Martian, the Martian "
    "and the Martian said no. For Bree and Bree and Bree nobody cares."
)


def rename(share, seed=0, text=STORY):
    (renamed,) = add_namesakes([text], NAMES, share, np.random.default_rng(seed))
    return renamed


def test_people_get_one_other_name_each_from_beginning_to_end():
    # Rose is also a flower, Mars and Bree do nothing, the Martian and the Mayor have an article,
    # Mr. Ames has a title
    for seed in range(5):
        (anse,) = re.findall(r"Then (\w+) laughed", rename(1.0, seed))
        (mink,) = re.findall(r"thought (\w+);", rename(1.0, seed))
        assert {anse, mink} <= {*NAMES}
        assert rename(1.0, seed) == STORY.replace("Anse", anse).replace("Mink", mink)


def test_a_share_of_the_people_is_renamed():
    assert rename(0.0) == STORY
    kept = sum("Anse" in rename(0.5, seed) for seed in range(100))
    assert 35 <= kept <= 65
    assert {name for seed in range(40) for name in NAMES if name in rename(0.5, seed)} == {*NAMES}


def test_texts_without_people_stay_as_they_are():
    text = "No names in here, and nobody, and none."
    assert rename(1.0, text=text) == text


def test_heroes_of_the_stories_that_come_with_byheart_are_renamed():
    texts = read_background(None, "train")
    before, after = (
        Counter(re.findall(r"\b(?:Mary|John|Daniel|Sandra|Mr|Mars|Earth)\b", " ".join(stories)))
        for stories in (texts, add_namesakes(texts, NAMES, 1.0, np.random.default_rng(0)))
    )
    assert (before["Daniel"], before["Sandra"]) == (0, 0)
    assert min(after[name] for name in NAMES) > 100
    assert [after[word] for word in ("Mr", "Mars", "Earth")] == [
        before[word] for word in ("Mr", "Mars", "Earth")
    ]


@pytest.mark.parametrize("name", ["memorize", "detect"])
def test_background_of_a_task_has_namesakes(words, tmp_path, name):
    path = tmp_path / "stories.txt"
    path.write_text("and then Anse said to Anse, who was Anse in all but name\n" * 40)

    def heroes(namesakes, seed):
        config = TaskConfig(name=name, segment_length=64, background=str(path), namesakes=namesakes)
        text = Task(config, words, split="train", seed=seed).sample(0, 4).text()
        return {*re.findall(rf"{'|'.join(NAMES)}|\[UNK\]", text)}

    # the fact has a name of its own, and strange words are unknown
    plain, *named = (
        heroes(share, seed) for share, seed in ((0.0, 0), *((1.0, s) for s in range(9)))
    )
    assert "[UNK]" in plain
    assert len(plain & {*NAMES}) == 1
    assert named[0] == heroes(1.0, 0)
    assert all(len(found & {*NAMES}) in {1, 2} for found in named)
    assert len({frozenset(found) for found in named}) > 2


def test_persons_and_rooms_are_words_of_the_vocabulary_of_detect():
    run = rmt_detect()
    assert run.encoder is not None
    config = run.task.resolve(run.segment_length, "train")
    tokenizer = train_task_tokenizer(config, run.encoder.vocab_size)
    for word in (*NAMES, *ROOMS):
        assert len(tokenizer.encode(f" {word}")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"namesakes": -0.1}, r"namesakes is a share and must be between 0 and 1, got -0\.1"),
        ({"namesakes": 1.5}, r"namesakes is a share and must be between 0 and 1, got 1\.5"),
        ({"namesakes": float("nan")}, "namesakes must be a finite number, got nan"),
        ({"namesakes": 0.5, "form": "report"}, r"namesakes must be 0 for form='report', got 0\.5"),
        ({"namesakes": 0.5, "name": "reason"}, r"namesakes must be 0 for name='reason', got 0\.5"),
        (
            {"more_stories": True, "background": "x"},
            "must be false where another .*, got background='x'",
        ),
    ],
)
def test_impossible_namesakes_and_stories_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "detect", "segment_length": 9, **settings})
