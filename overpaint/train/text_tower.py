"""The tokenizer and the text tower of `icons`.

The tokenizer has CLIP's first 16,000 merges, so that words share pieces as they do in Stable Diffusion: a quarter of
the world's names has several tokens. The tower is trained on four tasks at once:

- contrastive, as CLIP: captions of pictures against an image tower, with a small weight, because it sets the words of
  captions apart from all other words;
- nouns: a state of a caption about any noun predicts the sentence vector of that noun alone, so that a caption about a
  `puppy` has a state like one about a `dog`, in every frame;
- attributes: the same state predicts the style and the color that the caption names, beside any noun;
- sentences: the state at the end of text of an everyday sentence predicts the vector of the sentence.

The state is that at the end of text or, in half of the captions, at a random padding token behind it, because the UNet
reads these too. The sentence vectors are those of a teacher, `language.Teacher`. Synonyms that are held out occur in no
caption. Like all other English, they occur in WordNet's example sentences and, alone, among its nouns.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from overpaint import files, probes
from overpaint.train import captions, icon_world, language
from overpaint.train.icon_scenes import Scenes
from overpaint.train.loop import damage_named, load_tensors, save_tensors
from overpaint.train.networks import MERGES, TOKENS, Recipe, build_clip
from overpaint.zoo import builders

__all__ = [
    "Texts",
    "as_pixels",
    "contrast",
    "draw_loss",
    "network",
    "texts",
    "tokenizer",
]

NOUNS = 6000
SENTENCES = 20_000
_FRAMED, _SENTENCES = 48, 16  # captions about a noun and everyday sentences in a step
# Lines of a word alone for each of the two heads; they are short, so a step can hold many.
_WORDS = 64
_CONTRASTIVE = 0.15  # weight of the contrastive loss; that of the nouns and the sentences is 1
_ATTRIBUTES = 0.5
_TEMPERATURE = 0.07


def tokenizer(packages: Path, folder: Path, merges: int = MERGES) -> Any:
    """Return a `CLIPTokenizer`, loaded from `folder` or made of CLIP's first merges and saved there."""
    import transformers

    build: Any = transformers.CLIPTokenizer
    if not (folder / "tokenizer.json").exists():
        pairs = language.clip_merges(packages, merges)
        tokens = build(vocab=builders.vocabulary(pairs), merges=pairs, model_max_length=TOKENS)
        with files.atomic(folder) as draft:
            tokens.save_pretrained(draft)
    return build.from_pretrained(folder)


@dataclass(frozen=True)
class Texts:
    """Lines with sentence vectors, of width 384: nouns and everyday lines; and rows of the token embedding."""

    nouns: tuple[str, ...]  # of the world first, `own` of them
    own: int
    noun_vectors: Tensor  # (N, 384), centred, of length 1
    lines: tuple[str, ...]
    line_vectors: Tensor  # (L, 384), of length 1
    rows: Tensor  # (V, D), zero where a token is no word of its own


