"""The judge: what it says, against CLIP's own forward pass, and what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint import zoo
from overpaint.probes import Probe
from overpaint.scorers import judge as features
from overpaint.scorers.judge import Judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return features.load("icons-judge")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_clip_score_is_the_cosine_of_clips_own_forward(judge: Judge, images: Tensor) -> None:
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


def test_probabilities_add_up_and_name_the_prediction(judge: Judge, images: Tensor) -> None:
    for kind, names in judge.labels.items():
        found = judge.classify(images, kind)
        assert found.shape == (5, len(names))
        assert torch.allclose(found.sum(1), torch.ones(5), atol=1e-5)
        assert judge.predict(images, kind) == [names[i] for i in found.argmax(1)]


def test_a_row_does_not_depend_on_its_neighbours(judge: Judge, images: Tensor) -> None:
    together = judge.classify(images, "object")
    alone = torch.cat([judge.classify(images[i : i + 1], "object") for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_plain_colors_are_recognised(judge: Judge) -> None:
    # The background of the icon world, without an icon: the judge never saw an empty picture.
    color = torch.tensor([124, 176, 240]) / 255
    image = color.view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert judge.predict(image, "color") == ["blue"]


def test_score_asks_the_head_of_the_kind_and_falls_back_to_clip(
    judge: Judge, images: Tensor
) -> None:
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


def test_an_unknown_head_is_refused(judge: Judge, images: Tensor) -> None:
    with pytest.raises(ValueError, match="has no head for 'mood': choose one of object, style"):
        judge.classify(images, "mood")


def test_an_unknown_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown judge 'nobody'"):
        features.load("nobody")


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a judge: it has no model\.safetensors"):
        features.load(tmp_path)
