"""The dense grouped-query decoder that all architectures share.

Two ways through the same weights: `prefill` takes ragged rows on a flat token axis, `decode` one
token of every row. Hidden states are [T, E]: no batch axis, no padding.
Source: transformers modeling_llama.py, modeling_granite.py, modeling_phi3.py, modeling_olmo.py,
modeling_qwen2.py, modeling_qwen3.py, modeling_qwen3_vl.py, modeling_gemma3.py, modeling_smollm3.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.kv_cache import CacheRow, Layer, Span
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.attention import merge_heads, prefill_attention
from mlx_vlm_pipes.nn.capture import Capture
from mlx_vlm_pipes.nn.decode_step import DecodeStep, HeadCounts
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.linear import fuse_linears, linear_part, unbiased
from mlx_vlm_pipes.nn.lora import LoRATable, TokenSlots
from mlx_vlm_pipes.nn.rope import Rope, Rotation
from mlx_vlm_pipes.ranks import ALONE, Ranks

RotationT = TypeVar("RotationT")
MANY_ROWS = 128  # from here on, a product is bound by arithmetic, not by the kernels' number


@dataclass(frozen=True)
class PrefillRow:
    """Where one row lies on the flat token axis, and its cache."""

    begin: int  # first token of the row on the flat axis
    end: int
    cache: CacheRow
    rotations: dict[int | None, Rotation]  # by window
    spans: tuple[Span, ...] = ()  # positions in the sequence whose tokens see each other both ways

    @property
    def start(self) -> int:
        """Position of the row's first new token in its sequence."""
        return self.cache.length


@dataclass(frozen=True)
class Added:
    """What some tokens get on top of the hidden states, behind each of the first layers.

    places int32 [N], on the flat token axis, each once; features: one [N, E] for each layer.
    """

    places: mx.array
    features: Sequence[mx.array]

    def after(self, layer: int, h: mx.array) -> mx.array:
        """Hidden states [T, E] behind a layer, with its features; the caller's stay as they are."""
        return h.at[self.places].add(self.features[layer].astype(h.dtype))


def last_tokens(rows: Sequence[PrefillRow], tail: int) -> mx.array:
    """Places on the flat token axis of the last `tail` tokens of each row, int32 [B * tail]."""
    return mx.concatenate([mx.arange(row.end - tail, row.end, dtype=mx.int32) for row in rows])


class LayerNorm(nn.Module):
    """Mean and variance norm without weight or bias, eps 1e-5 (OLMo): [T, E] -> [T, E]."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, None, None, 1e-5)


class RMSNorm(nn.RMSNorm):
    """Its result has the type of its input, whatever type its weight has: [T, E] -> [T, E]."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(x.dtype)


def _norm(size: int, eps: float | None) -> nn.Module:
    return LayerNorm() if eps is None else RMSNorm(size, eps)


def project_into(linear: nn.Module, x: mx.array, residual: mx.array, factor: float) -> mx.array:
    """residual + factor * linear(x), in one fused matrix product where the layer is plain."""
    if type(linear) is nn.Linear and factor == 1.0:
        bias = linear.get("bias")
        base = residual if bias is None else residual + bias
        return mx.addmm(base, x, linear["weight"].T)
    out = linear(x)
    return residual + (out if factor == 1.0 else out * factor)


@dataclass(frozen=True)
class Joined:
    """Linears that are one matrix now: its name, theirs in the order of rows, those with a bias."""

    name: str
    parts: tuple[str, ...]
    biased: frozenset[str]


