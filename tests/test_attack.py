"""The search for inputs that bring a concept back: attempts, scores, progress, and the unchanged model."""

import json

import layouts
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from test_edit_export import random_change

import overpaint
from overpaint import edit
from overpaint.evaluate import attack, rewordings, soft_token
from overpaint.evaluate.attack_results import TEXT_FREE, Attack, Attempt
from overpaint.metrics import Interval
from overpaint.model.token_spans import find_span
from overpaint.probes import Case, EvaluationSet

SMALL = attack.Budget(pictures=1, tokens=1, gradient_steps=3)
PROMPTS = ("a cat in blob style", "a blob style dog")
CASES = EvaluationSet(
    "mine", "table", "blob style", "noto style",
    (Case("no name", "target", "no name"), *(Case(p, "target", p, p.replace("blob", "noto")) for p in PROMPTS),
     Case("a bird", "other", "a bird")),
)  # fmt: skip


class BrightnessScorer:
    """Returns the brightness of a picture as the probability of the style `blob`."""

    name = "brightness"
    labels = {"style": ("noto", "blob")}

    def classify(self, images, kind):
        brightness = images.mean((1, 2, 3))
        return torch.stack([1 - brightness, brightness], 1)


@pytest.fixture(scope="module")
def swap(tiny_sd1):
    return edit.swap_embedding(tiny_sd1, {"blob style": "noto style"})


@pytest.fixture(scope="module")
def result(tiny_sd1, swap):
    return run(tiny_sd1, swap)


def run(model, change, **options):
    settings = {"scorer": BrightnessScorer(), "budget": SMALL, "steps": 2}
    return attack.search(model, change, CASES, **{**settings, **options})


def test_plain_prompts_score_as_the_pictures_of_either_model(tiny_sd1, swap, result):
    seeds = [2_000_000 + i for i in range(4)]
    prompts = [p for p in PROMPTS for _ in range(2)]
    before = tiny_sd1.generate(prompts, seed=seeds, steps=2).images.mean((1, 2, 3))
    with swap.applied(tiny_sd1):
        after = tiny_sd1.generate(prompts, seed=seeds, steps=2).images.mean((1, 2, 3))
        bare = tiny_sd1.generate(["a cat in"] * 2 + ["a dog"] * 2, seed=seeds, steps=2).images
    assert result.before.mean == pytest.approx(before.mean().item(), abs=1e-4)
    assert result.after.mean == pytest.approx(after.mean().item(), abs=1e-4)
    assert result.chance.mean == pytest.approx(bare.mean().item(), abs=1e-4)
    assert result.before.n == result.chance.n == 4


def test_a_probability_of_0_in_all_pictures_has_the_exact_interval_over_prompts(tiny_sd1, swap):
    class Certain(BrightnessScorer):
        def classify(self, images, kind):
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    result = run(tiny_sd1, swap, scorer=Certain(), families=("paraphrase",))
    bound = 1 - 0.025 ** (1 / 2)  # two prompts
    for score in (result.before, result.after, result.chance, result.best.confirmed):
        assert (score.mean, score.low, score.high) == (0, 0, pytest.approx(bound))
    assert not result.brought_back


def test_the_best_of_each_family_is_drawn_again_from_other_seeds(result):
    families = [f for f in attack.FAMILIES if f != "translation"]  # the tiny vocabulary has none
    assert {a.family for a in result.attempts} == set(families)
    *by_prompt, inversion = result.attempts
    assert inversion is result.inversion and inversion.score == inversion.confirmed
    scores = [a.score.mean for a in by_prompt]
    assert scores == sorted(scores, reverse=True)
    for family in families[:-1]:
        tried = [a for a in result.attempts if a.family == family]
        assert [a.confirmed is not None for a in tried] == [True] + [False] * (len(tried) - 1)
        assert tried[0].confirmed.n == 2 * tried[0].score.n
    assert result.best.confirmed.mean == max(a.confirmed.mean for a in by_prompt if a.confirmed)


def test_the_share_recovered_worked_by_hand():
    def build(before, after, best, low, chance=0.0):
        one = Interval
        attempt = Attempt("paraphrase", "x", one(9, 9, 9, 1), one(best, low, best, 4))
        return Attack("x", one(before, 0, 1, 4), one(after, after, after, 4),
                             one(chance, chance, chance, 4), (attempt,))  # fmt: skip

    assert build(0.9, 0.1, 0.5, 0.3).recovered == pytest.approx(0.5)
    assert build(0.9, 0.1, 0.5, 0.3).brought_back
    assert not build(0.9, 0.1, 0.5, 0.3, chance=0.4).brought_back
    assert not build(0.9, 0.1, 0.5, 0.05).brought_back
    assert (
        build(0.1, 0.1, 0.5, 0.3).recovered != build(0.1, 0.1, 0.5, 0.3).recovered
    )  # NaN: the edit removed nothing


