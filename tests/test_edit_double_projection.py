"""DP against a pseudo-inverse in scipy's null space: preserved outputs do not move, or by the bound at a lower rank."""

import numpy as np
import pytest
import scipy.linalg
import torch

from overpaint import edit
from overpaint.edit.change import Change
from overpaint.edit.methods.double_projection import projected_onto
from overpaint.edit.weights import find_weight

PAIRS = {"van gogh": "painting", "snoopy": "dog"}
PRESERVE = ["monet", "a cat", "tree", "a red house"]
FRAMES = ("", "photo of ")


def exact(model, site):
    return find_weight(model, site).parameter.detach().double().numpy()


def last(model, text):
    mask = model.tokenizer(text, padding="max_length", truncation=True).attention_mask
    return model.encode([text])[0, sum(mask) - 2].double().numpy()


@pytest.mark.parametrize("preserve", [(), PRESERVE])
def test_every_weight_equals_the_pseudo_inverse_in_the_null_space(tiny_sd1, preserve):
    change = edit.dp(tiny_sd1, PAIRS, preserve=preserve, frames=FRAMES, ridge=1e-9)
    olds = np.stack([last(tiny_sd1, f + old) for old in PAIRS for f in FRAMES], 1)
    news = np.stack([last(tiny_sd1, f + new) for new in PAIRS.values() for f in FRAMES], 1)
    kept = np.stack([last(tiny_sd1, p) for p in preserve], 1) if preserve else olds[:, :0]
    u2 = scipy.linalg.null_space(kept.T) if preserve else np.eye(64)
    assert len(change.movements) == 32
    for m in change.movements:
        w = exact(tiny_sd1, m.site)
        expected = w @ (news - olds) @ np.linalg.pinv(u2.T @ olds) @ u2.T
        assert np.linalg.norm(m.delta.numpy() - expected) < 1e-4 * np.linalg.norm(expected)


def test_one_concept_has_the_papers_rank_one_solution(tiny_sd1):
    change = edit.dp(
        tiny_sd1, {"van gogh": "painting"}, preserve=PRESERVE, frames=("",), ridge=1e-9
    )
    c, target = last(tiny_sd1, "van gogh"), last(tiny_sd1, "painting")
    u2 = scipy.linalg.null_space(np.stack([last(tiny_sd1, p) for p in PRESERVE]))
    x = u2.T @ c
    for m in change.movements[:4]:
        b = exact(tiny_sd1, m.site) @ (target - c)
        expected = np.outer(b, x) @ u2.T / (x @ x)
        assert np.linalg.norm(m.delta.numpy() - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_preserved_outputs_do_not_move(request, name):
    model = request.getfixturevalue(name)
    change = edit.dp(model, PAIRS, preserve=[*PRESERVE, ""], layers=[0, 4])
    rows = torch.stack([torch.from_numpy(last(model, p)) for p in PRESERVE])
    erased = torch.from_numpy(last(model, "snoopy"))
    for m in change.movements:
        w = torch.from_numpy(exact(model, m.site))
        moved = (rows @ m.delta.T).norm(dim=1) / (rows @ w.T).norm(dim=1)
        assert float(moved.max()) < 1e-6  # the features are float32
        assert float((m.delta @ erased).norm()) > 0.1 * float((w @ erased).norm())
    assert change.report["preserve_drift"] < 1e-12
    assert change.report["residual_after"] < 1e-4 < change.report["residual_before"]


def test_tokens_to_the_last_pad_are_preserved_too(tiny_sd1):
    options = {"preserve": ["monet"], "layers": [3], "keys": "last_to_pads", "frames": ("",)}
    change = edit.dp(tiny_sd1, {"snoopy": "dog"}, rank=40, **options)
    assert change.report["preserved_keys"] == 77 - 1 and len(change.movements[0].keys) > 70
    with pytest.raises(ValueError, match="leave no direction of 64 in which 'snoopy' could be edi"):
        edit.dp(tiny_sd1, {"snoopy": "dog"}, **options)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_at_a_limited_rank_preserved_outputs_move_at_most_by_the_bound(tiny_sd1, rank):
    prompts = [*PRESERVE, "a bird", "an apple", "a fish"]
    change = edit.dp(tiny_sd1, PAIRS, preserve=prompts, rank=rank, layers=[0, 8])
    rows = torch.stack([torch.from_numpy(last(tiny_sd1, p)) for p in prompts])
    sizes = torch.linalg.svdvals(rows)
    for m in change.movements:
        moved = (rows @ m.delta.T).norm(dim=1)
        bound = float(torch.linalg.matrix_norm(m.delta, 2) * sizes[rank])
        assert 1e-3 * bound < float(moved.max()) <= bound * (1 + 1e-5)


def test_safe_concepts_are_projected_onto_by_a_plain_loop(tiny_sd1):
    safe = ["tree", "a cat"]
    change = edit.dp(tiny_sd1, PAIRS, safe=safe, frames=FRAMES, ridge=1e-9, layers=[2])
    targets, keys = [], []
    for old, new in PAIRS.items():
        for frame in FRAMES:
            s = np.stack([last(tiny_sd1, frame + name) for name in (new, *safe)], 1)
            c = last(tiny_sd1, frame + old)
            targets.append(s @ np.linalg.pinv(s.T @ s) @ s.T @ c)
            keys.append(c)
    for m in change.movements:
        w = exact(tiny_sd1, m.site)
        expected = (np.stack(targets) - np.stack(keys)) @ w.T
        assert np.allclose(m.residuals.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    one = projected_onto(torch.tensor([[2.0, 3.0]]), torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]))
    assert torch.allclose(one, torch.tensor([[2.0, 0.0]]).double())


