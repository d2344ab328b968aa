"""Synthetic tasks on long documents: facts in a background text, and a question at the end."""

from byheart.data.tasks.burn_in import BurnIn, draw_burn_in
from byheart.data.tasks.config import TaskConfig, TaskForm, TaskName
from byheart.data.tasks.facts import Split, Story
from byheart.data.tasks.sample import TaskSample, collate, pad_questions
from byheart.data.tasks.stories_file import read_stories
from byheart.data.tasks.task import Task
from byheart.data.tasks.vocabulary import train_task_tokenizer

__all__ = [
    "BurnIn",
    "Split",
    "Story",
    "Task",
    "TaskConfig",
    "TaskForm",
    "TaskName",
    "TaskSample",
    "collate",
    "draw_burn_in",
    "pad_questions",
    "read_stories",
    "train_task_tokenizer",
]
