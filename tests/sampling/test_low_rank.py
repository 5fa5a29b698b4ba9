"""Several adapters in one engine: each request has its own, and gets the same result as from the merged model alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import ar_unified
from ar_unified.data.images import CodesAlone
from ar_unified.errors import UserError
from ar_unified.interop.peft import Adapter
from ar_unified.interop.token_rows import TokenRows
from ar_unified.language.document import TextPart
from ar_unified.model.lora import LoraConfig, merged
from ar_unified.parallel.mesh import make_mesh
from ar_unified.sampling.conversation import Conversation
from ar_unified.sampling.job import JobMismatch, run_job
from ar_unified.sampling.request import Request, RequestError
from ar_unified.sampling.weights import settled
from tests import adapters, bundles
from tests.sampling.test_engine import (
    CONFIG,
    GRAMMARS,
    GREEDY,
    _few_programs,  # noqa: F401 (used by pytest)
    collect,
    engine,
    random_params,
    requests,
)
from tests.sampling.tiny import ENLARGED

LORAS = {
    "a": LoraConfig(rank=4, alpha=8.0),
    "b": LoraConfig(rank=2, alpha=1.0, rslora=True, targets=("attention.query", "attention.output", "mlp.up")),
}
DRAWN = {name: adapters.drawn(CONFIG, lora, seed) for seed, (name, lora) in enumerate(LORAS.items())}
GRAMMAR = GRAMMARS["grid"]


def beside() -> dict[str, Adapter]:
    return {
        name: Adapter(
            Path(name),
            {path: tuple(DRAWN[name][path.split(".")[0]][path.split(".")[1]].values()) for path in lora.matrices},
            {path: (lora.rank,) * CONFIG.n_layers for path in lora.matrices},
            {path: (lora.scale_of(path),) * CONFIG.n_layers for path in lora.matrices},
            f"hash of {name}",
        )
        for name, lora in LORAS.items()
    }


def alone(name: str):
    """Parameters of the model with that adapter merged in."""
    params = random_params()
    return merged(LORAS[name], params | {"lora": DRAWN[name]}) if name else params


def asked(adapter: str):
    rows = [each for each in requests(GRAMMAR, **GREEDY) if each.id in ("t2i", "i2t", "story")]
    return [dataclasses.replace(row, id=f"{row.id} {adapter}", adapter=adapter) for row in rows]


@pytest.fixture(scope="module")
def expected():
    """The tokens of the merged model and of the base, by request and index."""
    found = {}
    for name in ("", *LORAS):
        rows = [dataclasses.replace(row, adapter="") for row in asked(name)]
        found |= {key: s.tokens for key, s in collect(engine(GRAMMAR, alone(name)).generate(rows)).items()}
    return found


FORMS = {
    "stacked": lambda params: (params, {}),
    "settled": lambda params: (settled(CONFIG, jax.tree.map(jax.numpy.array, params), None), {}),
    "window": lambda params: (params, {"window": 4}),
    "mesh": lambda params: (params, {"mesh": make_mesh(dict(data=2, tensor=2), jax.devices()[:4])}),
}


@pytest.mark.parametrize(
    "form", ["stacked", "settled", *(pytest.param(f, marks=pytest.mark.slow) for f in ("window", "mesh"))]
)
def test_each_request_is_drawn_as_by_its_own_merged_model(form, expected) -> None:
    params, more = FORMS[form](random_params())
    several = engine(GRAMMAR, params, adapters=beside(), **more)
    mixed = [row for rows in zip(*(asked(name) for name in ("", *LORAS)), strict=True) for row in rows]
    together = collect(several.generate(mixed))
    assert together.keys() == expected.keys() and not any(sample.error for sample in together.values())
    for key, sample in together.items():
        np.testing.assert_array_equal(sample.tokens, expected[key], err_msg=str(key))
    for name in LORAS:
        differs = [key for key in expected if key[0].endswith(f" {name}")]
        bare = [np.array_equal(expected[key], expected[key[0].removesuffix(name), key[1]]) for key in differs]
        assert not all(bare), f"adapter {name} draws what none draws"


OWN = {"a": [2, 5, 30, 31, 42], "b": [3, 5, 31, 60]}  # text, controls, image codes, and an unused id


def rows_of(name: str) -> TokenRows:
    values = np.random.default_rng(len(OWN[name])).normal(0, 1.5, (len(OWN[name]), CONFIG.d_model))
    return TokenRows(np.array(OWN[name]), values.astype(np.float32))


SLOW = [pytest.param(False, form, marks=pytest.mark.slow) for form in ("settled", "window", "mesh")]


@pytest.mark.parametrize("tied, form", [(True, "settled"), (False, "stacked"), *SLOW])
def test_rows_of_its_own_go_with_an_adapter(tied, form) -> None:
    """Each request has the tokens and log-likelihoods of the model with its adapter and rows merged in."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    made = {key: leaf for key, leaf in random_params().items() if not tied or key != "head"}
    if tied:  # as a head, the enlarged table makes logits of hundreds, which float32 holds to 3e-5
        made["embedding"] /= ENLARGED
    params, more = FORMS[form](made)
    # if there are two tables, "b" has rows only of the head
    tables = {"a": ("embedding",) if tied else ("embedding", "head"), "b": ("embedding",) if tied else ("head",)}
    loaded = {
        name: adapter._replace(rows=dict.fromkeys(tables[name], rows_of(name))) for name, adapter in beside().items()
    }

    def merged_with_rows(name: str):
        whole = merged(LORAS[name], made | {"lora": DRAWN[name]}) if name else made
        return whole | {
            table: whole[table].at[rows_of(name).ids].set(rows_of(name).values) for table in tables.get(name, ())
        }

    several = engine(GRAMMAR, params, config=config, adapters=loaded, **more)
    expected = {}
    for name in ("", *LORAS):
        alone = engine(GRAMMAR, merged_with_rows(name), config=config)
        asked_alone = [dataclasses.replace(row, adapter="") for row in asked(name)]
        expected |= {key: s.tokens for key, s in collect(alone.generate(asked_alone)).items()}
        request = Request("r", (TextPart("fg"),), mode="text", text=GREEDY["text"], max_tokens=6)
        answer = (TextPart("abcfd"),)
        (found,), (single,) = (
            each.score([(dataclasses.replace(request, adapter=which), answer)])
            for each, which in ((several, name), (alone, ""))
        )
        assert found.log_likelihood == pytest.approx(single.log_likelihood, abs=1e-4)
    mixed = [row for rows in zip(*(asked(name) for name in ("", *LORAS)), strict=True) for row in rows]
    together = collect(several.generate(mixed))
    assert together.keys() == expected.keys() and not any(sample.error for sample in together.values())
    for key, sample in together.items():
        np.testing.assert_array_equal(sample.tokens, expected[key], err_msg=str(key))