def test_concepts_are_added_and_removed_and_files_keep_the_preservation(tiny_sd1, tmp_path):
    options = {"preserve": PRESERVE, "layers": [1]}
    joint = edit.dp(tiny_sd1, PAIRS, **options)
    parts = [edit.dp(tiny_sd1, {old: new}, **options) for old, new in PAIRS.items()]
    for added in (parts[0] + parts[1], edit.stack(tiny_sd1, parts)):
        assert added.protocol["preserve_weight"] == "exact"
        for m in added.movements:
            whole = next(other for other in joint.movements if other.site == m.site)
            assert float((m.delta - whole.delta).norm()) < 1e-6 * float(whole.delta.norm())
    alone = joint.without("snoopy")
    for m, other in zip(alone.movements, parts[0].movements, strict=True):
        assert float((m.delta - other.delta).norm()) < 1e-6 * float(other.delta.norm())
    joint.save(tmp_path / "c.safetensors")
    loaded = Change.load(tmp_path / "c.safetensors")
    assert loaded.digest == joint.digest and loaded.without("snoopy").digest == alone.digest
    assert joint.compact(rank=4).report["rank"] <= 4
    other = edit.dp(tiny_sd1, {"snoopy": "dog"}, preserve=["monet"], layers=[1])
    for add in (lambda: parts[0] + other, lambda: edit.stack(tiny_sd1, [parts[0], other])):
        with pytest.raises(ValueError, match="differ in preserve, which they hold exactly"):
            add()


def test_bad_arguments_are_refused(tiny_sd1):
    with pytest.raises(ValueError, match="`rank` must be 1 or more, got 0. Leave it out"):
        edit.dp(tiny_sd1, PAIRS, rank=0)
    with pytest.raises(ValueError, match="moves 'k', 'v' or both"):
        edit.dp(tiny_sd1, PAIRS, matrices=("q",))
    with pytest.raises(TypeError, match="`safe` must be a list of texts, got 'tree'"):
        edit.dp(tiny_sd1, PAIRS, safe="tree")
    with pytest.raises(ValueError, match="'snoopy' has the same key as 'snoopy' → 'dog', which is"):
        edit.dp(tiny_sd1, PAIRS, preserve=["snoopy"])
