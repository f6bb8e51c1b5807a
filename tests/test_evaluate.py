import math

import pytest
import torch

from overpaint import edit, evaluate
from overpaint.evaluate.recognition import _Runner
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.evaluate.shares import Tally
from overpaint.metrics import Interval
from overpaint.model import TextToImage
from overpaint.probes import questions

LABELS = {"object": ("cat", "dog", "bird"), "style": ("noto", "blob"), "color": ("red", "blue")}


class ColorClassifier:
    """Labels a picture by its mean color; any difference of two pictures may change the label."""

    labels = LABELS

    def classify(self, images, kind):
        mean = images.mean((2, 3)) * 1000  # (B, 3)
        return torch.stack([(mean.sum(1) * (k + 1)).frac() for k in range(len(LABELS[kind]))], 1)


class CountingClassifier(ColorClassifier):
    """Counts the pictures that it labels."""

    def __init__(self):
        self.count = 0

    def classify(self, images, kind):
        self.count += len(images) if kind == "style" else 0
        return super().classify(images, kind)


class CountingModel(TextToImage):
    """Records how many prompts each call of `encode` has, except calls from `generate`."""

    def __init__(self, pipe):
        super().__init__(pipe, name="counting")
        self.reads = []
        self.is_drawing = False

    def encode(self, prompts):
        if not self.is_drawing:
            self.reads.append(len(prompts))
        return super().encode(prompts)

    def generate(self, *args, **options):
        self.is_drawing = True
        result = super().generate(*args, **options)
        self.is_drawing = False
        return result


@pytest.fixture(scope="module")
def swap(tiny_sd1):
    return edit.swap_embedding(tiny_sd1, {"blob style": "noto style"})


def compare(model, changes, **options):
    settings = {"scorer": ColorClassifier(), "size": 3, "steps": 2, "batch_size": 4} | options
    return evaluate.compare(model, changes, **settings)


def test_no_edit_has_the_scores_and_pictures_before(tiny_sd1, swap):
    result = compare(tiny_sd1, {"no edit": None, "swap": swap})
    same = result.scores["no edit"]
    for pair in (
        same.efficacy,
        same.redirection,
        *same.specificity.values(),
        *same.others.values(),
    ):
        assert pair.before == pair.after
        assert pair.drop == 0
    assert same.empty_drift == 0
    assert torch.equal(result.pictures["before"], result.pictures["no edit"])


def test_a_change_alters_pictures_and_leaves_the_model_unchanged(tiny_sd1, swap):
    before = tiny_sd1.encode(["a cat in blob style"])
    result = compare(tiny_sd1, {"swap": swap})
    assert not torch.equal(result.pictures["before"], result.pictures["swap"])
    assert torch.equal(tiny_sd1.encode(["a cat in blob style"]), before)
    assert result.scores["swap"].erase == "blob"
    assert result.scores["swap"].protocol["change_digest"] == swap.digest
    assert result.scores["swap"].replace == "noto"


