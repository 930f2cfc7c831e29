"""Stages of the protocol as sets of roles (protocol.md section 1)."""

from __future__ import annotations

from dataclasses import dataclass

from avzero.data.benchmark import ClassRole, Role


@dataclass(frozen=True)
class Stage:
    """What is trained on, what is evaluated, and which classes are seen and unseen in it."""

    number: int
    train: tuple[Role, ...]
    evaluate: tuple[Role, ...]
    seen: tuple[ClassRole, ...]
    unseen: tuple[ClassRole, ...]


STAGE_1 = Stage(
    1,
    train=(Role.TRAIN,),
    evaluate=(Role.VAL_SEEN, Role.VAL_UNSEEN),
    seen=(ClassRole.TRAIN,),
    unseen=(ClassRole.VAL_UNSEEN,),
)
STAGE_2 = Stage(
    2,
    train=(Role.TRAIN, Role.VAL_SEEN, Role.VAL_UNSEEN),
    evaluate=(Role.TEST_SEEN, Role.TEST_UNSEEN),
    seen=(ClassRole.TRAIN, ClassRole.VAL_UNSEEN),
    unseen=(ClassRole.TEST_UNSEEN,),
)
STAGES = {1: STAGE_1, 2: STAGE_2}
