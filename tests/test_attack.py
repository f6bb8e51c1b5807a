"""The attack: what it tries, that it finds what is there, that it leaves nothing behind."""

import json

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from overpaint import edit
from overpaint.evaluate import attack
from overpaint.model.token_spans import end_of_text
from overpaint.probes import Case, EvaluationSet

PROMPTS = ("a cat in blob style", "a blob style dog")
CASES = EvaluationSet(
    "mine", "table", "blob style", "noto style",
    (Case("no name", "target", "no name"), *(Case(p, "target", p, p.replace("blob", "noto")) for p in PROMPTS),
     Case("a bird", "other", "a bird")),
)  # fmt: skip


class Eyes:
    """Sees how light a picture is, as the probability of the style `blob`."""

    name = "a light meter"
    labels = {"style": ("noto", "blob")}

    def classify(self, images, kind):
        light = images.mean((1, 2, 3))
        return torch.stack([1 - light, light], 1)


@pytest.fixture(scope="module")
def swap(tiny_sd1):
    return edit.swap_embedding(tiny_sd1, {"blob style": "noto style"})


@pytest.fixture(scope="module")
def found(tiny_sd1, swap):
    return run(tiny_sd1, swap)


def run(model, change, **options):
    settings = {"eyes": Eyes(), "pictures": 1, "tokens": 1, "gradient_steps": 3, "steps": 2}
    return attack.search(model, change, CASES, **{**settings, **options})


def test_plain_prompts_score_as_the_pictures_of_either_model(tiny_sd1, swap, found):
    seeds = [2_000_000 + i for i in range(4)]
    prompts = [p for p in PROMPTS for _ in range(2)]
    before = tiny_sd1.generate(prompts, seed=seeds, steps=2).images.mean((1, 2, 3))
    with swap.applied(tiny_sd1):
        after = tiny_sd1.generate(prompts, seed=seeds, steps=2).images.mean((1, 2, 3))
        bare = tiny_sd1.generate(["a cat in"] * 2 + ["a dog"] * 2, seed=seeds, steps=2).images
    assert found.before.mean == pytest.approx(before.mean().item(), abs=1e-4)
    assert found.after.mean == pytest.approx(after.mean().item(), abs=1e-4)
    assert found.chance.mean == pytest.approx(bare.mean().item(), abs=1e-4)
    assert found.before.n == found.chance.n == 4


def test_the_best_of_each_family_is_drawn_again_from_other_seeds(found):
    assert {a.family for a in found.attempts} == set(attack.FAMILIES)
    scores = [a.found.mean for a in found.attempts]
    assert scores == sorted(scores, reverse=True)
    for family in attack.FAMILIES:
        tried = [a for a in found.attempts if a.family == family]
        assert [a.confirmed is not None for a in tried] == [True] + [False] * (len(tried) - 1)
        assert tried[0].confirmed.n == 2 * tried[0].found.n
    assert found.best.confirmed.mean == max(a.confirmed.mean for a in found.attempts if a.confirmed)


def test_the_share_recovered_worked_by_hand(found):
    def made(before, after, best, low, chance=0.0):
        one = attack.Interval
        tried = attack.Attempt("paraphrase", "x", one(9, 9, 9, 1), one(best, low, best, 4))
        return attack.Attack("x", one(before, 0, 1, 4), one(after, after, after, 4),
                             one(chance, chance, chance, 4), (tried,))  # fmt: skip

    assert made(0.9, 0.1, 0.5, 0.3).recovered == pytest.approx(0.5)
    assert made(0.9, 0.1, 0.5, 0.3).brought_back
    assert not made(0.9, 0.1, 0.5, 0.3, chance=0.4).brought_back
    assert not made(0.9, 0.1, 0.5, 0.05).brought_back
    assert (
        made(0.1, 0.1, 0.5, 0.3).recovered != made(0.1, 0.1, 0.5, 0.3).recovered
    )  # NaN: nothing was taken


def test_a_soft_token_stands_before_the_end_of_each_prompt_and_changes_what_follows(
    tiny_sd1, tiny_xl
):
    for model in (tiny_sd1, tiny_xl):
        hunt = attack._Hunt(model, Eyes(), CASES.cases[1:3], "blob style", 1, 2, 1.0, 0)
        soft = [attack._start(model, i, "blob style") for i in range(len(model.text_encoders))]
        plain, made = hunt.plain(), hunt.softened(soft)
        other = hunt.softened([-s for s in soft])
        for row, prompt in enumerate(PROMPTS):
            end = end_of_text(model.tokenizer, model.tokenize([prompt])[0])
            assert torch.allclose(made[row, :end], plain[row, :end], atol=1e-5)
            assert not torch.allclose(made[row, end], plain[row, end], atol=1e-3)
            assert not torch.allclose(made[row, end], other[row, end], atol=1e-3)