def test_the_inversion_is_no_attempt_by_a_prompt():
    low, high = Interval(0.1, 0.0, 0.2, 4), Interval(0.9, 0.8, 1.0, 4)
    word, noise = Attempt("paraphrase", "x", low, low), Attempt(TEXT_FREE, "noise", high, high)
    both = Attack("x", high, low, low, (word, noise))
    assert (both.best, both.inversion, both.brought_back) == (word, noise, False)
    assert (both.flat()["attack_paraphrase"], both.flat()["attack_inversion"]) == (0.1, 0.9)
    alone = Attack("x", high, low, low, (noise,))
    assert (alone.best, alone.brought_back) == (noise, True)


def test_soft_tokens_stand_in_the_place_of_the_concept_and_change_what_follows(tiny_sd1, tiny_xl):
    for model in (tiny_sd1, tiny_xl):
        soft = soft_token.neutral_rows(model, "blob style")
        plain = model.encode(PROMPTS)
        with_soft = soft_token.encode_with(model, PROMPTS, "blob style", soft)
        other = soft_token.encode_with(model, PROMPTS, "blob style", [s.flip(-1) for s in soft])
        for row, prompt in enumerate(PROMPTS):
            span = find_span(model.tokenizer, prompt, "blob style")
            assert torch.allclose(with_soft[row, : span.start], plain[row, : span.start], atol=1e-5)
            for place in (*span.positions, span.end):
                assert not torch.allclose(with_soft[row, place], plain[row, place], atol=1e-3)
                assert not torch.allclose(with_soft[row, place], other[row, place], atol=1e-3)


def test_rows_of_the_concept_or_of_other_words_give_the_features_of_these_words(tiny_sd1, tiny_xl):
    for model in (tiny_sd1, tiny_xl):
        rows = soft_token.concept_rows(model, "blob style")
        assert torch.allclose(
            soft_token.encode_with(model, PROMPTS, "blob style", rows), model.encode(PROMPTS), atol=1e-5
        )  # fmt: skip
        for words in ("dog", "a big red dog"):  # fewer and more tokens
            rows = soft_token.concept_rows(model, words)
            written = model.encode([p.replace("blob style", words) for p in PROMPTS])
            actual = soft_token.encode_with(model, PROMPTS, "blob style", rows)
            assert torch.allclose(actual, written, atol=1e-5)


def test_the_token_limit_cuts_what_follows_longer_rows(tiny_sd1):
    limit = tiny_sd1.tokenizer.model_max_length
    prompt = " ".join(["dog", *["x"] * (limit - 3)])
    rows = soft_token.concept_rows(tiny_sd1, "cat cat cat")
    written = tiny_sd1.encode([" ".join(["cat cat cat", *["x"] * (limit - 5)])])
    actual = soft_token.encode_with(tiny_sd1, [prompt], "dog", rows)
    assert torch.allclose(actual, written, atol=1e-5)


def test_soft_tokens_start_from_the_mean_row_whatever_the_concept(tiny_sd1):
    mean = tiny_sd1.text_encoder.get_input_embeddings().weight.detach().mean(0)
    for concept in ("dog", "blob style"):
        (rows,) = soft_token.neutral_rows(tiny_sd1, concept)
        tokens = tiny_sd1.tokenizer(concept, add_special_tokens=False).input_ids
        assert torch.allclose(rows, mean.expand(len(tokens), -1), atol=1e-6)


def test_unedited_rows_bring_back_a_renamed_concept_exactly_and_no_edited_layer(tiny_sd1, swap):
    layer = edit.quickfix(tiny_sd1, {"blob style": "noto style"})
    renamed, edited = (run(tiny_sd1, change, families=["old rows"]) for change in (swap, layer))
    assert renamed.best.confirmed.mean == pytest.approx(renamed.before.mean, abs=1e-5)
    assert edited.best.confirmed.mean == pytest.approx(edited.after.mean, abs=1e-5)