def test_only_prompts_with_changed_features_are_drawn_again(tiny_sd1, swap):
    items = questions.build("style", "blob", labels=LABELS, held_out=(), size=3, seed=0)
    drawn = []
    runner = _Runner(
        tiny_sd1,
        ColorClassifier(),
        items,
        [0, 1],
        2,
        None,
        4,
        lambda done, total, name: drawn.append(done),
    )
    before = runner.run(None, "no edit", done=0, total=99)
    whole = runner.run(swap, "swap", done=0, total=99)
    drawn.clear()
    result = runner.run(swap, "swap", done=0, total=99, before=before)
    touched = [i for i, q in enumerate(items) if "blob" in q.prompt]
    assert 0 < len(touched) < len(items)
    assert len(drawn) == 1 + -(-len(touched) // 4)
    assert result.labels != before.labels
    for i in touched:
        assert all(result.labels[k][i] == whole.labels[k][i] for k in LABELS)
    for i in set(range(len(items))) - set(touched):
        assert all(result.labels[k][i] == before.labels[k][i] for k in LABELS)
    assert result.pictures.keys() == whole.pictures.keys()


def test_the_unedited_model_encodes_the_prompts_once(tiny_sd1, swap):
    bird = edit.swap_embedding(tiny_sd1, {"bird": "cat"})
    counting, classifier = CountingModel(tiny_sd1.pipe), CountingClassifier()
    few = {"size": 2, "steps": 1, "batch_size": 64}
    result = compare(
        counting, {"no edit": None, "swap": swap, "bird": bird}, scorer=classifier, **few
    ).scores
    assert (
        sum(count > 1 for count in counting.reads) == 1 + 2
    )  # a drift reads the empty prompt alone
    protocols = {name: scores.protocol for name, scores in result.items()}
    count = protocols["swap"]["questions"]
    reused = {n: p["reused_pictures"] for n, p in protocols.items()}
    assert reused["no edit"] == count
    assert 0 < reused["swap"] < count
    assert classifier.count == 3 * count - reused["swap"] - reused["bird"]
    alone = compare(tiny_sd1, {"bird": bird}, erase="blob style", replace="noto style", **few)
    assert alone.scores["bird"].flat() == pytest.approx(result["bird"].flat(), nan_ok=True)


def test_a_change_of_the_unet_reuses_no_pictures(tiny_sd1):
    change = edit.uce(tiny_sd1, {"blob style": "noto style"})
    classifier = CountingClassifier()
    protocol = (
        compare(tiny_sd1, {"uce": change}, scorer=classifier, size=1, steps=1)
        .scores["uce"]
        .protocol
    )
    assert protocol["reused_pictures"] == 0
    assert classifier.count == 2 * protocol["questions"]


def test_the_weights_are_restored_when_the_scorer_fails(tiny_sd1, swap):
    class FailingClassifier(ColorClassifier):
        def classify(self, images, kind):
            raise OSError("no device")

    before = tiny_sd1.text_encoder.get_input_embeddings().weight.clone()
    with pytest.raises(OSError, match="no device"):
        compare(tiny_sd1, {"swap": swap}, scorer=FailingClassifier())
    assert torch.equal(tiny_sd1.text_encoder.get_input_embeddings().weight, before)


def test_scores_do_not_depend_on_the_batch_size(tiny_sd1, swap):
    one = compare(tiny_sd1, {"swap": swap}, batch_size=1).pictures["swap"].int()
    many = compare(tiny_sd1, {"swap": swap}, batch_size=32).pictures["swap"].int()
    assert (one - many).abs().max() <= 1


def test_progress_counts_every_picture_once(tiny_sd1, swap):
    calls = []
    result = compare(tiny_sd1, {"swap": swap}, on_progress=lambda *at: calls.append(at))
    count = result.scores["swap"].protocol["questions"]
    assert calls[-1] == (2 * count, 2 * count, "swap")
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})


def test_shares_equal_values_worked_by_hand():
    ask = questions.Question
    items = (
        ask("p0", 0, "target", "cat", "blob"),
        ask("p1", 1, "target", "dog", "blob"),
        ask("p2", 2, "unseen", "cat", "blob"),
        ask("p3", 0, "other", "cat", "noto"),
        ask("p4", 1, "other", "dog", "noto"),
        ask("p5", 3, "plain", "bird", "", "red"),
    )
    before = {"style": ["blob", "blob", "blob", "noto", "noto", "noto"],
              "object": ["cat", "dog", "cat", "cat", "dog", "bird"],
              "color": ["red"] * 6}  # fmt: skip
    after = {"style": ["noto", "blob", "blob", "noto", "blob", "noto"],
             "object": ["cat", "dog", "cat", "bird", "dog", "bird"],
             "color": ["red"] * 6}  # fmt: skip
    tally = Tally(items, before, "style", "blob", "noto")
    scores = tally.scores("x", after, drift=0.0, protocol={})
    assert (scores.efficacy.before.mean, scores.efficacy.after.mean) == (1, 0.5)
    assert (scores.redirection.before.mean, scores.redirection.after.mean) == (0, 0.5)
    assert scores.generality["unseen wordings"].after.mean == 1
    assert scores.generality["held-out pairs"].after.n == 0
    assert scores.others["noto"].drop == 0.5
    assert scores.specificity["object"].drop == pytest.approx(1 / 3)
    assert scores.specificity["color"].before.n == 1
    flat = scores.flat()
    assert flat["target_after"] == 0.5
    assert flat["others_drop"] == flat["others_drop_worst"] == 0.5
    assert flat["objects_drop"] == pytest.approx(1 / 3)
    assert tally.baseline()["style"].mean == 1


