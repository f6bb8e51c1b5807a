"""Tables of `quality_scene_text` on style: color, font, style of a second word, zero-shot claims, background."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scene_text_style as style
from scene_text_crops import Crop, Materials
from scene_text_methods import OURS, RENDERED, TRUTH, color_value
from scene_text_networks import Fonts, render
from scene_text_reading import median
from scipy.stats import binomtest

from overpaint.metrics import Interval, bootstrap, paired, share

__all__ = ["background", "color", "fonts", "mixing", "style_copy", "variation", "wording"]

Lines = Callable[[str, str, str], np.ndarray]  # (method, set, variant) to RGB uint8 (N, H, W, 3)
Drawn = Mapping[str, Sequence[Crop]]  # by set
Rows = list[dict[str, Any]]
_LIGHTNESS = ("black", "white", "grey")


def _letters(lines: np.ndarray, drawn: Sequence[Crop]) -> list[style.Letters]:
    return [style.letters(x, one.clean, one.mask) for x, one in zip(lines, drawn, strict=True)]


def color(lines: Lines, drawn: Drawn) -> Rows:
    """Return how near the color of letters is to the one that is named, for written and for true letters.

    Columns: median CIEDE2000; share of letters that are there; median hue error in degrees of colors with a hue;
    median lightness error (L*) of black, white and grey; share of pictures in which naming the other color moves the
    mean of the letters by more than 30 of 255; mean change of the background between the two, of 255.
    """
    name, rows = "color", []
    for method in (TRUTH, OURS):
        seen = _letters(lines(method, name, ""), drawn[name])
        named = [color_value(one.color) for one in drawn[name]]
        pairs = list(zip(seen, named, strict=True))
        grey = [p for p, one in zip(pairs, drawn[name], strict=True) if one.color in _LIGHTNESS]
        row: dict[str, Any] = {
            "method": method,
            "CIEDE2000, median": median([style.difference(s.color, c) for s, c in pairs]),
            "letters present": share([float(s.present) for s in seen]),
            "hue error, median": median(
                [style.hue_error(s.color, c) for s, c in pairs if style.is_chromatic(c)]
            ),
            "lightness error, median": median(
                [abs(style.lab(s.color)[0] - style.lab(c)[0]) for s, c in grey]
            ),
        }
        if method == OURS:
            row |= _two_colors(lines, drawn[name], seen)
        rows.append(row)
    return rows


def _two_colors(
    lines: Lines, drawn: Sequence[Crop], first: Sequence[style.Letters]
) -> dict[str, Interval]:
    """Return how far the letters and the background move when another color is named, at the same noise."""
    one, other = lines(OURS, "color", ""), lines(OURS, "color", "other")
    second = _letters(other, drawn)
    named = [color_value(crop.case.other) for crop in drawn]
    moves = [float(np.abs(a.color - b.color).mean() > 30) for a, b in zip(first, second, strict=True)]  # fmt: skip
    leaks = [style.leak(a, b, c.mask, c.cover) for a, b, c in zip(one, other, drawn, strict=True)]
    return {
        "other color, CIEDE2000, median": median(
            [style.difference(s.color, c) for s, c in zip(second, named, strict=True)]
        ),
        "other color moves letters": share(moves),
        "other color moves background": bootstrap([x for x in leaks if x is not None]),
    }


def fonts(lines: Lines, drawn: Drawn, classifier: Fonts, sets: Sequence[str]) -> Rows:
    """Return how often the classifier recognises the font, and its own rate on clean words that are held out."""
    rows: Rows = [
        {
            "method": "clean words, held out of its training",
            "top 1": Interval(classifier.accuracy, float("nan"), float("nan"), classifier.n),
        }
    ]
    for method in (TRUTH, RENDERED, OURS):
        pictures, faces = [], []
        for name in sets:
            chosen = [i for i, x in enumerate(drawn[name]) if x.case.font in classifier.names]
            seen = _letters(lines(method, name, "")[chosen], [drawn[name][i] for i in chosen])
            pictures += [s.opacity for s in seen]
            faces += [drawn[name][i].case.font for i in chosen]
        if not pictures:
            continue
        ranks = np.array(classifier.ranks(np.stack(pictures), faces))
        groups = [face.partition("-")[0] for face in faces]
        rows.append(
            {
                "method": method,
                "top 1": share((ranks == 0).astype(float), groups=groups),
                "top 3": share((ranks < 3).astype(float), groups=groups),
            }
        )
    return rows


def style_copy(lines: Lines, drawn: Drawn, classifier: Fonts, materials: Materials) -> Rows:
    """Return whether letters have the style of the second word rather than that of another case's, when none is named.

    Each row compares, case by case, the distance to the own style with that to the style of the next case with another
    font and color: CIEDE2000 of colors, and the distance of the classifier's features to those of the same word drawn
    in a font. Differences are the other distance minus the own one: above zero if the style was copied.
    """
    rows: Rows = []
    for name in ("style, seen font", "style, unseen font"):
        parts = drawn.get(name, ())
        pairs = [(i, j) for i, j in enumerate(_partners(parts)) if j is not None]
        if not pairs:
            continue
        for method in (TRUTH, OURS):
            seen = _letters(lines(method, name, ""), parts)
            own = [style.difference(seen[i].color, color_value(parts[i].color)) for i, _ in pairs]
            other = [style.difference(seen[i].color, color_value(parts[j].color)) for i, j in pairs]
            features = classifier.embed(np.stack([seen[i].opacity for i, _ in pairs]))
            near = _distances(features, [(parts[i], parts[i]) for i, _ in pairs], classifier, materials)  # fmt: skip
            far = _distances(features, [(parts[i], parts[j]) for i, j in pairs], classifier, materials)  # fmt: skip
            groups = [parts[i].case.font.partition("-")[0] for i, _ in pairs]
            rows.append(
                {
                    "set": name, "method": method, "CIEDE2000, own": median(own), "CIEDE2000, other": median(other),
                    "color, other - own": paired(own, other, groups=groups),
                    "own color nearer": share((np.array(own) < other).astype(float), groups=groups),
                    "font, other - own": paired(near, far, groups=groups),
                    "own font nearer": share((near < far).astype(float), groups=groups),
                }
            )  # fmt: skip
    return rows


def _partners(parts: Sequence[Crop]) -> list[int | None]:
    """Return for each case the next one of another font family and color."""
    result: list[int | None] = []
    for i, one in enumerate(parts):
        order = [(i + k) % len(parts) for k in range(1, len(parts))]
        result.append(
            next(
                (
                    j for j in order
                    if parts[j].color != one.color
                    and parts[j].case.font.partition("-")[0] != one.case.font.partition("-")[0]
                ),
                None,
            )
        )  # fmt: skip
    return result


def _distances(
    features: np.ndarray,
    pairs: Sequence[tuple[Crop, Crop]],
    classifier: Fonts,
    materials: Materials,
) -> np.ndarray:
    """Return the distance of features to those of each pair's first word in its second font, (N,)."""
    drawn = np.stack([
        render(np.random.default_rng(0), materials.faces[b.case.font], materials.line, text=a.case.text.ljust(3, "."))
        if len(a.case.text) < 3 else
        render(np.random.default_rng(0), materials.faces[b.case.font], materials.line, text=a.case.text)
        for a, b in pairs
    ])  # fmt: skip
    return np.linalg.norm(features - classifier.embed(drawn), axis=1)


