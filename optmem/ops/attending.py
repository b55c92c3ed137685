"""attention: CLIP's, the second generation's, and that of causal prompts; and which code serves which call of it on CUDA."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.kernels.launch import WIDEST_HEAD
from optmem.native import NativeModule, native
from optmem.ops.registry import (
    Implementation,
    as_array,
    check,
    check_same_kind,
    cpp_for,
    described,
    differentiate,
    library,
    triton_module,
)

log = logging.getLogger(__name__)

library.define("attention(Tensor query, Tensor key, Tensor value, int prefix) -> Tensor")


def attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    """Scaled dot-product attention: query i stands at place S - T + i and sees the first `prefix` keys and all up to its place.

    query       [B, T, H, d]     fp32, bf16 or fp16; so are key and value
    key, value  [B, S, K, d]     S >= T; H a multiple of K, of which H / K neighbours share one
    prefix      S: everything is seen (CLIP).  0: causal.  n: n image tokens, then queries in order (the second generation)
    -> [B, T, H, d]

    Raises InputError where shapes, types or devices do not fit together.
    """
    check(query.dim() == 4, f"attention: query must be [B, T, H, d], got {list(query.shape)}")
    batch, num_queries, heads, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check(
            tensor.dim() == 4 and tensor.shape[0] == batch and tensor.shape[3] == head_dim,
            f"attention: {name} must be [{batch}, S, K, {head_dim}], got {list(tensor.shape)}",
        )
    check(key.shape == value.shape, f"attention: key is {list(key.shape)}, but value is {list(value.shape)}")
    num_keys, kv_heads = key.shape[1:3]
    check(kv_heads > 0 and heads % kv_heads == 0, f"attention: {kv_heads} heads of keys cannot serve {heads} heads of queries")
    check(num_keys >= num_queries, f"attention: {num_queries} queries cannot be the last of {num_keys} keys")
    if not 0 <= prefix <= num_keys:  # no message of a number that a graph may not know
        raise InputError(f"attention: prefix must be 0 to {num_keys}, got {prefix}")
    check_same_kind("attention", query=query, key=key, value=value)
    # Slices of one projection stay as they are; only the numbers of a head must lie side by side.
    inputs = [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value)]
    mixed: Tensor = torch.ops.optmem.attention(*inputs, prefix)
    return mixed


@torch.library.impl(library, "attention", "CompositeExplicitAutograd")
def _attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    mask = None
    if prefix < key.shape[1]:
        mask = reference.attention_mask(query.shape[1], key.shape[1], prefix, query.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    # torch's own kernel: no logits in memory, strided inputs as they are
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).contiguous()


@torch.library.impl(library, "attention", "CPU")
def _attention_cpu(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    cpu = cpp_for(query) if query.dtype == torch.bfloat16 and query.shape == key.shape and prefix == key.shape[1] else None
    if cpu is None or not cpu.has_grid_attention(query.shape[3]) or not query.numel():
        return _attention(query, key, value, prefix)
    out: Tensor = _attention_fake(query, key, value, prefix)
    cpu.attention(*map(as_array, (query, key, value, out)), torch.get_num_threads())
    return out


# --- who serves it on CUDA ------------------------------------------------------------------------------------------------------

Server = Literal["flash-attn", "triton", "torch"]
WIDEST_FLASH_HEAD = 256


class AttentionCall(NamedTuple):
    """What decides who serves it."""

    dtype: torch.dtype
    head_dim: int
    num_queries: int
    num_keys: int
    prefix: int

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self.prefix == self.num_keys

    @property
    def is_causal(self) -> bool:
        """Whether every query sees the keys up to its own place and no other: the first one's place is num_keys - num_queries."""
        return self.prefix <= self.num_keys - self.num_queries + 1


def attention_server(call: AttentionCall, *, has_flash: bool, has_triton: bool) -> Server:
    """The code for a call on CUDA.  Here alone it is decided.

    flash-attn, where someone installed it, takes what it means as we do: 16 bits, a full or a causal mask.  A lone query stays with
    us, for it might be split by how many others there are, and then a page's numbers would depend on its batch mates.
    Where bench/bench_gpu_vision.py measures another order faster for a kind of call, this is the place to say so.
    """
    is_known = call.dtype in (torch.bfloat16, torch.float16) and (call.is_full or call.is_causal)
    if has_flash and is_known and call.num_queries > 1 and call.head_dim <= WIDEST_FLASH_HEAD and call.head_dim % 8 == 0:
        return "flash-attn"
    return "triton" if has_triton and call.head_dim <= WIDEST_HEAD else "torch"


