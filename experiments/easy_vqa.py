"""easy-VQA: questions about images of one coloured shape, and images from captions, 64 x 64 pixels; scored on the test
split.

    python experiments/data/make_easy_vqa.py --output datasets/easy-vqa    # from the Python package easy-vqa
    ar-unified run --config experiments/easy_vqa.py --workdir workdirs/easy_vqa

Expected: vqa_accuracy 0.99 (target 0.97), text_to_image_exact 0.92 (target 0.90), after 27 minutes on two cores.
docs/results.md says which settings this result needs.
"""

from typing import Any

from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, model, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config. arg: "path=DIR" of the dataset."""
    path = parse_arg(arg, path="datasets/easy-vqa")["path"]
    made_by = f"python experiments/data/make_easy_vqa.py --output {path}"
    config = defaults()
    config.name = "easy_vqa"

    def sources(split: str, versions: dict[str, int]) -> tuple[ConfigDict, ...]:
        found = []
        for file, weight in {"captions": 0.15, "vqa": 0.85}.items():
            spec: dict[str, Any] = dict(
                kind="folder", path=path, files=(file,), label=file, split=split, weight=weight, made_by=made_by
            )
            if versions:  # safe, because no text says where the figure is
                spec["augmentation"] = dict(count=versions[file], shift=0.99, mirror=True, whole=True)
            found.append(ConfigDict(spec))
        return tuple(found)

    config.data.train = sources("train", versions={"captions": 12, "vqa": 2})
    config.data.validation = sources("test", versions={})
    config.data.image_size = (28, 28)  # the checker reads all test images right, down to 24 x 24
    config.data.max_tokens = 66

    config.text_tokenizer.vocab_size = 384

    config.image_tokenizer.factor = 4  # 7 x 7 codes per image
    config.image_tokenizer.patch = 4
    config.image_tokenizer.width = 64
    config.image_tokenizer.multipliers = (1,)
    config.image_tokenizer.blocks = (1,)  # a code sees little around it, so the background has few different codes
    config.image_tokenizer.levels = (8, 8, 8)
    config.image_tokenizer.tolerance = 0.12  # no question is about the background's tint (channels from 230 to 255)
    config.image_tokenizer.steps = 4500
    config.image_tokenizer.batch_size = 32
    config.image_tokenizer.learning_rate = 4e-3

    config.model = model("2m", d_model=128, n_heads=4, n_kv_heads=4, d_mlp=384, tie_embeddings=False, rope_theta=1e3)
    config.loss.prompt = 0.0
    config.loss.tasks.image_to_text = 20.0
    config.loss.z_loss = 1e-4
    config.training.steps = 6100
    config.training.batch_size = 24
    config.training.sequence_length = 66  # one document per row
    config.training.optimizer = "muon"
    config.training.code_embedding_init = "codebook"
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 100
    config.training.b2 = 0.99
    config.training.weight_decay = 0.01
    # First only questions, then drawing with some questions
    config.training.flip_pairs = 1.0
    config.training.condition_dropout = 0.05
    drawing = dict(begin=0.28, weights=dict(captions=0.75, vqa=0.25), flip_pairs=0.1)
    config.training.phases = (ConfigDict(drawing),)
    config.training.restarts = (drawing["begin"],)
    config.training.log_every = 100
    config.training.validate_every = 1000
    config.training.checkpoint_every = 500

    config.sampling.max_length = 96
    config.sampling.guidance = 3.0
    config.sampling.image.temperature = 0.8
    config.evaluation.protocol = "easy_vqa"
    config.evaluation.limit = 1000
    config.evaluation.thresholds = ConfigDict(dict(vqa_accuracy=0.97, text_to_image_exact=0.90))
    return config
