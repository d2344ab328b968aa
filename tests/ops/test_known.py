import pytest
import torch

from byheart.ops import known


def test_a_mask_is_asked_on_a_cpu_alone():
    assert known.known_none(torch.zeros(3, dtype=torch.bool))
    assert not known.known_none(torch.tensor([False, True]))
    # a value that is not there cannot be asked for: to try raises
    assert not known.known_none(torch.zeros(3, dtype=torch.bool, device="meta"))


def test_what_must_hold_is_refused_with_the_callers_error():
    known.require(torch.tensor([True, True]), lambda: KeyError("met"), "must hold")
    with pytest.raises(KeyError, match="met"):
        known.require(torch.tensor([True, False]), lambda: KeyError("met"), "must hold")


def test_where_values_are_not_known_the_device_checks(monkeypatch):
    monkeypatch.setattr(known, "values_are_known", lambda _: False)
    known.require(torch.tensor([True, True]), lambda: KeyError("met"), "must hold")
    with pytest.raises(RuntimeError, match="must hold"):
        known.require(torch.tensor([True, False]), lambda: KeyError("met"), "must hold")
    known.require(torch.ones(2, dtype=torch.bool, device="meta"), lambda: KeyError("met"), "holds")
