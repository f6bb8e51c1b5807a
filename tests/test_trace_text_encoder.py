"""Causal tracing of the text encoder: laws of restored states, controls, settings and resumed traces."""

import pytest
import torch
from trace_inputs import brightness, hook_count

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sampling import denoise
from overpaint.probes import Probe
from overpaint.trace import Drawing, Noise, TextStates, UNetStates
from overpaint.trace.corruption import corruptions
from overpaint.trace.text_encoder_trace import encode_restored, untrained
from overpaint.zoo import builders

STYLE = Probe("a", "style", "a cat in openmoji style on a red background", "openmoji style")
CAT = Probe("b", "object", "a cat in noto style", "cat")


ONE = TextStates(only=[("text.0.mlp", "eos")])
LAST_SUBJECT = TextStates(positions=("last_subject",))


def corrupt(model, probe=STYLE, sigma=1.0):
    (corruption,), _ = corruptions(model, [probe], Noise(sigma=sigma))
    return corruption


@pytest.fixture(scope="module")
def traced(tiny_sd1):
    return op.trace.text_encoder(tiny_sd1, [STYLE, CAT], generate=False, noise=Noise(sigma=1.0))


@pytest.fixture(scope="module")
def drawn(tiny_sd1):
    """A trace of two states with pictures."""
    return op.trace.text_encoder(
        tiny_sd1,
        [CAT],
        states=TextStates(only=[("text.2.mlp", "last_subject"), ("text.0.mlp", "eos")]),
        drawing=Drawing(steps=2, solver="own"),
        noise=Noise(sigma=1.0),
        scorer=brightness,
        minimum_gap=-1.0,
    )


def test_there_are_24_states_at_each_position(traced, tiny_sd1):
    rows = [r for r in traced.table.to_pylist() if not r["control"]]
    style = [r for r in rows if r["probe"] == "a"]
    # open|moji, style, on, end of text, first padding
    assert {(r["role"], r["position"]) for r in style} == {
        ("subject", 4), ("subject", 5), ("last_subject", 6), ("after", 7), ("eos", 11), ("pad", 12),
    }  # fmt: skip
    for position in (4, 5, 6, 7, 11, 12):
        there = [r for r in style if r["position"] == position]
        assert len(there) == len({r["site"] for r in there}) == 24
        assert sum(r["kind"] == "self_attn" for r in there) == 12
    assert len(rows) == 24 * (6 + 4)


def test_the_clean_row_equals_a_plain_encoding(tiny_double):
    corruption = corrupt(tiny_double)
    clean, _ = encode_restored(tiny_double.text_encoder, corruption, [])
    plain = tiny_double.encode([STYLE.prompt] * 8)  # equal batch shape
    assert torch.equal(clean, plain[0])


def test_restoring_the_last_block_at_all_positions_equals_the_clean_pass(tiny_double):
    corruption = corrupt(tiny_double)
    text = tiny_double.text_encoder
    last = text.get_submodule(sites.find_text(text)[-1].path.rpartition(".")[0])
    everywhere = range(77)
    embeds = encode_restored(text, corruption, [[(last, everywhere)]])
    assert torch.equal(embeds[2], embeds[0])
    assert not torch.equal(embeds[1], embeds[0])


def test_restoring_all_sublayers_leaves_the_noise_on_the_residual_stream(tiny_double):
    corruption = corrupt(tiny_double)
    text = tiny_double.text_encoder
    sublayers = sites.find_text(text)
    everything = [(text.get_submodule(site.path), range(77)) for site in sublayers]
    norm = text.get_submodule(sublayers[0].path.partition("encoder.")[0] + "final_layer_norm")
    with hooks.record_inputs(norm) as seen:
        encode_restored(text, corruption, [everything])
    difference = seen[0][2] - seen[0][0]  # float32 of float64
    span = corruption.span
    assert torch.allclose(difference[span.start : span.end], corruption.noise, atol=1e-5)
    difference[span.start : span.end] = 0
    assert torch.equal(difference, torch.zeros_like(difference))


