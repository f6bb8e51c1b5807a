"""LocoEdit against the paper's row form, on the tiny pipelines."""

import pytest
import torch

from overpaint import edit
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.errors import UnknownSite
from overpaint.model.sampling import Drawing
from overpaint.model.sites import find_unet
from overpaint.model.token_spans import find_span

GOGH = {"van gogh": "painting"}
FRAMES = ("", "a photo of ", "an image of ", "a picture of ")


def bytes_of(model):
    return {name: fingerprint(p) for name, p in model.unet.named_parameters()}


def features(model, concept):
    """Return the features of the concept's last token in each frame, shape (4, D), from whole prompts."""
    texts = [frame + concept for frame in FRAMES]
    rows = model.encode(texts)
    places = [find_span(model.tokenizer, text, concept).last for text in texts]
    return torch.stack([rows[i, place] for i, place in enumerate(places)]).double()


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2"])
def test_every_weight_equals_the_papers_row_form(request, name):
    model = request.getfixturevalue(name)
    change = edit.loco(model, GOGH, ridge=0.1)
    x, y = features(model, "van gogh"), features(model, "painting")
    for movement in change.movements:
        w = find_weight(model, movement.site).parameter.detach().double()
        system = x.T @ x + 0.1 * torch.eye(64, dtype=torch.float64)
        row = torch.linalg.solve(system, x.T @ y @ w.T + 0.1 * w.T)
        assert float((w + movement.delta - row.T).norm()) <= 1e-4 * float((row.T - w).norm())


def test_the_middle_layers_move_and_are_restored(tiny_sd1):
    before = bytes_of(tiny_sd1)
    change = edit.loco(tiny_sd1, GOGH)
    assert change.sites == tuple(f"unet.cross_attn.{i}.to_{kv}" for i in (8, 9) for kv in "kv")
    layers = [s for s in find_unet(tiny_sd1.unet) if s.kind == "cross_attn"][8:10]
    named = {f"{site.path}.to_{kv}.weight" for site in layers for kv in "kv"}
    with change.applied(tiny_sd1):
        after = bytes_of(tiny_sd1)
        assert {n for n in before if before[n] != after[n]} == named
    assert bytes_of(tiny_sd1) == before
    again = edit.loco(tiny_sd1, GOGH, layers=layers)
    assert again.digest == change.digest


def test_the_layers_can_be_those_of_a_traced_window(tiny_sd1):
    from overpaint import trace
    from overpaint.probes import Probe

    probes = [Probe("one", "style", "a tree in van gogh style", "van gogh")]
    effects = trace.prompt_swap(
        tiny_sd1, probes, target="painting", drawing=Drawing(steps=1, guidance_scale=1.0),
        minimum_gap=0.0, scorer=lambda images, _: images.flatten(1).mean(1),
    )  # fmt: skip
    window = trace.pick_window(effects)
    change = edit.loco(tiny_sd1, GOGH, layers=window)
    assert change.sites == tuple(f"{site.name}.to_{kv}" for site in window for kv in "kv")


def test_a_wider_window_and_two_concepts(tiny_xl):
    change = edit.loco(tiny_xl, {**GOGH, "snoopy": "dog"}, window=11, ridge=1e-6)
    assert len(change.movements) == 22
    assert change.movements[0].owners == (0,) * 4 + (1,) * 4
    assert change.report["residual_after"] < 1e-2 * change.report["residual_before"]


def test_a_concept_can_be_removed_and_added(tiny_sd1):
    joint = edit.loco(tiny_sd1, {**GOGH, "snoopy": "dog"})
    alone = edit.loco(tiny_sd1, GOGH)
    for a, b in zip(joint.without("snoopy").movements, alone.movements, strict=True):
        assert float((a.delta - b.delta).norm()) <= 1e-8 * float(b.delta.norm())
    both = alone + edit.loco(tiny_sd1, {"snoopy": "dog"})
    for a, b in zip(both.movements, joint.movements, strict=True):
        assert float((a.delta - b.delta).norm()) <= 1e-6 * float(b.delta.norm())


def test_bad_arguments_are_refused(tiny_sd1):
    with pytest.raises(ValueError, match="the old concept of the pair ' ' → 'apple' is empty"):
        edit.loco(tiny_sd1, {" ": "apple"})
    with pytest.raises(ValueError, match="`window` must be from 1 to 16, .* got 17. 2 is usual"):
        edit.loco(tiny_sd1, GOGH, window=17)
    with pytest.raises(UnknownSite, match="unknown layer -1"):
        edit.loco(tiny_sd1, GOGH, layers=[-1])
    with pytest.raises(
        TypeError, match=r"`frames` must be a list of texts, got .* write \['...'\]"
    ):
        edit.loco(tiny_sd1, GOGH, frames="a photo of ")
