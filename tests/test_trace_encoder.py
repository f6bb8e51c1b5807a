"""Acceptance checks 11, 13 and 15 to 20 of causal tracing, text encoder."""

import pytest
import torch

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.probes import Probe
from overpaint.trace import corruption as corrupt
from overpaint.trace import renderer, text_encoder_trace

STYLE = Probe("a", "style", "a cat in openmoji style on a red background", "openmoji style")
CAT = Probe("b", "object", "a cat in noto style", "cat")


def corruption(model, probe=STYLE, sigma=1.0, samples=1):
    made, _ = corrupt.corruptions(model, [probe], noise_samples=samples, sigma=sigma)
    return made[0]


def brightness(images, probes):
    return images.mean((1, 2, 3))


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def traced(tiny_sd1):
    probes = [STYLE, CAT]
    return op.trace.text_encoder(
        tiny_sd1, probes, steps=2, sigma=1.0, score=brightness, minimum_gap=-1.0, solver="own"
    )


def test_24_states_a_position(traced, tiny_sd1):
    rows = [r for r in traced.table.to_pylist() if not r["control"]]
    style = [r for r in rows if r["probe"] == "a"]
    # open|moji, style, on, end of text, first padding
    assert {(r["role"], r["position"]) for r in style} == {
        ("subject", 4), ("subject", 5), ("last_subject", 6), ("after", 7), ("eos", 11), ("pad", 12),
    }  # fmt: skip
    for position in (4, 5, 6, 7, 11, 12):
        found = [r for r in style if r["position"] == position]
        assert len(found) == len({r["site"] for r in found}) == 24
        assert sum(r["kind"] == "self_attn" for r in found) == 12
    assert len(rows) == 24 * (6 + 4)


def test_corruption_changes_the_concept_and_what_follows_only(tiny_double):
    made = corruption(tiny_double)
    clean, corrupted = text_encoder_trace.encode_restored(tiny_double.text_encoder, made, [])
    start = made.span.start
    assert torch.equal(clean[:start], corrupted[:start])
    assert ((clean[start:] - corrupted[start:]).norm(dim=1) > 1e-3).all()


def test_sigma_zero_corrupts_nothing(tiny_double):
    made = corruption(tiny_double, sigma=0.0)
    clean, corrupted = text_encoder_trace.encode_restored(tiny_double.text_encoder, made, [])
    assert torch.equal(clean, corrupted)


def test_clean_row_is_the_plain_encoding(tiny_double):
    made = corruption(tiny_double)
    clean, _ = text_encoder_trace.encode_restored(tiny_double.text_encoder, made, [])
    plain = tiny_double.encode([STYLE.prompt] * 8)  # equal batch shape
    assert torch.equal(clean, plain[0])


def test_restoring_the_last_block_everywhere_is_the_clean_pass(tiny_double):
    made = corruption(tiny_double)
    text = tiny_double.text_encoder
    last = text.get_submodule(sites.find_text(text)[-1].path.rpartition(".")[0])
    everywhere = range(77)
    embeds = text_encoder_trace.encode_restored(text, made, [[(last, everywhere)]])
    assert torch.equal(embeds[2], embeds[0])
    assert not torch.equal(embeds[1], embeds[0])


def test_restoring_every_sublayer_leaves_the_noise_on_the_residual_stream(tiny_double):
    made = corruption(tiny_double)
    text = tiny_double.text_encoder
    found = sites.find_text(text)
    everything = [(text.get_submodule(site.path), range(77)) for site in found]
    norm = text.get_submodule(found[0].path.partition("encoder.")[0] + "final_layer_norm")
    with hooks.record_inputs(norm) as seen:
        text_encoder_trace.encode_restored(text, made, [everything])
    difference = seen[0][2] - seen[0][0]  # float32 of float64
    span = made.span
    assert torch.allclose(difference[span.start : span.end], made.noise, atol=1e-5)
    difference[span.start : span.end] = 0
    assert torch.equal(difference, torch.zeros_like(difference))


def test_restoring_attention_is_restoring_its_out_projection(tiny_double):
    made = corruption(tiny_double)
    text = tiny_double.text_encoder
    for layer in (0, 7):
        site = sites.get(tiny_double, f"text.{layer}.self_attn")
        whole, linear = site.module(tiny_double), site.module(tiny_double).out_proj
        position = made.span.last
        embeds = text_encoder_trace.encode_restored(
            text, made, [[(whole, [position])], [(linear, [position])]]
        )
        assert torch.equal(embeds[2], embeds[3])
        assert torch.equal(embeds[2][:position], embeds[1][:position])
        assert not torch.equal(embeds[2][position:], embeds[1][position:])


