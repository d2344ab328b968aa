import re
from collections import Counter

import numpy as np
import pytest

from byheart.data.tasks import Task, TaskConfig
from byheart.data.tasks.facts import NAMES
from byheart.data.tasks.namesakes import add_namesakes
from byheart.data.tasks.streams import read_background

STORY = (
    "Then Anse laughed. Poor Anse, thought Mink; was Anse's hat red? Twice, Mink and the Mayor "
    "saw Rose, and then Rose, a rose in her hair, saw Mink. “Go,” said Rose. Mars was far. Mars! "
    "On Mars no man is Anse."
)


def rename(share, seed=0, text=STORY):
    (renamed,) = add_namesakes([text], NAMES, share, np.random.default_rng(seed))
    return renamed


def test_people_get_one_other_name_each_from_beginning_to_end():
    for seed in range(5):
        renamed = rename(1.0, seed)
        pattern = re.escape(STORY)
        for person in ("Anse", "Mink"):
            first, *others = (
                f"(?P<{person}>{'|'.join(NAMES)})" if place == 0 else f"(?P={person})"
                for place in range(STORY.count(person))
            )
            for group in (first, *others):
                pattern = re.sub(
                    rf"(?<![<=]){person}\b", group.replace("\\", r"\\"), pattern, count=1
                )
        # Rose is also a flower, Mars begins most of its sentences, the Mayor comes once
        assert re.fullmatch(pattern, renamed)


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
        Counter(re.findall(r"\b(?:Mary|John|Daniel|Sandra)\b", " ".join(stories)))
        for stories in (texts, add_namesakes(texts, NAMES, 0.5, np.random.default_rng(0)))
    )
    assert (before["Daniel"], before["Sandra"]) == (0, 0)
    assert min(after[name] for name in NAMES) > 100


@pytest.mark.parametrize("name", ["memorize", "detect"])
def test_background_of_a_task_has_namesakes(words, tmp_path, name):
    path = tmp_path / "stories.txt"
    path.write_text("and then Anse met Anse, who was Anse in all but name\n" * 40)

    def background(namesakes, seed=0):
        config = TaskConfig(name=name, segment_length=64, background=str(path), namesakes=namesakes)
        return Task(config, words, split="train", seed=seed).sample(0, 4)

    assert background(0.0).text() == background(0.0).text()
    assert background(1.0).text() != background(0.0).text()
    assert background(1.0).text() == background(1.0).text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"namesakes": -0.1}, r"namesakes must be between 0 and 1, got -0\.1"),
        ({"namesakes": 1.5}, r"namesakes must be between 0 and 1, got 1\.5"),
        ({"namesakes": float("nan")}, "namesakes must be between 0 and 1, got nan"),
        ({"namesakes": 0.5, "form": "report"}, r"namesakes must be 0 for form='report', got 0\.5"),
        ({"namesakes": 0.5, "name": "reason"}, r"namesakes must be 0 for name='reason', got 0\.5"),
    ],
)
def test_impossible_namesakes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "detect", "segment_length": 9, **settings})