def test_restoring_attention_equals_restoring_its_out_projection(tiny_double):
    corruption = corrupt(tiny_double)
    text = tiny_double.text_encoder
    for layer in (0, 7):
        site = sites.get(tiny_double, f"text.{layer}.self_attn")
        whole, linear = site.module(tiny_double), site.module(tiny_double).out_proj
        position = corruption.span.last
        embeds = encode_restored(text, corruption, [[(whole, [position])], [(linear, [position])]])
        assert torch.equal(embeds[2], embeds[3])
        assert torch.equal(embeds[2][:position], embeds[1][:position])
        assert not torch.equal(embeds[2][position:], embeds[1][position:])


def test_a_state_restored_in_a_batch_equals_that_state_restored_alone(tiny_sd1):
    corruption = corrupt(tiny_sd1)
    text = tiny_sd1.text_encoder
    states = [[(site.module(tiny_sd1), [corruption.span.last])] for site in sites.find_text(text)]
    together = encode_restored(text, corruption, states)
    parts = encode_restored(text, corruption, states, rows=5)
    alone = encode_restored(text, corruption, states[3:4])
    assert torch.allclose(together, parts, atol=1e-5)
    assert torch.allclose(together[5], alone[2], atol=1e-5)


def test_first_layers_recover_most_with_random_weights(tiny_double):
    """Part of the effect comes from the architecture alone, which is why there is an untrained control."""
    table = op.trace.text_encoder(
        tiny_double,
        [STYLE, CAT],
        states=LAST_SUBJECT,
        noise=Noise(samples=2),
        generate=False,
        controls="none",
    ).mean("embed_recovery")
    means = {row["site"]: row["mean"] for row in table.to_pylist()}
    attention = [means[f"text.{i}.self_attn"] for i in range(12)]
    assert attention[0] == max(attention)
    assert sum(attention[:3]) > 3 * abs(sum(attention[6:9]))


def test_the_untrained_encoder_is_repeatable_and_has_other_weights(tiny_sd1, traced, drawn):
    first, second = (untrained(tiny_sd1.text_encoder) for _ in range(2))
    weights = [next(m.parameters()) for m in (first, second, tiny_sd1.text_encoder)]
    assert torch.equal(weights[0], weights[1])
    assert weights[0].shape == weights[2].shape
    rows = traced.table.to_pylist()
    control = [r for r in rows if r["control"] == "untrained"]
    assert len(control) == 24 * (6 + 4)
    assert all(r["embed_recovery"] is not None for r in control)
    assert {r["control"] for r in drawn.table.to_pylist() if r["score_restored"] is None} == {
        "untrained",
        "other span",
    }
    trained = {
        (r["site"], r["position"], r["probe"]): r["embed_recovery"]
        for r in rows
        if not r["control"]
    }
    changed = [trained[r["site"], r["position"], r["probe"]] - r["embed_recovery"] for r in control]
    assert sum(abs(difference) > 1e-3 for difference in changed) > len(changed) / 2


def test_the_second_control_has_the_positions_of_other_words(traced):
    rows = [r for r in traced.table.to_pylist() if r["control"] == "other span"]
    assert {r["position"] for r in rows if r["probe"] == "a"} == {1, 2, 3, 4, 11, 12}


