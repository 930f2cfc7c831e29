"""A stand-in with the structure of the public AVCA code, to measure a training loop against.

Written from avca.md and protocol.md: a dataset that makes one pair at a time, a loader that
collates, positives and negatives passed one after the other through modules of the framework, every
loss term by itself, the dead branch and the extra train-mode pass (P-11), a validation loss over as
many batches as were trained, and an evaluation that repeats argmin and per-class recalls for each
of 16 betas. Nothing is slower than this structure asks for: there is no parsing of files, no
second positive, one process, and features lie in memory as tensors. (The public code's train batch
costs 1.37 times our earlier plain step; ``tests.bench.loop`` prints this stand-in's ratio to our
own step.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

RATES = {"encoder": 0.2, "projection": 0.3, "decoder": 0.5}
"""Published dropout rates of UCF, main features (avca.md section 6)."""
WIDTH, OUT, HIDDEN, HEADS = 300, 64, 512, 3


class Block(nn.Module):
    """One or two times Linear, BatchNorm, ReLU, Dropout."""

    def __init__(self, width: int, hidden: int, out: int, rate: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((width, hidden), (hidden, out)) if hidden else ((width, out),):
            layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(rate)]
        self.fc = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(WIDTH), fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x)) + x
        return out


class Attention(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(rate))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (
            part.view(rows, tokens, HEADS, -1).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).reshape(rows, tokens, WIDTH))
        return out


class FeedForward(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        first, last = nn.Linear(WIDTH, OUT), nn.Linear(OUT, WIDTH)
        self.net = nn.Sequential(first, nn.GELU(), nn.Dropout(rate), last, nn.Dropout(rate))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Fusion(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        parts = [Residual(Attention(rate)), Residual(FeedForward(rate))]
        self.layers = nn.ModuleList([nn.ModuleList(parts)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for block in layer:  # type: ignore[attr-defined]
                x = block(x)
        return x


class Network(nn.Module):
    """The network with the checkpoint's names, so that it can take our weights."""

    def __init__(self, audio: int, video: int, text: int, rates: dict[str, float] = RATES) -> None:
        super().__init__()
        enc, proj, dec = rates["encoder"], rates["projection"], rates["decoder"]
        self.pos_emb1D = nn.Parameter(torch.randn(2, WIDTH))
        self.A_enc, self.V_enc = (Block(d, HIDDEN, WIDTH, enc) for d in (audio, video))
        self.cross_attention = Fusion(enc)
        self.W_proj, self.D = Block(text, 0, OUT, dec), Block(OUT, 0, text, dec)
        self.A_proj, self.V_proj = (Block(WIDTH, HIDDEN, OUT, proj) for _ in range(2))
        self.A_rec, self.V_rec = (Block(OUT, 0, WIDTH, dec) for _ in range(2))

    def embed(self, audio: Tensor, video: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Return phi_a, phi_v [n, 300] and theta_a, theta_v, theta_w [n, 64]."""
        phi_a, phi_v = self.A_enc(audio), self.V_enc(video)
        tokens = torch.stack([phi_a + self.pos_emb1D[0], phi_v + self.pos_emb1D[1]], dim=1)
        fused = self.cross_attention(tokens)
        theta_a, theta_v = self.A_proj(phi_a + fused[:, 0]), self.V_proj(phi_v + fused[:, 1])
        return phi_a, phi_v, theta_a, theta_v, self.W_proj(text)

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the sum of the 17 terms; ``batch`` is (a, v, w) of anchors, then of negatives."""
        phi_a, phi_v, a, v, w = self.embed(*batch[:3])
        _, _, a_, v_, w_ = self.embed(*batch[3:6])
        rho_w, _, rho_a, rho_a_, rho_v, rho_v_ = (self.D(x) for x in (w, w_, a, a_, v, v_))
        rec_a, rec_v = self.A_rec(a), self.V_rec(v)
        self.A_proj(rec_a), self.V_proj(rec_v)  # used by no term
        hinge, mse = nn.TripletMarginLoss(margin=1.0), nn.MSELoss()
        l_w = hinge(w, a, a_) + hinge(w, v, v_) + hinge(a, w, w_) + hinge(v, w, w_)
        l_t = hinge(a, w, a_) + hinge(v, w, v_) + hinge(w, a, w_) + hinge(w, v, w_)
        l_ct = hinge(rho_w, rho_a, rho_a_) + hinge(rho_w, rho_v, rho_v_)
        l_rec = mse(rho_v, batch[2]) + mse(rho_a, batch[2]) + mse(rho_w, batch[2])
        l_reg = mse(rec_v, phi_v) + mse(rec_a, phi_a) + mse(v, w) + mse(a, w)
        total: Tensor = l_w + l_t + l_ct + l_rec + l_reg
        return total


class Pairs(Dataset[tuple[Any, ...]]):
    """One pair per item: a sample and one of another class, drawn anew or fixed per sample."""

    def __init__(
        self, features: tuple[Tensor, Tensor], text: Tensor, label: Tensor, fixed: bool = False
    ) -> None:
        self.audio, self.video = features
        self.text, self.label = text, label.tolist()
        self.classes = sorted(set(self.label))
        self.rows: dict[int, list[int]] = {c: [] for c in self.classes}
        for row, c in enumerate(self.label):
            self.rows[c].append(row)
        self.fixed = [self.draw(row) for row in range(len(self.label))] if fixed else None

    def draw(self, row: int) -> int:
        """Return a sample of one of the other classes."""
        while (other := random.choice(self.classes)) == self.label[row]:
            pass
        return random.choice(self.rows[other])

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        """Return audio, video and text of the sample and of its negative, and both classes."""
        other = self.draw(row) if self.fixed is None else self.fixed[row]
        own, far = self.label[row], self.label[other]
        first = (self.audio[row], self.video[row], self.text[own])
        return (*first, self.audio[other], self.video[other], self.text[far], own, far)

    def loader(self, batches: int, size: int) -> DataLoader[tuple[Any, ...]]:
        """Return a loader of class-uniform batches, drawn with replacement, in this process."""
        weights = [1.0 / len(self.rows[c]) for c in self.label]
        sampler = WeightedRandomSampler(weights, batches * size)
        return DataLoader(self, batch_size=size, sampler=sampler, num_workers=0)


class ReferenceLoop:
    """Train, validate and evaluate; one method per part, so that each can be timed.

    Args:
        train: pairs to train on.
        val: pairs of VAL with fixed negatives.
        seen: ascending ids of VAL's seen classes; ``unseen`` likewise.
        unseen: see seen.
        size: batch size.
    """

    def __init__(
        self, train: Pairs, val: Pairs, seen: list[int], unseen: list[int], size: int
    ) -> None:
        self.train_pairs, self.val_pairs, self.size = train, val, size
        self.seen, self.unseen = seen, unseen
        text = train.text.shape[1]
        self.network = Network(train.audio.shape[1], train.video.shape[1], text)
        learning = [p for name, p in self.network.named_parameters() if name != "pos_emb1D"]
        self.optimizer = torch.optim.Adam(learning, lr=1e-3, weight_decay=1e-5)

    def train(self, batches: int) -> float:
        """Train some batches; return the mean loss."""
        self.network.train()
        total = 0.0
        for *batch, _, _ in self.train_pairs.loader(batches, self.size):
            loss = self.network.loss(batch)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            with torch.no_grad():  # the anchors once more: it moves BatchNorm statistics only
                self.network.embed(*batch[:3])
            total += loss.item()
        return total / batches

    @torch.no_grad()
    def validate(self, batches: int) -> float:
        """Return the mean loss over some batches of VAL."""
        self.network.eval()
        total = 0.0
        for *batch, _, _ in self.val_pairs.loader(batches, self.size):
            total += self.network.loss(batch).item()
        return total / batches

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the scores at the first of 16 betas with the highest HM."""
        self.network.eval()
        pairs, ids = self.val_pairs, torch.tensor(self.seen + self.unseen)
        order = torch.argsort(ids)
        label = torch.tensor(pairs.label)
        *_, theta_v, theta_w = self.network.embed(pairs.audio, pairs.video, pairs.text[ids[order]])
        distance = torch.cdist(theta_v, theta_w)
        is_seen = torch.isin(ids[order], torch.tensor(self.seen))
        best: dict[str, float] = {"HM": -1.0}
        for step in range(16):
            beta = 0.2 * step
            found = ids[order][(distance + beta * is_seen).argmin(dim=1)]
            s, u = (_mean_recall(found, label, group) for group in (self.seen, self.unseen))
            hm = 2 * s * u / (s + u + torch.finfo(torch.float64).eps)
            if hm > best["HM"]:
                best = {"S": s, "U": u, "HM": hm, "beta": beta}
        among = distance.masked_fill(is_seen, torch.inf).argmin(dim=1)
        return best | {"ZSL": _mean_recall(ids[order][among], label, self.unseen)}


def _mean_recall(found: Tensor, label: Tensor, classes: list[int]) -> float:
    """Return the mean over classes of the share of their samples that were found."""
    recalls = []
    for c in classes:
        mine = label == c
        recalls.append((found[mine] == c).double().mean().item())
    return sum(recalls) / len(recalls)


def weights_of(ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield our weights under the names of ``Network``, which also counts BatchNorm's batches."""
    for name, value in ours.items():
        yield name, value
        if name.endswith("running_var"):
            yield name.replace("running_var", "num_batches_tracked"), torch.tensor(0)
