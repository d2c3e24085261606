"""CBraMod checkpoints against the reference implementation's outputs, and exports there and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from physio_dist.errors import DataError, UserError
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig, MaskedModel, preset
from physio_dist.models.export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    from_cbramod,
    load_encoder,
    read_cbramod,
    read_export_config,
    save_encoder,
)


@pytest.fixture(scope="module")
def reference(data_dir: Path) -> dict[str, Tensor]:
    return read_cbramod(str(data_dir / "cbramod-reference" / "two_layers.safetensors"))


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", range(5))
def test_features_and_reconstructions_are_the_references(
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
        known = {name.split(".")[1]: torch.from_numpy(cases[name]) for name in cases if name[0] == str(case)}
    x, hidden = known["input"].to(dtype), known["mask"].bool()
    valid = torch.ones_like(hidden) if with_valid else None
    with torch.no_grad():
        results = {
            "features": model.encoder(x, valid=valid),
            "masked_features": model.encoder(x, hidden, valid),
            "masked_reconstruction": model(x, hidden, valid),
        }
    for name, result in results.items():
        assert result.dtype == dtype
        assert float((result.double() - known[name]).abs().max()) <= tolerance, name


def test_pth_and_safetensors_hold_the_same(data_dir: Path, reference: dict[str, Tensor]) -> None:
    pickled = read_cbramod(str(data_dir / "cbramod-reference" / "two_layers.pth"))
    assert pickled.keys() == reference.keys()
    assert all(torch.equal(pickled[name], reference[name]) for name in reference)


def test_shape_is_read_off_the_tensors_and_ddp_names_are_understood(reference: dict[str, Tensor]) -> None:
    state, report = from_cbramod({f"module.{name}": value for name, value in reference.items()})
    assert report.config == EncoderConfig(d=200, layers=2, heads=8, ffn=800, dropout=0.1)
    assert state.keys() == MaskedModel(report.config).state_dict().keys()


def test_a_checkpoint_without_head_gives_an_encoder(reference: dict[str, Tensor]) -> None:
    state, report = from_cbramod({k: v for k, v in reference.items() if not k.startswith("proj_out")})
    assert not report.has_head
    missing, unexpected = MaskedModel(report.config).load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"reconstruct.weight", "reconstruct.bias"}


def test_braindecodes_layout_is_the_published_one_with_a_classifier(reference: dict[str, Tensor]) -> None:
    published, before = from_cbramod(reference)
    total = len(reference)
    assert before.layout == "published" and before.matched == total and before.left_out == ()
    assert f"{total} of {total} tensors matched, none missing" in before.tell()
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
    assert f"{total - 2} of {total + 2} tensors matched, none missing, left out: final_layer.1.weight" in report.tell()
    CrissCrossEncoder(report.config).load_state_dict({k.removeprefix("encoder."): v for k, v in state.items()})
    with pytest.raises(UserError, match=r"is \[64\] instead of \[200\]"):
        from_cbramod({**reference, **narrow})


def test_another_architecture_is_refused_with_what_differs(reference: dict[str, Tensor]) -> None:
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


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
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
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UserError, DataError), match=name):
        read_cbramod(str(tmp_path / name))


def test_a_checkpoint_of_other_things_or_none_at_all_is_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*dictionary of tensors"):
        read_cbramod(str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"absent\.pth"):
        read_cbramod(str(tmp_path / "absent.pth"))


ABOUT = {"channels": ["I", "II"], "rate": 200, "unit_uv": 100.0}


def export(folder: Path) -> CrissCrossEncoder:
    torch.manual_seed(0)
    encoder = CrissCrossEncoder(preset("tiny", 0.1))
    folder.mkdir(exist_ok=True)
    for name, data in save_encoder(encoder, ABOUT).items():
        (folder / name).write_bytes(data)
    return encoder


def test_an_export_comes_back_bit_for_bit_and_in_eval_mode(tmp_path: Path) -> None:
    encoder = export(tmp_path / "out")
    loaded = load_encoder(f"{tmp_path}/out/")
    assert not loaded.training and loaded.config == encoder.config
    x, valid = torch.randn(2, 3, 4, 200), torch.rand(2, 3, 4) < 0.7
    assert torch.equal(loaded(x, valid=valid), encoder.eval()(x, valid=valid))
    about = read_export_config(str(tmp_path / "out"))
    assert {name: about[name] for name in ABOUT} == ABOUT and about["format"] == 1
    names = set(safetensors.torch.load_file(tmp_path / "out" / WEIGHTS_FILE))
    assert names == set(encoder.state_dict()) and not any("reconstruct" in name for name in names)


def test_an_export_is_the_same_bytes_every_time_and_fp32(tmp_path: Path) -> None:
    encoder = export(tmp_path)
    files = save_encoder(encoder, dict(reversed(ABOUT.items())))
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    narrow = safetensors.torch.load(save_encoder(encoder.bfloat16(), ABOUT)[WEIGHTS_FILE])
    assert {value.dtype for value in narrow.values()} == {torch.float32}


def test_an_export_keeps_the_mask_patch_of_a_cbramod_checkpoint(reference: dict[str, Tensor]) -> None:
    state, report = from_cbramod(reference)
    model = MaskedModel(report.config)
    model.load_state_dict(state)
    files = save_encoder(model.encoder, {})
    loaded = load_encoder("memory", lambda url: files[url.removeprefix("memory/")])
    assert torch.equal(loaded.embedding.mask_patch, reference["patch_embedding.mask_encoding"])


def test_names_of_ours_may_not_be_overwritten() -> None:
    with pytest.raises(ValueError, match="encoder_sha256"):
        save_encoder(CrissCrossEncoder(preset("tiny")), {"encoder_sha256": ""})


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    export(tmp_path)
    data = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(data))
    with pytest.raises(DataError, match="sha256"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"encoder": {"d": 80}}, "layers"),
        ({"encoder": {"depth": 80}}, "has to hold"),
        ({"encoder": {"d": 80, "layers": 5, "heads": 4, "ffn": 320}}, "layers.4.* is missing"),
        ({"encoder": {"d": 80, "layers": 4, "heads": 4, "ffn": 160}}, r"instead of \[160"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    export(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_encoder(str(tmp_path))
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_encoder(str(tmp_path))