def test_scores_equal_those_of_denoising_the_features_separately(tiny_sd1, drawn):

    corruption = corrupt(tiny_sd1, CAT)
    site = sites.get(tiny_sd1, "text.2.mlp")
    embeds = encode_restored(
        tiny_sd1.text_encoder, corruption, [[(site.module(tiny_sd1), [corruption.span.last])]]
    )
    latents = denoise(
        tiny_sd1, tiny_sd1.initial_latents([0] * 3), embeds, tiny_sd1.encode([""]), steps=2,
        guidance_scale=7.5,
    )  # fmt: skip
    scores = brightness(tiny_sd1.decode(latents), None)
    row = next(
        r for r in drawn.table.to_pylist()
        if (r["probe"], r["site"], r["role"], r["control"]) == ("b", "text.2.mlp", "last_subject", "")
    )  # fmt: skip
    row_scores = [row["score_clean"], row["score_corrupted"], row["score_restored"]]
    assert row_scores == pytest.approx(scores.tolist(), abs=1e-5)
    assert row["indirect_effect"] == row["score_restored"] - row["score_corrupted"]
    plain = tiny_sd1.generate(CAT.prompt, seed=0, steps=2)
    assert row["score_clean"] == pytest.approx(plain.images.mean().item(), abs=1e-5)


def test_equal_features_are_drawn_once(tiny_sd1):
    drawn = []

    def score(images, probes):
        drawn.append(len(images))
        return images.mean((1, 2, 3))

    options = {
        "drawing": Drawing(steps=1),
        "scorer": score,
        "states": LAST_SUBJECT,
        "controls": "none",
    }
    op.trace.text_encoder(tiny_sd1, [CAT], noise=Noise(sigma=0.0), **options)
    assert sum(drawn) == 1  # nothing corrupted: every row is the clean one
    drawn.clear()
    op.trace.text_encoder(tiny_sd1, [CAT], noise=Noise(sigma=1.0, samples=2), **options)
    assert sum(drawn) == 1 + 2 * (1 + 24)  # the clean picture is shared by both noise samples


def test_no_hook_or_changed_weight_is_left_on_the_model(tiny_sd1):
    before = [p.clone() for p in tiny_sd1.text_encoder.parameters()]

    def fail(images, probes):
        raise RuntimeError("on purpose")

    settings = {"states": LAST_SUBJECT, "drawing": Drawing(steps=1), "scorer": fail}
    with pytest.raises(RuntimeError, match="on purpose"):
        op.trace.text_encoder(tiny_sd1, [CAT], **settings)
    assert hook_count(tiny_sd1.text_encoder) == hook_count(tiny_sd1.unet) == 0
    assert all(map(torch.equal, before, tiny_sd1.text_encoder.parameters()))


def test_progress_is_reported_and_settings_are_saved(tiny_sd1):
    seen = []
    effects = op.trace.text_encoder(
        tiny_sd1,
        [CAT, STYLE],
        noise=Noise(sigma=0.1),
        generate=False,
        controls="none",
        on_progress=lambda *x: seen.append(x),
    )
    label = "tracing the text encoder"
    assert seen == [(1000, 2000, label), (2000, 2000, label)]
    expected = {"trace": "text_encoder", "sigma": 0.1, "scorer": "none", "seeds": [0], "probes": 2}
    assert effects.protocol.items() >= expected.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": []}, "`probes` is empty: give at least one"),
        ({"drawing": Drawing(batch_size=3)}, "`batch_size` must be at least 4"),
        ({"controls": "both"}, "`controls` must be 'none', 'features' or 'pictures', got 'both'"),
        (
            {"states": TextStates(only=[("text.0.mlp", "last")])},
            "no states are selected, so there is nothing to trace",
        ),
        (
            {"states": TextStates(positions=("last",))},
            "unknown position 'last': choose among subject, last_subject",
        ),
        ({"probes": [Probe("x", "style", "a cat", "ca")]}, "concept 'ca' is not in the prompt"),
        ({"probes": [Probe("x", "object", "a cat, a cat", "cat")]}, "occurs 2 times in the prompt"),
        ({"probes": [Probe("x", "object", "a " * 80 + "cat", "cat")]}, "cut off by the limit"),
    ],
)
def test_settings_out_of_range_are_refused(tiny_sd1, change, message):
    settings = {"probes": [CAT], "generate": False, "controls": "none", **change}
    with pytest.raises(ValueError, match=message):
        op.trace.text_encoder(tiny_sd1, **settings)


