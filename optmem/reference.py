"""What every operator means, in plain torch.  Every implementation is compared with this page; nothing here is meant to be fast."""

from __future__ import annotations

import torch
from torch import Tensor

PAPER = 255


def draw_text(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    """Draw glyphs black on white; where they overlap the darker pixel wins.  Shapes as in ops.draw_text."""
    num_pages = starts.numel() - 1
    pages = torch.full((num_pages, height, width), PAPER, dtype=torch.uint8)
    for page in range(num_pages):
        for glyph, top, left in placements[starts[page] : starts[page + 1]].tolist():
            offset, h, w = glyphs[glyph].tolist()
            patch = pages[page, top : top + h, left : left + w]
            patch.copy_(torch.minimum(patch, PAPER - ink[offset : offset + h * w].view(h, w)))
    return pages