def test_a_state_restored_among_others_is_that_state_restored_alone(tiny_sd1):
    made = corruption(tiny_sd1)
    text = tiny_sd1.text_encoder
    states = [[(site.module(tiny_sd1), [made.span.last])] for site in sites.find_text(text)]
    together = text_encoder_trace.encode_restored(text, made, states)
    parts = text_encoder_trace.encode_restored(text, made, states, rows=5)
    alone = text_encoder_trace.encode_restored(text, made, states[3:4])
    assert torch.allclose(together, parts, atol=1e-5)
    assert torch.allclose(together[5], alone[2], atol=1e-5)


def test_recovery_with_depth_on_random_weights(tiny_double):
    """Part of what looks like knowledge is architecture: the reason for the untrained control."""
    table = op.trace.text_encoder(
        tiny_double, [STYLE, CAT], positions=("last_subject",), noise_samples=3, generate=False,
        control=False,
    ).mean("embed_recovery")  # fmt: skip
    means = {row["site"]: row["mean"] for row in table.to_pylist()}
    attention = [means[f"text.{i}.self_attn"] for i in range(12)]
    assert attention[0] == max(attention)
    assert sum(attention[:3]) > 3 * abs(sum(attention[6:9]))


def test_untrained_control_is_repeatable_and_other_weights(tiny_sd1, traced):
    first, second = (text_encoder_trace.untrained(tiny_sd1.text_encoder) for _ in range(2))
    weights = [next(m.parameters()) for m in (first, second, tiny_sd1.text_encoder)]
    assert torch.equal(weights[0], weights[1])
    assert weights[0].shape == weights[2].shape
    rows = traced.table.to_pylist()
    control = [r for r in rows if r["control"] == "untrained"]
    assert len(control) == 24 * (6 + 4)
    assert all(r["score_restored"] is None for r in control)
    assert all(r["embed_recovery"] is not None for r in control)
    trained = {
        (r["site"], r["position"], r["probe"]): r["embed_recovery"]
        for r in rows
        if not r["control"]
    }
    changed = [trained[r["site"], r["position"], r["probe"]] - r["embed_recovery"] for r in control]
    assert sum(abs(difference) > 1e-3 for difference in changed) > len(changed) / 2


def test_other_words_of_equal_length_are_the_second_control(tiny_sd1, traced):
    made = corruption(tiny_sd1)
    other = made.elsewhere()
    assert (made.span.start, made.span.end) == (4, 7)
    assert (other.span.start, other.span.end) == (1, 4)
    assert other.noise is made.noise
    rows = [r for r in traced.table.to_pylist() if r["control"] == "other span"]
    assert {r["position"] for r in rows if r["probe"] == "a"} == {1, 2, 3, 4, 11, 12}
    whole = corruption(tiny_sd1, Probe("c", "object", "cat", "cat"))
    assert whole.elsewhere() is None


def test_noise_depends_on_probe_and_sample_alone(tiny_sd1):
    made, scale = corrupt.corruptions(tiny_sd1, [STYLE, CAT], noise_samples=2, sigma=0.5)
    again, _ = corrupt.corruptions(tiny_sd1, [CAT], noise_samples=1, sigma=0.5)
    assert scale == 0.5
    assert [m.sample for m in made] == [0, 1, 0, 1]
    assert torch.equal(made[2].noise, again[0].noise)
    assert not torch.equal(made[0].noise, made[1].noise)
    many, _ = corrupt.corruptions(tiny_sd1, [STYLE], noise_samples=40, sigma=0.5)
    assert torch.cat([m.noise for m in many]).std().item() == pytest.approx(0.5, rel=0.03)
    clean = [text_encoder_trace.encode_restored(tiny_sd1.text_encoder, m, [])[0] for m in made[:2]]
    assert torch.equal(clean[0], clean[1])


def test_three_standard_deviations_of_the_concepts_embeddings(tiny_sd1):
    _, scale = corrupt.corruptions(tiny_sd1, [STYLE, CAT], noise_samples=1, sigma="3std")
    ids = [
        tiny_sd1.tokenizer(text, add_special_tokens=False).input_ids
        for text in ("openmoji style", "cat")
    ]
    table = tiny_sd1.text_encoder.get_input_embeddings().weight
    assert scale == pytest.approx(3 * table[torch.tensor(sum(ids, []))].std().item(), rel=1e-6)


