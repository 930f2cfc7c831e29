"""The journal's file as its only writer sees it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from avzero.tune.journal_file import OnlyWriter

SPACE = {"lr": FloatDistribution(1e-5, 1e-1, log=True), "heads": CategoricalDistribution([1, 4])}


def write(study: optuna.Study, trials: int) -> None:
    """Have trials proposed, reported and told."""
    for _ in range(trials):
        trial = study.ask(SPACE)
        trial.set_user_attr("task", ["a", 0.1, {"nested": None}])
        trial.report(1 / 3, 4)
        study.tell(trial, trial.params["lr"])


def said(study: optuna.Study) -> list[object]:
    """Return all a study says of its trials."""
    return [
        (t.number, t.state, t.params, t.value, t.intermediate_values, t.user_attrs)
        for t in study.trials
    ]


def test_on_disk_is_what_the_writer_saw(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    for call in range(2):
        writer = OnlyWriter(path)
        storage = JournalStorage(writer)
        sampler = optuna.samplers.TPESampler(seed=call)
        study = optuna.create_study(
            study_name="s", storage=storage, sampler=sampler, load_if_exists=True
        )
        write(study, 12)
        before = path.read_bytes()
        seen = said(study)
        writer.commit()
        writer.close()
        assert path.read_bytes().startswith(before) and len(path.read_bytes()) > len(before)
        fresh = JournalStorage(JournalFileBackend(str(path)))
        assert said(optuna.load_study(study_name="s", storage=fresh)) == seen
        assert len(seen) == 12 * (call + 1)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file ends with a whole record, and what was refused is written later."""
    path = tmp_path / "study.journal"
    writer = OnlyWriter(path)
    study = optuna.create_study(study_name="s", storage=JournalStorage(writer))
    write(study, 1)
    writer.commit()
    before = path.read_bytes()
    write(study, 1)
    real = os.write

    def full(handle: int, data: memoryview) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:100])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        writer.commit()
    assert path.read_bytes() == before
    monkeypatch.setattr(os, "ftruncate", lambda handle, length: full(handle, memoryview(b"")))
    with pytest.raises(OSError, match="No space"):
        writer.commit()
    assert path.read_bytes() != before, "not even cutting it back was allowed"
    monkeypatch.undo()
    writer.commit()
    fresh = JournalStorage(JournalFileBackend(str(path)))
    assert said(optuna.load_study(study_name="s", storage=fresh)) == said(study)


def test_ctrl_c_while_it_waits_for_the_disk_writes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.journal"
    writer = OnlyWriter(path)
    study = optuna.create_study(study_name="s", storage=JournalStorage(writer))
    write(study, 2)

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.commit()
    monkeypatch.undo()
    writer.commit()
    fresh = JournalStorage(JournalFileBackend(str(path)))
    assert said(optuna.load_study(study_name="s", storage=fresh)) == said(study)
