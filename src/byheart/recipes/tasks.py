"""The tasks of the Recurrent Memory Transformer report, for a small encoder from scratch.

The defaults of `byheart.training.task_config` are the recipe: windows of 64 tokens, 10 memory
tokens, documents of mixed lengths that grow from 1 to 7 segments, and in `reason` to 16. For a
pretrained encoder:
`--set pretrained=FOLDER --set encoder=null --set window=512 --set training.learning_rate=5e-5`.
"""

from byheart.training.task_config import (
    CurriculumConfig,
    EncoderConfig,
    MemoryPart,
    TaskEvaluationConfig,
    TaskPart,
    TaskRunConfig,
    TaskTrainingConfig,
)


def rmt_memorize() -> TaskRunConfig:
    """Keep a fact from the first segment to the question in the last: minutes on 2 CPU cores."""
    return TaskRunConfig(name="rmt-memorize", task=TaskPart(name="memorize"))


def rmt_detect() -> TaskRunConfig:
    """Find a fact anywhere in a text and keep it to the question."""
    return TaskRunConfig(
        name="rmt-detect",
        # in few stories, whose people have other names than those of the facts, a model learns to
        # take such a name for a fact
        task=TaskPart(name="detect", namesakes=0.5, more_stories=True),
        # a memory that is written anew in every segment drifts in long texts, also while it is
        # empty: gates keep it, and learn to in texts as long as those of evaluation
        curriculum=CurriculumConfig(continue_steps=1000, burn_in_segments=1024),
        memory=MemoryPart(update="gated", gate_bias_init=2.0),
        training=TaskTrainingConfig(write_cost=0.3),
    )


def rmt_reason() -> TaskRunConfig:
    """Keep two facts from anywhere in a text, and answer by the one that is asked for."""
    return TaskRunConfig(
        name="rmt-reason",
        # parts of these facts in the background have not made it better at long documents
        task=TaskPart(name="reason", fragments=0.0),
        # one kind of story in four is hardly learned among the others, and not at all where
        # every layer meets the background
        encoder=EncoderConfig(num_local_layers=2, pooling="mean", init_std=0.07),
        # the last two in a hundred come when the rate falls, not before. Two facts wear away in
        # segments that do not concern them: gates that close keep them, and learn to where it pays
        curriculum=CurriculumConfig(
            lessons=True, advance_accuracy=0.98, continue_steps=1500, continue_segments=16
        ),
        memory=MemoryPart(update="gated", gate_bias_init=2.0),
        # a fact that the end of a segment cuts is rare, and learned last: more documents a step
        training=TaskTrainingConfig(rows_per_device=64, write_cost=0.1),
    )


def rmt_capacity() -> TaskRunConfig:
    """Keep 8 facts and answer by one of them: what a memory can hold.

    16 need three segments: --set task.num_facts=16 --set curriculum.min_segments=3 --set
    evaluation.segments=[4,8,16].
    """
    return TaskRunConfig(
        name="rmt-capacity",
        task=TaskPart(name="capacity", num_facts=8),
        # 8 facts fill more than a segment of 51 tokens
        curriculum=CurriculumConfig(min_segments=2),
        evaluation=TaskEvaluationConfig(segments=(2, 4, 8, 16)),
    )