def variation(lines: Lines, drawn: Drawn, materials: Materials) -> Rows:
    """Return whether a bold or italic of a family that was trained without it is bolder or more slanted than its base.

    Rows are of written words and of the true faces: share of bold words with wider strokes and the mean ratio of the
    widths; share of italic words that are slanted by 5 degrees more and the mean difference; p of a sign test.
    """
    parts = drawn.get("variation", ())
    written = [_letters(lines(OURS, "variation", v), parts) for v in ("", "other")]
    rows: Rows = []
    for suffix in ("-Bold", "-Italic"):
        chosen = [i for i, one in enumerate(parts) if one.case.other == suffix]
        if not chosen:
            continue
        for label in ("true face", OURS):
            if label == OURS:
                pairs = [(written[0][i].opacity, written[1][i].opacity) for i in chosen]
            else:
                pairs = [_true_pair(parts[i], materials) for i in chosen]
            measure = style.stroke_width if suffix == "-Bold" else style.slant
            values = np.array([[measure(a), measure(b)] for a, b in pairs])
            if suffix == "-Bold":
                hits, change = values[:, 1] > values[:, 0], values[:, 1] / np.maximum(values[:, 0], 1e-6)  # fmt: skip
            else:
                change = values[:, 1] - values[:, 0]
                hits = change > 5
            up = int((values[:, 1] > values[:, 0]).sum())
            untied = max(int((values[:, 1] != values[:, 0]).sum()), 1)
            groups = [parts[i].case.font for i in chosen]
            rows.append(
                {
                    "asked": suffix.removeprefix("-"), "method": label,
                    "obeyed": share(hits.astype(float), groups=groups),
                    "mean change": bootstrap(change, groups=groups),
                    "p": float(binomtest(up, untied, alternative="greater").pvalue),
                }
            )  # fmt: skip
    return rows