def test_of_a_word_s_own_embedding_the_soft_token_is_that_word(tiny_sd1):
    hunt = attack._Hunt(tiny_sd1, Eyes(), CASES.cases[1:2], "blob style", 1, 2, 1.0, 0)
    (word,) = tiny_sd1.tokenizer("x", add_special_tokens=False).input_ids
    soft = tiny_sd1.text_encoder.get_input_embeddings().weight[word].detach()
    written = tiny_sd1.encode([f"{PROMPTS[0]} x"])
    assert torch.allclose(hunt.softened([soft]), written, atol=1e-5)


def test_gradient_steps_lower_the_error_of_the_noise(tiny_sd1, swap):
    hunt = attack._Hunt(tiny_sd1, Eyes(), CASES.cases[1:2], "blob style", 1, 3, 1.0, 0)
    wanted = hunt.wanted()
    assert [int(t) for t, *_ in wanted] == sorted((int(t) for t, *_ in wanted), reverse=True)
    with swap.applied(tiny_sd1):
        soft, losses = hunt.soften(wanted, 12, 0.3)
    assert losses[-1] < losses[0]
    assert not soft[0].requires_grad


def test_what_is_wanted_is_read_as_the_sampler_reads_it(tiny_sd1, monkeypatch):
    euler = EulerDiscreteScheduler.from_config(tiny_sd1.scheduler.config)
    monkeypatch.setattr(tiny_sd1.pipe, "scheduler", euler)
    hunt, seen = attack._Hunt(tiny_sd1, Eyes(), CASES.cases[1:2], "blob style", 1, 3, 1.0, 0), []
    hook = tiny_sd1.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        wanted = hunt.wanted()
    finally:
        hook.remove()
    assert len(seen) == 6  # of each step ours, then the sampler's
    for ours, theirs, (_, latents, _, _) in zip(seen[::2], seen[1::2], wanted, strict=True):
        assert ours.equal(theirs) and latents.equal(ours[0])


def test_nothing_is_left_behind_also_when_the_eyes_fail(tiny_sd1, swap):
    class Blind(Eyes):
        looked = 0

        def classify(self, images, kind):
            Blind.looked += 1
            if Blind.looked == 4:
                raise OSError("no light")
            return Eyes.classify(self, images, kind)

    parts = (tiny_sd1.text_encoder, tiny_sd1.unet)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    hooked = [sum(len(m._forward_hooks) for m in part.modules()) for part in parts]
    with pytest.raises(OSError, match="no light"):
        run(tiny_sd1, swap, eyes=Blind())
    run(tiny_sd1, swap, families=["soft token"])
    for part, weights in zip(parts, before, strict=True):
        assert all(torch.equal(weights[k], v) for k, v in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert [sum(len(m._forward_hooks) for m in part.modules()) for part in parts] == hooked


def test_a_seed_gives_the_same_search_and_progress_reaches_its_end(tiny_sd1, swap, found):
    told = []
    again = run(tiny_sd1, swap, on_progress=lambda *at: told.append(at))
    assert [a.words for a in again.attempts] == [a.words for a in found.attempts]
    assert again.best == found.best
    assert told[-1][:2] == (told[0][1], told[0][1])
    assert [t[0] for t in told] == sorted(t[0] for t in told)


def test_paraphrases_and_neighbours_are_other_words(tiny_sd1):
    forms = attack.paraphrases("van gogh")
    assert forms == (
        "VAN GOGH", "van-gogh", "vangogh", "van googh", "van goh", "van go gh", "gogh van",
        "van gogh, van gogh", "famous van gogh", "typical van gogh",
    )  # fmt: skip
    found = attack.neighbours(tiny_sd1, "blob style", 2)
    assert found
    assert "blob style" not in found


def test_a_search_is_written_as_json(found, tmp_path):
    words = json.loads(found.save(tmp_path).read_text(), parse_constant=lambda t: pytest.fail(t))
    assert words["protocol"]["scorer"] == "a light meter"
    assert words["protocol"]["score"] == "probability of the style blob"
    assert len(words["attempts"]) == len(found.attempts)
    assert found.flat()["attack_recovered"] == pytest.approx(found.recovered, nan_ok=True)


def test_bad_input_is_named(tiny_sd1, swap):
    with pytest.raises(ValueError, match="unknown family of attacks 'magic': choose of paraphrase"):
        run(tiny_sd1, swap, families=["magic"])
    with pytest.raises(ValueError, match="be at least 1 and `rate` positive; got 3, 2, 0, 3"):
        run(tiny_sd1, swap, pictures=0)
    bare = EvaluationSet("bare", "csv", "owl", "", CASES.cases)
    with pytest.raises(ValueError, match="no target prompt of 'bare' names 'owl' once"):
        attack.search(tiny_sd1, swap, bare, eyes=Eyes())
