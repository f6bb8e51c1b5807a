"""Export a change for web UIs: LoRAs with the names of kohya's scripts and of ComfyUI, and textual-inversion files.

Names, as the readers build them:

- kohya (AUTOMATIC1111, ComfyUI, SD.Next, InvokeAI): `lora_te_text_model_encoder_layers_0_self_attn_out_proj` for a
  model with one text encoder, `lora_te1_...` and `lora_te2_...` for SDXL, `lora_unet_` and the path of a layer of
  the UNet in diffusers, with `_` for `.`; then `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
- ComfyUI's generic form: `text_encoders.` and the name of any weight in its own text encoders, here
  `clip_l.transformer.text_model.embeddings.token_embedding` (`clip_h` in Stable Diffusion 2, `clip_g` for the second
  encoder of SDXL). A token row is a one-hot column of `lora_up` and a row of `lora_down`.
- textual inversion: one file a word, whose name is the word that is replaced in a prompt; the tensor `emb_params`, and
  for SDXL the tensors `clip_l` and `clip_g`.

The converter to kohya's names is that of diffusers. AUTOMATIC1111 knows no LoRA of a token embedding.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from overpaint.edit.change import Change
from overpaint.edit.export import formats
from overpaint.edit.movement import Movement
from overpaint.edit.token_rules import spelling
from overpaint.edit.weights import encoder_index, find_weight, is_embedding
from overpaint.model import TextToImage

__all__ = ["comfy", "embeddings", "kohya"]

_WIDTH_OF_CLIP_H = 1024
_END = "</w>"


def kohya(change: Change, path: str | Path, *, model: TextToImage | None = None) -> Path:
    """Write `change` as a LoRA with kohya's names, which AUTOMATIC1111 and ComfyUI read; diffusers reads it too.

    Args:
        change: As in `export.lora`.
        path: Must end in `.safetensors`.
        model: As in `export.lora`. Without it, a change of a first text encoder alone is named for a model with one.

    Returns:
        `path`.

    Raises:
        ValueError: The change moves token rows, which these names cannot express, or as `export.lora`.
        UnknownSite: As `export.lora`.
        OSError: The place cannot be written.
    """
    target = formats.safetensors_path(path)
    if any(is_embedding(m.site) for m in change.movements):
        raise ValueError(
            "kohya's names cannot express token rows, so half of the edit would be lost: use `export.comfy` for "
            "ComfyUI, or `export.embeddings` for AUTOMATIC1111 if nothing else moves."
        )
    return formats.save(_kohya_tensors(change, model), target)


def comfy(change: Change, path: str | Path, *, model: TextToImage | None = None) -> Path:
    """Write `change` as a LoRA for ComfyUI: token rows under its generic names, everything else under kohya's.

    Args:
        change: As in `export.lora`, and token rows.
        path: Must end in `.safetensors`.
        model: As in `kohya`.

    Returns:
        `path`.

    Raises:
        ValueError: As `export.lora`.
        UnknownSite: As `export.lora`.
        OSError: The place cannot be written.
    """
    target = formats.safetensors_path(path)
    rows = [m for m in change.movements if is_embedding(m.site)]
    others = tuple(m for m in change.movements if not is_embedding(m.site))
    tensors: dict[str, Tensor] = {}
    if others:
        tensors |= _kohya_tensors(Change(others, change.protocol, change.report), model)
    for movement in rows:
        tensors |= _one_hot(movement)
    return formats.save(tensors, target)


def embeddings(model: TextToImage, change: Change, path: str | Path) -> Path:
    """Write token rows as textual-inversion files into a new folder: AUTOMATIC1111 replaces each word of that name.

    Args:
        model: The model that the change was made for, unedited or with `change` applied last.
        change: A change of token rows alone, as by `edit.rename`.
        path: A folder that does not exist yet; each moved word becomes the file `<word>.safetensors` in it.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` exists.
        ValueError: The change moves other weights too, a moved token is no whole word, or only one of two encoders
            moves.
        OSError: The place cannot be written.
    """
    target = formats.new_folder(path)
    if not change.movements or not all(is_embedding(m.site) for m in change.movements):
        raise ValueError(
            "textual-inversion files hold token rows alone, and this change moves other weights: use "
            "`export.kohya`, or make the change with `edit.rename`."
        )
    if len(change.movements) != len(model.text_encoders):
        raise ValueError(
            f"{model.name!r} has {len(model.text_encoders)} text encoders, and a file must hold the rows of all: make "
            "the change with `encoder='all'`."
        )
    applied = change.is_applied(model)
    words: dict[str, dict[str, Tensor]] = {}
    for movement in change.movements:
        part = movement.site.partition(".")[0]
        single = len(change.movements) == 1
        name = "emb_params" if single else ("clip_l" if part == "text" else "clip_g")
        for word, row in _word_rows(model, movement, part, applied).items():
            words.setdefault(word, {})[name] = row[None]
    with formats.draft_at(target) as folder:
        folder.mkdir()
        for word, tensors in words.items():
            save_file(tensors, folder / f"{word}.safetensors", {"format": "pt"})
    return target


def _kohya_tensors(change: Change, model: TextToImage | None) -> dict[str, Tensor]:
    """Return the factors of the LoRA under kohya's names."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    factors = formats.with_attention(formats.lora_tensors(change, model), ".self_attn.out_proj.")
    tensors = convert_state_dict_to_kohya(factors)
    two = any(m.site.startswith("text2.") for m in change.movements)
    two = two or bool(change.report.get("unedited_encoders"))
    if two or (model is not None and len(model.text_encoders) > 1):
        return tensors
    return {name.replace("lora_te1_", "lora_te_", 1): tensor for name, tensor in tensors.items()}


def _one_hot(movement: Movement) -> dict[str, Tensor]:
    """Return the factors of token rows under ComfyUI's generic names; the rows are one-hot in `lora_up`."""
    part = movement.site.partition(".")[0]
    encoder = "clip_g" if part == "text2" else "clip_l"
    if part == "text" and movement.right.shape[1] == _WIDTH_OF_CLIP_H:
        encoder = "clip_h"
    name = f"text_encoders.{encoder}.transformer.text_model.embeddings.token_embedding"
    tokens = _moved_tokens(movement)
    up = torch.zeros(len(movement.left), len(tokens), dtype=torch.float16)
    up[tokens, range(len(tokens))] = 1
    return {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": (
            movement.left[tokens].double() @ movement.right.double()
        ).float(),
        f"{name}.alpha": torch.tensor(float(len(tokens))),
    }


def _moved_tokens(movement: Movement) -> list[int]:
    """Return the tokens whose rows move; the first one if none does, because a LoRA has at least rank 1."""
    if not movement.left.numel():
        return [0]
    return movement.left.abs().amax(1).nonzero().flatten().tolist() or [0]


def _word_rows(
    model: TextToImage, movement: Movement, part: str, applied: bool
) -> dict[str, Tensor]:
    """Return the new row of each moved word, float32."""
    tokens = _moved_tokens(movement)
    tokenizer = model.tokenizers[encoder_index(model, part)]
    names: Sequence[str] = [str(n) for n in tokenizer.convert_ids_to_tokens(tokens)]
    pieces = [n for n in names if not (n.endswith(_END) and n.removesuffix(_END).isalnum())]
    if pieces:
        raise ValueError(
            f"the token {pieces[0]!r} is no whole word, and a textual-inversion file replaces whole words: export a "
            "folder, or use `export.comfy` for ComfyUI."
        )
    rows = find_weight(model, movement.site).parameter.detach().cpu()[tokens].double()
    if not applied:
        rows = rows + movement.left[tokens].double() @ movement.right.double()
    words = [spelling(tokenizer, token) for token in tokens]
    return dict(zip(words, rows.float(), strict=True))