def _true_pair(one: Crop, materials: Materials) -> tuple[np.ndarray, np.ndarray]:
    faces = (materials.faces[f"{one.case.font}{suffix}"] for suffix in ("", one.case.other))
    first, second = (
        render(np.random.default_rng(0), face, materials.line, text=one.case.text) for face in faces
    )
    return first, second


def mixing(lines: Lines, drawn: Drawn, classifier: Fonts, materials: Materials) -> Rows:
    """Return whether a mix of two fonts is nearer to both of them than to other fonts, by the classifier's features.

    The other fonts are those of the next eight cases. A row of words drawn in the first font alone shows what a mix
    that is no mix would give.
    """
    parts = drawn.get("mixing", ())
    names = list(dict.fromkeys(one.case.font for one in parts))
    if len(names) < 3:
        return []
    rows: Rows = []
    for method, label in ((TRUTH, "the first font alone"), (OURS, OURS)):
        variant = "other" if method == OURS else ""
        seen = _letters(lines(method, "mixing", variant), parts)
        features = classifier.embed(np.stack([s.opacity for s in seen]))
        first, second, rest = [], [], []
        for one, feature in zip(parts, features, strict=True):
            others = [n for n in names if n not in (one.case.font, one.case.other)][:8]
            faces = [one.case.font, one.case.other, *others]
            drawn_words = np.stack([
                render(np.random.default_rng(0), materials.faces[f], materials.line, text=one.case.text) for f in faces
            ])  # fmt: skip
            distances = np.linalg.norm(classifier.embed(drawn_words) - feature, axis=1)
            first.append(distances[0])
            second.append(distances[1])
            rest.append(distances[2:].mean() if len(others) else np.inf)
        both = np.maximum(first, second) < np.array(rest)
        rows.append(
            {
                "method": label, "nearer to both": share(both.astype(float)),
                "others - first": paired(first, rest), "others - second": paired(second, rest),
            }
        )  # fmt: skip
    return rows


def wording(lines: Lines, drawn: Drawn) -> Rows:
    """Return how near the color is to the named one for the template of training and for other wordings."""
    parts = drawn.get("wording", ())
    errors = {
        label: [
            style.difference(s.color, color_value(one.color))
            for s, one in zip(_letters(lines(OURS, "wording", variant), parts), parts, strict=True)
        ]
        for label, variant in (("template", ""), ("other wording", "other"))
    }
    groups = [one.case.other for one in parts]
    rows: Rows = [{"instruction": k, "CIEDE2000, median": median(v)} for k, v in errors.items()]
    rows[1]["other wording - template"] = paired(*errors.values(), groups=groups)
    return rows


def background(lines: Lines, drawn: Drawn, sets: Sequence[str]) -> Rows:
    """Return the PSNR of the background in the region, the seam, and the equality of all pixels outside."""
    rows: Rows = []
    for method in (TRUTH, RENDERED, OURS):
        noise, steps, equal, groups, sources = [], [], [], [], []
        for name in sets:
            for x, one in zip(lines(method, name, ""), drawn[name], strict=True):
                value = style.background_psnr(x, one.clean, one.mask, one.cover)
                if value is not None:
                    noise.append(value)
                    groups.append(one.case.photo)
                steps.append(style.seam(x, one.truth, one.mask))
                sources.append(one.case.photo)
                equal.append(float(style.outside_equal(x, one.input, one.mask)))
        row: dict[str, Any] = {
            "method": method, "PSNR": bootstrap(noise, groups=groups), "seam": bootstrap(steps, groups=sources),
        }  # fmt: skip
        if method != TRUTH:
            row["equal outside"] = share(equal, groups=sources)
        rows.append(row)
    return rows
