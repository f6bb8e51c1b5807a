"""Export a change: as a LoRA, a single LDM file, or a diffusers folder with a model card."""

from overpaint.edit.export.formats import folder, lora, single_file

__all__ = ["folder", "lora", "single_file"]
