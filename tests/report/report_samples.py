"""A small run directory for the tests of the report, every file made from plain numbers."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from safetensors.numpy import save

from physio_dist.report import components
from physio_dist.report.page import render

LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
ZERO = {"intra": 0.9, "inter": 1.1}
INTERP = {"intra": 1.2, "inter": 1.1}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements, texts and alternative texts of a page; fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def images(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def texts(image: Any) -> list[str]:
    """All pieces of text of an SVG drawing."""
    kind, data = image.uri.removeprefix("data:").split(";base64,")
    assert kind == "image/svg+xml"
    root = ElementTree.fromstring(base64.b64decode(data))
    return [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]


def reader(folder: Path) -> Callable[[str], bytes | None]:
    """What the caller of ``render`` gives it, on a local folder."""

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return read


_PAGES: dict[Any, str] = {}


def page_of(folder: Path) -> tuple[str, Page]:
    """The page of a run, rendered once for all tests whose runs hold the same files."""
    files = sorted((path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file())
    key = (components.SVG_LIMIT_BYTES, *files)
    if key not in _PAGES:
        _PAGES[key] = render(reader(folder))
    return _PAGES[key], Page(_PAGES[key])


def assert_escaped(text: str, page: Page, evil: str) -> None:
    """Markup in names of files and recordings is shown, and not taken for a page's own."""
    assert "<script" not in text
    assert html.escape("<script>") in text
    assert evil in page.texts
    assert all("onload" not in attrs for _, attrs in page.tags)


def metric_rows(steps: int = 60, every: int = 1, validate: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Logged steps of a run that learns; every ``validate``-th line carries a validation (0: none does)."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for line in range(1, steps // every + 1):
        step = line * every
        fall = 0.25 + 0.75 * math.exp(-3.0 * step / steps)
        intra = 0.9 * fall * float(rng.lognormal(0, 0.12))
        inter = 1.1 * fall * float(rng.lognormal(0, 0.12))
        row: dict[str, Any] = {
            "step": step,
            "epoch": step / steps * 2,
            "samples": step * 64,
            "loss": intra + inter,
            "loss_intra": intra,
            "loss_inter": inter,
            "val_loss": None,
            "lr": 5e-4 * min(1.0, 10 * step / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": 2.0 * fall * float(rng.lognormal(0, 0.3)),
            "samples_per_s": 100.0 + float(rng.normal(0, 5)),
            "data_wait_frac": 0.02 + 0.02 * float(rng.random()),
            "mfu": None,
            "step_s": 0.6,
            "time": 1.7e9 + 0.6 * step,
            "peak_memory_mb": 1500.0,
        }
        if validate and line % validate == 0:
            row |= {"val_intra": 0.85 * fall, "val_inter": 1.0 * fall, "val_loss": 1.85 * fall}
            row |= {f"val_zero_{key}": value for key, value in ZERO.items()}
            row |= {f"val_interp_{key}": value for key, value in INTERP.items()}
        rows.append(row)
    return rows


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """The rows as the lines of ``metrics.jsonl``."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def heartbeats(rng: np.random.Generator, channels: int, samples: int, rate: float) -> np.ndarray:
    """Something like an ECG, ``[channel, time]`` in uV: P, QRS and T as bumps, each channel with its own weights."""
    time = np.arange(samples) / rate
    wave = np.zeros((3, samples))
    beat = 0.3
    while beat < samples / rate + 1:
        for part, (shift, width) in enumerate(((-0.17, 0.025), (0.0, 0.012), (0.27, 0.05))):
            wave[part] += np.exp(-0.5 * ((time - beat - shift) / width) ** 2)
        beat += 0.85 + 0.06 * rng.standard_normal()
    weights = np.stack(
        [rng.uniform(60, 140, channels), rng.uniform(-900, 1400, channels), rng.uniform(-100, 350, channels)]
    )
    return np.asarray(weights.T @ wave + 8 * rng.standard_normal((channels, samples)))


def example_tensors(
    n: int = 2, channels: int = 12, patches: int = 10, rate: int = 200, seed: int = 1
) -> dict[str, np.ndarray]:
    """Windows with patches hidden in seen leads, the last lead but one hidden whole, and one invalid lead."""
    rng = np.random.default_rng(seed)
    samples = patches * rate
    target = np.stack([heartbeats(rng, channels, samples, rate) for _ in range(n)]).astype(np.float32)
    made = (0.8 * target + 15 * rng.standard_normal(target.shape)).astype(np.float32)
    inter = np.zeros((n, channels, patches), dtype=np.uint8)
    inter[:, channels - 2] = 1
    if channels > 4:
        inter[0, 3] = 1
    intra = ((rng.random(inter.shape) < 0.3) & (inter == 0)).astype(np.uint8)
    intra[:, 0, 1] = 1
    valid = np.ones((n, channels), dtype=np.uint8)
    if channels > 6:
        valid[0, 5] = 0
        target[0, 5] = made[0, 5] = 0
    return {"target": target, "reconstruction": made, "intra": intra, "inter": inter, "valid": valid}


def examples_file(
    tensors: dict[str, np.ndarray], channels: list[str], rate: int = 200, simulated: bool = True
) -> bytes:
    """The tensors as ``examples.safetensors``."""
    keys = [f"rec{i:03d}-00" for i in range(len(tensors["target"]))]
    meta = {"step": "60", "rate": str(rate), "channels": json.dumps(channels), "keys": json.dumps(keys)}
    meta |= {"unit": "uV", "simulated": "true" if simulated else "false"}
    return bytes(save(tensors, metadata=meta))


def data_json(simulated: bool = True) -> dict[str, Any]:
    """One shard set's description."""
    splits = {"train": 4000, "val": 500, "test": 500}
    index: dict[str, Any] = {"url": "s3://bucket/ecg/index.json", "fingerprint": "sha256:" + "ab12" * 16}
    index |= {"splits": splits, "people": 731, "rate": 200, "channels": LEADS, "simulated": simulated}
    return {"indexes": [index | {"sources": ["simulate"]}]}


def config_yaml(name: str = "quickstart") -> str:
    """A resolved configuration."""
    return f"""run:
  name: {json.dumps(name)}
  dir: runs
  seed: 0
data:
  index: s3://someone:secret@bucket/ecg/index.json
model:
  preset: tiny
  dropout: 0.1
mask:
  intra_ratio: 0.5
  inter_ratio: 0.25
train:
  steps: 60
  global_batch: 64
  micro_batch: 32
  precision: fp32
  lr: 0.0005
zero:
  stage: 2
"""


def attempts_json() -> list[dict[str, Any]]:
    """Two starts of one run."""
    common = {
        "zero_stage": 2,
        "precision": "fp32",
        "device": "cpu",
        "versions": {"torch": "2.6", "deepspeed": "0.19"},
    }
    return [
        {"attempt": 1, "from_step": 0, "world": 2} | common,
        {"attempt": 2, "from_step": 30, "world": 1} | common,
    ]


def write_run(folder: Path, **changes: bytes | None) -> Path:
    """A whole run in ``folder``; ``changes`` give a file other bytes or, with None, leave it out."""
    files: dict[str, bytes | None] = {
        "config.yaml": config_yaml().encode(),
        "metrics.jsonl": jsonl(metric_rows()),
        "examples.safetensors": examples_file(example_tensors(), LEADS),
        "data.json": json.dumps(data_json()).encode(),
        "attempts.json": json.dumps(attempts_json()).encode(),
    }
    names = {name.split(".")[0]: name for name in files}
    files |= {names[stem]: content for stem, content in changes.items()}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder
