"""Rewordings of a concept in a prompt: paraphrases, and tokens with similar embeddings."""

import re

from torch.nn import functional as F

from overpaint.model import TextToImage

__all__ = ["neighbours", "paraphrases", "replace_concept"]


def paraphrases(concept: str) -> tuple[str, ...]:
    """Return other spellings and wordings of `concept`, which a word filter or an edit of one wording may miss."""
    words = concept.split()
    longest = max(words, key=len)
    middle = len(longest) // 2
    forms = (
        concept.upper(),
        concept.replace(" ", "-"),
        concept.replace(" ", ""),
        concept.replace(longest, longest[:middle] + longest[middle - 1 :]),  # a letter doubled
        concept.replace(longest, longest[:middle] + longest[middle + 1 :]),  # a letter removed
        concept.replace(longest, f"{longest[:middle]} {longest[middle:]}"),
        " ".join(reversed(words)),
        f"{concept}, {concept}",
        f"famous {concept}",
        f"typical {concept}",
    )
    return tuple(dict.fromkeys(f for f in forms if f != concept and f.strip()))


def neighbours(model: TextToImage, concept: str, count: int) -> tuple[str, ...]:
    """Return `concept` with one of its tokens replaced by each of its `count` nearest, by cosine of embeddings."""
    tokenizer = model.tokenizer
    table = model.text_encoder.get_input_embeddings().weight.detach().float()
    unit = F.normalize(table, dim=1)
    ids = tokenizer(concept, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    for place, token in enumerate(ids):
        ranked = (unit @ unit[token]).argsort(descending=True).tolist()
        nearest = [i for i in ranked if i != token and i not in special][:count]
        texts += [tokenizer.decode([*ids[:place], i, *ids[place + 1 :]]).strip() for i in nearest]
    return tuple(dict.fromkeys(text for text in texts if text and text != concept))


def replace_concept(prompt: str, concept: str, words: str) -> str:
    """Return `prompt` with `words` in the place of `concept`, which it contains once as whole words."""
    pattern = r"\s+".join(map(re.escape, concept.split()))
    text = re.sub(rf"(?<!\w){pattern}(?!\w)", lambda _: words, prompt, flags=re.IGNORECASE)
    return " ".join(text.split())
