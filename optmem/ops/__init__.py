"""Every operator by its name: schema, checks, fake, and which implementation serves it.

A function here checks what a caller can get wrong and calls ``torch.ops.optmem.<name>``, which eager mode, torch.compile and CUDA
graphs all understand.  What the operator means is written in reference.py; the C++ is in csrc/, the Triton in kernels/.
"""

from optmem.ops.attending import attention
from optmem.ops.decoding import (
    PAGE_UNIT,
    CacheScales,
    add_rms_norm,
    paged_attention,
    rms_norm,
    rope_cache,
    silu_mul,
)
from optmem.ops.drawing import MAX_SIDE, SheetBox, contact_sheet, draw_text, resample
from optmem.ops.e4m3 import E4M3, E4m3Rows, e4m3_rows, linear_e4m3
from optmem.ops.experts import ExpertScales, Routing, expert_mlp, route
from optmem.ops.linear import Activation, linear, linear_rows
from optmem.ops.norm import add_layer_norm, layer_norm
from optmem.ops.picking import pick_token
from optmem.ops.registry import Implementation, implementations
from optmem.ops.vision import compress, global_attention, patch_embed, window_attention

__all__ = [
    "E4M3",
    "MAX_SIDE",
    "PAGE_UNIT",
    "Activation",
    "CacheScales",
    "E4m3Rows",
    "ExpertScales",
    "Implementation",
    "Routing",
    "SheetBox",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "compress",
    "contact_sheet",
    "draw_text",
    "e4m3_rows",
    "expert_mlp",
    "global_attention",
    "implementations",
    "layer_norm",
    "linear",
    "linear_e4m3",
    "linear_rows",
    "paged_attention",
    "patch_embed",
    "pick_token",
    "resample",
    "rms_norm",
    "rope_cache",
    "route",
    "silu_mul",
    "window_attention",
]