def test_corrupting_states_is_the_mirror_image_of_restoring_them(tiny_double):
    corruption = corrupt(tiny_double)
    text = tiny_double.text_encoder
    last = text.get_submodule(sites.find_text(text)[-1].path.rpartition(".")[0])
    first = sites.get(tiny_double, "text.0.self_attn").module(tiny_double)
    plan = [
        [(last, range(77))],
        [(first, [corruption.span.last])],
        [(first, [corruption.span.start - 1])],
    ]
    embeds = encode_restored(text, corruption, plan, direction="corrupt")
    assert torch.equal(embeds[2], embeds[1])
    assert not torch.equal(embeds[3], embeds[0])
    assert torch.equal(embeds[3][: corruption.span.last], embeds[0][: corruption.span.last])
    assert torch.equal(embeds[4], embeds[0])  # nothing before the concept is corrupted


def test_restoring_all_heads_of_a_layer_equals_restoring_the_layer(tiny_double):
    corruption = corrupt(tiny_double)
    text = tiny_double.text_encoder
    site = sites.get(tiny_double, "text.0.self_attn")
    linear, width = site.module(tiny_double).out_proj, 64 // sites.heads(tiny_double, site)
    slices = [slice(i * width, (i + 1) * width) for i in range(sites.heads(tiny_double, site))]
    assert len(slices) == 4
    heads = [(linear, [corruption.span.last], columns) for columns in slices]
    plan = [[(site.module(tiny_double), [corruption.span.last])], heads, heads[:1]]
    embeds = encode_restored(text, corruption, plan)
    assert torch.allclose(embeds[2], embeds[3], atol=1e-12)
    assert not torch.allclose(embeds[4], embeds[2], atol=1e-6)


def test_heads_groups_and_single_states_are_named_in_the_table(tiny_sd1):
    options = {"generate": False, "controls": "none", "noise": Noise(sigma=1.0)}
    rows = op.trace.text_encoder(
        tiny_sd1,
        [CAT],
        states=TextStates(only=[("text.1.self_attn", "last_subject")], heads=True),
        **options,
    ).table.to_pylist()
    assert [r["head"] for r in rows] == [None, 0, 1, 2, 3]
    attention = [s for s in sites.find_text(tiny_sd1.text_encoder) if s.kind == "self_attn"]
    rows = op.trace.text_encoder(
        tiny_sd1,
        [CAT],
        states=TextStates(groups={"all attention": attention}, positions=("last_subject",)),
        **options,
    ).table.to_pylist()
    assert [(r["site"], r["kind"], r["path"]) for r in rows] == [("all attention", "group", "")]


def test_pictures_of_the_other_span_are_drawn_with_controls_pictures(tiny_sd1):
    rows = op.trace.text_encoder(
        tiny_sd1,
        [CAT],
        drawing=Drawing(steps=1, seeds=(0, 1)),
        scorer=brightness,
        controls="pictures",
        states=ONE,
    ).table.to_pylist()
    other = [r for r in rows if r["control"] == "other span"]
    assert {r["seed"] for r in other} == {0, 1}
    assert all(r["score_restored"] is not None for r in other)
    assert {r["score_clean"] for r in other} == {r["score_clean"] for r in rows if not r["control"]}


def test_sdxl_is_corrupted_and_traced_in_both_encoders(tiny_xl):
    corruption = corrupt(tiny_xl)
    assert len(corruption.parts) == 2
    clean, corrupted = encode_restored(tiny_xl.text_encoders, corruption, [])
    plain = tiny_xl.encode([STYLE.prompt] * 8)[0]
    assert torch.allclose(clean, plain, atol=1e-6)
    width = tiny_xl.text_encoders[0].config.hidden_size
    moved = (clean - corrupted)[corruption.span.start].abs()
    assert moved[:width].max() > 1e-3
    assert moved[width:].max() > 1e-3
    effects = op.trace.text_encoder(tiny_xl, [STYLE], drawing=Drawing(steps=1), scorer=brightness)
    parts = {r["part"] for r in effects.table.to_pylist()}
    assert parts == {"text", "text2"}
    unet = op.trace.unet(
        tiny_xl,
        [STYLE],
        drawing=Drawing(steps=1),
        scorer=brightness,
        states=UNetStates(kinds=("cross_attn",)),
    )
    assert len(unet) == sum(s.kind == "cross_attn" for s in sites.find_unet(tiny_xl.unet))


