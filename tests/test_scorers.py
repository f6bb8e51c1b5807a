"""The judge, compared with the forward pass of transformers' CLIP; its errors, and the size check of scorers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint import scorers, zoo
from overpaint.probes import Probe
from overpaint.scorers import Judge
from overpaint.scorers.protocols import check_size, scorer_name


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_clip_score_equals_the_cosine_of_clips_forward_pass(judge: Judge, images: Tensor) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder = zoo.folder("icons-judge")
    clip = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    prompts = ["a cat in noto style", "a dog", "high contrast style bus", "the flag of japan", ""]
    ids = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        result = clip(input_ids=ids, pixel_values=images * 2 - 1)
    expected = F.cosine_similarity(result.image_embeds, result.text_embeds)
    assert torch.allclose(judge.clip_score(images, prompts), expected, atol=1e-6)


def test_probabilities_add_up_to_one_and_agree_with_predict(judge: Judge, images: Tensor) -> None:
    for kind, names in judge.labels.items():
        shares = judge.classify(images, kind)
        assert shares.shape == (5, len(names))
        assert torch.allclose(shares.sum(1), torch.ones(5), atol=1e-5)
        assert judge.predict(images, kind) == [names[i] for i in shares.argmax(1)]


def test_a_row_does_not_depend_on_the_other_rows(judge: Judge, images: Tensor) -> None:
    together = judge.classify(images, "object")
    alone = torch.cat([judge.classify(images[i : i + 1], "object") for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_plain_colors_are_recognised(judge: Judge) -> None:
    # A background of the icon world without an icon; no such picture is in the training data.
    color = torch.tensor([124, 176, 240]) / 255
    image = color.view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert judge.predict(image, "color") == ["blue"]


def test_score_uses_the_head_of_the_kind_or_the_cosine(judge: Judge, images: Tensor) -> None:
    probes = [
        Probe("a", "style", "a cat in noto style", "noto style", "noto"),
        Probe("b", "action", "a person running", "running", "person running"),
        Probe("c", "fact", "the flag of japan", "japan", "flag of japan"),
        Probe("d", "count", "two cats", "two", "two"),
    ]
    scores = judge.score(images[:4], probes)
    style = judge.classify(images[:1], "style")[0, judge.labels["style"].index("noto")]
    objects = judge.classify(images[1:3], "object")
    running = objects[0, judge.labels["object"].index("person running")]
    japan = objects[1, judge.labels["object"].index("flag of japan")]
    cosine = judge.clip_score(images[3:4], ["two cats"])[0]
    assert torch.allclose(scores, torch.stack([style, running, japan, cosine]), atol=1e-6)


def test_an_unknown_head_is_an_error(judge: Judge, images: Tensor) -> None:
    with pytest.raises(ValueError, match="has no head for 'mood': choose one of object, style"):
        judge.classify(images, "mood")


def test_an_unknown_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown judge 'nobody'"):
        scorers.load("nobody")


def test_a_folder_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a judge: it has no model\.safetensors"):
        scorers.load(tmp_path)


class Fake:
    """A scorer, or a model, of one picture size."""

    def __init__(self, name: str, size: object) -> None:
        self.name, self.size = name, size

    def score(self, images: Tensor, probes: object) -> Tensor:
        return images.mean((1, 2, 3))


def test_a_scorer_of_another_picture_size_is_an_error() -> None:
    wide = Fake("wide", (64, 128))
    message = "judge reads pictures of 64x64 pixels, and wide draws 128x64: pass another `scorer`"
    for scorer in (Fake("judge", 64), Fake("judge", 64).score):
        with pytest.raises(ValueError, match=message):
            check_size(scorer, wide)  # pyright: ignore[reportArgumentType]
        check_size(scorer, Fake("square", (64, 64)))  # pyright: ignore[reportArgumentType]
    for scorer in (None, lambda images, probes: images, Fake("any", None)):
        check_size(scorer, wide)  # pyright: ignore[reportArgumentType]


def test_a_scorer_has_the_name_of_its_object_or_of_its_function(judge: Judge) -> None:
    assert scorer_name(judge) == scorer_name(judge.score) == "icons-judge"
    assert scorer_name(check_size) == "check_size"
    assert scorer_name(None) == "none"
