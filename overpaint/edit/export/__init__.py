"""Export a change: as a LoRA, for web UIs, as a single LDM file, or as a diffusers folder with a model card."""

from overpaint.edit.export.formats import folder, lora, single_file
from overpaint.edit.export.web_ui import comfy, embeddings, kohya

__all__ = ["comfy", "embeddings", "folder", "kohya", "lora", "single_file"]
