"""What docs/api.md promises of every architecture: a room's test file subclasses `Contract`."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextAndVisionContext, TextContext
from mlx_vlm_pipes.dtypes import DeviceRef
from mlx_vlm_pipes.errors import CheckpointError, ConfigError, InputError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import (
    LogProbabilities,
    ModelInputs,
    ReturnHiddenStates,
    ReturnLogits,
)
from mlx_vlm_pipes.kv_cache import (
    KVCache,
    KVCacheInputs,
    KVCacheInputsPerDevice,
    cache_inputs,
    increment_cache_lengths,
)
from tests.api.driving import (
    BAR,
    STEPS,
    Room,
    best,
    build,
    decode,
    lengths,
    model_of,
    new_cache,
    paged,
    pipeline_config,
    prefill,
    relative,
    rms_norm,
    row_logits,
    step,
)
from tests.device import bar, device, device_ref

TAIL = 3  # return_n_logits, where a mode reads it
HIDDEN_BAR = bar(5e-5)  # of the largest logit: the head in numpy, over our hidden states


class Contract:
    """The documented model class of one room, driven by hand."""

    room: ClassVar[Room]

    # ---- building

    def test_the_constructor_keeps_what_it_was_given(self) -> None:
        model = model_of(self.room)
        pipeline = model.pipeline_config
        assert (model.devices, model.device_refs) == ([device()], [device_ref()])
        assert model.kv_cache_config is pipeline.model.kv_cache
        assert (model.adapter, model.return_logits) == (None, ReturnLogits.ALL)
        assert model.dtype.name == "float32"
        assert model.huggingface_config.to_dict() == self.room.config_json
        config = self.room.config.initialize(pipeline)
        assert config.get_kv_params() == model.kv_params
        limit = self.room.text_json["max_position_embeddings"]
        assert config.get_max_seq_len() == model.max_seq_len == limit
        shorter = build(self.room.model, self.room.folder, max_length=limit - 1)
        assert shorter.max_seq_len == limit - 1
        with pytest.raises(ConfigError, match=f"{limit + 1}.*{limit}"):
            build(self.room.model, self.room.folder, max_length=limit + 1)

    def test_a_callers_adapter_decides_what_is_loaded(self) -> None:
        seen: list[str] = []

        def nothing(state_dict: Any, *, huggingface_config: Any, **_: Any) -> dict[str, Any]:
            assert huggingface_config.to_dict() == self.room.config_json
            seen.extend(state_dict)
            return {}

        with pytest.raises(CheckpointError, match=r"missing|have no"):
            build(self.room.model, self.room.folder, adapter=nothing)
        assert sorted(seen) == sorted(self.room.tensors)

    def test_weights_carry_canonical_names_and_the_stored_values(self) -> None:
        weights = self.text_weights(model_of(self.room))
        for name, stored in self.room.tensors.items():
            if name.startswith(f"{self.room.text}layers."):
                own = name.removeprefix(self.room.text)
                np.testing.assert_array_equal(np.array(weights[own]), stored)

    def text_weights(self, model: Any) -> Any:
        return model.language_model.weights

    # ---- steps

    def test_two_rows_and_five_tokens_are_those_of_transformers(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()
        inputs, outputs = prefill(model, contexts)
        assert isinstance(inputs, self.room.inputs)
        for prompt, got in zip(self.room.prompts, row_logits(outputs), strict=True):
            want = self.room.logits(prompt)
            assert relative(got, want) < BAR
            assert (got.argmax(-1) == want.argmax(-1)).all()
        assert decode(model, inputs, outputs) == [self.room.greedy(p) for p in self.room.prompts]

    def test_prefill_in_two_chunks_then_decode(self) -> None:
        model, prompt = model_of(self.room), self.room.prompts[0]
        context, kv, parts = self.room.context(prompt), new_cache(model), []
        context.tokens.chunk(self.room.cut)
        parts.append(np.array(prefill(model, [context], kv)[1].logits))
        context.tokens.advance_chunk()
        inputs, outputs = prefill(model, [context], kv)
        parts.append(np.array(outputs.logits))
        assert len(parts[0]) == self.room.cut
        assert relative(np.concatenate(parts), self.room.logits(prompt)) < BAR
        assert decode(model, inputs, outputs) == [self.room.greedy(prompt)]

    def test_a_context_that_took_its_token_is_prepared_like_the_next_token(self) -> None:
        model, prompt = model_of(self.room), self.room.prompts[0]
        context = self.room.context(prompt)
        inputs, outputs = prefill(model, [context])
        for token in self.room.greedy(prompt)[: STEPS - 1]:
            context.update(token)
            _, outputs = prefill(model, [context], inputs.kv_cache_inputs)
            assert context.tokens.active_length == 1
        assert int(mx.argmax(best(outputs)).item()) == self.room.greedy(prompt)[-1]

    def test_types_of_the_inputs(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()
        counts = lengths(contexts)
        inputs = model.prepare_initial_token_inputs([contexts], new_cache(model, 2), TAIL)
        following = model.prepare_next_token_inputs(mx.array([1, 2]), inputs)
        for made, rows in ((inputs, counts), (following, [1, 1])):
            offsets = made.input_row_offsets
            offsets = offsets[0] if isinstance(offsets, list) else offsets
            assert (offsets.dtype, offsets.tolist()) == (mx.uint32, [0, rows[0], sum(rows)])
            assert made.tokens.shape == (sum(rows),)
            assert (made.return_n_logits.dtype, made.return_n_logits.tolist()) == (mx.int64, [TAIL])
            assert made.kv_cache_inputs is inputs.kv_cache_inputs
            assert made.hidden_states is None

    @pytest.mark.parametrize("mode", ReturnLogits)
    def test_return_logits(self, mode: ReturnLogits) -> None:
        model, contexts = model_of(self.room, mode), self.room.contexts()
        counts = lengths(contexts)
        _, outputs = prefill(model, contexts, None, TAIL)
        want = [self.room.logits(prompt) for prompt in self.room.prompts]
        assert outputs.logits.dtype == best(outputs).dtype == mx.float32
        assert relative(best(outputs), np.stack([rows[-1] for rows in want])) < BAR
        if mode is ReturnLogits.LAST_TOKEN:
            assert outputs.logit_offsets is None
            np.testing.assert_array_equal(np.array(outputs.logits), np.array(best(outputs)))
            return
        taken = counts if mode is ReturnLogits.ALL else [TAIL, TAIL]
        assert outputs.logit_offsets is not None
        assert outputs.logit_offsets.tolist() == [0, taken[0], sum(taken)]
        for got, rows, count in zip(row_logits(outputs), want, taken, strict=True):
            assert relative(got, rows[-count:]) < BAR

    def test_more_logits_than_a_row_has_tokens(self) -> None:
        model = model_of(self.room, ReturnLogits.VARIABLE)
        context = self.room.context(self.room.prompts[0])
        context.tokens.chunk(2)
        with pytest.raises(InputError, match="return_n_logits 3 for a row of 2"):
            prefill(model, [context], None, 3)
        with pytest.raises(InputError, match="return_n_logits is 0, expected 1 or more"):
            prefill(model, [context], None, 0)

    def test_a_last_token_alone_has_no_more_logits_than_one(self) -> None:
        model = model_of(self.room, ReturnLogits.VARIABLE)
        context, kv = self.room.context(self.room.prompts[0]), new_cache(model)
        context.tokens.chunk(context.tokens.active_length - 1)
        prefill(model, [context], kv)
        context.tokens.advance_chunk()
        with pytest.raises(InputError, match="return_n_logits 2 for a row of 1"):
            prefill(model, [context], kv, 2)

    @pytest.mark.parametrize("mode", [m for m in ReturnHiddenStates if m.value != "eagle3"])
    def test_return_hidden_states(self, mode: ReturnHiddenStates) -> None:
        """norm and head in numpy make transformers' logits of what was returned."""
        model = model_of(self.room, ReturnLogits.ALL, mode)
        contexts = self.room.contexts()
        _, outputs = prefill(model, contexts)
        if mode is ReturnHiddenStates.NONE:
            assert outputs.hidden_states is None
            return
        h = np.array(outputs.hidden_states)
        want = np.concatenate([self.room.logits(prompt) for prompt in self.room.prompts])
        if mode.value.startswith("last"):
            want = want[np.cumsum(lengths(contexts)) - 1]
        if mode is not ReturnHiddenStates.ALL_NORMALIZED:
            h = self.room.normed(h)
        assert h.shape == (len(want), self.room.text_json["hidden_size"])
        assert relative(self.room.hidden(h), want) < HIDDEN_BAR

    def test_eagle3_captures_the_layers_it_was_told(self) -> None:
        """The last layer's capture is the decoder's result: norm and head make its logits."""
        room, prompt = self.room, self.room.prompts[0]
        width, last = room.text_json["hidden_size"], room.text_json["num_hidden_layers"] - 1
        model = self.eagle([0, last])
        inputs, outputs = prefill(model, [room.context(prompt)])
        assert outputs.hidden_states is not None
        assert outputs.hidden_states.shape == (len(room.logits(prompt)), 2 * width)
        h = np.array(outputs.hidden_states)
        assert relative(room.hidden(room.normed(h[:, width:])), room.logits(prompt)) < HIDDEN_BAR
        assert relative(h[:, :width], h[:, width:]) > 0.01
        following = model.prepare_next_token_inputs(mx.array([1]), inputs)
        assert model.execute(following).hidden_states.shape == (1, 2 * width)

    def eagle(self, layers: list[int] | None) -> Any:
        more = {} if layers is None else {"eagle_layers": layers}
        mode = ReturnHiddenStates.EAGLE3
        return build(self.room.model, self.room.folder, return_hidden_states=mode, more=more)

    @pytest.mark.parametrize("layers", [None, [], [99]])
    def test_eagle3_needs_layers_that_there_are(self, layers: list[int] | None) -> None:
        with pytest.raises(ConfigError, match="eagle_layers"):
            self.eagle(layers)

    def test_the_documented_types_refuse_what_is_not_theirs(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()
        kv = new_cache(model, 2)
        with pytest.raises(ConfigError, match="replica"):
            model.prepare_initial_token_inputs([contexts[:1], contexts[1:]], kv)
        with pytest.raises(TypeError, match=self.room.inputs.__name__):
            model.execute(ModelInputs(kv_cache_inputs=kv))
        with pytest.raises(TypeError, match=self.room.inputs.__name__):
            model.prepare_next_token_inputs(mx.array([1]), ModelInputs(kv_cache_inputs=kv))
        inputs = model.prepare_initial_token_inputs([contexts], kv)
        inputs.kv_cache_inputs = None
        with pytest.raises(ConfigError, match="kv_cache_inputs"):
            model.execute(inputs)

    def test_a_foreign_cache_is_a_type_error(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()[:1]
        empty = mx.zeros((1,), mx.uint32)
        foreign = KVCacheInputs([KVCacheInputsPerDevice(empty, empty, empty[None], empty)])
        with pytest.raises(TypeError, match=r"cache_inputs"):
            increment_cache_lengths(foreign, [1])
        with pytest.raises(TypeError, match=r"cache_inputs"):
            model.execute(model.prepare_initial_token_inputs([contexts], foreign))

    # ---- the cache

    def test_the_cache_view_holds_what_is_stored(self) -> None:
        """Values of layer 0 at text positions are v_proj(norm(embedding)), in numpy."""
        room, size = self.room, 16
        model = build(room.model, room.folder, kv_cache=paged(size))
        contexts, kv = room.contexts(), new_cache(model, 2)
        (view,) = kv.inputs
        counts = lengths(contexts)
        inputs = model.prepare_initial_token_inputs([contexts], kv)
        assert np.array(view.cache_lengths).tolist() == [0, 0]
        assert np.array(view.max_lengths).tolist() == [[max(counts), 0]]
        step(model, inputs, counts)
        model.prepare_next_token_inputs(mx.array([1, 2]), inputs)
        assert np.array(view.cache_lengths).tolist() == counts
        assert np.array(view.max_lengths).tolist() == [[1, max(counts)]]
        table, blocks = np.array(view.lookup_table), np.array(view.kv_blocks)
        assert table.dtype == np.uint32
        assert list(blocks.shape[1:]) == model.kv_params.shape_per_block
        assert table.shape == (2, -(-(max(counts) + 1) // size))
        used = [row[: -(-(n + 1) // size)] for row, n in zip(table, counts, strict=True)]
        assert not {*used[0].tolist()} & {*used[1].tolist()}
        assert max(max(pages) for pages in used) < len(blocks)
        for row, context in enumerate(contexts):
            pages = blocks[used[row], 1, 0]  # [pages, size, heads, head_dim]
            got = pages.reshape(-1, *pages.shape[2:])[: counts[row]]
            where = self.text_positions(context)
            want = self.layer_0_values(context)[where].reshape(-1, *pages.shape[2:])
            assert relative(got[where], want) < BAR

    def test_the_cache_view_flattens_in_the_documented_order(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()
        inputs, _ = prefill(model, contexts)
        (view,) = inputs.kv_cache_inputs.inputs
        fields = [view.kv_blocks, view.cache_lengths, view.lookup_table, view.max_lengths]
        flat = inputs.kv_cache_inputs.flatten()
        assert [array.shape for array in flat] == [field.shape for field in fields]
        assert [array.dtype for array in flat[1:]] == [mx.uint32] * 3

    def test_rows_in_another_order_keep_their_own_pages(self) -> None:
        room, model = self.room, model_of(self.room)
        cache = KVCache(model.kv_params)
        rows = [cache.new_row(), cache.new_row()]
        kv = cache_inputs(cache, rows)
        inputs, outputs = prefill(model, room.contexts(), kv)
        decode(model, inputs, outputs, 1)  # now both rows lie in the batch's arrays
        ((view,), (reverse,)) = kv.inputs, cache_inputs(cache, rows[::-1]).inputs
        for row in (0, 1):
            np.testing.assert_array_equal(self.pages(view, row), self.pages(reverse, 1 - row))
        assert np.abs(self.pages(view, 0)).max() > 0

    @staticmethod
    def pages(view: Any, row: int) -> np.ndarray:
        """A row's cached keys and values, [2, layers, tokens, heads, head_dim]."""
        table, blocks = np.array(view.lookup_table), np.array(view.kv_blocks)
        length = int(np.array(view.cache_lengths)[row])
        mine = table[row, : -(-length // blocks.shape[3])]
        return np.concatenate(list(blocks[mine]), axis=2)[:, :, :length]

    def text_positions(self, context: TextContext) -> np.ndarray:
        """Positions of tokens that are no placeholders of pictures."""
        images = context.images if isinstance(context, TextAndVisionContext) else []
        keep = np.ones(len(context.tokens), bool)
        for image in images:
            keep[image.start_idx : image.end_idx] = False
        return np.flatnonzero(keep)

    def layer_0_values(self, context: TextContext) -> np.ndarray:
        tensors, at = self.room.tensors, f"{self.room.text}layers.0."
        x = tensors[f"{self.room.text}embed_tokens.weight"][context.tokens.all]
        eps = self.room.text_json["rms_norm_eps"]
        normed = rms_norm(x, tensors[f"{at}input_layernorm.weight"], eps)
        values = normed @ tensors[f"{at}self_attn.v_proj.weight"].T
        return values + tensors.get(f"{at}self_attn.v_proj.bias", 0)

    def test_a_forgotten_increment_is_noticed(self) -> None:
        model, context = model_of(self.room), self.room.context(self.room.prompts[0])
        inputs = model.prepare_initial_token_inputs([[context]], new_cache(model))
        outputs = model.execute(inputs)
        with pytest.raises(InputError, match="increment_cache_lengths"):
            model.execute(model.prepare_next_token_inputs(mx.argmax(best(outputs), -1), inputs))

    def test_nothing_is_evaluated_before_it_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of(self.room)
        inputs = model.prepare_initial_token_inputs([self.room.contexts()], new_cache(model, 2))
        mx.eval(inputs.tokens)
        asked: list[Any] = []
        monkeypatch.setattr(mx, "eval", lambda *arrays: asked.append(arrays))
        model.execute(inputs)
        assert not asked

    def test_a_decode_step_waits_for_nothing(self) -> None:
        """While MLX traces a function, reading a value that depends on its input is an error."""
        model = model_of(self.room)
        inputs, _ = prefill(model, self.room.contexts())

        def decode_step(tokens: mx.array) -> mx.array:
            return best(model.execute(model.prepare_next_token_inputs(tokens, inputs)))

        logits = mx.compile(decode_step)(
            mx.array([self.room.greedy(p)[0] for p in self.room.prompts])
        )
        assert mx.argmax(logits, axis=-1).tolist() == [
            self.room.greedy(p)[1] for p in self.room.prompts
        ]

    # ---- log-probabilities

    @pytest.mark.parametrize("echo", [False, True])
    def test_log_probabilities_are_those_of_the_stored_logits(self, echo: bool) -> None:
        model, contexts, top = model_of(self.room), self.room.contexts(), 4
        inputs, outputs = prefill(model, contexts)
        sampled = [self.room.greedy(prompt)[0] for prompt in self.room.prompts]
        results = model.compute_log_probabilities(
            model.session, inputs, outputs, mx.array(sampled), [top, 0], [echo, echo]
        )
        assert results[1] is None
        scores = log_softmax(self.room.logits(self.room.prompts[0]))
        tokens = [*contexts[0].tokens.all[1:].tolist(), sampled[0]]
        if not echo:
            scores, tokens = scores[-1:], tokens[-1:]
        check_log_probabilities(results[0], scores, tokens, top)

    def test_echo_needs_all_logits_and_enable_echo_gives_them(self) -> None:
        for asked in (False, True):
            model = build(
                self.room.model,
                self.room.folder,
                return_logits=ReturnLogits.LAST_TOKEN,
                enable_echo=asked,
            )
            context = self.room.context(self.room.prompts[0])
            inputs, outputs = prefill(model, [context])
            arguments = (model.session, inputs, outputs, mx.array([1]), [1], [True])
            if not asked:
                with pytest.raises(InputError, match="enable_echo"):
                    model.compute_log_probabilities(*arguments)
                continue
            assert model.return_logits is ReturnLogits.ALL
            (result,) = model.compute_log_probabilities(*arguments)
            assert len(result.token_log_probabilities) == context.tokens.active_length

    # ---- memory

    activation_bytes: ClassVar[int] = 0

    def test_documented_estimates(self) -> None:
        model = model_of(self.room)
        estimate = model.estimate_activation_memory(model.pipeline_config, model.huggingface_config)
        assert estimate == self.activation_bytes
        size = (self.room.folder / "model.safetensors").stat().st_size
        assert model.estimate_weights_size(model.pipeline_config) == size

    # ---- devices

    def test_devices_are_one_that_is_there(self) -> None:
        with pytest.raises(ConfigError, match="devices"):
            build(self.room.model, self.room.folder, devices=[])
        with pytest.raises(NotImplementedError, match="2 devices"):
            build(self.room.model, self.room.folder, devices=[device(), device()])

    @pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU here")
    def test_a_gpu_is_refused_where_there_is_none(self) -> None:
        with pytest.raises(ConfigError, match="gpu"):
            build(self.room.model, self.room.folder, devices=[DeviceRef.GPU().to_device()])

    # ---- live

    @pytest.mark.reference
    def test_transformers_config_object_is_read_like_ours(self) -> None:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoConfig.from_pretrained(self.room.folder)
        made = []
        for options in ({}, {"huggingface_config": theirs}):
            model = build(self.room.model, self.room.folder, **options)
            _, outputs = prefill(model, [self.room.context(self.room.prompts[0])])
            made.append((self.room.config.initialize(model.pipeline_config), outputs))
        assert made[0][0] == made[1][0]
        np.testing.assert_array_equal(np.array(made[0][1].logits), np.array(made[1][1].logits))

    own_defaults: ClassVar[dict[str, str]] = {}

    @pytest.mark.reference
    def test_a_missing_key_is_filled_as_by_transformers(self) -> None:
        """config.json without one key at a time; own_defaults: key -> why it differs there."""
        transformers = pytest.importorskip("transformers")
        kind = transformers.CONFIG_MAPPING[self.room.config_json["model_type"]]
        parts = [
            p for p in ("", "text_config", "vision_config") if p in {"", *self.room.config_json}
        ]
        other = []
        for part in parts:
            for key in self.room.config_json[part] if part else self.room.config_json:
                if key in ("model_type", "architectures", *parts):
                    continue
                values = json.loads(json.dumps(self.room.config_json))
                del (values[part] if part else values)[key]
                made = [self.reading(make(values)) for make in (HuggingFaceConfig, kind.from_dict)]
                if made[0] != made[1]:
                    other.append(key)
        assert set(other) == set(self.own_defaults)

    def reading(self, config: Any) -> Any:
        """The documented config made of a configuration object; an error's type where refused."""
        pipeline = pipeline_config(self.room.folder, huggingface_config=config)
        try:
            return self.room.config.initialize(pipeline)
        except CheckpointError:
            return CheckpointError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [T, V]."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check_log_probabilities(
    result: LogProbabilities | None, scores: np.ndarray, tokens: list[int], top: int
) -> None:
    """Every place: the token's own score, the `top` best and the token itself, best first."""
    assert result is not None
    assert len(result.token_log_probabilities) == len(tokens) == len(scores)
    for own, listed, row, token in zip(
        result.token_log_probabilities, result.top_log_probabilities, scores, tokens, strict=True
    ):
        assert abs(own - row[token]) < 5e-4
        wanted = {*np.argsort(-row)[:top].tolist(), token}
        assert set(listed) == wanted
        assert all(abs(value - row[t]) < 5e-4 for t, value in listed.items())
        assert list(listed.values()) == sorted(listed.values(), reverse=True)