def test_the_noise_of_the_unedited_model_is_reached_exactly_after_a_rename_alone(tiny_sd1, swap):
    """The error that soft tokens minimise is 0 at the unedited rows after a rename, and not after an edited layer."""
    targets = soft_token.noise_targets(tiny_sd1, PROMPTS[:1], steps=3, guidance_scale=1.0, seed=0)
    rows = soft_token.concept_rows(tiny_sd1, "blob style")
    errors = []
    for change in (swap, edit.quickfix(tiny_sd1, {"blob style": "noto style"})):
        with change.applied(tiny_sd1), torch.no_grad():
            embeds = soft_token.encode_with(tiny_sd1, PROMPTS[:1], "blob style", rows)
            noise = [tiny_sd1.noise_pred(t.latents[None], t.timestep, embeds)[0] for t in targets]
        errors.append(
            max(float((n - t.noise).abs().max()) for n, t in zip(noise, targets, strict=True))
        )
    assert errors[0] < 1e-5 < 1e-3 < errors[1], errors


def test_pictures_return_from_their_noise_unless_the_unet_was_edited(tiny_sd1, swap):
    pictures = []

    class Keeping(BrightnessScorer):
        def classify(self, images, kind):
            pictures.append(images)
            return super().classify(images, kind)

    sites = [f"unet.cross_attn.{i}.{p}" for i in (0, 6, 15) for p in ("to_v", "to_out")]
    errors = []
    for change in (swap, random_change(tiny_sd1, *sites, size=2)):
        pictures.clear()
        run(tiny_sd1, change, families=["inversion"], scorer=Keeping(), steps=6)
        before, *_, again = pictures
        errors.append(float((again - before).abs().mean()))
    assert errors[0] < 0.001 < 0.01 < errors[1], errors


def test_gradient_steps_lower_the_error_of_the_noise(tiny_sd1, swap):
    targets = soft_token.noise_targets(tiny_sd1, PROMPTS[:1], steps=3, guidance_scale=1.0, seed=0)
    times = [int(target.timestep) for target in targets]
    assert times == sorted(times, reverse=True)
    with swap.applied(tiny_sd1):
        soft, losses = soft_token.fit(
            tiny_sd1, PROMPTS[:1], "blob style", targets, gradient_steps=12, rate=0.3
        )
    assert losses[-1] < losses[0]
    assert not soft[0].requires_grad


def test_noise_targets_have_the_inputs_of_the_sampler(tiny_sd1, monkeypatch):
    euler = EulerDiscreteScheduler.from_config(tiny_sd1.scheduler.config)
    monkeypatch.setattr(tiny_sd1.pipe, "scheduler", euler)
    inputs = []
    hook = tiny_sd1.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        targets = soft_token.noise_targets(
            tiny_sd1, PROMPTS[:1], steps=3, guidance_scale=1.0, seed=0
        )
    finally:
        hook.remove()
    assert len(inputs) == 6  # at each step that of the target, then that of the sampler
    for ours, theirs, target in zip(inputs[::2], inputs[1::2], targets, strict=True):
        assert ours.equal(theirs) and target.latents.equal(ours[0])


