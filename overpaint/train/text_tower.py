"""The tokenizer and the text tower of `icons`.

The tokenizer has CLIP's first 16,000 merges, so that words share pieces as they do in Stable Diffusion: a quarter of
the world's names has several tokens. The tower is trained on three tasks at once:

- contrastive, as CLIP: captions of pictures against an image tower;
- nouns: the state at the end of text of a caption about any noun predicts the sentence vector of that noun alone, so
  that a caption about a `puppy` has a state like one about a `dog`, in every frame;
- sentences: the same state of an everyday sentence predicts the vector of the sentence.

The sentence vectors are those of a teacher, `language.Teacher`. Synonyms that are held out occur in no caption. Like
all other English, they occur in WordNet's example sentences and, alone, among its nouns.
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
_FRAMED, _SENTENCES = 24, 16  # captions about a noun and everyday sentences in a step
# Lines of a word alone for each of the two heads; they are short, so a step can hold many.
_WORDS = 96
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
    reserved = captions.held_out_synonyms()
    own = [*icon_world.OBJECTS, *captions.more_objects()]
    own += [s for others in captions.synonyms().values() for s in others if s not in reserved]
    named = [noun for noun in language.nouns(packages, NOUNS) if noun not in reserved]
    nouns = tuple(dict.fromkeys([*own, *named]))
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
    """Return an untrained CLIP with a head for nouns and one for sentences.

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
    heads = {
        name: nn.Linear(recipe.text_width, language.Teacher.WIDTH) for name in ("noun", "sentence")
    }
    return nn.ModuleDict({"clip": clip, "projection_heads": nn.ModuleDict(heads)})


@sdpa_kernel(SDPBackend.MATH)  # a fifth faster for lines as short as these
def draw_loss(
    model: Any, tokens: Any, scenes: Scenes, data: Texts, rng: np.random.Generator, batch: int, device: str = "cpu"
) -> Tensor:  # fmt: skip
    """Return the sum of the three losses on randomly drawn pictures and lines."""
    pictures = [scenes.small(rng) for _ in range(batch)]
    pixels = as_pixels(pictures)
    noise = torch.from_numpy(rng.normal(0, 0.05, pixels.shape).astype(np.float32))
    pixels = (pixels + noise).to(device)
    shown = [p.caption for p in pictures]
    # The object of a picture is its noun too, by whichever synonym the caption names it.
    index = {noun: i for i, noun in enumerate(data.nouns[: data.own])}
    single = [(row, index[p.object]) for row, p in enumerate(pictures) if p.object in index]
    drawn = rng.integers(0, len(data.nouns), _FRAMED)
    framed = [_framed(data.nouns[i], scenes.words, rng) for i in drawn]
    alone = rng.integers(0, len(data.nouns), _WORDS)
    articles = rng.choice(("", "a ", "the ", "one ", "my "), _WORDS)
    bare = [article + data.nouns[i] for article, i in zip(articles, alone, strict=True)]
    of_noun = [row for row, _ in single] + list(range(batch, batch + _FRAMED + _WORDS))
    chosen = [i for _, i in single] + list(drawn) + list(alone)
    read = rng.integers(0, SENTENCES, _SENTENCES)
    words = rng.integers(SENTENCES, len(data.lines), _WORDS)
    clip = model["clip"]
    with torch.autocast(device.split(":")[0], torch.bfloat16):
        said = _pooled(clip, tokens, [data.lines[i] for i in read], device)
        short = _pooled(clip, tokens, [*bare, *(data.lines[i] for i in words)], device)
        states = torch.cat([_pooled(clip, tokens, [*shown, *framed], device), short[:_WORDS]])
        images = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        captioned = clip.text_projection(states[:batch])
        nouns = model["projection_heads"]["noun"](states[of_noun])
        sentences = model["projection_heads"]["sentence"](torch.cat([said, short[_WORDS:]]))
    logits = (
        clip.logit_scale.exp()
        * F.normalize(captioned.float(), dim=1)
        @ F.normalize(images.float(), dim=1).t()
    )
    total = contrast(logits, shown)
    total = total + _distance(nouns.float(), data.noun_vectors[chosen].to(device))
    return total + _distance(sentences.float(), data.line_vectors[[*read, *words]].to(device))


def _pooled(clip: Any, tokens: Any, lines: Sequence[str], device: str) -> Tensor:
    """Return the state at the end of text of each line, (B, D)."""
    ids = tokens(lines, padding="longest", truncation=True, return_tensors="pt").input_ids
    return clip.text_model(input_ids=ids.to(device)).pooler_output


def _framed(noun: str, words: captions.Captions, rng: np.random.Generator) -> str:
    phrase = words.noun_phrase(noun, rng)
    if rng.random() < 0.15:
        phrase = words.placed(phrase, str(rng.choice(captions.SIDES)), rng)
    style = str(rng.choice(list(icon_world.STYLES))) if rng.random() < 0.85 else ""
    color = str(rng.choice(list(icon_world.COLORS))) if rng.random() < 0.7 else ""
    return words.frame(phrase, style, color, rng)


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