def test_a_stopped_trace_continues_to_the_same_table(tiny_sd1, tmp_path):
    options = {
        "drawing": Drawing(steps=1),
        "scorer": brightness,
        "states": TextStates(only=[("text.0.mlp", "eos"), ("text.2.mlp", "eos")]),
    }
    whole = op.trace.text_encoder(tiny_sd1, [STYLE, CAT], **options)

    def stop(done, total, label):
        if done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        op.trace.text_encoder(tiny_sd1, [STYLE, CAT], folder=tmp_path, on_progress=stop, **options)
    again = op.trace.text_encoder(tiny_sd1, [STYLE, CAT], folder=tmp_path, **options)
    assert again.table.equals(whole.table)


def test_a_folder_of_selected_states_is_refused_for_all_states(tiny_sd1, tmp_path):
    options = {"generate": False, "controls": "none", "noise": Noise(sigma=1.0), "folder": tmp_path}
    only = {("text.1.mlp", "eos"), ("text.0.mlp", "eos")}
    some = op.trace.text_encoder(tiny_sd1, [CAT], states=TextStates(only=only), **options)
    assert some.protocol["only"] == [["text.0.mlp", "eos"], ["text.1.mlp", "eos"]]
    with pytest.raises(ValueError, match="protocol differs in 'only'"):
        op.trace.text_encoder(tiny_sd1, [CAT], **options)
    assert op.trace.text_encoder(
        tiny_sd1, [CAT], states=TextStates(only=list(only)), **options
    ).table.equals(some.table)


@pytest.mark.parametrize(
    ("probe", "groups", "field"),
    [
        (Probe("b", "object", CAT.prompt, "noto style"), (0, 1), "asked"),
        (Probe("b", "object", CAT.prompt, "cat", label="dog"), (0, 1), "asked"),
        (Probe("b", "object", CAT.prompt, "cat", seed=3), (0, 1), "asked"),
        (CAT, (0, 2), "groups"),
    ],
)
def test_a_folder_of_other_probes_or_groups_is_refused(tiny_sd1, tmp_path, probe, groups, field):
    sublayers = sites.find_text(tiny_sd1.text_encoder)

    def trace(probe, indices):
        return op.trace.text_encoder(
            tiny_sd1,
            [probe],
            states=TextStates(groups={"some": [sublayers[i] for i in indices]}),
            generate=False,
            controls="none",
            noise=Noise(sigma=1.0),
            folder=tmp_path,
        )

    trace(CAT, (0, 1))
    with pytest.raises(ValueError, match=f"protocol differs in '{field}'"):
        trace(probe, groups)


def test_another_scorer_of_the_same_name_is_refused_on_resuming(tiny_sd1, tmp_path):
    class Scale:
        name = "mine"

        def __init__(self, weight):
            self.weight = torch.tensor(weight)

        def score(self, images, probes):
            return self.weight * images.mean((1, 2, 3))

    options = {
        "drawing": Drawing(steps=1),
        "states": ONE,
        "folder": tmp_path,
    }
    op.trace.text_encoder(tiny_sd1, [CAT], scorer=Scale(1.0).score, **options)
    with pytest.raises(ValueError, match="protocol differs in 'scorer_weights'"):
        op.trace.text_encoder(tiny_sd1, [CAT], scorer=Scale(2.0).score, **options)