def test_scores_are_those_of_generating_the_features_oneself(tiny_sd1, traced):
    from overpaint.model.sampling import denoise

    made = corruption(tiny_sd1, CAT)
    site = sites.get(tiny_sd1, "text.2.mlp")
    embeds = text_encoder_trace.encode_restored(
        tiny_sd1.text_encoder, made, [[(site.module(tiny_sd1), [made.span.last])]]
    )
    latents = denoise(
        tiny_sd1, tiny_sd1.initial_latents([0] * 3), embeds, tiny_sd1.encode([""]), steps=2,
        guidance_scale=7.5,
    )  # fmt: skip
    scores = brightness(tiny_sd1.decode(latents), None)
    row = next(
        r for r in traced.table.to_pylist()
        if (r["probe"], r["site"], r["role"], r["control"]) == ("b", "text.2.mlp", "last_subject", "")
    )  # fmt: skip
    found = [row["score_clean"], row["score_corrupted"], row["score_restored"]]
    assert found == pytest.approx(scores.tolist(), abs=1e-5)
    assert row["indirect_effect"] == row["score_restored"] - row["score_corrupted"]
    plain = tiny_sd1.generate(CAT.prompt, seed=0, steps=2)
    assert row["score_clean"] == pytest.approx(plain.images.mean().item(), abs=1e-5)


def test_equal_features_are_drawn_once(tiny_sd1):
    drawn = []

    def score(images, probes):
        drawn.append(len(images))
        return images.mean((1, 2, 3))

    options = {"steps": 1, "score": score, "positions": ("last_subject",), "control": False}
    op.trace.text_encoder(tiny_sd1, [CAT], sigma=0.0, **options)
    assert sum(drawn) == 1  # nothing corrupted: every row is the clean one
    drawn.clear()
    op.trace.text_encoder(tiny_sd1, [CAT], sigma=1.0, noise_samples=2, **options)
    assert sum(drawn) == 1 + 2 * (1 + 24)  # the clean picture is shared by both noise samples


def test_nothing_is_left_on_the_model(tiny_sd1):
    before = [p.clone() for p in tiny_sd1.text_encoder.parameters()]

    def fail(images, probes):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        op.trace.text_encoder(tiny_sd1, [CAT], steps=1, score=fail)
    assert hook_count(tiny_sd1.text_encoder) == hook_count(tiny_sd1.unet) == 0
    assert all(map(torch.equal, before, tiny_sd1.text_encoder.parameters()))


def test_progress_and_protocol(tiny_sd1):
    seen = []
    effects = op.trace.text_encoder(
        tiny_sd1,
        [CAT, STYLE],
        sigma=0.1,
        generate=False,
        control=False,
        on_progress=lambda *x: seen.append(x),
    )
    assert seen == [(1000, 2000), (2000, 2000)]
    wanted = {"trace": "text_encoder", "sigma": 0.1, "scorer": "none", "seeds": [0], "probes": 2}
    assert effects.protocol.items() >= wanted.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": []}, "`probes` is empty: give at least one"),
        ({"seeds": ()}, "`seeds` is empty: give at least one"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 4"),
        ({"noise_samples": 0}, "`noise_samples` must be at least 1, got 0"),
        (
            {"sigma": -1.0},
            "`sigma` must be a number from 0 on, or a factor such as '3std', got -1.0",
        ),
        ({"sigma": "std"}, "a factor such as '3std', got 'std'"),
        (
            {"only": [("text.0.mlp", "last")]},
            "no states are selected, so there is nothing to trace",
        ),
        ({"positions": ("last",)}, "unknown position 'last': choose among subject, last_subject"),
        ({"probes": [Probe("x", "style", "a cat", "ca")]}, "concept 'ca' is not in the prompt"),
        ({"probes": [Probe("x", "object", "a cat, a cat", "cat")]}, "occurs 2 times in the prompt"),
        ({"probes": [Probe("x", "object", "a " * 80 + "cat", "cat")]}, "cut off by the limit"),
    ],
)
def test_bad_requests(tiny_sd1, change, message):
    with pytest.raises(ValueError, match=message):
        op.trace.text_encoder(tiny_sd1, **{"probes": [CAT], "generate": False, **change})


