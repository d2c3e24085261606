"""The public API and the base install, without the libraries of any extra."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import physio_dist
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, preset
from physio_dist.models.export import save_encoder

ROOT = Path(__file__).resolve().parents[1]
EXTRA_LIBRARIES = ("deepspeed", "ray", "webdataset", "tensorboard", "wfdb", "h5py", "edfio", "matplotlib", "jinja2")
# Run before the code under test: an import of a library of an extra fails as if it were not installed.
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({EXTRA_LIBRARIES!r}))\n"


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code], capture_output=True, text=True, env=environ, check=False
    )


@pytest.fixture
def export(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    for name, data in save_encoder(CrissCrossEncoder(preset("tiny")), {"signal": "ecg"}).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_package_lists_load_encoder_and_rejects_unknown_names() -> None:
    assert "load_encoder" in dir(physio_dist)
    with pytest.raises(AttributeError):
        _ = physio_dist.no_such_name  # type: ignore[attr-defined]


@pytest.mark.integration
@pytest.mark.integration
def test_importing_the_package_does_not_import_torch() -> None:
    result = run_without_extras("import physio_dist; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


@pytest.mark.integration
@pytest.mark.integration
def test_load_encoder_reads_an_export_without_extras(export: Path) -> None:
    result = run_without_extras(
        "import torch, physio_dist\n"
        f"encoder = physio_dist.load_encoder({str(export)!r})\n"
        "print(*encoder(torch.zeros(2, 3, 4, 200)).shape)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "3", "4", "80"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "extra"),
    [(["report", "runs/none"], "report"), (["predict", "runs/none", "a.edf"], "readers")],
)
@pytest.mark.integration
def test_command_without_its_extra_ends_with_status_2_and_the_extra(words: list[str], extra: str) -> None:
    result = run_without_extras(f"sys.argv = {['physio-dist', *words]!r}\nfrom physio_dist.cli import main; main()")
    assert result.returncode == 2, result.stderr
    assert f"physio-dist {words[0]} needs" in result.stderr
    assert f"'physio-dist[{extra}]'" in result.stderr


def test_type_marker_is_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "physio_dist" / "py.typed").exists()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["physio_dist"]