def test_rows_of_other_ids_are_refused() -> None:
    for ids, said in (
        ([3, 900], "expected rows of ids below 128, as this model has; found a row of id 900"),
        ([3], "another"),
    ):
        rows = TokenRows(np.array(ids), np.zeros((len(ids), CONFIG.d_model), np.float32))
        one = beside()["a"]._replace(rows={"embedding": rows}, vocabulary="of another" if said == "another" else "")
        with pytest.raises(UserError, match=said):
            engine(GRAMMAR, random_params(), adapters={"a": one})


def test_a_sample_does_not_depend_on_the_adapters_around_it() -> None:
    own = {name: adapter._replace(rows={"embedding": rows_of(name)}) for name, adapter in beside().items()}
    several = engine(GRAMMAR, random_params(), adapters=own)
    hot = [dataclasses.replace(row, image=dataclasses.replace(row.image, temperature=1.0)) for row in asked("a")]
    by_itself = collect(several.generate(hot))
    mixed = collect(several.generate([*asked("b"), *hot, *asked("")]))
    for key, sample in by_itself.items():
        np.testing.assert_array_equal(mixed[key].tokens, sample.tokens)


def test_scores_and_conversations_have_the_adapter_of_their_request() -> None:
    several = engine(GRAMMAR, random_params(), adapters=beside())
    answer = (TextPart("abc"),)
    for name in ("", *LORAS):
        own = engine(GRAMMAR, alone(name))
        request = Request("r", (TextPart("fg"),), mode="text", text=GREEDY["text"], max_tokens=6)
        (found,), (single,) = (
            each.score([(dataclasses.replace(request, adapter=which), answer)])
            for each, which in ((several, name), (own, ""))
        )
        assert found.log_likelihood == pytest.approx(single.log_likelihood, abs=1e-4)
    talk = Conversation(several)
    for turn, name in enumerate(("a", "b", "a")):
        talk.say((TextPart("gh"),), mode="text", text=GREEDY["text"], max_tokens=5, adapter=name, seed=turn)
    fresh = Conversation(several)
    for turn, name in enumerate(("a", "b", "a")):
        fresh._kept = {}  # a cache of one adapter is not used for another, so reading again gives the same
        fresh.say((TextPart("gh"),), mode="text", text=GREEDY["text"], max_tokens=5, adapter=name, seed=turn)
    np.testing.assert_array_equal(talk.tokens, fresh.tokens)


def test_an_adapter_that_is_not_there_is_refused_and_the_others_go_on() -> None:
    several = engine(GRAMMAR, random_params(), adapters=beside())
    rows = [Request(name, (TextPart("a"),), mode="text", max_tokens=3, adapter=name) for name in ("a", "aa", "b")]
    found = {sample.request.id: sample for sample in several.generate(rows)}
    assert found["aa"].error == "adapter: expected one of 'a', 'b'; found 'aa'; did you mean 'a'?" or (
        "expected one of 'a', 'b'; found 'aa'" in found["aa"].error
    )
    assert not found["a"].error and not found["b"].error
    with pytest.raises(RequestError, match="expected none, because no adapter was loaded; found 'a'"):
        engine(GRAMMAR, random_params()).plan(rows[0])