@torch.no_grad()
def texts(packages: Path, folder: Path, tokens: Any, width: int) -> Texts:
    """Return the texts, with their vectors computed once and saved in `folder`."""
    reserved = captions.unseen_synonyms()
    own = [*icon_world.OBJECTS, *captions.more_objects()]
    own += [s for others in captions.synonyms().values() for s in others if s not in reserved]
    own += [s for others in language.kinds_of_objects(packages).values() for s in others]
    named = [*language.nouns(packages, NOUNS), *language.things(packages)]
    nouns = tuple(dict.fromkeys([*own, *(noun for noun in named if noun not in reserved)]))
    unseen = {*probes.everyday("validation"), *probes.everyday("test")}
    said = [line for line in language.sentences(packages) if line not in unseen]
    drawn = np.random.default_rng(6).permutation(said)[:SENTENCES]
    lines = (*map(str, drawn), *language.nouns(packages, NOUNS), *language.things(packages))
    vocabulary = sorted(tokens.get_vocab().items(), key=lambda item: item[1])
    words = {i: t[:-4] for t, i in vocabulary if t.endswith("</w>") and t[:-4].isalpha()}
    path = folder / "text-vectors.safetensors"
    read = "\n".join([*nouns, *lines, *words.values()])
    key = hashlib.sha256(read.encode()).hexdigest()
    if not path.exists() or _made_of(path) != key:
        teacher = language.Teacher(packages, folder)
        vectors = {
            "nouns": teacher.encode(nouns),
            "lines": teacher.encode(lines),
            "words": teacher.encode(list(words.values())),
        }
        save_tensors(vectors, path, {"made_of": key})
    saved = load_tensors(path)
    rows = torch.zeros(len(tokens), width)
    centred = saved["words"] - saved["words"].mean(0)
    _, _, axes = torch.pca_lowrank(centred, width, niter=4)
    reduced = centred @ axes
    rows[list(words)] = reduced * (0.03 / reduced.std())
    mean = saved["nouns"].mean(0)
    return Texts(
        nouns,
        len(dict.fromkeys(own)),
        F.normalize(saved["nouns"] - mean, dim=1),
        lines,
        saved["lines"],
        rows,
    )


def _made_of(path: Path) -> str:
    with damage_named(path), safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("made_of", "")


def network(recipe: Recipe, tokens: Any, data: Texts) -> nn.Module:
    """Return an untrained CLIP with a head for nouns, one for sentences and one for styles and colors.

    The rows of tokens that are whole words are the teacher's vectors of the words, reduced. They get no gradient
    (weight decay alone shrinks them, all alike), so that the layers learn to read these vectors, and with them the rows
    of words that no caption holds.
    """
    clip = build_clip(recipe, len(tokens))
    embedding = clip.text_model.get_input_embeddings().weight
    free = (data.rows.abs().sum(1) == 0)[:, None]
    with torch.no_grad():
        embedding.copy_(torch.where(free, embedding, data.rows))
    embedding.register_hook(lambda gradient: gradient * free.to(gradient))
    widths = {"noun": language.Teacher.WIDTH, "sentence": language.Teacher.WIDTH,
              "attribute": len(icon_world.STYLES) + len(icon_world.COLORS) + 2}  # fmt: skip
    heads = {name: nn.Linear(recipe.text_width, width) for name, width in widths.items()}
    return nn.ModuleDict({"clip": clip, "projection_heads": nn.ModuleDict(heads)})


@sdpa_kernel(SDPBackend.MATH)  # a fifth faster for lines as short as these
def draw_loss(
    model: Any, tokens: Any, scenes: Scenes, data: Texts, rng: np.random.Generator, batch: int, device: str = "cpu"
) -> Tensor:  # fmt: skip
    """Return the weighted sum of the four losses on randomly drawn pictures and lines."""
    pictures = [scenes.small(rng) for _ in range(batch)]
    pixels = as_pixels(pictures)
    noise = torch.from_numpy(rng.normal(0, 0.05, pixels.shape).astype(np.float32))
    pixels = (pixels + noise).to(device)
    shown = [p.caption for p in pictures]
    # The object of a picture is its noun too, by whichever synonym the caption names it.
    index = {noun: i for i, noun in enumerate(data.nouns[: data.own])}
    single = [(row, index[p.object]) for row, p in enumerate(pictures) if p.object in index]
    drawn = rng.integers(0, len(data.nouns), _FRAMED)
    framed, attributes = zip(
        *(_framed(data.nouns[i], scenes.words, rng) for i in drawn), strict=True
    )
    alone = rng.integers(0, len(data.nouns), _WORDS)
    articles = rng.choice(("", "a ", "the ", "one ", "my "), _WORDS)
    bare = [article + data.nouns[i] for article, i in zip(articles, alone, strict=True)]
    of_noun = [row for row, _ in single] + list(range(batch, batch + _FRAMED + _WORDS))
    chosen = [i for _, i in single] + list(drawn) + list(alone)
    read = rng.integers(0, SENTENCES, _SENTENCES)
    words = rng.integers(SENTENCES, len(data.lines), _WORDS)
    clip = model["clip"]
    with torch.autocast(device.split(":")[0], torch.bfloat16):
        said, _ = _states(clip, tokens, [data.lines[i] for i in read], rng, device)
        short, _ = _states(clip, tokens, [*bare, *(data.lines[i] for i in words)], rng, device)
        ends, states = _states(clip, tokens, [*shown, *framed], rng, device)
        images = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        captioned = clip.text_projection(ends[:batch])
        nouns = model["projection_heads"]["noun"](torch.cat([states, short[:_WORDS]])[of_noun])
        named = model["projection_heads"]["attribute"](states[batch:])
        sentences = model["projection_heads"]["sentence"](torch.cat([said, short[_WORDS:]]))
    logits = (
        clip.logit_scale.exp()
        * F.normalize(captioned.float(), dim=1)
        @ F.normalize(images.float(), dim=1).t()
    )
    total = _CONTRASTIVE * contrast(logits, shown)
    labels = torch.tensor(attributes, device=device)
    for kind, scores in enumerate(
        named.float().split([len(icon_world.STYLES) + 1, len(icon_world.COLORS) + 1], dim=1)
    ):
        total = total + _ATTRIBUTES * F.cross_entropy(scores, labels[:, kind])
    total = total + _distance(nouns.float(), data.noun_vectors[chosen].to(device))
    return total + _distance(sentences.float(), data.line_vectors[[*read, *words]].to(device))