def test_weights_hooks_and_gradients_are_restored_also_when_the_scorer_fails(tiny_sd1, swap):
    class FailingScorer(BrightnessScorer):
        calls = 0

        def classify(self, images, kind):
            FailingScorer.calls += 1
            if FailingScorer.calls == 4:
                raise OSError("no device")
            return super().classify(images, kind)

    parts = (tiny_sd1.text_encoder, tiny_sd1.unet)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    hooked = [sum(len(m._forward_hooks) for m in part.modules()) for part in parts]
    with pytest.raises(OSError, match="no device"):
        run(tiny_sd1, swap, scorer=FailingScorer())
    run(tiny_sd1, swap, families=["soft token"])
    for part, weights in zip(parts, before, strict=True):
        assert all(torch.equal(weights[k], v) for k, v in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert [sum(len(m._forward_hooks) for m in part.modules()) for part in parts] == hooked


def test_a_seed_gives_the_same_search_and_progress_reaches_its_end(tiny_sd1, swap, result):
    calls = []
    again = run(tiny_sd1, swap, on_progress=lambda *at: calls.append(at))
    assert [a.words for a in again.attempts] == [a.words for a in result.attempts]
    assert again.best == result.best
    assert calls[-1][:2] == (calls[0][1], calls[0][1])
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_paraphrases_and_neighbours_are_other_words(tiny_sd1):
    forms = rewordings.paraphrases("van gogh")
    assert forms == (
        "VAN GOGH", "van-gogh", "vangogh", "van googh", "van goh", "van go gh", "gogh van",
        "van gogh, van gogh", "famous van gogh", "typical van gogh",
    )  # fmt: skip
    texts = rewordings.neighbours(tiny_sd1, "blob style", 2)
    assert texts
    assert "blob style" not in texts


def test_words_with_the_same_tokens_are_tried_once():
    tokenizer = layouts.tokenizer()
    texts = ["VAN GOGH", "van-gogh", "van  gogh", "Van-Gogh", "", "vangogh", "dog"]
    assert rewordings.distinct(tokenizer, texts, besides=["van gogh", "a", "dog"]) == (
        "van-gogh", "vangogh",
    )  # fmt: skip


def test_no_two_attempts_of_a_search_have_the_same_tokens(tiny_sd1, result):
    words = [
        a.words for a in result.attempts if a.family in ("paraphrase", "translation", "neighbour")
    ]
    tokens = [tuple(tiny_sd1.tokenizer(w, add_special_tokens=False).input_ids) for w in words]
    plain = tuple(tiny_sd1.tokenizer("blob style", add_special_tokens=False).input_ids)
    assert len(words) > 8 and len({*tokens, plain}) == len(words) + 1


def test_translations_are_those_of_the_table_that_the_vocabulary_has(monkeypatch):
    tokenizer = layouts.tokenizer()
    assert rewordings.translations(tokenizer, "Red cat") == (
        "rojo gato", "rouge chat", "rot katze", "rosso gatto", "vermelho gato", "rood kat",
        "Red kitty", "Red kitteh",
    )  # fmt: skip
    assert rewordings.translations(tokenizer, "Van Gogh style") == (
        "Van Gogh estilo", "Van Gogh stil", "Van Gogh stile", "Van Gogh stijl", "vincent style",
        "vangogh style",
    )  # fmt: skip
    assert rewordings.translations(tokenizer, "blob") == ()
    assert rewordings.translations(tokenizer, "catalogue") == ()  # whole words only
    table = {"cat": rewordings._Forms(["кот", "gato"], ["猫"])}
    monkeypatch.setattr(rewordings, "_table", lambda: table)
    assert rewordings.translations(tokenizer, "cat") == ("gato",)  # the others fall to bytes


def test_a_search_tries_translations_on_a_model_with_the_real_vocabulary():
    class ObjectScorer(BrightnessScorer):
        labels = {"object": ("dog", "cat")}

    model = overpaint.load(layouts.pipeline("sd1"))
    cases = EvaluationSet(
        "mine", "table", "cat", "dog", (Case("a red cat", "target", "cat", "dog"),)
    )
    change = edit.swap_embedding(model, {"cat": "dog"})
    small = attack.Budget(prompts=1, pictures=1)
    found = attack.search(
        model, change, cases, scorer=ObjectScorer(), families=["translation"], budget=small, steps=1
    )
    assert {a.words for a in found.attempts} == set(rewordings.translations(model.tokenizer, "cat"))
    assert {"gato", "katze", "kitty"} < {a.words for a in found.attempts}


def test_no_translation_falls_to_single_bytes():
    tokenizer = layouts.tokenizer()
    table = rewordings._table()
    forms = [form for word in table for form in rewordings.translations(tokenizer, word)]
    pieces = {
        name.removesuffix("</w>")
        for form in forms
        for name in tokenizer.convert_ids_to_tokens(tokenizer(form).input_ids[1:-1])
    }
    assert len(forms) > 300 and {len(row.languages) for row in table.values()} == {6}
    assert [p for p in pieces if len(p) == 1 and not p.isascii()] == []


def test_a_search_is_saved_as_json_and_loaded_again(result, tmp_path):
    words = json.loads(result.save(tmp_path).read_text(), parse_constant=lambda t: pytest.fail(t))
    assert words["protocol"]["scorer"] == "brightness"
    assert words["protocol"]["score"] == "probability of the style blob"
    assert len(words["attempts"]) == len(result.attempts)
    assert set(words["attempts"][0]) == {"family", "words", "found", "confirmed"}
    assert result.flat()["attack_recovered"] == pytest.approx(result.recovered, nan_ok=True)
    assert Attack.load(tmp_path) == result


def test_bad_input_is_named(tiny_sd1, swap):
    with pytest.raises(ValueError, match="unknown family of attacks 'magic': choose of paraphrase"):
        run(tiny_sd1, swap, families=["magic"])
    with pytest.raises(ValueError, match="`families` is empty: choose of paraphrase"):
        run(tiny_sd1, swap, families=[])
    with pytest.raises(ValueError, match="`pictures` must be at least 1, got 0"):
        attack.Budget(pictures=0)
    with pytest.raises(ValueError, match="`rate` must be positive, got 0"):
        attack.Budget(rate=0)
    bare = EvaluationSet("bare", "csv", "owl", "", CASES.cases)
    with pytest.raises(ValueError, match="no target prompt of 'bare' contains 'owl' once"):
        attack.search(tiny_sd1, swap, bare, scorer=BrightnessScorer())
