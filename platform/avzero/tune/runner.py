"""What runs inside a Ray Tune actor: one trial at a time, one epoch per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray import tune

from avzero.canon import canonical
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Resources, Task
from avzero.train.drive import drive
from avzero.train.folder import RunFolder
from avzero.train.outcome import conclude_stage_1
from avzero.train.records import Epoch, TrainingFailed


class TrialRunner(tune.Trainable):
    """A Tune trainable around the training loop; the actor is reused for many trials.

    A trial that cannot succeed (bad configuration, non-finite loss) ends with a ``failed`` result
    instead of an exception, because Tune would retry an exception.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial of this actor."""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._store = FeatureStore(config["store"])
        self._task = Task.model_validate_json(config["task"])
        self._folder = RunFolder(self._store.storage, self._task)
        resources = Resources.model_validate(config["resources"])
        self._epochs: Iterator[Epoch] = drive(self._store, self._task, resources)

    def step(self) -> dict[str, Any]:
        """Run one epoch, or conclude the trial."""
        try:
            epoch = next(self._epochs, None)
            if epoch is None:
                conclude_stage_1(self._folder, self._store.open(self._task.benchmark))
                return {"done": True, "hm": -1.0}
            return {
                # Tune flattens nested results; a text stays whole.
                "record": canonical(epoch.as_dict()),
                "replayed": epoch.replayed,
                "hm": epoch.val.get("HM", -1.0),
                "done": False,
            }
        except (TrainingFailed, UserError) as error:
            return {"done": True, "failed": str(error), "hm": -1.0}

    def cleanup(self) -> None:
        """Stop the trial's workers, if it has any."""
        close = getattr(self._epochs, "close", None)
        if close is not None:
            close()
