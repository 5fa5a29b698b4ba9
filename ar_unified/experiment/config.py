"""The one description of an experiment: what every key means, and how a config file is read.

An experiment file defines `get_config(arg=None)`, takes `defaults()` and changes what it needs. On the command line
`--config experiments/folder.py:path=DIR` passes `path=DIR` to it and `--config.training.steps=100` changes one key. The
file is Python code, and runs because you named it; a config's values are never evaluated as code.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ar_tokenizers.image.adversary import AdversaryConfig
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.objective import ObjectiveConfig
from ml_collections import ConfigDict, config_flags

from ar_unified.data.filters import Filters
from ar_unified.data.phases import Phase
from ar_unified.errors import UserError, about, in_words, nearest, several
from ar_unified.experiment.brought import describe
from ar_unified.experiment.keys import WORDS, of_override, require_known
from ar_unified.experiment.rollouts import DrawingConfig
from ar_unified.language.document import TASKS
from ar_unified.language.vocabulary import Role
from ar_unified.manifests import Json
from ar_unified.model.config import PRESETS, TransformerConfig
from ar_unified.model.lora import LoraConfig
from ar_unified.paths import home
from ar_unified.rewards.reward import RewardConfig
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.request import DEFAULTS, Request
from ar_unified.training.loop import TrainingConfig
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.policy import PolicyConfig
from ar_unified.training.preference import PreferenceConfig
from ar_unified.training.tasks import TransformerTask
from ar_unified.workdir import read_json

T = TypeVar("T")


def defaults() -> ConfigDict:
    """Every key of an experiment with its default. Sizes are in pixels and lengths in tokens, unless said otherwise.

    A key that is a field of a dataclass is explained there, with its default. Here are the keys that only experiments
    have, and the defaults that differ because an experiment should be small enough for a CPU.
    """
    config = ConfigDict()
    config.name = "experiment"
    config.seed = 0
    config.init = ""  # a bundle whose tokenizers, language and weights training begins with; "" for none
    config.checkpoint_folder = ""  # for the transformer, e.g. gs://bucket/run; "" is model/checkpoints in the workdir

    _add_data_and_tokenizers(config)
    _add_training(config)
    _add_sampling_and_evaluation(config)
    return config


def _add_data_and_tokenizers(config: ConfigDict) -> None:
    # Documents: tuples of dicts for ar_unified.data.sources.open_source, each with its `weight` in the mixture
    config.data = ConfigDict()
    config.data.train = ()
    config.data.validation = ()  # held out: for the validation loss, and for `evaluate`
    config.data.tests = ConfigDict()  # more held-out sets by name; each is reported under its name
    config.data.image_size = (64, 64)  # height and width of images; with resize="aspect" only the area counts
    config.data.resize = "crop"  # crop: to exactly image_size | aspect: sides are multiples of image_tokenizer.factor
    config.data.resample = "lanczos"  # the filter: lanczos | bicubic | bilinear; faster: lanczos_simd | bilinear_simd
    config.data.decoding = "full"  # full | reduced: first shrinks images with 4 times the target's sides or more
    config.data.layout = "grid"  # see language.layouts; grid: all images have one size | rows: each states its size
    config.data.filters = ConfigDict(_fields(Filters))  # what `prepare` leaves out of `train`
    config.data.max_tokens = 256  # cuts longer documents; leaves out longer questions and captions (data.cutting)

    config.text_tokenizer = ConfigDict()
    config.text_tokenizer.vocab_size = 512  # at most this many; a small corpus gives fewer
    config.text_tokenizer.model_type = "bpe"  # bpe | unigram
    config.text_tokenizer.max_bytes = 100_000_000  # read evenly from all text; needs 20 to 90 times this memory
    config.text_tokenizer.temperature = 1.0  # above 1: small sources are read several times (see data.balance)
    config.text_tokenizer.model = ""  # use this file instead: SentencePiece's, a tokenizer.json or *.tiktoken
    config.text_tokenizer.lossy = "refuse"  # what to do if that tokenizer loses text: refuse | warn

    config.image_tokenizer = ConfigDict(
        _fields(AutoencoderConfig, width=32)
        | _fields(ObjectiveConfig, adversary=ConfigDict(_fields(AdversaryConfig)))
        | _fields(OptimizerConfig, ("b1", "clip_norm"), learning_rate=2e-3, b2=0.99, weight_decay=0.0)
        | _fields(TrainingConfig, ("accumulation",))
    )
    config.image_tokenizer.perceptual_file = ""  # for perceptual = lpips or features: the network's weights
    config.image_tokenizer.steps = 1000  # 0: none is trained
    config.image_tokenizer.model = ""  # folder of a tokenizer to use instead; it sets the other keys of this section
    config.image_tokenizer.batch_size = 64
    config.image_tokenizer.warmup_steps = 50  # or a tenth of the steps if that is less
    config.image_tokenizer.final_fraction = 0.02  # learning rate of the last step, as a share of the peak
    config.image_tokenizer.checkpoint_every = 0  # steps between checkpoints, with validation and images; 0: steps / 4
    config.image_tokenizer.crop = 0  # side of the random crops to train on; 0: whole images of image_size
    config.image_tokenizer.short_side = 0  # short side of images before they are cropped; 0: 5/4 of the crop
    config.image_tokenizer.mirror = False  # mirror half of the images left to right
    config.image_tokenizer.recolour = 0.0  # share of images whose colours change, so that no code means only one colour


def _add_training(config: ConfigDict) -> None:
    config.model = model("2m")

    config.loss = ConfigDict(_fields(TransformerTask, ("z_loss", "chunk")))
    config.loss.softmax = "joint"  # one softmax over all ids | by_side: one over text ids, one over image ids
    config.loss.mean = "joint"  # mean over all targets | by_side: half the text mean + half the image mean, as in LWM
    config.loss.roles = ConfigDict({role.name.lower(): 1.0 for role in Role if role != Role.PAD})
    config.loss.tasks = ConfigDict(dict.fromkeys(TASKS, 1.0))
    config.loss.prompt = TransformerTask.prompt_weight  # extra factor for the weight of targets inside a prompt

    config.preference = ConfigDict(_fields(PreferenceConfig))  # for training.objective "preference"

    settled = ("b1",)  # not a key of the config, because nobody tunes it
    config.training = ConfigDict(
        _fields(TrainingConfig, without=("seed", "optimizer"), steps=1000)
        | _fields(OptimizerConfig, without=settled, learning_rate=2e-3, warmup_steps=50, final_fraction=0.0)
        | _fields(TransformerTask, ("attention_share", "only", "rates"))
    )
    # What the training maximises. likelihood: the probability of documents | preference: the preference for the chosen
    # over the rejected answer to a prompt (without flip_pairs, condition_dropout and loss.prompt) | reward: the reward
    # of answers that the model draws, by config.reward.
    config.training.objective = "likelihood"
    config.training.batch_size = 16  # packed rows per step, over all devices
    config.training.sequence_length = 256
    # How the rows of image codes are initialised: random | codebook: similar codes get similar rows | mean. If a
    # language model of text alone is extended, all three choices are near the mean of its text rows, and `mean` is
    # exactly that mean.
    config.training.code_embedding_init = "random"
    config.training.fresh = ()  # parameters, named as in `only`, that begin at random although `init` has them
    config.training.flip_pairs = Phase.flip_pairs  # probability that a text-image pair is read in the other direction
    config.training.condition_dropout = Phase.condition_dropout  # probability that a prompt becomes empty
    # Later parts of the training: dicts of `begin` (a share of the steps) and the settings that change there: `weights`
    # ({source: share of the rows}), `flip_pairs`, `condition_dropout`, `sequence_length`, `batch_size` and `only` (the
    # only parameters that are trained then; () for all). The longest rows must have room for data.max_tokens; phases
    # with shorter rows leave out longer documents.
    config.training.phases = ()

    config.lora = ConfigDict(_fields(LoraConfig))  # trains an adapter on config.init's bundle, not all parameters
    config.lora.init = ""  # folder of an adapter in PEFT's form to begin with; "" for a new one

    # For the objective "reward": how answers are drawn and judged, and what happens if a reward fails.
    config.reward = ConfigDict(_fields(RewardConfig) | _fields(DrawingConfig) | _fields(PolicyConfig))

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, context=1))  # -1: all remaining devices


def _add_sampling_and_evaluation(config: ConfigDict) -> None:
    config.sampling = ConfigDict()
    config.sampling.checkpoint = "last"  # the checkpoint that samples and evaluation use: last | best
    config.sampling.batch_size = 64  # rows per process; a multiple of the number of devices that split rows
    config.sampling.max_length = 256  # of prompt and answer together
    config.sampling.kv_dtype = ""  # cache: int8 | float8_e4m3fn | bfloat16 | float32; "": the model's, on a CPU float32
    config.sampling.weights_dtype = ""  # dtype of the layers' matrices: int8 | float8_e4m3fn; "" is the model's dtype
    config.sampling.window = "1"  # positions of an image per step: 1 | 2 | 4 | 8 | auto; same tokens, more speed
    # The defaults of requests; ar_unified.sampling.request says what each means.
    config.sampling.update(_fields(Request, [name for name in DEFAULTS if name not in ("text", "image")]))
    config.sampling.text = ConfigDict(_fields(Filter, temperature=0.0))
    config.sampling.image = ConfigDict(_fields(Filter))

    config.evaluation = ConfigDict()
    config.evaluation.protocol = "exact"  # which answers are right: exact | shapes | easy_vqa
    config.evaluation.limit = 256  # documents of each kind per set; for the tokenizer, images per set
    config.evaluation.tokenizer_probe_steps = 0  # steps of a small transformer that measures bits per id; 0: none
    config.evaluation.lpips_file = ""  # weights for the tokenizer's LPIPS; "" measures no LPIPS
    config.evaluation.inception_file = ""  # weights for its rFID
    config.evaluation.thresholds = ConfigDict()  # the value that each metric should reach, for the report


def _fields(kind: type, only: Collection[str] = (), without: Collection[str] = (), **changes: Any) -> dict[str, object]:
    """Fields of a dataclass with their defaults and `changes`; `only` or `without` says which fields."""
    names = {*only, *changes} if only else {field.name for field in dataclasses.fields(kind)} - set(without)
    return {field.name: field.default for field in dataclasses.fields(kind) if field.name in names} | changes


def model(preset: str, **changes: object) -> ConfigDict:
    """A preset of ar_unified.model.config with all its fields, so that each can be overridden."""
    fields = _fields(TransformerConfig) | PRESETS[preset]
    del fields["vocab_size"]  # the tokenizers decide it
    return ConfigDict(fields | changes)


FILES = (  # keys whose value is a file or folder, or "" for none
    "init",
    "checkpoint_folder",
    "text_tokenizer.model",
    "image_tokenizer.model",
    "image_tokenizer.perceptual_file",
    "evaluation.lpips_file",
    "evaluation.inception_file",
)


def load(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of "FILE[:arg]" with "--config.key=value" applied.

    It has the keys of `defaults` with values of the same types; `check` judges the values.

    Raises UserError, which names the file or the key: if there is no such file; if the file is not Python, fails or has
    no `get_config`; if `get_config` takes no `:arg` or needs one; if a key is unknown or a value has another type.
    """
    path, _, arg = home(file).partition(":")
    config = _from_file(path, arg or None)
    _require_form(config)
    config = _overridden(config, overrides)
    if config.image_tokenizer.model:
        keys = [override.removeprefix("--config.").partition("=")[0] for override in overrides]
        describe(config.image_tokenizer, [key.removeprefix("image_tokenizer.") for key in keys])
    return config