class Projections(nn.Module):
    """Linears with an optional LoRA table beside each; `adapters` maps to it a linear's name, or
    that of several side by side."""

    residual_multiplier: float
    ranks: Ranks = ALONE
    joined: Joined | None = None

    def join(self, fused: str, names: tuple[str, ...]) -> None:
        """Make one matrix of several, where their formats agree."""
        parts = [self[name] for name in names]
        linear = fuse_linears(parts)
        if linear is not None:
            self[fused] = linear
            biased = frozenset(n for n, p in zip(names, parts, strict=True) if "bias" in p)
            self.joined = Joined(fused, names, biased)
            for name in names:
                self.pop(name)

    def side_by_side(
        self, fused: str, names: tuple[str, ...], x: mx.array, slots: TokenSlots | None
    ) -> mx.array:
        """x [T, E] -> the outputs of `names`, concatenated; one product where they are fused."""
        if fused not in self:
            return mx.concatenate(self.apart(fused, names, x, slots), axis=-1)
        y, table = self[fused](x), self._table(fused)
        if slots is None or table is None:
            return y
        return table(x, y, slots, self[fused].get("bias"))

    def apart(
        self, fused: str, names: tuple[str, ...], x: mx.array, slots: TokenSlots | None
    ) -> list[mx.array]:
        """x [T, E] -> the outputs of `names`, each by a product of its own."""
        table, outputs, begin = self._table(fused), [], 0
        for part, (name, size) in enumerate(zip(names, self.sizes(names), strict=True)):
            end = begin + size
            linear = self[fused if fused in self else name]
            bias = linear.get("bias")
            if fused in self:
                y = linear_part(linear, x, begin, end)
                bias = None if bias is None else bias[begin:end]
            else:
                y = linear(x)
            if slots is not None and table is not None:
                y = table(x, y, slots, bias, part)
            outputs.append(y)
            begin = end
        return outputs

    def _table(self, name: str) -> LoRATable | None:
        return self.get("adapters", {}).get(name)

    def sizes(self, names: tuple[str, ...]) -> list[int]:
        """Output widths of the linears that may be fused."""
        raise NotImplementedError

    def into(
        self, name: str, x: mx.array, residual: mx.array | None, slots: TokenSlots | None
    ) -> mx.array:
        """residual + multiplier * linear(x), with the row's adapter; without one linear(x)."""
        factor = self.residual_multiplier
        table = self._table(name)
        if self.ranks.are_many:
            return self._summed(name, x, residual, slots)
        if residual is None:
            y, bias = self[name](x), self[name].get("bias")
            return y if slots is None or table is None else table(x, y, slots, bias)
        if slots is None or table is None:
            return project_into(self[name], x, residual, factor)
        if not table.has_gain:  # added last, so that B = 0 leaves the base's very bits
            base, delta = project_into(self[name], x, residual, factor), table.delta(x, slots)
            return base if delta is None else base + factor * delta
        return residual + factor * table(x, self[name](x), slots, self[name].get("bias"))

    def _summed(
        self, name: str, x: mx.array, residual: mx.array | None, slots: TokenSlots | None
    ) -> mx.array:
        """`into` where each rank has columns of the linear, and of its adapters (which have no
        gain then); what is added, is added once."""
        linear, table = self[name], self._table(name)
        y, bias = unbiased(linear, x), linear.get("bias")
        delta = None if slots is None or table is None else table.delta(x, slots)
        y = self.ranks.sum(y if delta is None else y + delta)
        y = y if bias is None else y + bias
        if residual is None:
            return y
        factor = self.residual_multiplier
        return residual + (y if factor == 1.0 else y * factor)


class Attention(Projections):
    """Grouped-query self-attention over a cache: [T, E] -> [T, E], added to a given residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads, config.num_kv_heads, dim
        )  # fmt: skip
        self.scale, self.clip = config.attention_scale, config.clip_qkv
        self.residual_multiplier, self.ranks = config.residual_multiplier, config.ranks
        self.layer, self.window, self.turns = layer, config.window(layer), config.turns(layer)
        heads, kv_heads, bias = self.num_heads, self.num_kv_heads, config.qkv_bias
        if config.stacked_qkv:
            self.qkv_proj = nn.Linear(hidden, (heads + 2 * kv_heads) * dim, bias=bias)
        else:
            self.q_proj = nn.Linear(hidden, heads * dim, bias=bias)
            self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=bias)
            self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.norm_eps or 1e-6)
            self.k_norm = RMSNorm(dim, config.norm_eps or 1e-6)

    def fuse(self) -> None:
        if "q_proj" in self:
            self.join("qkv_proj", ("q_proj", "k_proj", "v_proj"))

    def sizes(self, names: tuple[str, ...]) -> list[int]:
        heads = {"q_proj": self.num_heads}
        return [heads.get(name, self.num_kv_heads) * self.head_dim for name in names]

    def _heads(self, x: mx.array, slots: TokenSlots | None) -> mx.array:
        """x [T, E] -> queries, keys and values side by side [T, H + 2 * K, D]."""
        qkv = self.side_by_side("qkv_proj", ("q_proj", "k_proj", "v_proj"), x, slots)
        if self.clip is not None:
            qkv = mx.clip(qkv, -self.clip, self.clip)
        return qkv.reshape(x.shape[0], -1, self.head_dim)

    def _rotation(self, rotations: dict[int | None, Rotation]) -> Rotation:
        """The one of the layer's window, or none at all."""
        return rotations[self.window] if self.turns else lambda x: x

    def prefill(
        self,
        x: mx.array,
        residual: mx.array | None,
        rows: Sequence[PrefillRow],
        slots: TokenSlots | None,
        asking: TokenSlots | None,
        tail: int | None,
    ) -> mx.array:
        """All tokens of x [T, E] are cached. With tail, only the last ones of each row query:
        residual and asking (their adapters) are then those tokens' alone.
        """
        qkv, first = self._heads(x, slots), self.num_heads
        q, k, v = mx.split(qkv, [first, first + self.num_kv_heads], axis=1)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        outs = []
        for row in rows:
            part = slice(row.begin, row.end)
            # Apart, unlike in a decode step: the queries can go before the keys are cached.
            rotation, start = self._rotation(row.rotations), row.start
            asked = rotation(q[part].transpose(1, 0, 2)[None])  # [1, H, T, D]
            if tail is not None:
                start += asked.shape[2] - tail
                asked = asked[:, :, -tail:]
            fresh = rotation(k[part].transpose(1, 0, 2)[None]), v[part].transpose(1, 0, 2)[None]
            cached = row.cache.append(self.layer, *fresh, row.start)
            format = row.cache.format
            out = prefill_attention(
                asked, fresh, cached, format, start, self.scale, self.window, row.spans
            )
            # Write the cache now: left to the end, every layer's projections would be kept.
            outs.extend(mx.depends([merge_heads(out)], list(cached)))
        merged = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=0)  # [T, H * D]
        return self.into("o_proj", merged, residual, asking)

    def decode(
        self, x: mx.array, residual: mx.array | None, caches: Sequence[Layer], step: DecodeStep
    ) -> tuple[mx.array, list[Layer]]:
        """caches: the layer's arrays of each group of the step; they come back written."""
        norms = (self.q_norm, self.k_norm) if "q_norm" in self else None
        rotation, joined = self._rotation(step.rotations), step.joined[self.window]
        heads = self._heads(x, step.slots)
        q, fresh = step.turn(heads, rotation, joined if self.turns else rotation, norms)
        out, written = step.attend(q, fresh, caches, self.window, self.scale)
        return self.into("o_proj", out, residual, step.slots), written


