"""The bench of training steps: its peer is the reference's mathematics and ours; its forms, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from physio_dist.models.cbramod import from_cbramod, read_cbramod
from physio_dist.models.encoders.criss_cross import MaskedModel, preset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import step  # noqa: E402
from common import BenchError  # noqa: E402
from plain import PlainModel, plain_loss  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", range(5))
def test_plain_model_matches_reference(data_dir: Path, case: int, dtype: torch.dtype, tolerance: float) -> None:
    theirs = read_cbramod(str(data_dir / "cbramod-reference" / "two_layers.safetensors"))
    model = PlainModel(from_cbramod(theirs)[1].config)
    model.load_state_dict(theirs)
    model.to(dtype).eval()
    with np.load(data_dir / "cbramod-reference" / "two_layers_cases.npz") as cases:
        known = {name.split(".")[1]: torch.from_numpy(cases[name]) for name in cases if name[0] == str(case)}
    x, hidden = known["input"].to(dtype), known["mask"].bool()
    with torch.no_grad():
        results = {
            "features": model.features(x),
            "masked_features": model.features(x, hidden),
            "masked_reconstruction": model(x, hidden),
        }
    for name, result in results.items():
        assert float((result.double() - known[name]).abs().max()) <= tolerance, name


def test_plain_loss_is_mean_over_windows() -> None:
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 3, 4, 5, 200).unbind(0)
    hidden = torch.rand(3, 4, 5) < 0.5
    each = [(predicted[i][hidden[i]] - target[i][hidden[i]]).square().mean() for i in range(3)]
    assert float(plain_loss(predicted, target, hidden)) == pytest.approx(float(sum(each)) / 3, rel=1e-6)


def test_losses_agree_without_dropout() -> None:
    assert step.check("tiny", CPU) < 1e-5


def test_step_bench_refuses_different_model(monkeypatch: pytest.MonkeyPatch) -> None:
    as_plain = step.as_plain

    def changed(model: MaskedModel) -> PlainModel:
        plain = as_plain(model)
        plain.encoder.layers[0].self_attn_s.num_heads //= 2  # type: ignore[operator, union-attr]
        plain.encoder.layers[0].self_attn_s.head_dim *= 2  # type: ignore[operator, union-attr]
        return plain

    monkeypatch.setattr(step, "as_plain", changed)
    with pytest.raises(BenchError, match="not the same mathematics"):
        step.check("tiny", CPU)


@pytest.mark.integration
def test_losses_agree_on_average_with_dropout() -> None:
    torch.manual_seed(0)
    model, prepared = MaskedModel(preset("tiny", 0.1)), step.draw(8)
    torch.nn.init.xavier_normal_(model.reconstruct.weight)
    plain = step.as_plain(model)
    losses = {}
    for name, one in (("ours", model), ("plain", plain)):
        runs = [
            [float(train()) for _ in range(4)] for train in (step.bare(one, prepared, CPU, False) for _ in range(6))
        ]
        losses[name] = torch.tensor(runs)
    # Six runs of four steps each: what they have in common but the draws of dropout.
    mean = {name: values.mean() for name, values in losses.items()}
    error = (sum(values.mean(1).var() / len(values) for values in losses.values())) ** 0.5
    assert 0 < error < 0.01 * mean["plain"]
    assert abs(mean["ours"] - mean["plain"]) < 4 * error


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the bench to its end."""
    command = [sys.executable, ROOT / "tools" / "bench" / "step.py", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("more", "unit"), [((), "windows/s"), (("--cpu-time",), "windows/s of CPU time")])
@pytest.mark.integration
def test_step_bench_last_line_has_all_fields(more: tuple[str, ...], unit: str) -> None:
    done = bench("--preset", "tiny", "--windows", 4, "--steps", 1, "--repeats", 2, "--threads", 1, *more)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["unit"], result["n"], result["ratio_to"]) == ("step", unit, 2, "plain fp32")
    assert result["ratio"] == pytest.approx(result["ours"] / result["peers"]["plain fp32"], rel=0.02)
    also = result["also"]
    assert also["loop"]["share_of_bare"] == pytest.approx(also["loop"]["rate"] / result["ours"], rel=0.02)
    assert also["apart_without_dropout"] < 1e-5
    assert set(also["last_loss"]) == {"plain fp32", "plain bf16", "ours fp32", "ours bf16", "loop"}
    assert max(also["last_loss"].values()) < 1.1 * min(also["last_loss"].values())


@pytest.mark.integration
def test_step_bench_refuses_cpu_time_of_several_threads() -> None:
    done = bench("--cpu-time", "--threads", 2)
    assert done.returncode == 2
    assert "--cpu-time needs --threads 1" in done.stderr