def test_prompts_without_a_selected_state_have_no_rows(tiny_sd1):
    """In one prompt no token follows "noto style", neither in the model's own run nor in the untrained control."""
    ends = Probe("c", "style", "a cat in noto style", "noto style")
    options = {
        "drawing": Drawing(steps=1),
        "scorer": brightness,
        "states": TextStates(only=[("text.0.mlp", "after")]),
    }
    rows = op.trace.text_encoder(tiny_sd1, [ends, STYLE], **options).table.to_pylist()
    assert {r["probe"] for r in rows if r["control"] in ("", "untrained")} == {"a"}
    with pytest.raises(ValueError, match="no states are selected"):
        op.trace.text_encoder(tiny_sd1, [ends], **options)


@pytest.mark.parametrize("generate", [True, False])
def test_features_and_scores_that_are_not_finite_raise(tiny_sd1, generate):
    last = tiny_sd1.text_encoder.get_submodule(sites.find_text(tiny_sd1.text_encoder)[-1].path)
    options = {
        "drawing": Drawing(steps=1),
        "scorer": brightness,
        "controls": "none",
        "states": TextStates(positions=("eos",)),
    }
    with (
        hooks.patch({last: lambda output: output * float("inf")}),
        pytest.raises(UnsupportedModel, match="text features became NaN or infinite in 'a cat in"),
    ):
        op.trace.text_encoder(tiny_sd1, [CAT], generate=generate, **options)
    with pytest.raises(
        UnsupportedModel, match="scores became NaN or infinite: check the output of `scorer`"
    ):
        op.trace.text_encoder(
            tiny_sd1, [CAT], **{**options, "scorer": lambda images, _: images.mean((1, 2, 3)) / 0}
        )


def test_a_sigma_factor_is_relative_to_each_encoders_own_embeddings(tiny_sd1):
    """Trained embeddings ten times as large do not change the noise of the untrained encoder."""
    large = op.load(builders.tiny())
    with torch.no_grad():
        large.text_encoder.get_input_embeddings().weight.mul_(10)
    options = {"generate": False, "states": TextStates(positions=("eos",))}

    def control(model, sigma):
        effects = op.trace.text_encoder(model, [CAT], noise=Noise(sigma=sigma), **options)
        rows = [r for r in effects.table.to_pylist() if r["control"] == "untrained"]
        return effects.protocol["sigma_untrained"], [r["embed_recovery"] for r in rows]

    assert control(large, "3std") == control(tiny_sd1, "3std")
    assert control(large, 0.5)[0] == control(tiny_sd1, 0.5)[0] == 0.5


def test_empty_groups_and_groups_of_another_part_are_refused(tiny_sd1):
    layer = sites.find_unet(tiny_sd1.unet)[0]
    with pytest.raises(
        ValueError,
        match="holds unet.resnet.0, which is not a site of the part that is traced .text.: ",
    ):
        op.trace.text_encoder(
            tiny_sd1, [CAT], states=TextStates(groups={"mixed": [layer]}), generate=False
        )
    for trace, states in ((op.trace.text_encoder, TextStates), (op.trace.unet, UNetStates)):
        with pytest.raises(ValueError, match="the group 'none' is empty: name at least one site"):
            trace(tiny_sd1, [CAT], states=states(groups={"none": []}), scorer=brightness)


def test_memory_also_limits_the_rows_of_the_text_encoder(tiny_sd1):
    options = {
        "scorer": brightness,
        "states": TextStates(positions=("eos",)),
        "controls": "none",
        "noise": Noise(sigma=1.0),
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
            effects = op.trace.text_encoder(
                tiny_sd1, [CAT], drawing=Drawing(steps=1, memory=memory), **options
            )
        assert max(largest) == (32 if memory is None else 8)
        tables.append(torch.tensor(effects.table["score_restored"].to_pylist()))
    assert torch.allclose(*tables, atol=1e-5)
