"""A workdir like one that its stages wrote, with untrained networks, made in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ar_unified.checkpoint import Checkpoints
from ar_unified.experiment import config as configs
from ar_unified.model.config import decisive
from ar_unified.workdir import Workdir, write_json
from tests.bundles import IMAGE, parts

SUMMARY = {"steps": 2, "best_step": 1, "best_validation_loss": 2.0, "seconds": 5400.0}


def config_of(layout: str) -> ConfigDict:
    """The config of an experiment with `parts(layout)`."""
    config = configs.defaults()
    model = decisive(parts(layout)["config"])
    del model["vocab_size"]
    config.name = "tiny"
    config.model.update(model)
    config.image_tokenizer.update(dataclasses.asdict(IMAGE))
    if layout == "none":
        config.image_tokenizer.steps = 0
        config.data.train = (ConfigDict(dict(kind="text", path="/gone/corpus")),)
    else:
        config.data.train = (ConfigDict(dict(kind="folder", path="/gone/images")),)
    config.data.image_size, config.data.max_tokens = (16, 16), 48
    config.loss.softmax = "by_side"
    config.sampling.update(dict(max_length=64, batch_size=8, guidance=1.5))
    config.sampling.image.top_k = 5
    return config


def trained(folder: Path, layout: str = "grid", **fingerprint: Any) -> Workdir:
    """A workdir like one that its stages wrote, with untrained networks. The weights of step 2 are twice those of step
    1."""
    workdir, own, config = Workdir(folder), parts(layout), config_of(layout)
    workdir.text_tokenizer.mkdir(parents=True)
    own["text_tokenizer"].save(workdir.text_tokenizer / "text.model")
    if own["image_tokenizer"]:
        own["image_tokenizer"].save(workdir.image_tokenizer)
    checkpoints = Checkpoints(workdir.model / "checkpoints")
    for step, loss in ((1, 2.0), (2, 3.0)):
        params = jax.tree.map(lambda x, step=step: x * step, own["params"])
        more = dict(optimizer={"count": np.zeros(1)}, metadata={"manifest": own["grammar"].manifest()})
        checkpoints.save(step, params=params, validation_loss=loss, **more)
    checkpoints.close()
    made = {key: configs.plain(config[key]) for key in ("model", "loss")} | {"manifest": own["grammar"].manifest()}
    made |= fingerprint
    write_json(workdir.model / "done.json", {"fingerprint": made, "summary": SUMMARY})
    data = {name: configs.plain(config.data[name]) for name in ("image_size", "resize", "layout", "max_tokens")}
    write_json(workdir.data / "done.json", {"fingerprint": {"data": data}, "summary": {}})
    write_json(workdir.config, configs.plain(config))
    return workdir
