"""What a page cannot be faster than: bytes and FLOPs that exact bf16 needs, over what the device copies and multiplies.

Counted as in performance.md, section 1: compute is hidden under memory within a step, weights are read once a step, the experts
that are read are those that random routing chooses.  A page is encoded, its prompt is read, and its text is said in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from optmem.model.config import DecoderConfig

ENCODER_GFLOP = {512: 236, 640: 380, 1024: 1103, 1280: 1913}  # of a view, as exact arithmetic needs
ENCODER_BOUND = 1.025  # what parts that memory bounds add, on an H200


@dataclass(frozen=True)
class Device:
    """Ceilings that were measured, or those of an H200."""

    bytes_per_s: float = 4.3e12
    flops_per_s: float = 788e12  # bf16


H200 = Device()


def expected_experts(config: DecoderConfig, texts: int) -> float:
    """Different experts of a layer that so many texts choose at random."""
    return config.experts * (1 - (1 - config.top_k / config.experts) ** texts)


def shared_weights(config: DecoderConfig) -> int:
    """Numbers in the matrices that every token meets, without the head."""
    attention = config.layers * 4 * config.hidden**2
    dense = config.dense_layers * 3 * config.hidden * config.dense_width
    shared = (config.layers - config.dense_layers) * 3 * config.hidden * config.shared_experts * config.expert_width
    return attention + dense + shared


def step_seconds(config: DecoderConfig, texts: int, context: float, device: Device = H200) -> float:
    """A step of so many texts with so many tokens each in the cache."""
    expert = 3 * config.hidden * config.expert_width
    routed = (config.layers - config.dense_layers) * expert
    head = config.hidden * config.vocab_size
    weights = 2 * (shared_weights(config) + head + routed * expected_experts(config, texts))
    cached = 2 * 2 * config.layers * config.hidden * context * texts
    flops = 2 * texts * (shared_weights(config) + head + routed * config.top_k)
    return max((weights + cached) / device.bytes_per_s, flops / device.flops_per_s)


def prompt_seconds(config: DecoderConfig, tokens: int, device: Device = H200) -> float:
    """A prompt's part of a pass that reads all weights anyway."""
    routed = (config.layers - config.dense_layers) * config.top_k * 3 * config.hidden * config.expert_width
    attention = 2 * 2 * config.layers * config.hidden * tokens**2 / 2
    return (2 * tokens * (shared_weights(config) + routed) + attention) / device.flops_per_s


def encode_seconds(side: int, device: Device = H200) -> float:
    """One view."""
    return ENCODER_BOUND * ENCODER_GFLOP[side] * 1e9 / device.flops_per_s


def page_seconds(config: DecoderConfig, side: int, prompt: int, tokens: int, texts: int, device: Device = H200) -> float:
    """A page of one view, one thing after the other, its text said among `texts` whose contexts are half said on average."""
    step = step_seconds(config, texts, prompt + tokens / 2, device)
    return encode_seconds(side, device) + prompt_seconds(config, prompt, device) + tokens * step / texts
