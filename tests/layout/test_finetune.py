"""What `benchmarks.finetune` compares, and what it makes of the numbers."""

import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.finetune import RUNS, VARIATIONS, closed, parse, runs


def made(monkeypatch, *options):
    paths = ["--data", "t", "--validation", "v", "--out", "o", "--work", "w"]
    monkeypatch.setattr(sys, "argv", ["finetune", *paths, *options])
    return runs(parse(ArgumentParser()), Path("shape"))


def test_the_runs_differ_in_memory_alone(monkeypatch):
    found = made(monkeypatch, "--xl-cache", "32")
    assert tuple(found) == RUNS
    none, start = found["none"], found["start"]
    assert replace(start, name="none", pretrained=none.pretrained) == none
    memory = start.pretrained.memory
    assert replace(memory, knn=None, normalize_qk=False) == none.pretrained.memory
    assert found["further"].training == found["tuned"].training
    assert {found[name].pretrained.memory for name in VARIATIONS} == {memory}


def test_tuning_takes_a_share_of_the_steps(monkeypatch):
    found = made(monkeypatch, "--steps", "3000")
    assert {found[name].training.max_steps for name in VARIATIONS} == {120}


def test_the_share_of_the_gap_counts_what_further_steps_bring():
    def run(nats, short):
        measured = {"nats_per_token": nats, "buckets": [{"nats_per_token": short}]}
        return {"evaluation": {"measurements": [measured]}}

    found = {
        "none": run(3.0, 2.5), "further": run(2.9, 2.4), "start": run(2.5, 2.3),
        "tuned": run(2.7, 2.4),
    }  # fmt: skip
    result = closed(found, "tuned")
    assert result["share_of_the_gap_closed"] == pytest.approx(0.6)
    assert result["share_of_the_gap_closed_beyond_further"] == pytest.approx(0.5)
    assert result["first_512_tokens_before"] == 2.5
    assert result["first_512_tokens_after"] == 2.4
