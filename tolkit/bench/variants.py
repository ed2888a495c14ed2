"""The models of one decode benchmark, loaded: real ones, and random ones of a shape.

V vocabulary, L layers, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tolkit.bench.generated import generated_bundle, generated_decoder, table_bytes
from tolkit.bench.residency import record_paths
from tolkit.bench.shapes import ARCHITECTURES, preset_config, twin_config
from tolkit.bench.specs import DecodeSpec
from tolkit.errors import ResourceError, UsageError
from tolkit.evaluate.runnable import pick_dtype
from tolkit.model import Decoder, ModelConfig, checkpoint_tensors, load_checkpoint
from tolkit.progress import Progress
from tolkit.runtime.memory import anonymous_bytes
from tolkit.runtime.rows import TableRows, open_table_rows
from tolkit.sources import is_bundle
from tolkit.tables import bundle_decoder
from tolkit_formats.frame_plan import least_cache_bytes
from tolkit_formats.frames import Frames
from tolkit_formats.reader import Bundle, open_bundle

__all__ = ["Variant", "loaded_variants"]

_MEMINFO = Path("/proc/meminfo")
_LEAST_RECORDS = 64
_DEVICE_TABLES = ("host", "device")


@dataclass(frozen=True)
class Variant:
    """One model ready to decode.

    Attributes:
        name: of the model: an architecture, or an input's name.
        architecture: as `tolkit.bench.shapes` names it.
        tables: ``disk``, ``host``, ``device``, ``ffn`` (rows computed by the model's FFNs) or "".
        generated: whether its weights are random.
        rows: where its table rows come from, None where it computes them or has none.
        bundle: whose rows.
        record_paths: files the rows are read from as they are needed.
        anonymous_bytes: memory its loading took that is no file's; None where not known.
        device_bytes: the same of torch's memory on a GPU; None without one.
    """

    name: str
    architecture: str
    tables: str
    generated: bool
    model: Decoder
    rows: TableRows | None
    bundle: Bundle | None
    record_paths: tuple[Path, ...]
    anonymous_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class _Plan:
    """A variant to load: how, and what memory its weights and tables will take."""

    name: str
    architecture: str
    tables: str
    config: ModelConfig
    path: Path | None
    needed_bytes: int


@contextmanager
def loaded_variants(
    spec: DecodeSpec, device: torch.device, progress: Progress
) -> Iterator[list[Variant]]:
    """All variants of `spec`, loaded one after the other and let go at the end.

    Raises:
        UsageError: shapes that cannot be had. ResourceError: no room in memory or on the disk.
        InputError and its kin: inputs that are missing or damaged.
    """
    dtype = pick_dtype(spec.dtype)
    plans = _plans(spec, dtype)
    if device.type == "cpu":
        _require_memory(sum(plan.needed_bytes for plan in plans))
    with ExitStack() as stack:
        folder = spec.work
        if folder is None and any(plan.path is None and plan.tables for plan in plans):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tolkit-bench-")))
        variants = []
        for plan in plans:
            variant = _loaded(plan, spec, dtype, device, folder, progress)
            if variant.rows is not None:
                stack.callback(variant.rows.close)
            variants.append(variant)
        yield variants


def _plans(spec: DecodeSpec, dtype: torch.dtype) -> list[_Plan]:
    plans = [plan for path in spec.inputs for plan in _input_plans(path, spec, dtype)]
    architectures = spec.architectures
    if not architectures and (not spec.inputs or spec.preset is not None):
        architectures = ARCHITECTURES
    for architecture in architectures:
        config = _generated_config(spec, architecture)
        weights_bytes = _weights_bytes(config, dtype, with_ffn=False)
        for place in spec.tables if config.has_tables else ("",):
            tables_bytes = table_bytes(config, spec.codec) if place in _DEVICE_TABLES else 0
            plans.append(
                _Plan(architecture, architecture, place, config, None, weights_bytes + tables_bytes)
            )
    return sorted(plans, key=lambda plan: plan.architecture != "dense")


def _input_plans(path: Path, spec: DecodeSpec, dtype: torch.dtype) -> list[_Plan]:
    """A bundle once a place; a checkpoint once, its FFNs computed."""
    name = path.resolve().name
    config = _input_config(path)
    if not is_bundle(path):
        weights_bytes = _weights_bytes(config, dtype, with_ffn=True)
        place = "ffn" if config.has_tables else ""
        return [_Plan(name, _named(config), place, config, path, weights_bytes)]
    weights_bytes = _weights_bytes(config, dtype, with_ffn=False)
    table_bytes_ = open_bundle(path).table_bytes
    return [
        _Plan(
            name,
            _named(config),
            place,
            config,
            path,
            weights_bytes + (table_bytes_ if place in _DEVICE_TABLES else 0),
        )
        for place in spec.tables
    ]


def _generated_config(spec: DecodeSpec, architecture: str) -> ModelConfig:
    like = spec.like
    if like is None and spec.inputs and spec.preset is None:
        like = _input_config(spec.inputs[0])
    if like is None:
        return preset_config(
            spec.preset or "tiny",
            architecture,
            layers=spec.layers,
            vocab_size=spec.vocab_size,
            positions=spec.context,
        )
    if spec.layers is not None or spec.vocab_size is not None:
        raise UsageError("layers: as the vocabulary, that of the input", hint="or name --preset")
    return twin_config(like, architecture, positions=spec.context)


def _input_config(path: Path) -> ModelConfig:
    if is_bundle(path):
        return ModelConfig.from_json(open_bundle(path).config(), f"{path}/config.json")
    return checkpoint_tensors(path).config


def _loaded(
    plan: _Plan,
    spec: DecodeSpec,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None,
    progress: Progress,
) -> Variant:
    bundle: Bundle | None = None
    if plan.path is not None and is_bundle(plan.path):
        bundle = open_bundle(plan.path)
    elif plan.path is None and plan.tables:
        assert folder is not None
        bundle = generated_bundle(folder, plan.config, spec.codec, progress)
    held = _Held(device)
    if plan.path is None:
        model = generated_decoder(plan.config, dtype=dtype, device=device)
    elif bundle is not None:
        model = bundle_decoder(bundle, dtype=dtype, device=device).eval()
    else:
        model = load_checkpoint(plan.path, dtype=dtype, device=device).eval()
    rows = None
    if bundle is not None:
        ceiling = None
        if plan.tables == "disk":
            ceiling = spec.max_table_bytes or _cache_bytes(bundle, model)
        rows = open_table_rows(
            bundle, plan.tables, device=device, dtype=dtype, max_table_bytes=ceiling
        )
    anonymous, on_device = held.since()
    return Variant(
        name=plan.name,
        architecture=plan.architecture,
        tables=plan.tables,
        generated=plan.path is None,
        model=model,
        rows=rows,
        bundle=bundle,
        record_paths=tuple(record_paths(bundle)) if bundle and plan.tables == "disk" else (),
        anonymous_bytes=anonymous,
        device_bytes=on_device,
    )


def _cache_bytes(bundle: Bundle, model: Decoder) -> int:
    """A row cache that hardly weighs beside the model."""
    records = sum(Frames.frame_bytes(tier.stride) for tier in bundle.manifest.tiers)
    weights_bytes = sum(p.nbytes for p in model.parameters())
    return max(weights_bytes // 100, least_cache_bytes(bundle) + (_LEAST_RECORDS - 1) * records)


class _Held:
    """Memory this process takes from here on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._anonymous = anonymous_bytes()
        self._on_device = self._allocated()

    def since(self) -> tuple[int | None, int | None]:
        """Anonymous bytes, and torch's on a GPU."""
        now, on_device = anonymous_bytes(), self._allocated()
        anonymous = None if now is None or self._anonymous is None else now - self._anonymous
        if on_device is None or self._on_device is None:
            return anonymous, None
        return anonymous, on_device - self._on_device

    def _allocated(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return int(torch.cuda.memory_allocated(self._device))


def _weights_bytes(config: ModelConfig, dtype: torch.dtype, *, with_ffn: bool) -> int:
    with torch.device("meta"):
        model = Decoder(config, with_ffn=with_ffn).to(dtype)
    return sum(p.nbytes for p in model.parameters())


def _named(config: ModelConfig) -> str:
    """As `ARCHITECTURES` does, where a flex model's FFN-C is one of theirs."""
    if config.architecture != "flex":
        return config.architecture
    for beta in (1, 2, 3):
        if config.intermediate_size == round(beta * config.hidden_size / 3):
            return f"flex-{beta}"
    return "flex"


def _require_memory(needed_bytes: int) -> None:
    """ResourceError where the models together have no room, rather than a killed process."""
    try:
        text = _MEMINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    _, found, rest = text.partition("MemAvailable:")
    if found and int(rest.split()[0]) * 1024 < needed_bytes:
        raise ResourceError(
            f"memory: the models take {needed_bytes:,} bytes together, "
            f"{int(rest.split()[0]) * 1024:,} are free",
            hint="compare fewer at a time (--arch dense,memory), fewer --layers, or --tables disk",
        )