class MLP(Projections):
    """Gated feed-forward: [T, E] -> [T, E], added to a given residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.inner, self.stacked = inner, config.stacked_mlp
        self.residual_multiplier, self.ranks = config.residual_multiplier, config.ranks
        act = activation(config.hidden_act)
        if config.stacked_mlp:  # as in Phi-3, which has another name for the activation too
            self.activation_fn = act
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.act_fn = act
            self.gate_proj = nn.Linear(hidden, inner, bias=bias)
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def fuse(self) -> None:
        if "gate_proj" in self:
            self.join("gate_up_proj", ("gate_proj", "up_proj"))

    def sizes(self, names: tuple[str, ...]) -> list[int]:
        return [self.inner for _ in names]

    def __call__(
        self, x: mx.array, residual: mx.array | None, slots: TokenSlots | None
    ) -> mx.array:
        names = ("gate_proj", "up_proj")
        if x.shape[0] >= MANY_ROWS:
            gate, up = self.apart("gate_up_proj", names, x, slots)
        else:
            gate, up = mx.split(self.side_by_side("gate_up_proj", names, x, slots), 2, axis=-1)
        act = self.activation_fn if self.stacked else self.act_fn
        return self.into("down_proj", act(gate) * up, residual, slots)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual: [T, E] -> [T, E].

    post_norms: a norm behind each too, before the residual; the names are then Gemma's, whose
    `post_attention_layernorm` is what it says.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.has_post_norms = config.post_norms
        self.input_layernorm = _norm(hidden, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = _norm(hidden, eps)
        if config.post_norms:
            self.pre_feedforward_layernorm = _norm(hidden, eps)
            self.post_feedforward_layernorm = _norm(hidden, eps)
        self.mlp = MLP(config)

    def prefill(
        self,
        h: mx.array,
        rows: Sequence[PrefillRow],
        slots: TokenSlots | None,
        tail: int | None = None,
    ) -> mx.array:
        """tail: how many last tokens of each row to return, None for all of them."""
        x, asking = self.input_layernorm(h), slots
        if tail is not None:
            places = last_tokens(rows, tail)
            h, asking = h[places], None if slots is None else slots[places]
        residual = None if self.has_post_norms else h
        out = self.self_attn.prefill(x, residual, rows, slots, asking, tail)
        return self._feed_forward(h, out, asking)

    def decode(
        self, h: mx.array, caches: Sequence[Layer], step: DecodeStep
    ) -> tuple[mx.array, list[Layer]]:
        residual = None if self.has_post_norms else h
        out, written = self.self_attn.decode(self.input_layernorm(h), residual, caches, step)
        return self._feed_forward(h, out, step.slots), written

    def _feed_forward(self, h: mx.array, attended: mx.array, slots: TokenSlots | None) -> mx.array:
        """attended: h with the attention's output added, or, with post norms, that output."""
        if not self.has_post_norms:
            return self.mlp(self.post_attention_layernorm(attended), attended, slots)
        h = h + self.post_attention_layernorm(attended)
        out = self.mlp(self.pre_feedforward_layernorm(h), None, slots)
        return h + self.post_feedforward_layernorm(out)


