"""When stages begin and end, which lengths they have, and how the rate follows them."""

import json
from collections import Counter

import pytest

from byheart.training.curriculum import Curriculum, CurriculumConfig


def config(**changes):
    settings = {
        "max_segments": 3, "advance_accuracy": 0.9, "evaluate_every": 10, "stage_steps": 30,
        "continue_steps": 20,
    }  # fmt: skip
    return CurriculumConfig(**(settings | changes))


def after(*accuracies, **changes):
    """A curriculum that was evaluated every ten steps."""
    curriculum = Curriculum(config=config(**changes))
    for index, accuracy in enumerate(accuracies):
        curriculum = curriculum.record(10 * (index + 1), accuracy)
    return curriculum


def test_a_stage_is_reached_by_one_evaluation_and_the_next_begins_there():
    curriculum = after(0.5, 0.9, 0.89)
    assert (curriculum.stage, curriculum.stage_start, curriculum.saturated_at) == (2, 20, None)
    assert [e.num_segments for e in curriculum.evaluations] == [1, 1, 2]


def test_the_run_goes_on_for_a_while_after_the_last_stage():
    curriculum = after(0.9, 0.95, 1.0)
    assert curriculum.saturated_at == 30
    assert [curriculum.outcome(step) for step in (30, 49, 50)] == ["running", "running", "reached"]


def test_evaluations_after_the_last_stage_change_nothing():
    curriculum = after(0.9, 0.95, 1.0).record(40, 0.0).record(50, 0.0)
    assert (curriculum.stage, curriculum.saturated_at) == (3, 30)
    assert curriculum.outcome(50) == "reached"


def test_the_last_step_comes_nearer_with_every_stage():
    steps = [after(*accuracies).last_step for accuracies in ([], [0.1], [1.0], [1.0] * 3)]
    assert steps == [config().most_steps, 110, 90, 50]
    assert after(1.0, stage_steps=31).last_step == 10 + 2 * 40 + 20


def test_without_steps_to_continue_the_run_ends_with_the_last_stage():
    assert after(1.0, 1.0, 1.0, continue_steps=0).outcome(30) == "reached"


def test_a_stage_that_takes_too_long_ends_the_run():
    assert after(1.0, 0.1, 0.1).outcome(30) == "running"
    assert after(1.0, 0.1, 0.1, 0.1).outcome(40) == "not reached"


def test_a_stage_reached_at_the_last_moment_is_reached():
    assert after(0.1, 0.1, 0.9).outcome(30) == "running"


def test_more_steps_let_a_run_that_has_ended_go_on():
    curriculum = after(0.1, 0.1, 0.1)
    longer = Curriculum.from_list(config(stage_steps=40), curriculum.to_list())
    assert (curriculum.outcome(30), longer.outcome(30)) == ("not reached", "running")


def test_a_saved_curriculum_is_the_same():
    curriculum = after(0.1, 0.9, 0.3)
    saved = json.loads(json.dumps(curriculum.to_list()))
    assert Curriculum.from_list(config(), saved) == curriculum


def test_lessons_go_through_all_stages_first():
    whole = after(*[0.9] * 6, lessons=True)
    assert [(e.num_segments, e.lesson) for e in whole.evaluations] == [
        (1, True), (2, True), (3, True), (1, False), (2, False), (3, False),
    ]  # fmt: skip
    assert (whole.stage, whole.saturated_at, whole.outcome(80)) == (3, 60, "reached")
    assert after(*[0.9] * 5, lessons=True).saturated_at is None
    starts = [after(*[0.9] * n, lessons=True).stage_start for n in range(7)]
    assert starts == [0, 10, 20, 30, 40, 50, 50]
    assert config(lessons=True).most_steps == config().most_steps + 90
    later = after(*[0.9] * 3, lessons=True, min_segments=2)
    assert [(e.num_segments, e.lesson) for e in later.evaluations] == [
        (2, True), (3, True), (2, False),
    ]  # fmt: skip


def test_a_lesson_is_reached_like_a_stage():
    curriculum = after(0.5, 0.9, 0.1, lessons=True)
    assert [(e.num_segments, e.lesson) for e in curriculum.evaluations] == [
        (1, True), (1, True), (2, True),
    ]  # fmt: skip
    assert (curriculum.stage, curriculum.lesson, curriculum.stage_start) == (2, True, 20)
    assert not after(0.5).lesson
    saved = json.loads(json.dumps(curriculum.to_list()))
    assert Curriculum.from_list(config(lessons=True), saved) == curriculum


def test_no_run_is_longer_than_the_longest():
    most = config().most_steps
    curriculum = Curriculum(config=config())
    for step in range(1, most + 1):
        if step % 10 == 0:
            last_chance = step - curriculum.stage_start == 30
            curriculum = curriculum.record(step, 1.0 if last_chance else 0.0)
        if curriculum.outcome(step) != "running":
            break
    assert (step, most) == (110, 110)
    assert curriculum.outcome(step) == "reached"


def test_stages_of_one_length_have_no_other():
    curriculum = after(1.0, lengths="stage")
    assert {curriculum.num_segments(0, step) for step in range(50)} == {2}


