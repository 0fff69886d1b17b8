"""What the decoder can do beyond the rooms' common ground, against transformers' numbers.

Features added behind the first layers are covered by Qwen3-VL's fixtures; the rest is Gemma 3's:
norms before the residual, a rope of its own for layers with a window, scaled token embeddings, and
a picture whose tokens see each other both ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, InputError
from mlx_vlm_pipes.interfaces import Phase, ReturnLogits, StepMode
from mlx_vlm_pipes.kv_cache import KVCache, Span, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.nn.decoder import DenseDecoder
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.language_model import LanguageModel
from mlx_vlm_pipes.nn.rope import RopeSpec, frequency_axes
from tests.device import bar

WINDOW, PICTURE = 4, (4, 10)
IDS = np.arange(17) * 5 % 24
# transformers 5.23, Gemma3ForCausalLM on `wave` weights (norms without their 1), float32: every
# fifth logit of all tokens, tokens 4 to 9 being a picture (create_masks_for_vision_model)
LOGITS = [
    [1.628551, 1.12387, 0.289266, -0.630254, -1.364758],
    [1.492593, 1.352925, 0.816092, 0.039688, -0.748367],
    [1.463666, 2.340913, 2.530962, 1.978022, 0.844415],
    [-0.012543, 0.43286, 0.751193, 0.849006, 0.697585],
    [0.185886, -0.229537, -0.577577, -0.756064, -0.712601],
    [0.224795, -0.168713, -0.512695, -0.70617, -0.692342],
    [0.299356, -0.004921, -0.307753, -0.520241, -0.580008],
    [0.251361, -0.014857, -0.276714, -0.457339, -0.503707],
    [0.271241, 0.071451, -0.149314, -0.326246, -0.407406],
    [0.323928, 0.13225, -0.098251, -0.29991, -0.413527],
    [-1.069994, -0.853046, -0.385678, 0.194909, 0.718279],
    [-1.094028, -1.110444, -0.800879, -0.256207, 0.363676],
    [-1.01655, -1.482095, -1.512557, -1.098994, -0.362809],
    [-0.226876, -0.892226, -1.295655, -1.318732, -0.954682],
    [0.452929, -0.215259, -0.820255, -1.184458, -1.200951],
    [-0.597001, -1.249479, -1.53516, -1.37018, -0.80297],
    [0.156967, -0.721248, -1.387734, -1.646836, -1.422494],
]


def wave(name: str, shape: tuple[int, ...]) -> mx.array:
    """Weights that need no file: a sine, shifted by the letters of the name."""
    values = np.sin(np.arange(np.prod(shape)) * 0.7 + sum(map(ord, name)))
    values = values * (0.3 if len(shape) > 1 else 0.1) + ("norm" in name)
    return mx.array(values.reshape(shape).astype(np.float32))


def cache_params(bits: int | None) -> KVCacheParams:
    from mlx_vlm_pipes.config import KVCacheConfig

    return KVCacheConfig(bits=bits).to_params(
        dtype=DType.float32,
        n_kv_heads=2,
        head_dim=32 if bits else 8,
        num_layers=3,
        devices=[DeviceRef.CPU()],
        data_parallel_degree=1,
    )


def gemma(bits: int | None = None) -> LanguageModel:
    """Two layers with a window around one without. bits: of a quantised cache."""
    dim = 32 if bits else 8
    config = DecoderConfig(
        hidden_size=16,
        intermediate_size=20,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=dim,
        vocab_size=24,
        rope=RopeSpec(dim, 10000.0),
        sliding_rope=RopeSpec(dim, 50.0),
        attention_scale=12**-0.5,
        hidden_act="gelu_pytorch_tanh",
        qk_norm=True,
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        sliding_layers=(True, False, True),
        post_norms=True,
        embed_scale=4.0,
    )
    decoder = DenseDecoder(config)
    named = [(name, wave(name, value.shape)) for name, value in tree_flatten(decoder.parameters())]  # pyright: ignore[reportAttributeAccessIssue]  # arrays
    decoder.update(tree_unflatten(named))  # pyright: ignore[reportArgumentType]  # a dict
    decoder.fuse()
    return LanguageModel(decoder, cache_params(bits), ReturnLogits.ALL)


def logits(model: LanguageModel, cuts: Sequence[int], spans: Sequence[Span]) -> np.ndarray:
    """All logits [T, V], the prompt given in pieces that end at `cuts`."""
    cache = KVCache(cache_params(8 if model.decoder.config.head_dim == 32 else None))
    row = cache.new_row()
    row.whole_spans = spans
    kv, parts, begin = cache_inputs(cache, [row]), [], 0
    rows = mx.array(np.cos(np.arange(6 * 16) * 0.37).reshape(6, 16).astype(np.float32))
    for end in cuts:
        has_picture = begin < PICTURE[1] and end > PICTURE[0]
        out = model(
            mx.array(IDS[begin:end]),
            mx.array([0, end - begin]),
            mx.array([1]),
            kv,
            image_embeddings=rows if has_picture else None,
            image_token_indices=mx.arange(*PICTURE) - begin if has_picture else None,
            mode=StepMode(Phase.DECODE if end == begin + 1 else Phase.PREFILL),
        )
        parts.append(np.array(out.logits))
        increment_cache_lengths(kv, [end - begin])
        begin = end
    return np.concatenate(parts)


@pytest.mark.parametrize("cuts", [[17], [4, 10, 17], [2, 12, 14, 15, 16, 17]])
def test_gemma_3_equals_transformers(cuts: list[int]) -> None:
    """In one step, around the picture, and with the last tokens in compiled decode steps."""
    np.testing.assert_allclose(logits(gemma(), cuts, [PICTURE])[:, ::5], LOGITS, atol=bar(2e-5))


def test_tiles_of_a_quantised_cache_show_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma(bits=8)
    whole = logits(model, [17], [PICTURE])
    monkeypatch.setattr("mlx_vlm_pipes.nn.attention.TILE", 3)
    np.testing.assert_allclose(logits(model, [17], [PICTURE]), whole, atol=bar(1e-5))
    assert np.abs(logits(model, [17], []) - whole).max() > 1e-2  # the span matters


def test_a_cut_span_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokens 4 to 9 .* only 0 to 6"):
        logits(gemma(), [7, 17], [PICTURE])


def test_frequencies_of_each_axis() -> None:
    assert frequency_axes((2, 1, 3), interleaved=False).tolist() == [0, 0, 1, 2, 2, 2]
    # Qwen3-VL's own section, as its code lays it out: T H W in turns, the rest T
    axes = frequency_axes((24, 20, 20), interleaved=True)
    assert axes.tolist() == [0, 1, 2] * 20 + [0] * 4
    with pytest.raises(ConfigError, match="half of the head, 64"):
        RopeSpec(128, 1e6, mrope_section=(24, 20, 21), mrope_interleaved=True)
