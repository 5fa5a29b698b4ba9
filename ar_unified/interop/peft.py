"""Reads and writes LoRA adapters in PEFT's form: adapter_config.json and adapter_model.safetensors.

A tensor is called base_model.model.MODULE.lora_A.weight, [r, in], or lora_B, [out, r], where MODULE is the module of
transformers' model that has the matrix (huggingface/peft, src/peft/utils/save_and_load.py). The key map (`keys.HF`) has
the names of these modules. Ours are [in, r] and [r, out], so both are transposed.

L layers, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ar_tokenizers.files import whole_folder
from safetensors import SafetensorError, safe_open

from ar_unified.bundle import Bundle
from ar_unified.errors import UserError, in_words, nearest
from ar_unified.interop import token_rows
from ar_unified.interop.keys import HF, transposed
from ar_unified.interop.sources import PICKLED, Source, inside, open_source, read_json
from ar_unified.interop.token_rows import TokenRows
from ar_unified.language.grammar import Grammar
from ar_unified.manifests import Json, manifest_hash
from ar_unified.model.config import TransformerConfig, layer_matrices
from ar_unified.model.lora import MATRICES, LoraConfig
from ar_unified.tensors import Kind, TensorWriter
from ar_unified.workdir import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "ar_unified.base"  # in the header of the weights: the hash of the bundle that the adapter was trained on
_KEY = re.compile(
    r"base_model\.model\.(?P<above>(?:\w+\.)*)layers\.(?P<layer>\d+)\.(?P<module>[\w.]+)"
    r"\.lora_(?P<side>[AB])(?:\.\w+)?\.weight"
)
_MODULES = {  # for each of MATRICES, the name of its module in a layer, from the key map
    path: str(HF.names[f"layers.{path}"]).partition("{}.")[2].removesuffix(".weight") for path in MATRICES
}
# The allowed form of a key in PEFT's patterns: enough for names of modules, but nothing that takes long to match.
_PATTERN = re.compile(r"(?:[\w|()^$-]|\\\.|\\d\+?|\.\*?|\[\d-\d\])+")
_PATHS = {module: path for path, module in _MODULES.items()}
# Keys for what PEFT can add to plain LoRA, with the values that mean plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
}


class Adapter(NamedTuple):
    """An adapter from a folder.

    Attributes:
        matrices: for each name in MATRICES, float32 A [L, I, r] and B [L, r, O]. r is the largest rank of the layers;
            matrices of smaller rank are padded with zeros.
        ranks, scales: for each matrix and layer, its rank (0: no adapter) and the factor of the product A B.
        hash: sha256 of the files.
        rows: the adapter's own rows of the tables "embedding" and "head" (`token_rows`), if any; a tied head uses the
            embedding's rows.
        vocabulary: the hash of the language that the rows' ids belong to; "" if the adapter does not name it.
        base: the hash of the bundle that the adapter was trained on; "" if the adapter does not name it.
    """

    folder: Path
    matrices: dict[str, tuple[np.ndarray, np.ndarray]]
    ranks: dict[str, tuple[int, ...]]
    scales: dict[str, tuple[float, ...]]
    hash: str
    rows: Mapping[str, TokenRows] = MappingProxyType({})
    vocabulary: str = ""
    base: str = ""


class _Settings(NamedTuple):
    """The rank and alpha in adapter_config.json, and exceptions for modules whose names match a pattern by PEFT's
    rule."""

    rank: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module, by its name in transformers' model."""
        rank, alpha = _matched(self.ranks, module, self.rank), _matched(self.alphas, module, self.alpha)
        return rank, LoraConfig(rank=rank, alpha=alpha, rslora=self.rslora).scale_of("")


