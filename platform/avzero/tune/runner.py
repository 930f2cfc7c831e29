"""What runs inside a Ray Tune actor: one trial at a time, one epoch per step."""

from __future__ import annotations

from collections.abc import Generator
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

    A diverging configuration ends with a ``failed`` result, trouble in the surroundings (store
    unreachable, disk full) with a ``trouble`` result; neither is an exception, because Tune would
    retry those.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial of this actor."""
        self._epochs = self._run(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial."""
        self.cleanup()
        self._epochs = self._run(new_config)
        return True

    @staticmethod
    def _run(config: dict[str, Any]) -> Generator[Epoch, None, None]:
        """Yield the epochs of a trial, then conclude it. Nothing happens before the first step."""
        store = FeatureStore(config["store"])
        task = Task.model_validate_json(config["task"])
        yield from drive(store, task, Resources.model_validate(config["resources"]))
        conclude_stage_1(RunFolder(store.storage, task), store.open(task.benchmark))

    def step(self) -> dict[str, Any]:
        """Run one epoch, or conclude the trial."""
        ended: dict[str, Any] = {"done": True, "hm": -1.0}
        try:
            epoch = next(self._epochs, None)
        except TrainingFailed as error:
            return ended | {"failed": str(error)}
        except UserError as error:
            return ended | {"trouble": str(error)}
        if epoch is None:
            return ended | {"finished": True}
        return {
            # Tune flattens nested results; a text stays whole.
            "record": canonical(epoch.as_dict()),
            "replayed": epoch.replayed,
            "hm": epoch.val.get("HM", -1.0),
            "done": False,
        }

    def cleanup(self) -> None:
        """Stop the trial's workers, if it has any."""
        self._epochs.close()