def test_equal_chunks_keep_one_shape():
    parts = list(renderer.equal_chunks(list("abcdefg"), 3))
    assert parts == [(["a", "b", "c"], 3), (["d", "e", "f"], 3), (["g", "g", "g"], 1)]
    assert list(renderer.equal_chunks(list("abcd"), 3)) == [(["a", "b"], 2), (["c", "d"], 2)]
    assert list(renderer.equal_chunks([], 3)) == [([], 0)]
    rows = {"rows": lambda n: n + 2, "multiple": 4, "fill": "-"}
    assert list(renderer.equal_chunks(list("abc"), 4, **rows)) == [(["a", "b"], 2), (["c", "-"], 1)]
    assert list(renderer.equal_chunks(list("abc"), 8, **rows)) == [
        (["a", "b", "c", "-", "-", "-"], 3)
    ]
    assert list(renderer.equal_chunks(list("abc"), 7, **rows)) == [(["a", "b"], 2), (["c", "-"], 1)]
    assert list(renderer.equal_chunks([], 3, **rows)) == [(["-", "-"], 0)]


def test_corrupting_states_mirrors_restoring_them(tiny_double):
    made = corruption(tiny_double)
    text = tiny_double.text_encoder
    last = text.get_submodule(sites.find_text(text)[-1].path.rpartition(".")[0])
    first = sites.get(tiny_double, "text.0.self_attn").module(tiny_double)
    plan = [[(last, range(77))], [(first, [made.span.last])], [(first, [made.span.start - 1])]]
    embeds = text_encoder_trace.encode_restored(text, made, plan, direction="corrupt")
    assert torch.equal(embeds[2], embeds[1])
    assert not torch.equal(embeds[3], embeds[0])
    assert torch.equal(embeds[3][: made.span.last], embeds[0][: made.span.last])
    assert torch.equal(embeds[4], embeds[0])  # nothing before the concept is corrupted


def test_all_heads_of_a_layer_are_the_layer(tiny_double):
    made = corruption(tiny_double)
    text = tiny_double.text_encoder
    site = sites.get(tiny_double, "text.0.self_attn")
    linear, width = site.module(tiny_double).out_proj, 64 // sites.heads(tiny_double, site)
    slices = [slice(i * width, (i + 1) * width) for i in range(sites.heads(tiny_double, site))]
    assert len(slices) == 4
    heads = [(linear, [made.span.last], columns) for columns in slices]
    plan = [[(site.module(tiny_double), [made.span.last])], heads, heads[:1]]
    embeds = text_encoder_trace.encode_restored(text, made, plan)
    assert torch.allclose(embeds[2], embeds[3], atol=1e-12)
    assert not torch.allclose(embeds[4], embeds[2], atol=1e-6)


def test_heads_groups_and_one_state_are_named(tiny_sd1):
    options = {"generate": False, "control": False, "sigma": 1.0}
    rows = op.trace.text_encoder(
        tiny_sd1, [CAT], only=[("text.1.self_attn", "last_subject")], heads=True, **options
    ).table.to_pylist()
    assert [r["head"] for r in rows] == [None, 0, 1, 2, 3]
    attention = [s for s in sites.find_text(tiny_sd1.text_encoder) if s.kind == "self_attn"]
    rows = op.trace.text_encoder(
        tiny_sd1, [CAT], groups={"all attention": attention}, positions=("last_subject",), **options
    ).table.to_pylist()
    assert [(r["site"], r["kind"], r["path"]) for r in rows] == [("all attention", "group", "")]


def test_the_other_span_can_be_drawn_too(tiny_sd1):
    rows = op.trace.text_encoder(
        tiny_sd1, [CAT], steps=1, score=brightness, draw_control=True, positions=("last_subject",), seeds=(0, 1)
    ).table.to_pylist()  # fmt: skip
    other = [r for r in rows if r["control"] == "other span"]
    assert {r["seed"] for r in other} == {0, 1}
    assert all(r["score_restored"] is not None for r in other)
    assert {r["score_clean"] for r in other} == {r["score_clean"] for r in rows if not r["control"]}