class DenseDecoder(nn.Module):
    """Embedding, layers, final norm and head. Hidden states are those before the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter_names: tuple[str, ...] = ()  # LoRA slots from 1 on
        self.adapter_ranks: tuple[int, ...] = ()
        self.rope = Rope(config.rope)
        self.sliding_rope = Rope(config.sliding_rope) if config.sliding_rope else self.rope
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i) for i in range(config.num_layers)]
        self.norm = _norm(config.hidden_size, config.norm_eps)
        if not config.tie_word_embeddings:
            begin, end = config.head_rows
            self.lm_head = nn.Linear(config.hidden_size, end - begin, bias=False)

    def cast_norms(self) -> None:
        """Give the norms' weights the type that the configuration asks for, if it does."""
        dtype = self.config.norm_dtype
        for module in self.modules():
            if dtype is not None and isinstance(module, RMSNorm):
                module.weight = module.weight.astype(dtype)

    def fuse(self) -> None:
        """Fewer, larger matrix products. Call it once, after the weights are in."""
        for layer in self.layers:
            layer.self_attn.fuse()
            layer.mlp.fuse()

    @property
    def head_counts(self) -> HeadCounts:
        return HeadCounts(self.config.num_heads, self.config.num_kv_heads)

    @property
    def windows(self) -> set[int | None]:
        return {self.config.window(i) for i in range(self.config.num_layers)}

    def rotations(self, make: Callable[[Rope], RotationT]) -> dict[int | None, RotationT]:
        """What `make` gives for each window's rope, once where the windows share one."""
        full = make(self.rope)
        sliding = full if self.sliding_rope is self.rope else make(self.sliding_rope)
        return {window: full if window is None else sliding for window in self.windows}

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens int [T] -> [T, E], times `embed_scale`, before `embedding_multiplier`."""
        h, scale = self.embed_tokens(tokens), self.config.embed_scale
        return h if scale == 1.0 else h * scale

    def scale_embeddings(self, h: mx.array) -> mx.array:
        factor = self.config.embedding_multiplier
        return h if factor == 1.0 else h * factor

    def prefill(
        self,
        h: mx.array,
        rows: Sequence[PrefillRow],
        slots: TokenSlots | None = None,
        tail: int | None = None,
        added: Added | None = None,
        capture: Capture | None = None,
    ) -> mx.array:
        """Embeddings [T, E] of ragged rows -> hidden states [T, E]; the rows' caches are written.

        slots: each token's LoRA adapter; None where none is loaded. tail: only the last `tail`
        tokens of each row are wanted, [B * tail, E]; the last layer skips the others, also for
        `capture`.
        """
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            gets_more = added is not None and i < len(added.features)
            h = layer.prefill(h, rows, slots, tail if i == last and not gets_more else None)
            if capture is not None:
                capture.keep(i, h)
            if added is not None and gets_more:
                h = added.after(i, h)
                h = h if i < last or tail is None else h[last_tokens(rows, tail)]
        return h

    def decode(
        self,
        h: mx.array,
        caches: Sequence[Sequence[Layer]],
        step: DecodeStep,
        capture: Capture | None = None,
    ) -> tuple[mx.array, list[list[Layer]]]:
        """Embeddings [B, E] of one token a row -> hidden states [B, E] and the written caches.

        caches: the layers of each group of the step; so are the written ones.
        """
        written: list[list[Layer]] = [[] for _ in caches]
        for i, layer in enumerate(self.layers):
            h, new = layer.decode(h, [group[i] for group in caches], step)
            for group, arrays in zip(written, new, strict=True):
                group.append(arrays)
            if capture is not None:
                capture.keep(i, h)
        return h, written

    def logits(self, h: mx.array) -> mx.array:
        """Hidden states [T, E] -> logits float32 [T, V]."""
        normed = self.norm(h)
        head = self.lm_head if "lm_head" in self else self.embed_tokens.as_linear
        shares = self.config.vocab_shares
        if shares and "lm_head" not in self:
            out = linear_part(self.embed_tokens, normed, *self.config.head_rows)
        else:
            out = head(normed)
        if shares:
            out = self.config.ranks.joined(out, [end - begin for begin, end in shares])
        out = out.astype(mx.float32)
        scaling = self.config.logits_scaling
        return out if scaling == 1.0 else out / scaling