def test_a_share_of_0_or_1_has_the_exact_interval_over_scenes():
    """Scenes are drawn in several styles: 12 pictures of 6 scenes are 6 independent units."""
    items = tuple(
        questions.Question(f"p{i}", i // 2, role, "cat", "blob")
        for role in ("target", "unseen")
        for i in range(12)
    )
    labels = {"style": ["blob"] * 24, "object": ["cat"] * 24, "color": [""] * 24}
    tally = Tally(items, labels, "style", "blob", "noto")
    scores = tally.scores("x", {**labels, "style": ["noto"] * 24}, drift=0.0, protocol={})
    bound = 1 - 0.025 ** (1 / 6)
    pairs = (scores.efficacy, scores.redirection, scores.generality["unseen wordings"])
    for pair in pairs:
        shares = sorted((pair.before, pair.after), key=lambda share: share.mean)
        assert [(s.mean, s.n) for s in shares] == [(0, 12), (1, 12)]
        assert (shares[0].low, shares[0].high) == (0, pytest.approx(bound))
        assert (shares[1].low, shares[1].high) == (pytest.approx(1 - bound), 1)
        assert pair.change.high - pair.change.low == pytest.approx(2 * bound)
    assert scores.aliases()["UA"].low == pytest.approx(1 - bound)
    intervals, figures = scores.intervals(), scores.flat()
    assert intervals["target_after"].high == pytest.approx(bound)
    assert all(
        intervals[n].mean == figures[n] for n in intervals.keys() & figures.keys() if intervals[n].n
    )
    assert set(figures) - set(intervals) == {"others_drop_worst", "empty_drift"}
    same = tally.scores("no edit", labels, drift=0.0, protocol={}).efficacy.change
    assert (same.mean, same.low, same.high) == (0, pytest.approx(-bound), pytest.approx(bound))


def test_a_comparison_is_saved_and_loaded(tiny_sd1, swap, tmp_path):
    result = compare(tiny_sd1, {"no edit": None, "swap": swap})
    again = Comparison.load(result.save(tmp_path / "results"))
    assert list(again.scores) == ["no edit", "swap"]
    assert again.questions == result.questions
    assert again.scores["swap"].specificity == result.scores["swap"].specificity
    assert math.isnan(again.scores["swap"].generality["held-out pairs"].after.mean)
    assert all(torch.equal(again.pictures[n], rows) for n, rows in result.pictures.items())
    assert sorted(p.name for p in tmp_path.glob("results/*")) == [
        "comparison.json",
        "gallery.safetensors",
    ]


def test_a_damaged_comparison_is_an_error(tmp_path):
    (tmp_path / "comparison.json").write_text('{"scores": {"x": {}}}')
    with pytest.raises(ValueError, match="is damaged .KeyError.*Make it again"):
        Comparison.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Comparison.load(tmp_path / "nowhere")


def test_a_drop_is_positive_if_the_share_falls():
    share = Interval(0.5, 0.4, 0.6, 10)
    assert Paired(share, share, Interval(-0.25, -0.5, 0.0, 10)).drop == 0.25


def test_bad_input_is_an_error(tiny_sd1, swap):
    with pytest.raises(ValueError, match="`changes` is empty"):
        compare(tiny_sd1, {})
    with pytest.raises(ValueError, match="no change says which concept"):
        compare(tiny_sd1, {"no edit": None})
    with pytest.raises(ValueError, match="has no label for 'monet'"):
        compare(tiny_sd1, {"swap": swap}, erase="monet")


def test_the_shipped_scorer_names_its_size_before_its_labels(swap, judge):
    """A model of one's own: the labels of the icons are of no use to it."""
    from overpaint import load
    from overpaint.zoo import builders

    own = load(builders.tiny())
    own.pipe.unet.register_to_config(sample_size=own.pipe.unet.config.sample_size * 2)
    with pytest.raises(ValueError, match="reads pictures of 64x64 pixels") as caught:
        evaluate.compare(own, {"swap": swap}, erase="van gogh", scorer=judge)
    assert "--scorer" in str(caught.value) and "--set" in str(caught.value)
    assert "label" not in str(caught.value)


def test_score_is_a_comparison_of_one(tiny_sd1, swap):
    alone = evaluate.score(tiny_sd1, swap, scorer=ColorClassifier(), size=3, steps=2, batch_size=4)
    assert isinstance(alone, Scores)
    assert alone.efficacy == compare(tiny_sd1, {"x": swap}).scores["x"].efficacy


def test_the_names_of_unlearncanvas_and_easyedit_are_the_same_shares():
    def share(mean, low, high):
        return Paired(Interval(0, 0, 0, 8), Interval(mean, low, high, 8), Interval(0, 0, 0, 8))

    scores = Scores(
        "x", "style", "blob", "noto",
        efficacy=share(0.25, 0.125, 0.5), redirection=share(0.5, 0, 1),
        generality={"unseen wordings": share(0.5, 0.25, 0.75)},
        others={}, specificity={"style": share(0.75, 0.5, 1), "object": share(0.875, 0.5, 1)},
        empty_drift=0.0,
    )  # fmt: skip
    result = scores.aliases()
    assert result["UA"] == result["reliability"] == Interval(0.75, 0.5, 0.875, 8)
    assert result["IRA"] == result["locality"] == Interval(0.75, 0.5, 1, 8)
    assert result["CRA"] == Interval(0.875, 0.5, 1, 8)
    assert result["generality"] == Interval(0.5, 0.25, 0.75, 8)