def test_sdxl_is_corrupted_and_traced_in_both_encoders(tiny_xl):
    made = corruption(tiny_xl)
    assert len(made.parts) == 2
    clean, corrupted = text_encoder_trace.encode_restored(tiny_xl.text_encoders, made, [])
    plain = tiny_xl.encode([STYLE.prompt] * 8)[0]
    assert torch.allclose(clean, plain, atol=1e-6)
    width = tiny_xl.text_encoders[0].config.hidden_size
    moved = (clean - corrupted)[made.span.start].abs()
    assert moved[:width].max() > 1e-3
    assert moved[width:].max() > 1e-3
    effects = op.trace.text_encoder(tiny_xl, [STYLE], steps=1, score=brightness)
    parts = {r["part"] for r in effects.table.to_pylist()}
    assert parts == {"text", "text2"}
    unet = op.trace.unet(tiny_xl, [STYLE], steps=1, score=brightness, kinds=("cross_attn",))
    assert len(unet) == sum(s.kind == "cross_attn" for s in sites.find_unet(tiny_xl.unet))


def test_a_stopped_sweep_goes_on_to_the_same_table(tiny_sd1, tmp_path):
    options = {"steps": 1, "score": brightness, "positions": ("last_subject",)}
    whole = op.trace.text_encoder(tiny_sd1, [STYLE, CAT], **options)

    def stop(done, total):
        if done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        op.trace.text_encoder(tiny_sd1, [STYLE, CAT], folder=tmp_path, on_progress=stop, **options)
    again = op.trace.text_encoder(tiny_sd1, [STYLE, CAT], folder=tmp_path, **options)
    assert again.table.equals(whole.table)


def test_a_folder_of_some_states_is_not_taken_for_all(tiny_sd1, tmp_path):
    options = {"generate": False, "control": False, "sigma": 1.0, "folder": tmp_path}
    only = {("text.1.mlp", "eos"), ("text.0.mlp", "eos")}
    some = op.trace.text_encoder(tiny_sd1, [CAT], only=only, **options)
    assert some.protocol["only"] == [["text.0.mlp", "eos"], ["text.1.mlp", "eos"]]
    with pytest.raises(ValueError, match="protocol differs in 'only'"):
        op.trace.text_encoder(tiny_sd1, [CAT], **options)
    assert op.trace.text_encoder(tiny_sd1, [CAT], only=list(only), **options).table.equals(
        some.table
    )


@pytest.mark.parametrize(
    ("probe", "groups", "field"),
    [
        (Probe("b", "object", CAT.prompt, "noto style"), (0, 1), "asked"),
        (Probe("b", "object", CAT.prompt, "cat", label="dog"), (0, 1), "asked"),
        (Probe("b", "object", CAT.prompt, "cat", seed=3), (0, 1), "asked"),
        (CAT, (0, 2), "groups"),
    ],
)
def test_a_folder_of_other_questions_is_refused(tiny_sd1, tmp_path, probe, groups, field):
    found = sites.find_text(tiny_sd1.text_encoder)

    def trace(probe, indices):
        return op.trace.text_encoder(
            tiny_sd1, [probe], groups={"some": [found[i] for i in indices]}, generate=False, control=False,
            sigma=1.0, folder=tmp_path,
        )  # fmt: skip

    trace(CAT, (0, 1))
    with pytest.raises(ValueError, match=f"protocol differs in '{field}'"):
        trace(probe, groups)


def test_every_weight_is_in_the_mark_of_a_model_and_of_a_judge(tiny_sd1):
    from overpaint.scorers import judge as features
    from overpaint.scorers.protocols import scorer_name
    from overpaint.trace import provenance
    from overpaint.zoo import builders

    model = op.load(builders.tiny())
    assert provenance.fingerprint(model) == provenance.fingerprint(tiny_sd1)
    table = model.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[700, 5] += 1e-3
    assert provenance.fingerprint(model) != provenance.fingerprint(tiny_sd1)
    judge = features.load()
    before = provenance.scorer_mark(judge.score)
    assert before == provenance.scorer_mark(features.load().score)
    with torch.no_grad():
        next(iter(judge._heads.values()))[0] += 1e-3
    assert provenance.scorer_mark(judge.score) != before
    assert provenance.scorer_mark(brightness) is None
    assert scorer_name(judge.score) == "icons-judge"


def test_another_judge_of_the_same_name_is_noticed_on_resuming(tiny_sd1, tmp_path):
    class Scale:
        name = "mine"

        def __init__(self, weight):
            self.weight = torch.tensor(weight)

        def score(self, images, probes):
            return self.weight * images.mean((1, 2, 3))

    options = {"steps": 1, "only": [("text.0.mlp", "eos")], "folder": tmp_path}
    op.trace.text_encoder(tiny_sd1, [CAT], score=Scale(1.0).score, **options)
    with pytest.raises(ValueError, match="protocol differs in 'scorer_weights'"):
        op.trace.text_encoder(tiny_sd1, [CAT], score=Scale(2.0).score, **options)


