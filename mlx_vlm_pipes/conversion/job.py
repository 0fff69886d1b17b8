"""A conversion from beginning to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_vlm_pipes.conversion.card import Report, model_card
from mlx_vlm_pipes.conversion.config import written_config
from mlx_vlm_pipes.conversion.measure import Difference, compare, text_logits
from mlx_vlm_pipes.conversion.recipe import ConvertOptions, Recipe
from mlx_vlm_pipes.conversion.source import Source, open_source
from mlx_vlm_pipes.conversion.transfer import Tally, Transfer
from mlx_vlm_pipes.conversion.writer import (
    ShardWriter,
    copy_processor,
    whole_folder,
    write_json,
)
from mlx_vlm_pipes.engine.memory import machine_memory
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.loading import resolve_folder
from mlx_vlm_pipes.paths import user_path
from mlx_vlm_pipes.progress import Watch, Work, bar, hidden, is_wanted

Progress = Callable[[int, int], None]
MEASURABLE_SHARE = 0.6  # of the machine's memory, for the source's bytes


def convert(options: ConvertOptions, progress: Progress | None = None) -> Report:
    """Write `options.out`; it appears only when it is whole.

    Args: progress, called with (bytes of the source done, all its bytes), in place of the bars
    that a terminal shows.
    Raises: InputError for options that contradict each other or the source, CheckpointError for
    a source or an adapter that cannot be read.
    """
    base = options.settings()
    has_bar = progress is None and is_wanted(None)
    folder = resolve_folder(options.model, options.revision, progress=has_bar)
    source = open_source(folder)
    _refuse_twice(source, options)
    adapter = None if options.lora is None else source.read_adapter(options.lora)
    recipe = Recipe(base, options.mixed, source.num_layers, options.quantize_vision)
    transfer = Transfer(source, options, recipe, adapter)
    total, name = source.num_bytes, source.room.name
    with whole_folder(options.out) as partial:
        with bar(is_on=has_bar) as watch:
            _write_weights(transfer, partial, progress or _noting(watch))
        tally = transfer.tally
        if base is not None and not tally.packed:
            raise InputError(
                f"groups of {base[0]} divide no matrix of this model; use a smaller --group-size"
            )
        copy_processor(folder, partial)
        write_json(partial / "config.json", written_config(source, tally.packed, options.dtype))
        with hidden(is_hidden=not has_bar):
            measured = _measure(folder, partial, options, total) if options.measure else None
        report = _report(options, name, total, tally, measured)
        (partial / "README.md").write_text(model_card(report, options), encoding="utf-8")
    return report


def _refuse_twice(source: Source, options: ConvertOptions) -> None:
    if source.packed is not None and options.quantizes:
        raise InputError(
            "the source is quantised already, and quantising twice loses twice; start from the"
            " unquantised model, or run --dequantize first"
        )
    if source.packed is None and options.dequantize:
        raise InputError("--dequantize: the source is not quantised (or expanded at load anyway)")


def _write_weights(transfer: Transfer, partial: Path, progress: Progress) -> None:
    writer = ShardWriter(partial, transfer.options.shard_bytes)
    total = transfer.source.num_bytes
    for name, array in transfer.run():
        writer.add(name, array)
        progress(transfer.tally.read, total)
    writer.close()


def _noting(watch: Watch | None) -> Progress:
    def note(done: int, total: int) -> None:
        if watch is not None:
            watch.note(Work("converting", done, total, "B"))

    return note


def _measure(
    source: Path, result: Path, options: ConvertOptions, source_bytes: int
) -> Difference | None:
    """None where the source is too large to be run here."""
    if source_bytes > MEASURABLE_SHARE * machine_memory():
        return None
    expected, with_image = text_logits(source, options.lora)
    found, _ = text_logits(result)
    return compare(expected, found, with_image=with_image)


def _report(
    options: ConvertOptions, room: str, total: int, tally: Tally, measured: Difference | None
) -> Report:
    out = user_path(options.out).absolute()
    return Report(
        out, room, tally.elements, tally.nbytes, total, tally.kept, tally.packed, measured
    )
