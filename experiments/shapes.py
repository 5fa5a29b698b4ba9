"""The demo: both tokenizers, the transformer, samples and their scores on the embedded shapes dataset.

    make demo      or      ar-unified run --config experiments/shapes.py --workdir workdirs/shapes

26 Nov 2026, fresh clone, jax 0.10.2, 2 cores of a Xeon that others share, everything included: 24 min 58 s, of it 890 s
of training at 6,000 to 8,200 tokens/s. evaluation.json, 400 of each kind, held-out scenes: text_to_image_exact 1.0,
image_to_text_exact 0.980 (questions; "Where is ...?" alone 0.948, what is beside it 0.853), caption_exact 0.998,
story_change_exact 0.860, parse_rate 1.0; unseen_combinations, in the same order: 0.073, 0.76, 0.015, 0.035, 1.0.

On 24 Nov 2 cores of an EPYC (20,000 to 23,000 tokens/s) took 12 min 2 s, with 5,500 steps of AdamW in place of 3,200
of Muon. Scores of such steps, in a run of 26 Nov: 1.0, 0.940 ("Where is ...?" 0.71), 1.0, 0.855, 1.0. A loss on the
prompt, which easy_vqa.py must not have, helps here: questions 0.920 with 0.1 of it, 0.887 without, after 2,000 steps.
"""

from ml_collections import ConfigDict

from ar_unified.experiment.config import defaults, model

WEIGHTS = {"captions": 0.18, "questions": 0.44, "stories": 0.38}  # shares of the packed rows


def sources(split: str) -> tuple[ConfigDict, ...]:
    return tuple(
        ConfigDict(dict(kind="tfds", name=f"shapes/{kind}", split=split, weight=weight))
        for kind, weight in WEIGHTS.items()
    )


def get_config() -> ConfigDict:
    config = defaults()
    config.name = "shapes"

    config.data.train = sources("train")
    config.data.validation = sources("validation")
    config.data.tests.unseen_combinations = sources("unseen_combinations")
    config.data.image_size = (64, 64)

    config.image_tokenizer.factor = 16  # 4 x 4 codes an image
    config.image_tokenizer.patch = 4
    config.image_tokenizer.width = 32
    config.image_tokenizer.multipliers = (1, 2, 4)
    config.image_tokenizer.blocks = (0, 1, 2)
    config.image_tokenizer.levels = (8, 6, 5)
    config.image_tokenizer.l1_weight = 0.5
    config.image_tokenizer.steps = 2000
    config.image_tokenizer.batch_size = 16
    config.image_tokenizer.learning_rate = 4e-3

    config.model = model("2m", d_model=128, n_heads=4, n_kv_heads=4, d_mlp=384, tie_embeddings=False, rope_theta=1e3)
    config.loss.prompt = 0.1
    config.loss.roles.text = 0.5
    config.loss.tasks.image_to_text = 6.0
    config.loss.z_loss = 1e-4
    config.training.steps = 3200
    config.training.batch_size = 8
    config.training.sequence_length = 256
    config.training.optimizer = "muon"
    config.training.code_embedding_init = "codebook"
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 60
    config.training.b2 = 0.99
    config.training.weight_decay = 0.01
    config.training.flip_pairs = 0.35
    config.training.condition_dropout = 0.05
    config.training.log_every = 50
    config.training.validate_every = 500
    config.training.checkpoint_every = 500

    config.sampling.max_length = 192
    config.sampling.image.temperature = 0.25
    config.evaluation.protocol = "shapes"
    config.evaluation.limit = 400
    config.evaluation.thresholds = ConfigDict(
        dict(text_to_image_exact=0.90, image_to_text_exact=0.90, story_change_exact=0.80, parse_rate=1.0)
    )
    return config