def test_a_job_takes_the_adapter_of_a_row_and_knows_which_it_had(tmp_path) -> None:
    rows = [
        {"id": name or "none", "content": [{"type": "text", "text": "ab"}], "mode": "text", "max_tokens": 6}
        for name in ("", "a")
    ]
    rows[1]["adapter"] = "a"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"text": {"temperature": 0.0}}

    def run(found):
        several = engine(GRAMMAR, random_params(), adapters=found)
        options = dict(defaults=defaults, show_progress=False)
        return run_job(several, CodesAlone(24), tmp_path / "rows.jsonl", tmp_path / "out", **options)

    assert run(beside()).samples == 2
    lines = {row["id"]: row for row in map(json.loads, (tmp_path / "out" / "samples.jsonl").read_text().splitlines())}
    assert lines["a"]["tokens"] != lines["none"]["tokens"]
    assert lines["a"]["adapter"] == "a" and "adapter" not in lines["none"]
    other = {name: each._replace(hash="another") for name, each in beside().items()}
    with pytest.raises(JobMismatch, match="adapters.a = 'hash of a', this one has 'another'"):
        run(other)


def test_one_adapter_that_no_request_names_is_for_all_and_what_is_not_named_is_said(tmp_path) -> None:
    text = {"content": [{"type": "text", "text": "ab"}], "mode": "text", "max_tokens": 6, "seed": 1}

    def run(names: str, *rows: object, to: str = "") -> tuple[dict[str, dict], list[str]]:
        path, said = tmp_path / "rows.jsonl", []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        several = engine(GRAMMAR, random_params(), adapters={name: beside()[name] for name in names})
        options = dict(defaults={"text": {"temperature": 0.0}}, show_progress=False, warn=said.append)
        out = tmp_path / (to or f"out{len(list(tmp_path.iterdir()))}")
        run_job(several, CodesAlone(24), path, out, **options)
        return {row["id"]: row for row in map(json.loads, (out / "samples.jsonl").read_text().splitlines())}, said

    mixed, said = run("ab", text | {"id": "plain"}, text | {"id": "a", "adapter": "a"})
    assert mixed["plain"]["tokens"] != mixed["a"]["tokens"]
    assert said == [
        "adapter 'b': loaded, but no request names it",
        "1 of 2 requests name no adapter and are drawn with the plain model",
    ]
    assert run("ab", text | {"adapter": "a"}, text | {"adapter": "b"})[1] == []
    alone, said = run("a", text | {"id": "x"}, to="alone")
    assert alone["x"]["tokens"] == mixed["a"]["tokens"] and alone["x"]["adapter"] == "a"
    assert said == ["no request names an adapter, so all are drawn with 'a'"]
    assert run("", text | {"id": "x"})[0]["x"]["tokens"] == mixed["plain"]["tokens"], "no adapter, and nothing to say"
    with pytest.raises(RequestError, match='expected requests that name one of .a., .b., found none: add "adapter": N'):
        run("ab", text, text)
    manifest = tmp_path / "alone" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"adapter": "a"', '"n": 1'))  # as of a version that drew without
    with pytest.raises(JobMismatch, match="defaults.adapter = '.absent.', this one has 'a'"):
        run("a", text | {"id": "x"}, to="alone")
    body = {"model": "a", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 6, "modalities": ["text"]}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    batch, said = run("ab", line | {"custom_id": "x"}, line | {"custom_id": "y", "body": body | {"model": "none"}})
    assert batch["x"]["adapter"] == "a" and "adapter" not in batch["y"] and len(said) == 2


def test_a_bundle_is_loaded_with_adapters_from_folders(tmp_path) -> None:
    bundle = bundles.write(tmp_path / "bundle")
    lora = LoraConfig(rank=2, alpha=4.0)
    made = adapters.write(tmp_path / "sketch", bundle, lora)
    model = ar_unified.load(bundle.folder, dtype="float32", adapters={"sketch": tmp_path / "sketch"})
    params = merged(lora, jax.tree.map(np.asarray, bundle.params()) | {"lora": made})
    inside = bundles.write(tmp_path / "inside", params=jax.device_get(params))
    whole, tokens = ar_unified.load(inside.folder, dtype="float32"), np.arange(24)[None]
    logits = whole.logits(tokens)
    assert np.abs(model.logits(tokens, adapter="sketch") - logits).max() < 1e-5 * np.abs(logits).max()
    assert np.abs(model.logits(tokens) - logits).max() > 0.1
    said = model.ask("A small", adapter="sketch", max_tokens=8)
    assert said == whole.ask("A small", max_tokens=8) and model.ask("A small", max_tokens=8) != said
    with pytest.raises(UserError, match="expected a name"):
        ar_unified.load(bundle.folder, adapters={"": tmp_path / "sketch"})
