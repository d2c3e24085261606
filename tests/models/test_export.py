"""Export folders written and read back, and `physio_dist.load_encoder` without the heavy dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import physio_dist
from physio_dist.errors import DataError, UserError
from physio_dist.models.cbramod import cbramod_name, load_checkpoint
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig, MaskedModel, preset
from physio_dist.models.export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_encoder,
    read_export_config,
    save_encoder,
)
from tests.conftest import S3, Web

ABOUT = {"channels": ["I", "II"], "rate": 200, "unit_uv": 100.0}


def export(folder: Path) -> CrissCrossEncoder:
    torch.manual_seed(0)
    encoder = CrissCrossEncoder(preset("tiny", 0.1))
    folder.mkdir(exist_ok=True)
    for name, data in save_encoder(encoder, ABOUT).items():
        (folder / name).write_bytes(data)
    return encoder


def test_load_encoder_returns_exported_encoder_in_eval_mode(tmp_path: Path) -> None:
    encoder = export(tmp_path / "out")
    loaded = load_encoder(f"{tmp_path}/out/")
    assert not loaded.training and loaded.config == encoder.config
    x, valid = torch.randn(2, 3, 4, 200), torch.rand(2, 3, 4) < 0.7
    assert torch.equal(loaded(x, valid=valid), encoder.eval()(x, valid=valid))
    about = read_export_config(str(tmp_path / "out"))
    assert {name: about[name] for name in ABOUT} == ABOUT and about["format"] == 1
    names = set(safetensors.torch.load_file(tmp_path / "out" / WEIGHTS_FILE))
    assert names == set(encoder.state_dict()) and not any("reconstruct" in name for name in names)


def test_save_encoder_gives_same_bytes_and_fp32(tmp_path: Path) -> None:
    encoder = export(tmp_path)
    files = save_encoder(encoder, dict(reversed(ABOUT.items())))
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    narrow = safetensors.torch.load(save_encoder(encoder.bfloat16(), ABOUT)[WEIGHTS_FILE])
    assert {value.dtype for value in narrow.values()} == {torch.float32}


def test_save_encoder_raises_on_reserved_metadata() -> None:
    with pytest.raises(ValueError, match="encoder_sha256"):
        save_encoder(CrissCrossEncoder(preset("tiny")), {"encoder_sha256": ""})


def test_load_encoder_raises_on_changed_weights(tmp_path: Path) -> None:
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
def test_load_encoder_raises_on_config_that_does_not_fit(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    export(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_load_encoder_raises_on_folder_without_export(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_encoder(str(tmp_path))
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["two_layers.pth", "two_layers.safetensors"])
def test_load_encoder_accepts_published_checkpoint(data_dir: Path, name: str) -> None:
    path = str(data_dir / "cbramod-reference" / name)
    loaded, expected = physio_dist.load_encoder(path), load_checkpoint(path).encoder
    assert not loaded.training and loaded.config == expected.config
    x = torch.randn(1, 2, 3, 200)
    assert torch.equal(loaded(x), expected(x))


def test_load_encoder_accepts_export_by_path_file_and_web_url(tmp_path: Path, web: Web) -> None:
    encoder = export(web.folder / "out")
    folder = f"{web.folder}/out"
    for url in (folder, f"{folder}/", f"{folder}/{WEIGHTS_FILE}", f"file://{folder}", f"{web.url}/out"):
        assert load_encoder(url).config == encoder.config


def test_load_encoder_accepts_export_in_bucket(s3_here: S3) -> None:
    encoder = export(s3_here.folder / "out")
    assert load_encoder(f"{s3_here.bucket}/out").config == encoder.config


BASE_INSTALL = """
import importlib.machinery
import sys

class Forbidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"deepspeed", "ray", "wfdb", "h5py", "edfio", "sklearn", "matplotlib"}:
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise AssertionError(f"{spec.name} is imported")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Forbidden())
import physio_dist
assert "torch" not in sys.modules and "load_encoder" in dir(physio_dist)
for url in sys.argv[1:]:
    encoder = physio_dist.load_encoder(url)
import torch
print(*encoder(torch.zeros(1, 2, 3, 200)).shape)
"""


@pytest.mark.integration
def test_load_encoder_needs_base_install_only(tmp_path: Path) -> None:
    model = MaskedModel(EncoderConfig(d=200, layers=1, heads=8, ffn=800))
    state = {cbramod_name(name): value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "cbramod.safetensors")
    torch.save(state, tmp_path / "cbramod.pth")
    export(tmp_path / "export")
    urls = [str(tmp_path / name) for name in ("cbramod.safetensors", "cbramod.pth", "export")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, *urls], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["1", "2", "3", "80"]
