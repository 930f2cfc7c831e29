"""The whole loop against a stand-in with the structure of the public AVCA code.

    make bench B=loop

AVCA as published for UCF (main features) on a simulated set of its size, one process, one thread,
the parts of both sides in turn. An epoch is 500 training batches. Stand-in: training, 500 batches
of validation loss, one evaluation. Ours: training, one evaluation, one checkpoint (the stand-in
writes none). A round times 19 batches of each kind, one evaluation and one checkpoint; a training
batch then costs train / 19 + (evaluation + checkpoint) / 500. Ours keeps BatchNorm statistics in
the last steps of an epoch only: 158 of 500, here 6 of 19. It runs with the stand-in's extra
BatchNorm passes (compat) and without (paper). Both sides multiply on the path the probe chose.
Goal (issue 4): at least 3 times where a full-precision path faster than the default exists, at
least 2 times otherwise.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch

from avzero.data.benchmark import Benchmark, Role
from avzero.data.store import FeatureStore
from avzero.models._basic import memory
from avzero.models._contract import Context, Model
from avzero.models._random import Dropout
from avzero.protocol.stages import STAGE_1
from avzero.spec import Preset, TextAlignment
from avzero.train import array
from avzero.train.folder import RunFolder
from avzero.train.gemm import use
from avzero.train.loop import Trainer
from tests.bench._measure import machine, ratio_line, rounds
from tests.bench._reference import RATES, Network, Pairs, ReferenceLoop, weights_of
from tests.bench._ucf import BareSteps, avca_task, ucf_size

STEPS = 19
EPOCH = 500
Parts = dict[str, Callable[[], object]]


def shorter_memory(model: Model) -> int:
    """Return how many of STEPS steps the running statistics remember, as of an EPOCH."""
    return round(memory(model) * STEPS / EPOCH)


def scores_of(trainer: Trainer) -> dict[str, float]:
    """Return the VAL scores of a trained epoch."""
    return trainer._scores(array._look([(trainer, {})])[0])


def our_parts(name: str, trainer: Trainer) -> Parts:
    """Return our training of STEPS batches, an evaluation and a checkpoint."""
    next(trainer.epochs())  # the history a checkpoint carries, and warm code
    return {
        f"{name} train": lambda: array._train([trainer]),
        f"{name} evaluate": lambda: scores_of(trainer),
        f"{name} save": lambda: trainer.folder.save(
            trainer.state, trainer._weights(), trainer._optimizer_tensors()
        ),
    }


def reference_loop(benchmark: Benchmark, batch: int) -> ReferenceLoop:
    """Return the stand-in on the benchmark's open part."""
    info, part = benchmark.info, benchmark.part
    text = torch.from_numpy(info.class_vectors("w2v", TextAlignment.BY_CLASS))

    def pairs(fixed: bool, *roles: Role) -> Pairs:
        rows = part.samples.rows(*roles)
        audio, video = (
            torch.from_numpy(np.asarray(part.features[m])[rows]) for m in ("audio", "video")
        )
        label = torch.from_numpy(part.samples.class_id[rows].astype(np.int64))
        return Pairs((audio, video), text, label, fixed)

    train, val = pairs(False, *STAGE_1.train), pairs(True, *STAGE_1.evaluate)
    seen, unseen = (info.classes.ids(*roles).tolist() for roles in (STAGE_1.seen, STAGE_1.unseen))
    return ReferenceLoop(train, val, seen, unseen, batch)


def reference_parts(loop: ReferenceLoop) -> Parts:
    """Return the stand-in's parts: STEPS batches of training and of validation, an evaluation."""
    return {
        "stand-in train": lambda: loop.train(STEPS),
        "stand-in validate": lambda: loop.validate(STEPS),
        "stand-in evaluate": loop.evaluate,
    }