def _matched(patterns: Mapping[str, Json], module: str, default: object) -> Any:
    """The value of the first pattern that matches the whole name or its end, as in PEFT's get_pattern_key."""
    return next((n for key, n in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


# ---- reading --------------------------------------------------------------------------------------------------------


def read(folder: str | Path, config: TransformerConfig, *bases: str) -> Adapter:
    """The adapter in a folder, for a model of this shape.

    Args:
        bases: hashes of the bundle that the adapter will be used with, if known. An adapter that names another bundle
            is refused; an adapter that names none is not.

    Raises UserError, which names the folder, if a file is missing or broken, or if the adapter is not LoRA, has more
    than LoRA, or belongs to another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of an adapter, found none")
    said = read_json(inside(folder, CONFIG))
    settings = _settings(folder, said)
    weights = _weights(folder)
    header = _header(weights)
    base = header.get(_BASE, "")
    if bases and base and base not in bases:
        raise UserError(f"{folder}: the adapter was trained on bundle {base[:12]}, not on this model, {bases[0][:12]}")
    digest = hashlib.sha256((folder / CONFIG).read_bytes() + weights.read_bytes()).hexdigest()
    source = open_source(weights)
    pairs = _pairs(folder, source, config, settings)
    rows = token_rows.read(folder, source, said.get(token_rows.KEY), config.d_model)
    if "head" in rows and config.tie_embeddings:
        raise UserError(f"{folder}: {token_rows.KEY}: expected no lm_head, because this model's head is its embedding")
    return Adapter(folder, *pairs, digest, rows, header.get(token_rows.VOCABULARY, ""), base)


def bases(bundle: Bundle) -> tuple[str, ...]:
    """Hashes that an adapter for this bundle may name: the bundle's hash, and the hash of the bundle that it
    extends."""
    extends = bundle.sections.get("extends")
    return (bundle.hash, extends) if isinstance(extends, str) else (bundle.hash,)


def own_rows(adapter: Adapter, grammar: Grammar) -> dict[str, TokenRows]:
    """The adapter's rows by table, with our ids, ascending; {} if it has none.

    Raises UserError if the ids of the rows belong to another vocabulary.
    """
    if adapter.rows and adapter.vocabulary not in ("", manifest_hash(grammar.manifest())):
        raise UserError(
            f"{adapter.folder}: its rows are for the ids of another vocabulary: load it with the "
            "bundle that `ar-unified export --to base` writes"
        )
    border, found = getattr(grammar.text_codec, "border", None), dict[str, TokenRows]()
    size = grammar.vocabulary.used if border is None else border.size
    for table, (ids, values) in adapter.rows.items():
        if len(ids) and ids[-1] >= size:
            raise UserError(
                f"{adapter.folder}: expected rows of ids below {size}, as this model has; found a row of id {ids[-1]}: "
                "load the adapter with the model that its rows extend"
            )
        ours = ids if border is None else np.asarray(border.ours)[ids]
        order = np.argsort(ours)
        found[table] = TokenRows(ours[order], values[order])
    return found


def _settings(folder: Path, found: Mapping[str, Any]) -> _Settings:
    """The settings in adapter_config.json. Raises UserError for anything beyond plain LoRA."""

    def wrong(key: str, expected: str) -> UserError:
        return UserError(f"{folder}: {CONFIG}: {key}: expected {expected}, found {found.get(key)!r:.80}")

    if found.get("peft_type") != "LORA":
        raise wrong("peft_type", "LORA")
    for key, plain in _PLAIN.items():
        if key in found and found[key] not in plain:
            raise wrong(key, f"{plain[0]!r}, because only plain LoRA is read")

    def is_rank(number: object) -> bool:
        return type(number) is int and 1 <= number < 1 << 20

    def is_alpha(number: Any) -> bool:
        return type(number) in (int, float) and 0 < number < float("inf")

    def patterns(key: str, fits: Callable[[Any], bool], what: str) -> dict[str, Any]:
        given = found.get(key) or {}
        if not isinstance(given, Mapping) or not all(map(fits, given.values())):
            raise wrong(key, f"{what} by names of modules")
        for name in given:
            if not _simple(name):
                raise UserError(f"{folder}: {CONFIG}: {key}: expected names of modules, found {name!r:.80}")
        return dict(given)

    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not is_rank(rank) or rank is None:
        raise wrong("r", "a rank of at least 1")
    if not is_alpha(alpha) or alpha is None:
        raise wrong("lora_alpha", "a number above 0")
    if not isinstance(rslora := found.get("use_rslora") or False, bool):
        raise wrong("use_rslora", "true or false")
    ranks = patterns("rank_pattern", is_rank, "ranks of at least 1")
    alphas = patterns("alpha_pattern", is_alpha, "numbers above 0")
    return _Settings(rank, alpha, rslora, ranks, alphas)


def _simple(pattern: str) -> bool:
    """Whether a text has the form of _PATTERN, and is a valid regular expression."""
    if len(pattern) > 200 or not _PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+")) > 4:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _weights(folder: Path) -> Path:
    if not (folder / WEIGHTS).exists():
        pickled = next((each.name for each in sorted(folder.iterdir()) if each.suffix in PICKLED), None)
        more = f": `ar-unified convert-pickle` makes it from {pickled}" if pickled else ""
        raise UserError(f"{folder}: expected a file {WEIGHTS}, found none{more}")
    return inside(folder, WEIGHTS)


def _header(weights: Path) -> dict[str, str]:
    try:
        with safe_open(weights, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: {error}: the file was cut short, or is not a safetensors file") from error


def _pairs(
    folder: Path, source: Source, config: TransformerConfig, settings: _Settings
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, tuple[int, ...]], dict[str, tuple[float, ...]]]:
    """The matrices, ranks and scales of an Adapter (its attributes)."""
    sizes, L = layer_matrices(config), config.n_layers
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    ranks, scales = dict[str, list[int]](), dict[str, list[float]]()
    most = max(settings.rank, *settings.ranks.values(), 1)
    left: set[tuple[str, int]] = set()  # pairs (A, B) of which only one was read so far
    above: str | None = None
    for name in sorted(name for name in source.names() if not token_rows.is_name(name)):
        match = _KEY.fullmatch(name)
        if match is None or match["module"] not in _PATHS or (above is not None and match["above"] != above):
            near = nearest(match["module"], list(_PATHS)) if match else ""
            raise UserError(f"{folder}: {name!r:.120} belongs to no matrix of a layer ({', '.join(_PATHS)}){near}")
        above, layer, path, side = match["above"], int(match["layer"]), _PATHS[match["module"]], match["side"]
        inputs, outputs = sizes[path.rpartition(".")[2]]
        rank, scale = settings.of(f"{above}layers.{layer}.{match['module']}")
        expected = (rank, inputs) if side == "A" else (outputs, rank)
        if layer >= L or source.shape(name) != expected:
            found = f"layer {layer}" if layer >= L else f"{list(source.shape(name))}"
            wanted = f"one of {L} layers" if layer >= L else f"{list(expected)}, as this model's {path} and r need"
            raise UserError(f"{folder}: {name}: expected {wanted}; found {found}: the adapter is for another model")
        array = source.read(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{folder}: {name}: expected finite numbers, found NaN or infinity")
        if path not in pairs:
            pairs[path] = np.zeros((L, inputs, most), np.float32), np.zeros((L, most, outputs), np.float32)
            ranks[path], scales[path] = [0] * L, [0.0] * L
        if side == "A":
            pairs[path][0][layer, :, :rank] = transposed(array)
        else:
            pairs[path][1][layer, :rank] = transposed(array)
        ranks[path][layer], scales[path][layer] = rank, scale
        left ^= {(path, layer)}
    if left:
        path, layer = min(left)
        raise UserError(f"{folder}: layer {layer}: {_MODULES[path]}: expected lora_A and lora_B, found only one")
    if not pairs:
        raise UserError(f"{folder}: {WEIGHTS}: expected tensors of an adapter, found none")
    own = {path: (a[..., : max(ranks[path])], b[:, : max(ranks[path])]) for path, (a, b) in pairs.items()}
    return (
        own,
        {path: tuple(each) for path, each in ranks.items()},
        {path: tuple(each) for path, each in scales.items()},
    )


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    bundle: Bundle,
    lora: LoraConfig,
    adapter: Mapping[str, Any],
    rows: Mapping[str, TokenRows] = MappingProxyType({}),
    vocabulary: str = "",
) -> None:
    """Writes an adapter that PEFT can load into transformers' form of the bundle, whole or not at all.

    Args:
        bundle: the bundle that the adapter was trained on.
        adapter: the arrays, as in params["lora"] of a training.
        rows, vocabulary: as in `Adapter`.

    Raises UserError if `folder` exists.
    """
    prefixes = (bundle.published or {}).get("prefixes", {})
    beginning = str(HF.prefixed(prefixes).names["layers.mlp.up"]).partition("layers.")[0]
    beginning = token_rows.in_memory(beginning)
    tensors, of_rows = token_rows.names(rows, prefixes)
    for path in lora.matrices:
        group, _, name = path.partition(".")
        for side in ("a", "b"):
            stacked = np.asarray(adapter[group][name][side], np.float32)
            for layer, matrix in enumerate(stacked):
                key = f"base_model.model.{beginning}layers.{layer}.{_MODULES[path]}.lora_{side.upper()}.weight"
                tensors[key] = transposed(matrix)
    name_of = {path: _MODULES[path].rpartition(".")[2] for path in lora.matrices}
    if prefixes:
        name_of = {path: rf"{re.escape(beginning)}layers\.\d+\.{re.escape(_MODULES[path])}" for path in lora.matrices}
    modules = [_MODULES[path].rpartition(".")[2] for path in lora.matrices]
    within = "|".join(re.escape(_MODULES[path]) for path in lora.matrices)
    # target_modules needs only the last parts of names, unless modules of an image tokenizer inside the model may have
    # the same last parts.
    target: Any = rf"{re.escape(beginning)}layers\.\d+\.({within})" if prefixes else modules
    try:
        with whole_folder(folder) as here:
            kinds = {name: Kind(tensor.shape, "float32") for name, tensor in sorted(tensors.items())}
            size = sum(kind.nbytes for kind in kinds.values())
            metadata = {"format": "pt", _BASE: bundle.hash} | ({token_rows.VOCABULARY: vocabulary} if rows else {})
            with TensorWriter(here, kinds, size + 1, alone=True, stem="adapter_model", metadata=metadata) as writer:
                for name in kinds:
                    writer.put(name, tensors[name])
            write_json(
                here / CONFIG,
                {
                    "peft_type": "LORA",
                    "task_type": "CAUSAL_LM",
                    "base_model_name_or_path": None,
                    "inference_mode": True,
                    "r": lora.rank,
                    "lora_alpha": lora.alpha,
                    "rank_pattern": _others(name_of, lora.rank_of, lora.rank),
                    "alpha_pattern": _others(name_of, lora.alpha_of, lora.alpha),
                    "lora_dropout": lora.dropout,
                    "use_rslora": lora.rslora,
                    "target_modules": target,
                    "bias": "none",
                    "fan_in_fan_out": False,
                    "modules_to_save": None,
                }
                | of_rows,
            )
    except FileExistsError as error:
        raise UserError(f"{in_words(error)}: name another folder, or remove this one") from error


def _others(name_of: Mapping[str, str], number: Callable[[str], Any], default: object) -> dict[str, object]:
    """PEFT's patterns for the matrices whose number (rank or alpha) is not the default, each with its number."""
    return {name: number(path) for path, name in name_of.items() if number(path) != default}
