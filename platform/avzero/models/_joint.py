"""One input vector of both modalities; of the CLIP/CLAP systems also the parts of the text.

On the clipclap feature set a class text vector is [CLIP 512 | WavCaps 1024] (clipclap.md section
1), and a system of one modality takes the part made by that modality's own encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from avzero.errors import UserError
from avzero.models._contract import Shapes
from avzero.spec import Modality

WordEmbeddings = Literal["both", "clip", "wavcaps"]

_TEXT = 1536
_PARTS = {"both": slice(0, _TEXT), "clip": slice(0, 512), "wavcaps": slice(512, _TEXT)}
_OWN: dict[Modality, WordEmbeddings] = {"both": "both", "audio": "wavcaps", "video": "clip"}


def joint_width(shapes: Shapes, modality: Modality = "both") -> int:
    """Return the width of ``joint``."""
    if modality == "both":
        return shapes.features["video"] + shapes.features["audio"]
    return shapes.features[modality]


def joint(features: Mapping[str, Tensor], modality: Modality = "both") -> Tensor:
    """Return [video, audio] of samples [..., d_v + d_a], or the one modality in use."""
    if modality == "both":
        return torch.cat([features["video"], features["audio"]], dim=-1)
    return features[modality]


def text_part(title: str, width: int, modality: Modality, wanted: WordEmbeddings) -> slice:
    """Return which columns of the class text a system reads.

    Args:
        title: the system's name in messages.
        width: columns of the class text.
        modality: one modality alone reads its own part, where the text has parts.
        wanted: the part asked for; ``both`` leaves the choice to ``modality``.

    Raises:
        UserError: ``wanted`` is not the modality's part, or the text has no parts.
    """
    if wanted == "both":
        return _PARTS[_OWN[modality]] if width == _TEXT else slice(0, width)
    if width != _TEXT:
        raise UserError(
            f"{title}: word_embeddings {wanted!r} needs class text of {_TEXT} columns (CLIP 512, "
            f"then WavCaps 1024), and this benchmark's has {width}; set word_embeddings to 'both', "
            "or choose a clipclap benchmark"
        )
    if modality != "both" and wanted != _OWN[modality]:
        raise UserError(
            f"{title}: modality {modality!r} reads word_embeddings {_OWN[modality]!r}, not "
            f"{wanted!r}; set word_embeddings to 'both', or modality to 'both'"
        )
    return _PARTS[wanted]