def _states(
    clip: Any, tokens: Any, lines: Sequence[str], rng: np.random.Generator, device: str
) -> tuple[Tensor, Tensor]:
    """Return two states of each line, (B, D): at the end of text, and there or at a padding token, half and half."""
    ids = tokens(lines, padding="longest", truncation=True, return_tensors="pt").input_ids
    states = clip.text_model(input_ids=ids.to(device)).last_hidden_state
    end = (ids == tokens.eos_token_id).int().argmax(1)
    behind = torch.from_numpy(rng.integers(end.numpy(), ids.shape[1]))
    moved = torch.where(torch.from_numpy(rng.random(len(end)) < 0.5), behind, end)
    rows = torch.arange(len(end))
    return states[rows, end], states[rows, moved]


def _framed(
    noun: str, words: captions.Captions, rng: np.random.Generator
) -> tuple[str, tuple[int, int]]:
    """Return a caption about a noun, with the number of the style and the color that it names, from 1, or 0."""
    phrase = words.noun_phrase(noun, rng)
    if rng.random() < 0.15:
        phrase = words.placed(phrase, str(rng.choice(captions.SIDES)), rng)
    style = str(rng.choice(list(icon_world.STYLES))) if rng.random() < 0.85 else ""
    color = str(rng.choice(list(icon_world.COLORS))) if rng.random() < 0.7 else ""
    text = words.frame(phrase, style, color, rng)
    styles, colors = ["", *icon_world.STYLES], ["", *icon_world.COLORS]
    return text, (styles.index(style), colors.index(color) if color in text else 0)


def _distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Return one minus the cosine, four times, plus the error of finding each target among those of the batch."""
    cosines = F.normalize(predicted, dim=1) @ target.t() / _TEMPERATURE
    same = (target @ target.t() > 0.999).float()
    choice = F.cross_entropy(cosines, same / same.sum(1, keepdim=True))
    return 4 * (1 - F.cosine_similarity(predicted, target, dim=1)).mean() + 0.25 * choice


def as_pixels(pictures: Sequence[icon_world.Picture]) -> Tensor:
    """Return pictures of one size as one tensor, (B, 3, H, W), in [-1, 1]."""
    stack = torch.from_numpy(np.stack([p.pixels for p in pictures]))
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def contrast(logits: Tensor, shown: Sequence[str]) -> Tensor:
    """Return CLIP's symmetric cross-entropy; equal captions share the target."""
    index = {caption: i for i, caption in enumerate(shown)}
    same = torch.tensor([index[c] for c in shown], device=logits.device)
    target = (same[:, None] == same[None]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
