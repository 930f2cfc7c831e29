"""TCaF: temporal and cross-modal attention for audio-visual zero-shot learning.

Mercea, Hummel, Koepke, Akata; ECCV 2022; https://arxiv.org/abs/2207.09966

Built from specs/models/tcaf.md. Both modalities are sequences; tokens attend to the other modality
and a class token only. Options beyond the numbers: ``attention`` (what may attend to what),
``video_norm_axis``, ``eval_time`` (the release trains with seconds and tests with token numbers),
``extra_bn_pass`` (its additional train-mode pass after every step).

On averaged features every sequence has length 1, and the video's norm is taken over channels
whatever ``video_norm_axis`` says: over time, each channel would be divided by itself.
``max_len_train`` and the loader's windows are a matter of reading data: token k lies at k steps.
Where the spec is silent: row 0 of the modality table is audio; with ``extra_bn_pass`` the class
table is projected after the anchors' texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avzero.models._basic import Linear
from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._layers import MLP, Dropout
from avzero.models._losses import cross_entropy, mse
from avzero.models._reference import load_strictly
from avzero.models._sequences import MaskedBlock, Pairs, attention_bias, real_steps
from avzero.spec import Count, Positive, Probability

OUT = 64
CODE = 64
"""Width of the position and modality code."""
FEED_FORWARD = 128
PAIR = {"audio": 0, "video": 1}


class TCAFConfig(ModelConfig):
    """Hyperparameters of TCaF, named as in tcaf.md section 8."""

    layers: Count = 6
    heads: Count = 8
    dim_head: Count = 64
    H: Count = 512
    K: Count = 512
    p_emb: Probability = 0.3
    p_transformer: Probability = 0.3
    p_pos: Probability = 0.2
    p_dec: Probability = 0.1
    p_add: Probability = 0.1
    fourier_scale: Positive = 10.0
    attention: Pairs = "cross_only"
    video_norm_axis: Literal["time", "channel"] = "time"
    eval_time: Literal["seconds", "index"] = "seconds"
    extra_bn_pass: bool = False
    audio_divisor: Positive = 255.0
    """The release divides audio by 255, also where it is no 8-bit code."""
    audio_seconds: Positive = 0.96
    video_seconds: Positive = 0.64


class _Positions(nn.Module):
    """Appends a code of time, modality and padding to features and mixes both."""

    fourier_randn: Tensor

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("fourier_randn", scale * torch.randn(2, CODE // 2))
        self.modal_embedding = nn.Embedding(2, CODE)
        self.fourier_embeddings = Linear(CODE, CODE)
        self.pad_embedding = nn.Embedding(1, CODE)
        self.out_proj_audio = Linear(width + CODE, width)
        self.out_proj_video = Linear(width + CODE, width)

    def forward(self, x: Tensor, time: Tensor, real: Tensor, modality: str) -> Tensor:
        """Return tokens [n, T, D] of features [n, T, D] at ``time`` [T]; ``real`` [n, T]."""
        phase = 2 * math.pi * time[:, None] * self.fourier_randn.sum(0)
        code = self.fourier_embeddings(torch.cat([phase.sin(), phase.cos()], dim=-1))
        code = code + self.modal_embedding.weight[PAIR[modality]]
        code = code + self.pad_embedding.weight[0] * (~real)[..., None]
        mix = self.out_proj_audio if modality == "audio" else self.out_proj_video
        out: Tensor = mix(torch.cat([x, code], dim=-1))
        return out


class TCAF(Model):
    """One transformer over both modalities' tokens; its class token is compared with texts."""

    card: ClassVar[Card] = Card(
        title="TCaF",
        authors="Mercea, Hummel, Koepke, Akata",
        year=2022,
        venue="ECCV",
        link="https://arxiv.org/abs/2207.09966",
        features=("averaged", "clipclap", "temporal"),
        options=("attention", "video_norm_axis", "eval_time", "extra_bn_pass"),
    )
    Config: ClassVar[type[ModelConfig]] = TCAFConfig
    scoring: ClassVar[frozenset[str]] = frozenset({"index_time"})
    compat: ClassVar[Mapping[str, object]] = {"eval_time": "index", "extra_bn_pass": True}

    audio_divisor: Tensor
    audio_seconds: Tensor
    video_seconds: Tensor

    def __init__(self, config: TCAFConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        width = shapes.text  # D_o's output is compared with the texts, so both widths are one
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.A_enc = MLP(shapes.features["audio"], c.H, width, c.p_emb)
        self.V_enc = MLP(shapes.features["video"], c.H, width, c.p_emb)
        self.position_encoder_block = _Positions(width, c.fourier_scale)
        self.pos_dropout = Dropout(c.p_pos)
        blocks = (
            MaskedBlock(width, c.heads, c.dim_head, FEED_FORWARD, c.p_transformer)
            for _ in range(c.layers)
        )
        self.Audio_visual_transformer = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.O_proj = MLP(width, c.K, OUT, c.p_dec)
        self.D_o = MLP(OUT, c.K, width, c.p_dec)
        self.W_proj = MLP(width, 0, OUT, c.p_add)
        self.D_w = MLP(OUT, 0, width, c.p_add)
        self.temporal = shapes.temporal
        self.attention: Pairs = c.attention
        self.over_time = shapes.temporal and c.video_norm_axis == "time"
        self.index_time = c.eval_time == "index"
        self.extra_bn_pass = c.extra_bn_pass
        for name in ("audio_divisor", "audio_seconds", "video_seconds"):
            scalar(self, name, getattr(c, name))

    def _tokens(
        self, features: Mapping[str, Tensor], modality: str, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens [n, T, D] of one modality and which are real, bool [n, T]."""
        x = features[modality]
        if self.temporal:
            real = real_steps(x, features[f"{modality}_length"])
            x = x * real[..., None]  # input scaling may have moved the padding away from zero
        else:
            x = x[:, None]
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if modality == "audio":
            x = x / self.audio_divisor
        else:
            x = F.normalize(x, dim=1 if self.over_time else 2)
        encoder = self.A_enc if modality == "audio" else self.V_enc
        # Padded rows are rows like others for BatchNorm, as in the release.
        x = encoder(x.flatten(0, 1), context).unflatten(0, x.shape[:2])
        time = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        if self.training or not self.index_time:
            time = time * (self.audio_seconds if modality == "audio" else self.video_seconds)
        tokens: Tensor = self.position_encoder_block(x, time, real, modality)
        return tokens if context is None else self.pos_dropout(tokens, context), real

    def _theta(self, features: Mapping[str, Tensor], context: Context | None) -> Tensor:
        """Return theta_o [n, 64] of samples."""
        audio, real_a = self._tokens(features, "audio", context)
        video, real_v = self._tokens(features, "video", context)
        x = torch.cat([self.cls_token.expand(len(audio), -1, -1), audio, video], dim=1)
        bias = attention_bias(real_a, real_v, self.attention, x.dtype)
        for block in self.Audio_visual_transformer["layers"]:  # type: ignore[attr-defined]
            x = block(x, bias, context)
        theta: Tensor = self.O_proj(x[:, 0], context)
        return theta

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the terms of tcaf.md section 3; only anchors are used."""
        text = batch.text[:, 0]
        theta_o = self._theta({m: x[:, 0] for m, x in batch.features.items()}, context)
        theta_w = self.W_proj(text, context)
        table = self.W_proj(batch.class_text, context.alone().salted(1))
        return {
            "ce": cross_entropy(theta_o @ table.T, batch.label[:, 0]),
            "reg": mse(theta_o, theta_w),
            "rec_o": mse(self.D_o(theta_o, context), text),
            "rec_w": mse(self.D_w(theta_w, context), text),
        }

    def settle(self, batch: Batch, context: Context) -> None:
        """With ``extra_bn_pass``: embed anchors and texts once more in train mode (section 6)."""
        if self.extra_bn_pass:
            again = context.salted(2)
            self._theta({m: x[:, 0] for m, x in batch.features.items()}, again)
            self.W_proj(batch.text[:, 0], again)

    def frozen(self) -> frozenset[str]:
        """Return the padding code: nothing attends to padding, so its gradient is always zero."""
        return frozenset({"position_encoder_block.pad_embedding.weight"})

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take a published checkpoint; the position block is stored twice, and read once."""

        def rename(key: str) -> str | None:
            return None if key.startswith("audiovisual_embeddings.") else key

        load_strictly(self, self.card.title, state, rename)

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_o [n, 64] as ``both``."""
        return {"both": self._theta(features, None)}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return theta_w [C, 64]."""
        out: Tensor = self.W_proj(text)
        return out