def same_mathematics(trainer: Trainer, loop: ReferenceLoop, bare: BareSteps) -> str:
    """Return loss (of one batch, without dropout) and scores of both sides with one set of
    weights; refuse a gap: a stand-in that computes something else measures nothing."""
    weights = dict(weights_of(trainer._weights()))
    ours = scores_of(trainer)
    loop.network.load_state_dict(weights)
    theirs = loop.evaluate()
    batch = bare.batches[0]
    bare.model.load_state_dict(trainer._weights())
    for module in bare.model.modules():
        if isinstance(module, Dropout):
            module.off = True
    own = sum(t.item() for t in bare.model.loss(batch, Context(bare.keys[0])).values())
    audio, video, text = batch.features["audio"], batch.features["video"], batch.text
    network = Network(audio.shape[-1], video.shape[-1], text.shape[-1], dict.fromkeys(RATES, 0.0))
    network.load_state_dict(weights)
    other = network.train().loss([x[:, i] for i in (0, 1) for x in (audio, video, text)]).item()
    if abs(own - other) > 1e-4 * own or any(abs(theirs[k] - ours[k]) > 2e-3 for k in theirs):
        raise SystemExit(
            f"the stand-in computes another loss or score: {other}, {theirs}; ours {own}, {ours}"
        )
    scores = (
        f"HM {s['HM']:.4f} ZSL {s['ZSL']:.4f} at beta {s['beta']:.1f}" for s in (theirs, ours)
    )
    return f"stand-in: loss {other:.5f}, {next(scores)}; ours: loss {own:.5f}, {next(scores)}"


def per_batch(taken: dict[str, list[float]], side: str) -> list[float]:
    """Return every round's CPU seconds per training batch with all that an epoch does besides."""
    share = {"train": STEPS, "validate": STEPS, "evaluate": EPOCH, "save": EPOCH}
    mine = {part: taken[f"{side} {part}"] for part in share if f"{side} {part}" in taken}
    return [
        sum(seconds / share[part] for part, seconds in zip(mine, row, strict=True))
        for row in zip(*mine.values(), strict=True)
    ]


def compare(store: FeatureStore, benchmark: Benchmark, batch: int, count: int) -> None:
    """Print what a training batch costs on either side, and the ratios over all rounds."""
    tasks = {p: avca_task(benchmark, batch, STEPS, p) for p in (Preset.COMPAT, Preset.PAPER)}
    bare = BareSteps(benchmark, tasks[Preset.PAPER])
    loop = reference_loop(benchmark, batch)
    trainers = {
        preset: Trainer(task, benchmark, RunFolder(store.storage, task))
        for preset, task in tasks.items()
    }
    parts: Parts = {"bare step": bare.all} | reference_parts(loop)
    for preset, trainer in trainers.items():
        parts |= our_parts(preset.value, trainer)
    rounds(parts, 1)
    taken = rounds(parts, count)
    print(f"\nbatch {batch}; median CPU-ms of {STEPS} batches, or of one evaluation or checkpoint:")
    for name, seconds in taken.items():
        print(f"  {name:20} {1e3 * statistics.median(seconds):8.1f}")
    train = "  stand-in's training batch / our bare step (the public code's: 1.37 x a plain step)"
    print(ratio_line(train, taken["stand-in train"], taken["bare step"], "none"))
    theirs = per_batch(taken, "stand-in")
    for preset in tasks:
        label = f"  whole loop, stand-in / ours ({preset.value})"
        print(ratio_line(label, theirs, per_batch(taken, preset.value), "at least 3, MKL only: 2"))
        alone = f"  training only, stand-in / ours ({preset.value})"
        print(ratio_line(alone, taken["stand-in train"], taken[f"{preset.value} train"], "none"))
    print("  " + same_mathematics(trainers[Preset.PAPER], loop, bare))


def main() -> None:
    """Run at batch 256 and 64."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    print(machine())
    shorter = patch.object(array, "memory", shorter_memory)
    with tempfile.TemporaryDirectory() as scratch, use("full") as path, shorter:
        print(f"matrix products: {path.as_dict()}")
        store, benchmark = ucf_size(scratch)
        for batch in (256, 64):
            compare(store, benchmark, batch, count)


if __name__ == "__main__":
    main()
