"""easy-VQA: questions about, and pictures of, one coloured shape on 64 x 64 pixels; train split against test split.

ar-unified run --config experiments/easy_vqa.py --workdir workdirs/easy_vqa

Not run to its end yet: no numbers.
"""

from ml_collections import ConfigDict

from ar_unified.cli.config import defaults, model, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    path = parse_arg(arg, path="../shared/data/easy-vqa")["path"]
    config = defaults()
    config.name = "easy_vqa"

    def sources(split: str) -> tuple[ConfigDict, ...]:
        weights = {"captions": 1.0, "vqa": 2.0}
        return tuple(
            ConfigDict(dict(kind="folder", path=path, files=(file,), label=file, split=split, weight=weight))
            for file, weight in weights.items()
        )

    config.data.train = sources("train")
    config.data.validation = sources("test")
    config.data.image_size = (64, 64)

    config.text_tokenizer.vocab_size = 384

    config.image_tokenizer.factor = 8
    config.image_tokenizer.patch = 4
    config.image_tokenizer.multipliers = (1, 2)
    config.image_tokenizer.blocks = (1, 1)
    config.image_tokenizer.steps = 1500

    config.model = model("2m")
    config.loss.prompt = 0.05
    config.training.steps = 2000
    config.training.drop_condition = 0.05
    config.sampling.max_length = 128
    config.sampling.image.temperature = 0.7
    config.evaluation.protocol = "easy_vqa"
    config.evaluation.limit = 1000
    config.evaluation.bars = ConfigDict(dict(vqa_accuracy=0.97, text_to_image_exact=0.90))
    return config