def of_bundle(folder: str, file: str = "", overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config for evaluating a bundle. It begins as "FILE[:arg]" or the defaults. The bundle then decides
    some of the values, and "--config.key=value" is applied last. Raises like `load`, and BundleError.
    """
    path, _, arg = home(file).partition(":")
    config = _from_file(path, arg or None) if file else defaults()
    _require_form(config)
    if not file:
        config.name = Path(home(folder)).resolve().name
    config.text_tokenizer.model = config.image_tokenizer.model = ""
    begin_with(config, folder)
    named, config = config.init, _overridden(config, overrides)
    if config.init != named:
        raise UserError(f"config.init: expected {named!r}, the bundle that is evaluated; found {config.init!r}")
    return config


def recorded(path: Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of a workdir's config.json, as `load` returned it; keys that the file lacks get their defaults.

    Raises UserError if there is no such file, or it is not the config of an experiment.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; give --config, or a workdir in which the experiment has run")
    found = read_json(path)
    config = defaults()
    try:
        with config.unlocked(), config.ignore_type():
            config.update(_tuples(found))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected the config of an experiment: {error}") from error
    with about(f"{path}, which another version may have written (name the experiment by --config instead)"):
        _require_form(config)
    return _overridden(config, overrides)


def _tuples(value: Any) -> Any:
    """JSON with tuples in place of lists, as configs have them."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The locked config with "--config.key=value" applied. Raises UserError like `load`."""
    last = {override.partition("=")[0]: override for override in overrides}  # else a tuple given twice is both joined
    for key in last:
        require_known(config, key.removeprefix("--config."))
    values, argv = flags.FlagValues(), ["ar-unified", *last.values()]
    try:
        config_flags.DEFINE_config_dict("config", config, lock_config=True, sys_argv=argv, flag_values=values)
        values(argv)
    except (AttributeError, KeyError, IndexError, flags.Error, TypeError, ValueError, SyntaxError) as error:
        raise UserError(of_override(config, str(error))) from error
    _require_form(config)
    for key in FILES:
        section, _, name = key.rpartition(".")
        with about(f"config.{key}"):
            at(config, section)[name] = home(at(config, key))
    return values.config


def _from_file(path: str, arg: str | None) -> ConfigDict:
    """What `get_config` of a Python file returns."""
    if not Path(path).is_file():
        beside = [str(other) for other in Path(path).parent.glob("*.py")]
        raise UserError(f"config {path}: no such file{nearest(path, beside)}")
    loader = SourceFileLoader("ar_unified_experiment", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    sys.modules[loader.name] = module  # dataclasses in the file look for their module here
    try:
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError("expected a function get_config that returns the config, found none")
        given = () if arg is None else (arg,)
        try:
            inspect.signature(get_config).bind(*given)
        except TypeError:
            wrong = f"takes no `:arg`, found {arg!r}" if given else f"needs an `:arg`, as in {path}:arg"
            raise UserError(f"its get_config {wrong}") from None
        config = get_config(*given)
        if not isinstance(config, ConfigDict):
            raise UserError(f"expected get_config to return a ConfigDict, found {type(config).__name__}")
    except (Exception, SystemExit) as error:
        raise UserError(f"config {path}{_of_file(path, error)}") from error
    return config


def _of_file(path: str, error: BaseException) -> str:
    """Describes an error in a config file, with the line if Python says it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}: {error.msg}" if error.filename == path else f": {error}"
    if isinstance(error, ValueError | SystemExit):  # the file's own get_config raised this message
        return f": {error}"
    if isinstance(error, OSError):
        return f": {in_words(error)}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return (f", line {lines[-1]}" if lines else "") + f": {type(error).__name__}: {error}"


# ---- keys and types --------------------------------------------------------------------------------------------

_OPEN = ("data.tests", "evaluation.thresholds")  # sections in which the experiment chooses the names of the keys
_PARTIAL = ("loss.roles", "loss.tasks", "mesh", "sampling.text", "sampling.image")  # absent keys have defaults
_ELEMENTS: dict[str, type] = {  # types of the elements of tuples that are empty by default
    "data.train": ConfigDict,
    "data.validation": ConfigDict,
    "data.tests": ConfigDict,
    "training.phases": ConfigDict,
    "training.restarts": float,
    **dict.fromkeys(("training.only", "training.fresh", "training.rates", "training.compiler_options"), str),
    **dict.fromkeys(("lora.ranks", "lora.alphas"), str),
    "data.filters.languages": str,
    **dict.fromkeys(("image_tokenizer.decoder_multipliers", "image_tokenizer.decoder_blocks"), int),
}


def _require_form(config: ConfigDict) -> None:
    if problems := list(_misfits(config, defaults(), "")):
        raise UserError(several(problems))


def _misfits(found: Any, expected: Any, key: str) -> Iterator[str]:
    """Keys that are unknown or missing, and values of another type than the default's."""
    where = f"config.{key}" if key else "config"
    if key.startswith("data.tests."):
        expected = ()
    if isinstance(expected, ConfigDict):
        if not _is(ConfigDict, found):
            yield f"{where}: expected keys and values, found {found!r:.80}"
            return
        for name in found:
            inner = f"{key}.{name}" if key else name
            if key in _OPEN:
                yield from _misfits(found[name], 0.0, inner)
            elif name in expected:
                yield from _misfits(found[name], expected[name], inner)
            else:
                yield f"config.{inner}: there is no such key{nearest(name, expected)}"
        if key not in (*_OPEN, *_PARTIAL) and (missing := [name for name in expected if name not in found]):
            yield f"{where}: {', '.join(missing)} missing; a config begins with ar_unified.experiment.config.defaults()"
    elif isinstance(expected, tuple):
        kind = type(expected[0]) if expected else _ELEMENTS["data.tests" if key.startswith("data.tests.") else key]
        if not isinstance(found, tuple | list) or not all(_is(kind, each) for each in found):
            yield f"{where}: expected a tuple in which each item is {WORDS[kind]}; found {_shown(found)}"
    elif not _is(type(expected), found):
        yield f"{where}: expected {WORDS[type(expected)]}, found {found!r:.80}"


def _shown(value: Any) -> str:
    return f"{plain(value)!r:.80}" if isinstance(value, ConfigDict | Mapping | tuple | list) else f"{value!r:.80}"


def _is(kind: type, value: Any) -> bool:
    if kind is ConfigDict:
        return isinstance(value, Mapping | ConfigDict)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


# ---- in an experiment's get_config ------------------------------------------------------------------------------


def parse_arg(arg: str | None, **known: str | None) -> dict[str, str | None]:
    """The known keys with their defaults, changed by the `:arg` of a config file, "key=value,key=value".

    A value may contain "=" and ":", but no ","; a leading `~` is the home folder. Raises ValueError for an unknown key.
    """
    given = {}
    for item in filter(None, (arg or "").split(",")):
        name, equals, value = item.partition("=")
        if name not in known or not equals:
            found = name if equals else f"{item!r} without a value (a value cannot contain a comma)"
            raise ValueError(f"config argument: expected {', '.join(known)}; found {found}{nearest(name, known)}")
        given[name] = home(value)
    return {**known, **given}


def begin_with(config: ConfigDict, folder: str) -> None:
    """Sets `init` and everything that a bundle decides for a training that begins with it: the model's shape, the image
    tokenizer, whether text may be lost, how the data were made, and the defaults of requests. Raises BundleError.
    """
    from ar_unified.bundle import Bundle  # imports JAX, which is slow; a config without a bundle avoids it

    bundle = Bundle(home(folder))
    config.init = str(bundle.folder)
    tokenizer = bundle.image_tokenizer()
    sections = {name: _tuples(section) for name, section in bundle.sections.items()}
    del sections["model"]["vocab_size"]
    if bundle.text_tokenizer.losses:
        config.text_tokenizer.lossy = "warn"
    config.image_tokenizer.steps = 0
    if tokenizer is not None:
        config.image_tokenizer.update(dataclasses.asdict(tokenizer.config))
    for name, section in sections.items():
        try:
            config[name].update(section)
        except (TypeError, ValueError) as error:  # possible if another program made the bundle
            raise UserError(f"config.{name}: {error}") from error
    config.training.sequence_length = max(config.training.sequence_length, config.data.max_tokens)


def whole(name: str, value: str | None) -> int:
    """The count that an argument gives. Raises ValueError, which names the argument, unless the count is at least 1."""
    if value is None or not value.isdecimal() or int(value) < 1:
        raise ValueError(f"config argument {name}: expected a whole number, at least 1; found {value!r}")
    return int(value)


def plain(config: Any) -> Any:
    """A config or a part of it as plain JSON values, which are saved with artefacts and compared on restart."""
    if isinstance(config, ConfigDict | Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [plain(value) for value in config]
    return json.loads(json.dumps(config))


def pick(kind: type[T], config: Mapping[str, Json], **more: object) -> T:
    """Makes the dataclass `kind` from the keys of a config that are its fields."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in plain(config).items() if key in names} | more)


def at(config: ConfigDict, key: str) -> Any:
    """The section or value of a dotted key; "" means the whole config."""
    return functools.reduce(lambda part, name: part[name], filter(None, key.split(".")), config)
