"""What each of several ranks would hold of a model, from headers alone."""

from __future__ import annotations

from dataclasses import asdict

from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint, blueprint
from mlx_vlm_pipes.checkpoint.sharding import own_part
from mlx_vlm_pipes.checkpoint.state import stored_dtype
from mlx_vlm_pipes.doctor.report import Checkup, RankPart, RanksPlan
from mlx_vlm_pipes.doctor.tensors import Tensors
from mlx_vlm_pipes.nn.parallel import decoder_shares, traffic
from mlx_vlm_pipes.registry import Room

EMBEDDING = "embed_tokens."


def examine_ranks(room: Room, tensors: Tensors, size: int, checkup: Checkup) -> None:
    """Fill in `checkup.ranks`. Raises: ConfigError for a model that cannot be cut so."""
    room_class, pipeline = room.model_class(), tensors.pipeline
    checkpoint = Checkpoint(pipeline, tensors.state)
    _, config = blueprint(room_class, checkpoint)
    text, model = checkpoint.text, pipeline.model
    outside = sum(weight.nbytes for weight in tensors.state.values())
    outside -= sum(weight.nbytes for weight in text.values())
    one = model.devices[:1]
    params = room_class.get_kv_params(
        model.huggingface_config, pipeline, one, model.kv_cache, model.cache_dtype
    )
    embedding = sum(w.nbytes for name, w in text.items() if name.startswith(EMBEDDING))
    ranks = []
    for rank in range(size):
        own, tower = own_part(config, text, rank, size), outside if rank == 0 else 0
        ranks.append(
            RankPart(
                weight_bytes=own.held + tower,
                embedding_bytes=embedding,
                tower_bytes=tower,
                read_bytes=own.read + tower,
                kv_heads=own.kv_heads,
                kv_token_bytes=params.bytes_per_token * own.kv_heads // config.num_kv_heads,
            )
        )
    parts = decoder_shares(config, text.shapes, size)
    sent = traffic(config, parts, stored_dtype(text, "embed_tokens").size_in_bytes)
    largest = max(weight.nbytes for weight in tensors.state.values())
    checkup.ranks = RanksPlan(ranks, config.num_kv_heads, largest, **asdict(sent))