def test_prompts_without_a_chosen_state_have_no_rows_and_stop_nothing(tiny_sd1):
    """Nothing follows "noto style" in one prompt; in the other control too, whose words stand elsewhere."""
    ends = Probe("c", "style", "a cat in noto style", "noto style")
    options = {"steps": 1, "score": brightness, "only": [("text.0.mlp", "after")]}
    rows = op.trace.text_encoder(tiny_sd1, [ends, STYLE], **options).table.to_pylist()
    assert {r["probe"] for r in rows if r["control"] in ("", "untrained")} == {"a"}
    with pytest.raises(ValueError, match="no states are selected"):
        op.trace.text_encoder(tiny_sd1, [ends], **options)


@pytest.mark.parametrize("generate", [True, False])
def test_features_and_scores_that_are_not_finite_are_an_error(tiny_sd1, generate):
    last = tiny_sd1.text_encoder.get_submodule(sites.find_text(tiny_sd1.text_encoder)[-1].path)
    options = {"steps": 1, "score": brightness, "control": False, "positions": ("eos",)}
    with (
        hooks.patch({last: lambda output: output * float("inf")}),
        pytest.raises(UnsupportedModel, match="text features became NaN or infinite in 'a cat in"),
    ):
        op.trace.text_encoder(tiny_sd1, [CAT], generate=generate, **options)
    with pytest.raises(
        UnsupportedModel, match="scores became NaN or infinite: look at what `score`"
    ):
        op.trace.text_encoder(
            tiny_sd1, [CAT], **{**options, "score": lambda images, _: images.mean((1, 2, 3)) / 0}
        )


def test_the_untrained_encoder_is_corrupted_as_strongly_as_its_own_embeddings_ask(tiny_sd1):
    """A factor is of each encoder's embeddings: made ten times larger, the trained one's say nothing of the fresh."""
    from overpaint.zoo import builders

    large = op.load(builders.tiny())
    with torch.no_grad():
        large.text_encoder.get_input_embeddings().weight.mul_(10)
    options = {"generate": False, "positions": ("eos",)}

    def control(model, sigma):
        effects = op.trace.text_encoder(model, [CAT], sigma=sigma, **options)
        rows = [r for r in effects.table.to_pylist() if r["control"] == "untrained"]
        return effects.protocol["sigma_untrained"], [r["embed_recovery"] for r in rows]

    assert control(large, "3std") == control(tiny_sd1, "3std")
    assert control(large, 0.5)[0] == control(tiny_sd1, 0.5)[0] == 0.5


def test_groups_of_another_part_or_of_nothing_are_refused(tiny_sd1):
    layer = sites.find_unet(tiny_sd1.unet)[0]
    with pytest.raises(
        ValueError,
        match="holds unet.resnet.0, which is not a site of the part that is traced .text.: ",
    ):
        op.trace.text_encoder(tiny_sd1, [CAT], groups={"mixed": [layer]}, generate=False)
    for trace in (op.trace.text_encoder, op.trace.unet):
        with pytest.raises(ValueError, match="the group 'none' is empty: name at least one site"):
            trace(tiny_sd1, [CAT], groups={"none": []}, score=brightness)


def test_memory_lowers_the_text_encoders_rows_too(tiny_sd1):
    options = {
        "steps": 1,
        "score": brightness,
        "positions": ("eos",),
        "control": False,
        "sigma": 1.0,
    }
    largest = []

    def watch(args, kwargs):
        largest.append(len(args[0] if args else kwargs["hidden_states"]))
        return args, kwargs

    norm = tiny_sd1.text_encoder.get_submodule(
        sites.find_text(tiny_sd1.text_encoder)[0].path.partition("encoder.")[0] + "final_layer_norm"
    )
    tables = []
    for memory in (None, 8):
        largest.clear()
        with hooks.patch_inputs({norm: watch}):
            effects = op.trace.text_encoder(tiny_sd1, [CAT], memory=memory, **options)
        assert max(largest) == (32 if memory is None else 8)
        tables.append(torch.tensor(effects.table["score_restored"].to_pylist()))
    assert torch.allclose(*tables, atol=1e-5)
