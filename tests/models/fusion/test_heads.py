"""Fusion heads against their formulas written out row by row, with missing modalities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from physio_dist.config.search import HEADS as NAMES
from physio_dist.config.search import POOLINGS, TOKENS
from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import HEADS, GatedHead, build_head, input_kind
from physio_dist.models.fusion.reduction import fit_reduction

N = 12
FEATURES = {"ecg": 3, "eeg": 5}
TOKEN = {"ecg": 4, "eeg": 2}


def test_every_option_value_has_a_head() -> None:
    assert tuple(HEADS) == NAMES


def rows(many: dict[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    sizes = {name: (N, size) if many is None else (N, many[name], size) for name, size in FEATURES.items()}
    return {name: torch.randn(size) * 3 + 1 for name, size in sizes.items()}


def head(kind: str, depth: int = 1, many: dict[str, int] | None = None, features: dict[str, int] = FEATURES) -> Head:
    """With weights that have moved, as after some training, and statistics of the rows."""
    torch.manual_seed(1)
    model = HEADS[kind](features, 3, depth, 6, 0.0, 64, many)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    given = rows(many)
    model.reduce_by({name: fit_reduction(given[name].flatten(0, -2).numpy(), 64) for name in features})
    return model.eval()


def there(many: dict[str, int] | None) -> dict[str, Tensor]:
    """ECG missing in row 0, EEG in rows 1 and 2, both in row 3; some tokens elsewhere."""
    shown = {name: torch.ones(N, (many or {}).get(name, 1), dtype=torch.bool) for name in FEATURES}
    shown["ecg"][[0, 3]] = False
    shown["eeg"][[1, 2, 3]] = False
    if many is not None:
        shown["ecg"][5:7, 1:3] = False
    return shown


def plain(model: Head, x: dict[str, Tensor], shown: dict[str, Tensor], depth: int) -> Tensor:
    """Logits, one row after the other, modalities that are missing left out of every sum rather than masked."""
    p = dict(model.named_parameters())
    names = list(x)

    def layers(prefix: str, z: Tensor) -> Tensor:
        for i in range(depth):
            z = z @ p[f"{prefix}hidden.{i}.weight"].T + p[f"{prefix}hidden.{i}.bias"]
            z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * p[f"{prefix}norms.{i}.weight"]
            z = z + p[f"{prefix}norms.{i}.bias"]
            z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        return z @ p[f"{prefix}out.weight"].T + p[f"{prefix}out.bias"]

    found = []
    for row in range(N):
        seen: dict[str, Tensor] = {}
        for name in names:
            mean, basis = model.get_buffer(f"mean_{name}"), model.get_buffer(f"basis_{name}")
            every = (x[name][row].reshape(-1, x[name].shape[-1]) - mean) @ basis
            seen[name] = every[shown[name][row]]
        present = [name for name in names if len(seen[name])]
        size = {name: x[name].shape[-1] for name in names}
        vector = {}
        for name in names:
            vector[name] = torch.zeros(size[name])
            if name in present:
                weight = torch.ones(len(seen[name])) / len(seen[name])
                if f"attend.{name}" in p:
                    weight = torch.softmax(seen[name] @ p[f"attend.{name}"] / math.sqrt(size[name]), 0)
                vector[name] = weight @ seen[name]
        side_by_side = torch.cat([vector[name] for name in names])
        if model.kind == "concat":
            found.append(layers("", side_by_side))
        elif model.kind == "gated":
            score = p["gate.weight"] @ side_by_side + p["gate.bias"]
            total = torch.zeros(6)
            norm = torch.stack([score[names.index(name)].exp() for name in present]).sum() if present else 1.0
            for name in present:
                i = names.index(name)
                projected = p[f"project.{i}.weight"] @ vector[name] + p[f"project.{i}.bias"]
                total = total + score[i].exp() / norm * projected
            found.append(layers("", total))
        elif model.kind == "late":
            mine = present or names
            shares = [torch.softmax(layers(f"each.{names.index(name)}.", vector[name]), 0) for name in mine]
            found.append(torch.stack(shares).mean(0).log())
        else:
            y = {
                name: seen[name] @ p[f"project.{names.index(name)}.weight"].T + p[f"project.{names.index(name)}.bias"]
                for name in present
            }
            means = []
            for name in present:
                others = [y[other] for other in present if other != name]
                z = y[name]
                if others:
                    far = torch.cat(others)
                    scores = (z @ p["query.weight"].T) @ (far @ p["key.weight"].T).T / math.sqrt(6)
                    z = z + torch.softmax(scores, 1) @ (far @ p["value.weight"].T + p["value.bias"])
                means.append(z.mean(0))
            found.append(layers("", torch.stack(means).mean(0) if means else torch.zeros(6)))
    return torch.stack(found)


@pytest.mark.parametrize("many", [None, TOKEN], ids=["vectors", "tokens"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", NAMES)
def test_head_and_gradients_match_formula_row_by_row(kind: str, depth: int, many: dict[str, int] | None) -> None:
    x, shown = rows(many), there(many)
    whole = {name: torch.ones_like(mask) for name, mask in shown.items()}
    for given, masks in ((None, whole), (shown, shown)):
        gradients: list[dict[str, Tensor]] = []
        ways: tuple[Callable[[Head], Tensor], ...] = (
            lambda model, given=given: model(x, given), lambda model, m=masks: plain(model, x, m, depth),
        )  # fmt: skip
        for way in ways:
            model = head(kind, depth, many)
            logits = way(model)
            logits.log_softmax(1)[:, 1].sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            gradients[-1][""] = logits.detach().softmax(1)
        for name, value in gradients[0].items():
            other = gradients[1].get(name, torch.zeros_like(value))
            torch.testing.assert_close(value, other, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("many", [None, TOKEN], ids=["vectors", "tokens"])
@pytest.mark.parametrize("kind", NAMES)
def test_head_ignores_content_of_missing_tokens(kind: str, many: dict[str, int] | None) -> None:
    model, x, shown = head(kind, many=many), rows(many), there(many)
    broken = {name: values.clone() for name, values in x.items()}
    for name, mask in shown.items():
        broken[name][mask[:, 0] if many is None else mask] = x[name][mask[:, 0] if many is None else mask]
        broken[name][~(mask[:, 0] if many is None else mask)] = torch.nan
    found = model(broken, shown)
    assert torch.equal(found, model(x, shown)) and found.isfinite().all()
    # A row says the same whoever stands beside it.
    torch.testing.assert_close(model({n: v[:2] for n, v in x.items()}, {n: m[:2] for n, m in shown.items()}), found[:2])
    assert not torch.allclose(model(x)[0], found[0], atol=1e-3)


@pytest.mark.parametrize("kind", NAMES)
def test_head_is_invariant_to_order_of_modalities_and_tokens(kind: str) -> None:
    x, shown, model = rows(TOKEN), there(TOKEN), head(kind, many=TOKEN)
    wanted = model(x, shown)
    turned = {name: values.flip(1) for name, values in x.items()}
    torch.testing.assert_close(model(turned, {name: mask.flip(1) for name, mask in shown.items()}), wanted)
    other = HEADS[kind](dict(reversed(FEATURES.items())), 3, 1, 6, 0.0, 64, TOKEN)
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(("project.", "each.")):
            first, number, rest = name.split(".", 2)
            name = f"{first}.{1 - int(number)}.{rest}"
        elif name == "gate.bias":
            value = value.flip(0)
        if name == "gate.weight" or (kind == "concat" and name == "hidden.0.weight"):
            value = torch.cat([value[:, 3:], value[:, :3]], 1)
            value = value.flip(0) if name == "gate.weight" else value
        state[name] = value
    other.load_state_dict(state)
    torch.testing.assert_close(other.eval()(x, shown), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_build_head_restores_head_from_values_and_state(kind: str) -> None:
    model = head(kind, many=TOKEN)
    model.get_buffer("temperature").fill_(2.0)
    again = build_head(model.to_dict())
    again.load_state_dict(model.state_dict())
    x = rows(TOKEN)
    assert torch.equal(again.eval()(x), model(x))
    model.get_buffer("temperature").fill_(1.0)
    torch.testing.assert_close(again(x) * 2, model(x))
    assert again.to_dict() == model.to_dict()
    with pytest.raises(KeyError):
        build_head({**model.to_dict(), "head": "mean"})


def test_attention_starts_as_mean_and_gates_start_equal() -> None:
    torch.manual_seed(0)
    gated = GatedHead(FEATURES, 2, 1, 6, 0.0, 64, TOKEN)
    x = rows(TOKEN)
    gated.reduce_by({name: fit_reduction(values.flatten(0, 1).numpy(), 64) for name, values in x.items()})
    z = gated.concatenate(x)
    means = [part.mean(1) for part in gated.parts(z).values()]
    for found, wanted in zip(gated.pooled(z, None), means, strict=True):
        torch.testing.assert_close(found, wanted)
    mask = gated.token_mask(there(TOKEN), N)
    gates = gated.gates(gated.hide(z, mask), mask)
    assert gates[4].tolist() == [0.5, 0.5] and gates[0].tolist() == [0.0, 1.0] and gates[1].tolist() == [1.0, 0.0]
    assert gates[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", NAMES)
def test_head_accepts_single_modality(kind: str) -> None:
    model = head(kind, features={"eeg": 5})
    x = {"eeg": rows()["eeg"]}
    assert model(x).shape == (N, 3) and model(x).isfinite().all()


def test_input_kind_of_token_heads_follows_pooling() -> None:
    for kind in (*POOLINGS, *TOKENS):
        assert input_kind({"pooling": kind}) == input_kind({"pooling": kind, "head": "gated"}) == kind
        wanted = "channels_attention" if kind.startswith("channels") else "attention"
        assert input_kind({"pooling": kind, "head": "cross_attention"}) == wanted
