"""What a process sets up before its first tensor."""

from __future__ import annotations

import os

import pytest

from linearard import parallel


@pytest.mark.parametrize("name", parallel.ALLOCATOR_SETTINGS)
def test_users_setting_of_the_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {name: "max_split_size_mb:512"}
    monkeypatch.setattr(os, "environ", dict(theirs))
    parallel._let_segments_grow()
    assert os.environ == theirs


def test_segments_grow_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    parallel._let_segments_grow()
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
