"""CBraMod checkpoints against the reference implementation's outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from physio_dist.errors import DataError, UserError
from physio_dist.models.cbramod import from_cbramod, read_cbramod
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig, MaskedModel
from physio_dist.models.export import load_export, save_encoder


@pytest.fixture(scope="module")
def reference(data_dir: Path) -> dict[str, Tensor]:
    return read_cbramod(str(data_dir / "cbramod-reference" / "two_layers.safetensors"))


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", range(5))
def test_features_and_reconstructions_match_reference_implementation(
    data_dir: Path,
    reference: dict[str, Tensor],
    case: int,
    dtype: torch.dtype,
    tolerance: float,
    with_valid: bool,
) -> None:
    state, report = from_cbramod(reference)
    assert report.has_head and not report.mask_patch_is_zero
    model = MaskedModel(report.config)
    model.load_state_dict(state)
    model.to(dtype).eval()
    with np.load(data_dir / "cbramod-reference" / "two_layers_cases.npz") as cases:
        expected = {name.split(".")[1]: torch.from_numpy(cases[name]) for name in cases if name[0] == str(case)}
    x, hidden = expected["input"].to(dtype), expected["mask"].bool()
    valid = torch.ones_like(hidden) if with_valid else None
    with torch.no_grad():
        results = {
            "features": model.encoder(x, valid=valid),
            "masked_features": model.encoder(x, hidden, valid),
            "masked_reconstruction": model(x, hidden, valid),
        }
    for name, result in results.items():
        assert result.dtype == dtype
        assert float((result.double() - expected[name]).abs().max()) <= tolerance, name


def test_read_cbramod_reads_same_tensors_from_pth_and_safetensors(data_dir: Path, reference: dict[str, Tensor]) -> None:
    pickled = read_cbramod(str(data_dir / "cbramod-reference" / "two_layers.pth"))
    assert pickled.keys() == reference.keys()
    assert all(torch.equal(pickled[name], reference[name]) for name in reference)


def test_from_cbramod_reads_shape_and_strips_ddp_prefix(reference: dict[str, Tensor]) -> None:
    state, report = from_cbramod({f"module.{name}": value for name, value in reference.items()})
    assert report.config == EncoderConfig(d=200, layers=2, heads=8, ffn=800, dropout=0.1)
    assert state.keys() == MaskedModel(report.config).state_dict().keys()


def test_from_cbramod_without_head_gives_encoder_only(reference: dict[str, Tensor]) -> None:
    state, report = from_cbramod({k: v for k, v in reference.items() if not k.startswith("proj_out")})
    assert not report.has_head
    missing, unexpected = MaskedModel(report.config).load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"reconstruct.weight", "reconstruct.bias"}


def test_from_cbramod_leaves_out_braindecode_classifier(reference: dict[str, Tensor]) -> None:
    published, before = from_cbramod(reference)
    total = len(reference)
    assert before.layout == "published" and before.matched == total and before.left_out == ()
    assert f"{total} of {total} tensors matched, none missing" in before.summary_line()
    extra = {"final_layer.1.weight": torch.zeros(4, 19 * 30 * 200), "final_layer.1.bias": torch.zeros(4)}
    state, report = from_cbramod({**reference, **extra})
    assert report.layout == "braindecode" and report.has_head
    assert (report.matched, report.left_out) == (total, tuple(extra))
    assert state.keys() == published.keys() and all(torch.equal(state[k], published[k]) for k in state)
    # With emb_dim the projection is no reconstruction of a patch.
    narrow = {"proj_out.0.weight": torch.zeros(64, 200), "proj_out.0.bias": torch.zeros(64)}
    state, report = from_cbramod({**reference, **extra, **narrow})
    assert not report.has_head and report.matched == total - 2
    assert set(report.left_out) == {*extra, *narrow}
    assert (
        f"{total - 2} of {total + 2} tensors matched, none missing, left out: final_layer.1.weight"
        in report.summary_line()
    )
    CrissCrossEncoder(report.config).load_state_dict({k.removeprefix("encoder."): v for k, v in state.items()})
    with pytest.raises(UserError, match=r"is \[64\] instead of \[200\]"):
        from_cbramod({**reference, **narrow})


def test_from_cbramod_raises_on_other_architecture_listing_differences(reference: dict[str, Tensor]) -> None:
    broken = dict(reference)
    del broken["patch_embedding.proj_in.3.bias"]
    broken["classifier.weight"] = torch.zeros(2, 2)
    broken["proj_out.0.bias"] = torch.zeros(7)
    with pytest.raises(UserError) as caught:
        from_cbramod(broken)
    for part in ("proj_in.3.bias is missing", "classifier.weight is unknown", "is [7] instead of [200]"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="not a CBraMod checkpoint"):
        from_cbramod(nn.Linear(2, 2).state_dict())
    many = {**reference, **{f"extra.{i}": torch.zeros(1) for i in range(20)}}
    with pytest.raises(UserError, match="and 12 more"):
        from_cbramod(many)


def test_read_cbramod_raises_on_pickled_code_without_running_it(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"__import__('pathlib').Path({str(sprung)!r}).touch()",))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth"):
        read_cbramod(str(tmp_path / "trap.pth"))
    assert not sprung.exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_read_cbramod_raises_on_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UserError, DataError), match=name):
        read_cbramod(str(tmp_path / name))


def test_read_cbramod_raises_on_other_objects_and_missing_file(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*dictionary of tensors"):
        read_cbramod(str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"absent\.pth"):
        read_cbramod(str(tmp_path / "absent.pth"))


def test_export_keeps_mask_patch_of_cbramod_checkpoint(reference: dict[str, Tensor]) -> None:
    state, report = from_cbramod(reference)
    model = MaskedModel(report.config)
    model.load_state_dict(state)
    files = save_encoder(model.encoder, {})
    loaded = load_export("memory", lambda url: files[url.removeprefix("memory/")])
    assert torch.equal(loaded.embedding.mask_patch, reference["patch_embedding.mask_encoding"])
