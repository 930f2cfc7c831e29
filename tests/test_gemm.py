"""Matrix products: which path full precision takes, and that less is used only where asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.errors import UserError
from avzero.spec import Matmul, TrainConfig, validate
from avzero.train import gemm
from avzero.train.gemm import Path, choose, path_of, use
from tests.conftest import make_task

MKL = Path("default", "highest", 3e-7, 105.0)
ONEDNN = Path("onednn", "medium", 4e-7, 250.0)


@pytest.fixture
def fresh_probe(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what this process and this node measured, before and after."""
    monkeypatch.setenv("AVZERO_CACHE", str(tmp_path))
    path_of.cache_clear()
    yield
    path_of.cache_clear()


def relative_error(left: torch.Tensor, right: torch.Tensor) -> float:
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


def operands() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs shaped like products of a step, transposed and batched ones among them."""
    draw = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return [
        (some(512, 512), some(512, 300)),
        (some(512, 300).T, some(512, 512)),
        (some(4, 256, 512), some(4, 300, 512).mT),
        (some(512, 64), some(300, 64).T),
    ]


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (ONEDNN, "onednn"),
        (replace(ONEDNN, error=2.4e-3, gflops=700.0), "default"),  # rounds to bfloat16
        (replace(ONEDNN, error=1e-5), "default"),
        (replace(ONEDNN, error=float("nan")), "default"),
        (replace(ONEDNN, gflops=1.29 * MKL.gflops), "default"),
        (replace(ONEDNN, gflops=1.31 * MKL.gflops), "onednn"),
    ],
)
def test_the_other_path_must_be_exact_and_clearly_faster(other: Path, kept: str) -> None:
    assert choose(MKL, other).name == kept


@pytest.mark.parametrize("noise", [0.8, 1.0, 1.25])
@pytest.mark.parametrize(("ratio", "kept"), [(1.0, "default"), (2.3, "onednn")])
def test_a_noisy_machine_decides_alike(noise: float, ratio: float, kept: str) -> None:
    """The two ratios that occur lie far enough from the threshold."""
    other = replace(ONEDNN, gflops=ratio * noise * MKL.gflops)
    assert choose(MKL, other).name == kept


def test_full_precision_is_full_here(fresh_probe: None) -> None:
    """Whatever the probe chose on this machine: every kind of product is exact."""
    path = path_of("full", "cpu")
    assert path.error < gemm.MOST_ERROR and path.gflops > 1
    assert path is path_of("full", "cpu"), "measured twice in one process"
    if path_of("bf16", "cpu").error > gemm.MOST_ERROR:  # as on Intel with AMX
        assert (path.name, path.setting) == ("default", "highest")
    with use("full") as used:
        assert used is path
        for left, right in operands():
            assert relative_error(left, right) < gemm.MOST_ERROR, (left.shape, right.shape)


def test_a_node_keeps_its_choice(
    fresh_probe: None, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later process measures other numbers, or two measure at once: one choice for all."""
    answers = [MKL, replace(ONEDNN, gflops=900.0)], [replace(MKL, gflops=900.0), ONEDNN]
    for measured in answers:
        monkeypatch.setattr(gemm, "_measure", lambda paths, device, found=measured: found)
        assert path_of("full", "cpu").name == "onednn"
        path_of.cache_clear()
    (file,) = (tmp_path / "gemm").iterdir()
    file.write_text("{")
    assert path_of("full", "cpu").name == "default", "a torn file is measured again"
    monkeypatch.setenv("AVZERO_CACHE", "/proc/nowhere")
    path_of.cache_clear()
    assert path_of("full", "cpu").name == "default", "no cache, no choice kept"


def test_the_probe_takes_the_measured_winner(
    fresh_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def measured(paths: list[Path], device: str) -> list[Path]:
        seen.append([p.name for p in paths])
        known = {p.name: p for p in (MKL, ONEDNN)}
        return [known.get(p.name, p) for p in paths]

    monkeypatch.setattr(gemm, "_measure", measured)
    with use("full") as path:
        assert torch.get_float32_matmul_precision() == "medium"
    assert path.as_dict() == {"path": "onednn", "error": 4e-7, "gflops": 250.0}
    # On a GPU the same setting would be TF32, so there it is not even a candidate.
    assert path_of("full", "cuda").setting == "highest"
    assert seen == [["default", "onednn"], ["default"]]


@pytest.mark.parametrize(
    ("matmul", "setting"), [("tf32", "high"), ("bf16", "medium"), ("full", None)]
)
def test_a_choice_holds_in_its_block_only(matmul: Matmul, setting: str | None) -> None:
    before = torch.get_float32_matmul_precision()
    inside = setting or path_of("full", "cpu").setting
    with pytest.raises(KeyError), use(matmul):
        assert torch.get_float32_matmul_precision() == inside
        with use("full"):
            assert torch.get_float32_matmul_precision() == path_of("full", "cpu").setting
        assert torch.get_float32_matmul_precision() == inside
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_less_precision_is_what_the_record_says() -> None:
    """bf16 rounds where the processor can, and the record's error tells which."""
    path, (left, right) = path_of("bf16", "cpu"), operands()[0]
    exact = left.double() @ right.double()
    with use("bf16"):
        assert (relative_error(left, right) > 1e-4) == (path.error > 1e-4)
        assert torch.equal(left.double() @ right.double(), exact)
    assert path_of("tf32", "cpu").error < gemm.MOST_ERROR  # there is none on a CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reduced_precision_on_cuda() -> None:
    errors = [path_of(matmul, "cuda").error for matmul in ("full", "tf32", "bf16")]
    assert errors[0] < gemm.MOST_ERROR < errors[1] < errors[2] < 1e-2
    with use("bf16", "cuda"):
        x = torch.ones(4, 4, device="cuda")
        assert (x @ x).dtype == torch.bfloat16


def test_measuring_disturbs_nothing(fresh_probe: None) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    path_of("full", "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_runs_of_full_precision_keep_their_identity(benchmark: Benchmark) -> None:
    task = make_task(benchmark, "avca")
    assert "matmul" not in task.train.model_dump(mode="json")
    reduced = task.train.model_copy(update={"matmul": "bf16"})
    assert task.model_copy(update={"train": reduced}).id != task.id
    assert TrainConfig.model_validate(reduced.model_dump(mode="json")) == reduced


def test_float64_with_reduced_products_is_refused() -> None:
    with pytest.raises(UserError, match="train: matmul bf16 does nothing to precision float64"):
        validate(TrainConfig, {"precision": "float64", "matmul": "bf16"}, "train")
    with pytest.raises(UserError, match=r"train: matmul: .*'full', 'tf32' or 'bf16'.*\(got 'fp8'"):
        validate(TrainConfig, {"matmul": "fp8"}, "train")
