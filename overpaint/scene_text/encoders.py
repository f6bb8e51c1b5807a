"""The two encoders of DiffSTE: one of characters for the spelling, one of instructions for the style.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568, section 3.
Deviations: characters are numbered from both ends if `both_ends`; the small instruction encoder is a transformer
trained with the rest instead of CLIP's frozen text tower.
"""

import torch
from torch import Tensor, nn

from overpaint.scene_text.alphabet import CHARACTERS
from overpaint.scene_text.layout import GEOMETRY

__all__ = ["CharacterEncoder", "InstructionEncoder"]


class CharacterEncoder(nn.Module):
    """Tokens of characters: an embedding of the symbol and of its position, and of its edges if there is a layout.

    With `both_ends=False` and `has_layout=False` this is DiffSTE's encoder: 95 x D and L x D embeddings, no other
    layer, and padding that is attended to.
    """

    def __init__(self, length: int, width: int, *, both_ends: bool, has_layout: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width, padding_idx=0)
        self.position_embedding = nn.Embedding(length, width)
        self.end_embedding = nn.Embedding(length + 1, width, padding_idx=0) if both_ends else None
        self.edges_embedding = nn.Linear(GEOMETRY, width) if has_layout else None
        for table in (self.embedding, self.position_embedding, self.end_embedding):
            if table is not None:
                nn.init.normal_(table.weight, std=0.5)
        with torch.no_grad():
            self.embedding.weight[0] = 0
            if self.end_embedding is not None:
                self.end_embedding.weight[0] = 0

    def forward(self, numbers: Tensor, counts: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Return tokens, (B, L, D).

        Args:
            numbers: Numbers of the characters, (B, L), of `alphabet.encode`.
            counts: Characters of each text, (B,).
            geometry: Features of the edges, (B, L, 18), zero for padding; for a layout only.
        """
        places = torch.arange(numbers.shape[1], device=numbers.device)
        tokens = self.embedding(numbers) + self.position_embedding(places)
        valid = (places < counts[:, None]).float()
        if self.end_embedding is not None:
            tokens = tokens + self.end_embedding((counts[:, None] - places).clamp(min=0))
        if self.edges_embedding is not None and geometry is not None:
            tokens = tokens + self.edges_embedding(geometry) * valid[..., None]
        return tokens


class InstructionEncoder(nn.Module):
    """Tokens of an instruction: a small pre-norm transformer that is trained with the rest of the model."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embedding = nn.Embedding(length, width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        nn.init.normal_(self.position_embedding.weight, std=0.1)
        with torch.no_grad():
            self.embedding.weight[0] = 0
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                max(1, width // 24),
                2 * width,
                0.0,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, L, D) and their mean over the tokens that are not padding, (B, D).

        Args:
            tokens: Numbers of tokens, (B, L), of `Tokenizer.encode`; 0 is padding. It is attended to, as in DiffSTE.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features = self.embedding(tokens) + self.position_embedding(places)
        for layer in self.layers:
            features = layer(features)
        features = self.norm(features)
        valid = (tokens > 0).float()[..., None]
        pooled = (features * valid).sum(1) / valid.sum(1).clamp(min=1)
        return features, pooled
