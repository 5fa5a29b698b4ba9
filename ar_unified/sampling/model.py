"""A model for notebooks and scripts: texts and images in, texts and images out.

    model = ar_unified.load("bundle")
    model.draw("a red circle", seed=3, n=4)          # four Pillow images
    model.ask(image, "How many circles are there?")

Axes: B rows, T position, V vocabulary; H, W pixels and h, w codes of an image.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ar_unified.bundle import Bundle, BundleError
from ar_unified.data.images import WAY, CodesAlone, ImageCodec, NoImages, Resize, draws_none, for_single, to_rgb
from ar_unified.data.sizes import default_resize
from ar_unified.errors import UserError, about
from ar_unified.interop.peft import bases
from ar_unified.language.border import Ids
from ar_unified.language.document import (
    CodesPart,
    Document,
    DocumentError,
    ImagePart,
    Part,
    TextPart,
    TokensPart,
    Turn,
    check_speakers,
)
from ar_unified.language.rows import read_messages
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import Transformer
from ar_unified.parallel.mesh import make_mesh
from ar_unified.sampling.conversation import Conversation, say_all
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine, ways_of
from ar_unified.sampling.low_rank import read_adapters
from ar_unified.sampling.request import DEFAULTS, Request, RequestError, Sample
from ar_unified.sampling.requests import request_of
from ar_unified.sampling.results import by_size
from ar_unified.sampling.score import Score, Scored
from ar_unified.sampling.weights import check_weights_dtype, read, read_as, settled

Content = str | Image.Image | np.ndarray | Part | TokensPart  # pixels are uint8 [H, W, 3]
_ROWS = 8  # default batch size: a notebook asks for few samples


def load(
    folder: str | Path,
    mesh: Mesh | Mapping[str, int] | None = None,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    weights_dtype: str | None = None,
    window: int | str = 1,
    adapters: Mapping[str, str | Path] | None = None,
) -> Model:
    """Loads the model of a bundle that `ar-unified export` wrote.

    Args:
        mesh: the mesh to decode on, or the sizes of its axes over all devices, such as {"data": -1, "tensor": 2}.
            `data` splits the samples and `tensor` the heads. None: this process's first device.
        batch_size: how many samples are drawn, or images coded, at once; default: 8, rounded up to fit the mesh.
        max_length: the most tokens of prompt and answer together; default: the bundle's.
        dtype: the dtype of the matrix products, "float32" or "bfloat16"; default: the bundle's.
        kv_dtype: the dtype of the KV cache, one of engine.KV_DTYPES; default: the bundle's.
        weights_dtype: the dtype of the layers' matrices, one of weights.WEIGHT_DTYPES; default: `dtype`.
        window: how many positions of an image are drawn at once, one of pace.WINDOWS. A wider window draws the same
            samples in fewer steps.
        adapters: maps names of your choice to folders of LoRA adapters in PEFT's format, as from `ar-unified export
            --to peft`. A request names its adapter, as in draw("a circle", adapter="sketches"); without a name, it
            uses the model alone.

    Raises bundle.BundleError if the folder is not a bundle or is damaged, and UserError if a setting does not fit, or
    an adapter is broken or belongs to another model.
    """
    bundle = Bundle(folder)
    with about(f"bundle {bundle.folder}"):
        if mesh is not None and not isinstance(mesh, Mesh):
            mesh = make_mesh(mesh)
        ways = ways_of(0, mesh)
        batch_size = batch_size or -(-_ROWS // ways) * ways
        config = dataclasses.replace(bundle.config, dtype=dtype or bundle.config.dtype)
        grammar, found = bundle.grammar, bundle.image_tokenizer(batch_size)
        resize, sampling = _resize(bundle, found), bundle.sections["sampling"]
        codes = grammar.vocabulary.codebook_size
        tokenizer: ImageCodec | None = CodesAlone(codes) if found is None and codes else found
        defaults = {name: sampling[name] for name in DEFAULTS if name in sampling}
        request_of({"mode": "text"} | _none_needed(defaults), "bundle", tokenizer or NoImages(), defaults)
        check_weights_dtype(weights_dtype)
        beside = read_adapters(adapters or {}, config, *bases(bundle))
        engine = Engine(
            config,
            settled(config, read(bundle, read_as(config, mesh)), mesh, weights_dtype),
            grammar,
            batch_size=batch_size,
            max_length=max_length or _length(sampling),
            kv_dtype=kv_dtype or sampling.get("kv_dtype") or None,
            weights_dtype=weights_dtype,
            window=window,
            mesh=mesh,
            softmax=bundle.sections["loss"].get("softmax", "joint"),
            adapters=beside,
        )
    warning = (bundle.published or {}).get("untrained", "")
    return Model(engine, tokenizer, resize, defaults, weights=bundle.hash, warning=str(warning))


def _length(sampling: Mapping[str, Json]) -> int:
    if type(found := sampling.get("max_length")) is not int:
        raise BundleError(f"sampling.max_length: expected a whole number, found {found!r:.80}")
    return found


def _none_needed(defaults: Mapping[str, Json]) -> dict[str, Json]:
    """Settings with a placeholder for the negative prompt, if the default context needs one and the defaults have none;
    else {}.
    """
    needs_one = defaults.get("context") == "negative_prompt" and not defaults.get("negative_prompt")
    return {"negative_prompt": "-"} if needs_one else {}


def _resize(bundle: Bundle, tokenizer: ImageCodec | None) -> Resize | None:
    """The resizing that data preparation applied to images."""
    if tokenizer is None:
        return None
    data = bundle.sections["data"]
    kind, size = data.get("resize"), data.get("image_size")
    if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int for side in size):
        raise BundleError(f"data.image_size: expected a height and a width in pixels, found {size!r:.80}")
    way = {name: data[name] for name in WAY if name in data}
    # `Resize` checks `kind`.
    return Resize(kind, size[0], size[1], tokenizer.factor * bundle.grammar.layout.units[0], **way)  # type: ignore[arg-type]


class Model:
    """An engine with its image tokenizer: pixels become codes on the way in, and codes become pixels on the way out.

    Args:
        engine: the transformer, and the grammar of both tokenizers.
        image_tokenizer: None if the model has text only.
        resize: as in `run_job`.
        defaults: values for settings that a request does not give, with the keys of a request.
        weights: a name of the weights, for `run_job`.
        warning: shown to users who draw images with the model.
    """

    def __init__(
        self,
        engine: Engine,
        image_tokenizer: ImageCodec | None = None,
        resize: Callable[[np.ndarray], np.ndarray] | None = None,
        defaults: Mapping[str, Any] | None = None,
        *,
        weights: str = "",
        warning: str = "",
    ):
        self.engine, self.grammar, self.vocabulary = engine, engine.grammar, engine.grammar.vocabulary
        self.image_tokenizer: ImageCodec = image_tokenizer or NoImages()
        self.resize = resize or default_resize(self.grammar.layout, self.image_tokenizer)
        self.defaults, self.weights, self.warning = dict(defaults or {}), weights, warning

    # ---- texts and images --------------------------------------------------------------------------------------------

    def draw(
        self,
        *content: Content,
        seed: int = 0,
        n: int = 1,
        guidance: float | None = None,
        size: int | tuple[int, int] | None = None,
        **settings: object,
    ) -> list[Image.Image]:
        """Draws images for a prompt of texts. The prompt may also have images, if the model was trained to edit images.

        Args:
            seed, n: draws n images. Image i of a seed does not depend on n.
            guidance: scale of classifier-free guidance; default: the bundle's.
            size: of the images, in pixels: one side or (height, width). Only for models whose images may have any size.
            settings: further settings of a request (`sampling.request`), such as context="bos_boi".

        Raises RequestError that says what to change, if the request cannot be served.
        """
        if why := draws_none(self.image_tokenizer):
            raise RequestError(why)
        if size is not None:
            settings["image_size"] = size if isinstance(size, int) else list(size)
        if guidance is not None:
            settings["guidance"] = guidance
        request = self.request(*content, mode="image", seed=seed, n=n, **settings)
        if self.warning:
            warnings.warn(self.warning, stacklevel=2)
        codes = [part.codes for document in self._answers(request) for part in _images(document)]
        return [Image.fromarray(pixels) for pixels in by_size(self.image_tokenizer.decode, codes)]

    def ask(self, *content: Content, **settings: object) -> str:
        """The text of the answer to a prompt of images and texts, as in ask(image, "How many?").

        settings: settings of a request, such as seed=1, max_tokens=50, text={"temperature": 0.7}.

        Raises RequestError like `draw`.
        """
        settings = {"seed": 0} | settings | {"mode": "text", "n": 1}
        (document,) = self._answers(self.request(*content, **settings))
        return _text(document)

    def chat(self, messages: Sequence[Mapping[str, Json]], **settings: object) -> dict[str, Json]:
        """The assistant's next message.

        Args:
            messages: turns, {"role": "system" | "user" | "assistant", "content": a text, or a list of {"type": "text",
                "text"} and {"type": "image", "image": an image}}. The last one is the user's.
            settings: settings of a request; with mode "text", the answer has no images.

        Returns {"role": "assistant", "content": ...} in the same form: the content is a text, or a list if the model
        drew an image. Raises RequestError like `draw`.
        """
        settings = self._chatting | settings | {"n": 1}
        *history, asked = self._turns(messages)
        request = dataclasses.replace(self.request(**settings), history=tuple(history), parts=asked.parts)
        (document,) = self._answers(request)
        return self.message(document)

    def conversation(self, system: str = "") -> Chat:
        """A conversation. Each call of `.say(*content)` is a turn, and the model reads only what is new."""
        return Chat(self, system)

    @property
    def _chatting(self) -> dict[str, Json]:
        """The default settings of a request for one turn."""
        draws = self.vocabulary.codebook_size and not draws_none(self.image_tokenizer)
        return {"mode": "free" if draws else "text", "seed": 0}

    def message(self, document: Document) -> dict[str, Json]:
        """An answer in the form that `chat` returns."""
        if not _images(document):
            return {"role": "assistant", "content": _text(document)}
        parts: list[dict[str, Any]] = []
        for part in document.parts:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            elif isinstance(part, CodesPart):
                parts.append({"type": "image", "image": Image.fromarray(self.detokenize_image(part.codes))})
        return {"role": "assistant", "content": parts}

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yields all samples of all requests as they finish (`Engine.generate`); images in prompts may be pixels."""
        return self.engine.generate(map(self._request, requests))

    def _request(self, request: Request) -> Request:
        history = tuple(dataclasses.replace(turn, parts=self._coded(turn.parts)) for turn in request.history)
        return dataclasses.replace(request, history=history, parts=self._coded(request.parts))

    def request(self, *content: Content, **settings: Any) -> Request:
        """A request for the prompt `content`, with the model's defaults for all settings that are not given.

        `settings` have the keys of a line of requests (`sampling.requests`): image_size is in pixels, text and image
        are dicts or Filters. Raises RequestError.
        """
        row = {name: dataclasses.asdict(x) if isinstance(x, Filter) else x for name, x in settings.items()}
        request = request_of(row, "", self.image_tokenizer, self.defaults)
        if request.meta:
            raise RequestError(f"{next(iter(request.meta))}: there is no such setting of a request")
        return dataclasses.replace(request, parts=self.parts(content))

    def _answers(self, request: Request) -> list[Document]:
        samples = sorted(self.engine.generate([request]), key=lambda sample: sample.index)
        for sample in samples:
            if sample.document is None:
                raise RequestError(sample.error)
        return [sample.document for sample in samples if sample.document is not None]

    # ---- likelihoods, ids and image codes --------------------------------------------------------------------------

    def score(self, items: Iterable[Scored]) -> list[Score]:
        """Log-likelihoods of documents, or of answers to requests (`Engine.score`); images may be pixels."""
        return self.engine.score(map(self._scored, items))

    def _scored(self, item: Scored) -> Scored:
        if isinstance(item, Document):
            return item.changed(self._coded_part)
        request, answer = item
        return self._request(request), self._coded(answer)

    def logits(self, tokens: np.ndarray, adapter: str = "") -> np.ndarray:
        """The logits of the next token after every token: int32 [B, T] -> float32 [B, T, used]. Each row is the ids of
        one document. Raises RequestError for an adapter that was not loaded.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
            raise ValueError(f"tokens: expected int32 [B, T], found {tokens.dtype} {list(tokens.shape)}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary.used:
            found = f"{tokens.min()}..{tokens.max()}"
            raise ValueError(f"tokens: expected ids 0..{self.vocabulary.used - 1} of the vocabulary, found {found}")
        engine, rows = self.engine, len(tokens)
        # Rows are added until the mesh can split them evenly.
        tokens = np.pad(tokens.astype(np.int32), [(0, -rows % ways_of(0, engine.mesh)), (0, 0)])
        which = np.full(len(tokens), engine.number(adapter), np.int32)
        found = engine.call(_logits, engine.config, self.vocabulary.used, engine.params, tokens, which)
        return np.asarray(found)[:rows]

    @functools.cached_property
    def ids(self) -> Ids:
        """Translates between this model's ids and those of the published model from which it was converted. Without a
        published model, ids stay the same.

        model.logits(model.ids.ours(tokens))[..., model.ids.ours(range(V))] are the published model's logits.
        """
        return Ids(getattr(self.grammar.text_codec, "border", None), self.vocabulary.used)

    def encode(self, document: Document) -> np.ndarray:
        """The ids of the document, int32 [n]; its images may be pixels of any size. Raises GrammarError."""
        return self.grammar.encode(document.changed(self._coded_part)).tokens

    def parse(self, ids: np.ndarray | Sequence[int]) -> Document:
        """The document that ids [n] stand for, with images as codes. Raises GrammarError that names the wrong
        position."""
        return self.grammar.parse(ids)

    def tokenize_image(self, pixels: np.ndarray | Image.Image) -> np.ndarray:
        """Turns uint8 [H, W, 3] or a Pillow image, of any size, into codes int32 [h, w], after resizing it as in
        training."""
        pixels = to_rgb(pixels) if isinstance(pixels, Image.Image) else np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(f"image: expected uint8 [H, W, 3], found {pixels.dtype} {list(pixels.shape)}")
        return for_single(self.image_tokenizer).encode(self.resize(pixels)[None])[0]

    def detokenize_image(self, codes: np.ndarray) -> np.ndarray:
        """Turns codes int32 [h, w] into pixels uint8 [H, W, 3]. Raises UserError if there is no decoder."""
        if why := draws_none(self.image_tokenizer):
            raise UserError(why)
        return for_single(self.image_tokenizer).decode(np.asarray(codes)[None])[0]

    def _coded(self, parts: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(map(self._part, parts))

    def _coded_part(self, part: Part) -> Part:
        return CodesPart(self.tokenize_image(part.pixels)) if isinstance(part, ImagePart) else part

    def _turns(self, messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
        """The turns of a conversation, with images as codes. Raises RequestError."""
        images: list[Any] = []

        def named(part: object) -> Any:  # read_messages expects images by name
            if not isinstance(part, Mapping) or part.get("type") != "image":
                return part
            images.append(part.get("image"))
            return {"type": "image", "image": str(len(images) - 1)}

        try:
            rows = [
                dict(message) | {"content": list(map(named, message["content"]))}
                if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
                else message
                for message in messages
            ]
            said = read_messages(rows, lambda name, where: self._part(images[int(name)]))
            turns = [Turn(who, tuple(parts)) for who, parts, _ in said]
            check_speakers([*(turn.speaker for turn in turns), "assistant"])
        except DocumentError as error:
            raise RequestError(str(error)) from None
        return turns

    def parts(self, content: Iterable[Content]) -> tuple[Part | TokensPart, ...]:
        """A prompt as parts of a Request: adjacent texts are joined by a line end, and images become codes."""
        parts: list[Part | TokensPart] = []
        for item in content:
            part = self._part(item)
            if isinstance(part, TextPart):
                if not part.text:
                    continue
                if parts and isinstance(before := parts[-1], TextPart):
                    parts[-1] = TextPart(f"{before.text}\n{part.text}")
                    continue
            parts.append(part)
        return tuple(parts)

    def _part(self, item: Content) -> Part | TokensPart:
        if isinstance(item, str):
            return TextPart(item)
        if isinstance(item, TextPart | CodesPart | TokensPart):
            return item
        return CodesPart(self.tokenize_image(item.pixels if isinstance(item, ImagePart) else item))


class Chat:
    """A conversation that keeps the model's KV cache from turn to turn (`sampling.conversation`)."""

    def __init__(self, model: Model, system: str = ""):
        self.model = model
        self.conversation = Conversation(model.engine, [Turn("system", (TextPart(system),))] if system else [])

    def say(self, *content: Content, **settings: Any) -> dict[str, Any]:
        """The assistant's answer to texts and images, in the form of `Model.chat`. `settings` are those of a request.

        Raises RequestError like `Model.draw`, and then leaves the conversation unchanged.
        """
        (sample,) = say_all([(self.conversation, self.model.request(*content, **self.model._chatting | settings))])
        if sample.document is None:
            raise RequestError(sample.error)
        return self.model.message(sample.document)


def _images(document: Document) -> list[CodesPart]:
    return [part for part in document.parts if isinstance(part, CodesPart)]


def _text(document: Document) -> str:
    return "".join(part.text for part in document.parts if isinstance(part, TextPart))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: TransformerConfig, used: int, params: Any, tokens: jax.Array, adapter: jax.Array) -> jax.Array:
    model = Transformer.bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.logits(model(tokens, positions, jnp.zeros_like(tokens), adapter=adapter), adapter)[..., :used]