def test_mixed_lengths_are_drawn_with_the_documented_weights():
    curriculum = after(1.0, 1.0, stage_share=0.4)
    counts = Counter(curriculum.num_segments(0, step) for step in range(6000))
    shares = {length: count / 6000 for length, count in counts.items()}
    assert shares == pytest.approx({1: 0.2, 2: 0.2, 3: 0.6}, abs=0.02)


def test_a_curriculum_may_begin_with_longer_documents():
    curriculum = after(1.0, min_segments=2, max_segments=4)
    assert (curriculum.stage, curriculum.stage_start) == (3, 10)
    assert {curriculum.num_segments(0, step) for step in range(60)} == {2, 3}
    done = after(1.0, 1.0, 1.0, min_segments=2, max_segments=4)
    assert (done.stage, done.saturated_at, config(min_segments=2).most_steps) == (4, 30, 80)


def test_longer_documents_come_when_the_last_stage_was_reached_and_not_before():
    learning = after(1.0, 1.0, continue_segments=6)
    assert (learning.stage, learning.longest) == (3, 3)
    done = after(1.0, 1.0, 1.0, continue_segments=6)
    assert (done.stage, done.longest) == (3, 6)
    assert {done.num_segments(0, step) for step in range(100)} == {1, 2, 3, 4, 5, 6}
    assert done.rate_share(40, "linear", 0, 0.5) == pytest.approx(0.5 * 6**-0.5)


def test_beginnings_come_when_the_last_stage_was_reached_and_double_equally_often():
    burn_in = {"burn_in_segments": 256, "burn_in_share": 0.25}
    assert not any(after(1.0, 1.0, **burn_in).num_burn_in(0, step) for step in range(99))
    done = after(1.0, 1.0, 1.0, **burn_in)
    drawn = [done.num_burn_in(0, step) for step in range(8000)]
    assert drawn == [done.num_burn_in(0, step) for step in range(8000)]
    assert drawn != [done.num_burn_in(1, step) for step in range(8000)]
    read = [count for count in drawn if count]
    assert len(read) / 8000 == pytest.approx(0.25, abs=0.02)
    assert (min(read), max(read)) == (1, 256)
    shares = [sum(low < count <= 4 * low for count in read) / len(read) for low in (4, 16, 64)]
    assert shares == pytest.approx([0.25] * 3, abs=0.04)
    assert not any(after(1.0, 1.0, 1.0).num_burn_in(0, step) for step in range(99))
    longer = after(1.0, 1.0, burn_in_segments=4, min_segments=2)
    assert {longer.num_burn_in(0, step) for step in range(200)} == {0, 2, 3, 4}


def test_lengths_follow_from_seed_and_step_alone():
    curriculum = after(1.0, 1.0)
    drawn = [curriculum.num_segments(0, step) for step in range(40)]
    assert drawn == [curriculum.num_segments(0, step) for step in range(40)]
    assert drawn != [curriculum.num_segments(1, step) for step in range(40)]


def test_the_rate_rises_stays_and_falls_when_the_last_stage_is_reached():
    learning, done = after(1.0), after(1.0, 1.0, 1.0)
    assert [learning.rate_share(step, "linear", 4) for step in (0, 2, 4, 1000)] == [0, 0.5, 1, 1]
    shares = [done.rate_share(step, "linear", 4) for step in (30, 40, 50)]
    assert shares == pytest.approx([1, 0.5, 0])
    shares = [done.rate_share(step, "cosine", 4) for step in (30, 35, 40, 50)]
    assert shares == pytest.approx([1, 0.853553, 0.5, 0], abs=1e-6)
    assert done.rate_share(50, "constant", 4) == 1
    assert done.rate_share(0, "constant", 0) == 1


def test_the_rate_falls_with_the_length_of_the_stage():
    stages = [after(*[1.0] * reached, max_segments=4) for reached in range(4)]
    assert [stage.rate_share(9, "constant", 0, 0.5) for stage in stages] == pytest.approx(
        [1, 2**-0.5, 3**-0.5, 0.5]
    )
    done = stages[3].record(40, 1.0)
    assert done.rate_share(50, "linear", 0, 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_segments": 0}, "max_segments must be at least 1, got 0"),
        ({"continue_segments": 2}, "continue_segments must be at least 3, got 2"),
        ({"stage_steps": 9}, "stage_steps must be at least 10, got 9"),
        ({"burn_in_segments": -1}, "burn_in_segments must be at least 0, got -1"),
        (
            {"burn_in_segments": 1, "min_segments": 2},
            "burn_in_segments must be at least 2, got 1",
        ),
        ({"burn_in_rows": 0}, "burn_in_rows must be at least 1, got 0"),
        ({"burn_in_share": 1.5}, "burn_in_share must be between 0 and 1, got 1.5"),
        ({"stage_share": 1.5}, "stage_share must be between 0 and 1, got 1.5"),
        ({"advance_accuracy": 99.5}, "advance_accuracy must be between 0 and 1, got 99.5"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
