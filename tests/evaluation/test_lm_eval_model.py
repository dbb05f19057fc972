"""What lm-eval asks of its model `rwkv_jax`, with a base class that stands for lm-eval's; with lm-eval itself it is
tested by `make test-peers` (test_lm_eval_peers.py)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import ModelConfig, save_pretrained
from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation import lm_eval_model
from rwkv_jax.evaluation.engine_scorer import EngineScorer
from rwkv_jax.evaluation.requests import Generate, Loglikelihood, Rolling
from rwkv_jax.inference.engine.engine import Engine
from tests.inference.models import CONFIGS, quick_engine, random_model


class StandIn:
    """`lm_eval.api.model.LM` as far as a model uses it."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *given: self.kept.append(given))


@pytest.fixture(scope="module")
def engine(programs_on_disk: None) -> Iterator[Engine]:
    with quick_engine(random_model(CONFIGS["7"])) as engine:
        yield engine


@pytest.fixture
def model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = StandIn  # pyright: ignore[reportAttributeAccessIssue]
    spec = importlib.util.spec_from_file_location("lm_eval_model_on_a_stand_in", lm_eval_model.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RWKVJax(engine=engine, template="world")


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    """Requests as lm-eval hands them over."""
    return [types.SimpleNamespace(args=each) for each in arguments]


def test_answers_are_the_scorers_and_the_cache_hears_of_each(model: Any, engine: Engine) -> None:
    scorer = EngineScorer(engine)
    pairs = [("The cat", " sat"), ("The", " cat"), ("", "Cats")]
    found = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    assert found == [tuple(result) for result in scorer.loglikelihood([Loglikelihood(*pair) for pair in pairs])]
    assert [type(result) for result in found] == [tuple] * 3
    expected = {("loglikelihood", pair, result) for pair, result in zip(pairs, found, strict=True)}
    assert set(model.kept) == expected
    model.kept.clear()
    (rolling,) = model.loglikelihood_rolling(instances(("The cat sat.",)), disable_tqdm=True)
    assert [rolling] == scorer.rolling([Rolling("The cat sat.")])
    assert model.kept == [("loglikelihood_rolling", ("The cat sat.",), rolling)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"until": ["x", "\n"], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0}, (("x", "\n"), 3)),
        ({"until": "x", "max_tokens": 2, "max_gen_toks": 4}, (("x",), 4)),
        ({"do_sample": False, "temperature": 0.7, "max_new_tokens": 2}, ((), 2)),
        ({"until": None, "max_completion_tokens": 1}, ((), 1)),
    ],
)
def test_what_ends_an_answer(model: Any, engine: Engine, arguments: dict[str, Any], expected: tuple[Any, Any]) -> None:
    (answer,) = model.generate_until(instances(("Q:", arguments)), disable_tqdm=True)
    assert [answer] == EngineScorer(engine).generate([Generate("Q:", *expected)])


@pytest.mark.parametrize("arguments", [{"do_sample": True}, {"temperature": 0.5}])
def test_tasks_that_sample_are_refused(model: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"gen_kwargs = \{.*\}: answers are greedy here; leave do_sample out"):
        model.generate_until(instances(("Q:", {}), ("Q:", arguments)), disable_tqdm=True)


def test_what_lm_eval_asks_about_the_model(model: Any, engine: Engine) -> None:
    assert model.eot_token_id == engine.tokenizer.end_of_text
    assert model.tokenizer_name == engine.tokenizer.fingerprint
    info = model.get_model_info()["rwkv_jax"]
    assert (info["hash"], info["begin"]) == (engine.identity.model, True)
    chat = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(chat) == "User: Hi\n\nAssistant:"
    assert model.chat_template(True) != model.chat_template(False) is None
    with pytest.raises(ConfigError, match="template = None: name one, such as template=world"):
        type(model)(engine=engine).apply_chat_template(chat)
    for given in ({}, {"engine": engine, "pretrained": "x.pth"}):
        with pytest.raises(ConfigError, match="pretrained: name weights, such as pretrained=PATH, or give an engine"):
            type(model)(**given)


@pytest.mark.parametrize(
    ("given", "num_slots"),
    [
        ({}, 8),
        ({"batch_size": "auto"}, 8),
        ({"batch_size": "32"}, 32),
        ({"batch_size": 12}, 12),
        ({"batch_size": 3}, 8),
        ({"batch_size": "3", "slots": 2}, 3),
    ],
)
def test_batch_size_is_taken_as_lm_evals_command_line_gives_it(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, Any], num_slots: int
) -> None:
    source = random_model(ModelConfig(vocab_size=257, num_layers=2, width=64))
    save_pretrained(source, tmp_path / "model.safetensors")
    module = vars(type(model))["__init__"].__globals__
    made: list[int] = []

    class MadeError(Exception):
        pass

    def make(model: Any, tokenizer: Any, options: Any) -> Any:
        made.append(options.num_slots)
        raise MadeError

    monkeypatch.setitem(module, "Engine", make)
    with pytest.raises(MadeError):
        type(model)(pretrained=str(tmp_path / "model.safetensors"), tokenizer="bytes", **given)
    assert made == [num_slots]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": "many"}, "batch_size = 'many': must be a whole number, not less than 1, or auto"),
        ({"batch_size": "0"}, "batch_size = 0: must be a whole number, not less than 1, or auto"),
        ({"batch_size": "-3"}, "batch_size = '-3': must be"),
        ({"batch_size": 2.5}, "batch_size = 2.5: must be"),
        ({"batch_size": "4096"}, "batch_size = 4096: the engine has [0-9]+ slots; leave it out, or make more"),
        ({"dtype": "bfloat16"}, "dtype = 'bfloat16': the engine has its own; leave it out, or give pretrained"),
        ({"quantize": "int8"}, "quantize = 'int8': the engine has its own"),
        ({"tokenizer": "world"}, "tokenizer = 'world': the engine has its own"),
        ({"slots": 8}, "slots = 8: the engine has its own"),
    ],
)
def test_what_an_engine_cannot_take_is_refused(model: Any, engine: Engine, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        type(model)(engine=engine, **given)


def test_the_entry_point_is_the_model() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, place),) = project["entry-points"]["lm_eval.models"].items()
    assert name == lm_eval_model.NAME
    assert importlib.metadata.EntryPoint(name, place, "lm_eval.models").load() is lm_eval_model.RWKVJax


def test_without_lm_eval_it_says_what_to_install(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_model, "LM", None)
    with pytest.raises(ConfigError, match=r"lm_eval: is not installed; pip install 'rwkv-jax\[eval\]'"):
        lm_eval_model.RWKVJax(engine=engine)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"rwkv: lm_eval: is not installed; pip install 'rwkv-jax\[eval\]'"):
        lm_eval_model.main()