@cache
def flash_attn() -> NativeModule:
    """The optional package, imported when first needed; what is found is logged once, a package that does not load as a warning."""
    try:
        module = import_module("flash_attn")
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return NativeModule("flash_attn", None, "not installed")
        log.warning("attention: flash-attn is installed, but does not load, so it serves nothing: %s", error)
        return NativeModule("flash_attn", None, f"does not load: {error}")
    version = str(getattr(module, "__version__", "of no version"))
    log.info("attention: flash-attn %s serves full and causal attention in 16 bits on CUDA", version)
    return NativeModule("flash_attn", module, version)


@cache
def _can_flash(device: torch.device) -> bool:
    """Whether flash-attn is here and knows the device; it begins with the A100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and flash_attn().module is not None


@torch.library.impl(library, "attention", "CUDA")
def _attention_cuda(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    call = AttentionCall(query.dtype, query.shape[3], query.shape[1], key.shape[1], prefix)
    has_triton = triton_module("attention") is not None
    server = attention_server(call, has_flash=_can_flash(query.device), has_triton=has_triton)
    return serve_attention(server, query, key, value, prefix)


def serve_attention(server: Server, query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    """What the chosen code makes of it."""
    if server == "torch":
        return _attention(query, key, value, prefix)
    if server == "flash-attn":
        return _by_flash_attn(query, key, value, is_causal=prefix < key.shape[1])
    kernel = triton_module("attention")
    assert kernel is not None, "chosen where Triton is installed"
    out: Tensor = _attention_fake(query, key, value, prefix)
    kernel.attention(query, key, value, prefix, out)
    return out


def _by_flash_attn(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Through its function for sequences of many lengths, all of which are the same here: the other one splits keys by how many
    sequences there are, and adds them up in another order.  Its causal mask too ends with the last query at the last key."""
    if query.numel() == 0:
        return query.new_empty(query.shape)
    batch, lengths = query.shape[0], (query.shape[1], key.shape[1])
    starts = (torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length for length in lengths)
    packed = (tensor.flatten(0, 1) for tensor in (query, key, value))  # slices of a projection stay as they are
    scale = query.shape[3] ** -0.5
    attend = flash_attn().require().flash_attn_varlen_func
    mixed: Tensor = attend(*packed, *starts, *lengths, softmax_scale=scale, causal=is_causal)
    return mixed.view(query.shape)


def _attention_served_on_cpu() -> Implementation:
    cpu = native("_cpu").module
    if cpu is not None and cpu.has_grid_attention(64):
        return Implementation(
            "attention", "cpu", "cpp", "bf16 where all see all, heads up to 64; else scaled_dot_product_attention"
        )
    return Implementation("attention", "cpu", "torch", "scaled_dot_product_attention")


def _attention_served() -> Implementation:
    """The rows of `optmem env`: the first that takes a call, and who takes the rest."""
    sdpa = "scaled_dot_product_attention"
    flash, ours = flash_attn(), f"kernels/attention.py: heads up to {WIDEST_HEAD}"
    has_flash = flash.module is not None and (not torch.cuda.is_available() or _can_flash(torch.device("cuda")))
    if has_flash:
        rest = sdpa if triton_module("attention") is None else f"kernels/attention.py up to {WIDEST_HEAD}, {sdpa}"
        reason = f"{flash.reason}: full and causal in 16 bits, heads up to {WIDEST_FLASH_HEAD}; else {rest}"
        return Implementation("attention", "cuda", "flash-attn", reason)
    why = "" if flash.reason == "not installed" or flash.module is not None else f"; flash-attn {flash.reason}"
    if triton_module("attention") is None:
        return Implementation("attention", "cuda", "torch", f"{sdpa}: triton is not installed{why}")
    return Implementation("attention", "cuda", "triton", f"{ours}; else {sdpa}{why}")


@torch.library.register_fake("optmem::attention")
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    return query.new_empty(query.shape)


differentiate("attention", reference.attention)
described.append(_attention_served_on_cpu)
described.append(_attention_served)
