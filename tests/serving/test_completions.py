"""/v1/completions: every field does what the engine's argument does, whole and streamed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.serving.protocol.completions import CompletionBody
from rwkv_jax.serving.routes.completions import as_job
from tests.inference.models import log_softmax, whole_logits
from tests.serving import calls

PROMPT = "Hello, caf\u00e9"
PATH = "/v1/completions"
GREEDY = {"model": "tiny", "temperature": 0, "prompt": PROMPT}


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    return calls.post(client, PATH, GREEDY | fields)


def streamed(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    return calls.streamed(client, PATH, GREEDY | fields)


def test_greedy_text_is_the_engines_whole_and_streamed(client: TestClient, engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=12, sampling="greedy")
    answer = complete(client, max_tokens=12)
    (choice,) = answer["choices"]
    assert (choice["index"], choice["text"], choice["logprobs"]) == (0, expected.text, None)
    assert choice["finish_reason"] == expected.finish_reason
    read = len(engine.encode(PROMPT, begins=True))
    assert answer["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": len(expected.ids),
        "total_tokens": read + len(expected.ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    pieces = streamed(client, max_tokens=12)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected.text
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == expected.finish_reason
    assert len({piece["id"] for piece in pieces}) == 1
    assert all("usage" not in piece for piece in pieces)


def test_usage_ends_a_stream_that_asks_for_it(client: TestClient) -> None:
    pieces = streamed(client, max_tokens=3, stream_options={"include_usage": True})
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == complete(client, max_tokens=3)["usage"]
    assert [piece["usage"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_prompts_of_all_forms(client: TestClient, engine: Engine) -> None:
    ids = engine.encode(PROMPT, begins=True)
    one = complete(client, max_tokens=4)["choices"][0]["text"]
    other = complete(client, prompt="x", max_tokens=4)["choices"][0]["text"]
    assert complete(client, prompt=ids, max_tokens=4)["choices"][0]["text"] == one
    for several in ([PROMPT, "x"], [ids, engine.encode("x", begins=True)]):
        choices = complete(client, prompt=several, max_tokens=4)["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == [(0, one), (1, other)]
    empty = complete(client, prompt="", max_tokens=4)
    assert empty["usage"]["prompt_tokens"] == 1
    assert empty["choices"][0]["text"] == engine.generate([0], max_tokens=4, sampling="greedy").text


def test_several_texts_of_each_prompt(client: TestClient, engine: Engine) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "temperature": 1, "seed": 5}
    answer = complete(client, **fields)
    prompts = ["a", "a", "b", "b"]
    expected = [text.text for text in engine.generate(prompts, max_tokens=3, seed=5)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, 12)
    texts = [""] * 4
    for piece in streamed(client, **fields):
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert texts == expected


def test_best_of_returns_the_likeliest(client: TestClient, engine: Engine) -> None:
    answer = complete(client, best_of=3, n=2, max_tokens=4, temperature=1, seed=1)
    texts = sorted(engine.generate([PROMPT] * 3, max_tokens=4, seed=1), key=lambda text: -text.score)
    assert [choice["text"] for choice in answer["choices"]] == [text.text for text in texts[:2]]
    assert answer["usage"]["completion_tokens"] == 12


def test_logprobs(client: TestClient, engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=5, sampling="greedy", top_logprobs=3)
    block = complete(client, max_tokens=5, logprobs=3)["choices"][0]["logprobs"]
    assert block["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    assert [max(top.values()) for top in block["top_logprobs"]] == block["token_logprobs"]
    assert [len(top) for top in block["top_logprobs"]] == [3] * 5
    assert [top[token] for token, top in zip(block["tokens"], block["top_logprobs"], strict=True)] == block[
        "token_logprobs"
    ]
    pieces = [piece["choices"][0]["logprobs"] for piece in streamed(client, max_tokens=5, logprobs=3)]
    for name, values in block.items():
        assert [value for piece in pieces for value in piece[name]] == values
    unlikely = complete(client, max_tokens=2, logprobs=0, temperature=1, seed=3)["choices"][0]["logprobs"]
    assert [list(top) for top in unlikely["top_logprobs"]] == [[token] for token in unlikely["tokens"]]


def test_stops(client: TestClient, engine: Engine) -> None:
    whole = engine.generate(PROMPT, max_tokens=12, sampling="greedy")
    stop = whole.text[3:5]
    choice = complete(client, max_tokens=12, stop=["never", stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole.text[: whole.text.index(stop)], "stop")
    assert complete(client, max_tokens=12, stop=stop)["choices"][0]["text"] == choice["text"]
    by_id = complete(client, max_tokens=12, stop_token_ids=[whole.ids[2]])["choices"][0]
    assert by_id["text"] == engine.tokenizer.decode(whole.ids[: whole.ids.index(whole.ids[2])])


def asked(engine: Engine, **fields: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """The prompts and the arguments that the engine gets for a request."""
    body = CompletionBody.model_validate({"model": "tiny", "prompt": "ab"} | fields)
    job = as_job(body, engine, "tenant")
    return job.prompts, dict(job.arguments)


def test_fields_become_the_engines_arguments(engine: Engine) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "typical_p": 0.8,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "penalty_decay": 0.9,
        "penalize_prompt": True,
        "order": "rwkv",
        "logit_bias": {"7": -1.5, "12": 2},
    }
    given = {"stop_token_ids": [9], "ignore_eos": True, "seed": -1, "n": 2, "max_tokens": 0, "user": "someone"}
    prompts, arguments = asked(engine, **fields, **given)
    expected = fields | {"top_k": 0, "logit_bias": {7: -1.5, 12: 2.0}}
    assert arguments == {
        "max_tokens": 0,
        "sampling": SamplingParams(**expected),
        "seed": [2**32 - 1, 0],
        "stop": [],
        "stop_ids": {9},
        "top_logprobs": 0,
        "client_id": "tenant",
        "grammar": None,
    }
    assert prompts == [engine.encode("ab", begins=True)] * 2
    _, plain = asked(engine)
    assert (plain["max_tokens"], plain["sampling"]) == (16, SamplingParams())
    assert plain["stop_ids"] == {engine.tokenizer.end_of_text}


def test_a_seed_is_drawn_where_none_is_given(engine: Engine) -> None:
    drawn = {asked(engine)[1]["seed"][0] for _ in range(4)}
    assert len(drawn) > 1


def test_a_suffix_is_filled_in(engine: Engine) -> None:
    prompts, arguments = asked(engine, prompt="a", suffix="b", stop="c")
    assert engine.tokenizer.decode(prompts[0]) == "✿prefix✿✿suffix✿b✿middle✿a"
    assert arguments["stop"] == ["c", "✿"]


def test_texts_match_what_guides_them(client: TestClient, engine: Engine) -> None:
    fields = {"temperature": 1, "seed": 2, "max_tokens": 40}
    assert re.fullmatch(r"[ab]{3}c", complete(client, guided_regex="[ab]{3}c", **fields)["choices"][0]["text"])
    assert complete(client, guided_grammar='start: "x" "y"', **fields)["choices"][0]["text"] == "xy"
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    for given in (schema, json.dumps(schema)):
        assert json.loads(complete(client, guided_json=given, **fields)["choices"][0]["text"])["n"] in (1, 2)


def test_echo_and_no_tokens(client: TestClient, engine: Engine) -> None:
    generated = complete(client, max_tokens=4)["choices"][0]["text"]
    assert complete(client, max_tokens=4, echo=True)["choices"][0]["text"] == PROMPT + generated
    assert "".join(piece["choices"][0]["text"] for piece in streamed(client, max_tokens=4, echo=True)) == (
        PROMPT + generated
    )
    none = complete(client, max_tokens=0)
    assert (none["choices"][0]["text"], none["choices"][0]["finish_reason"]) == ("", "length")
    assert none["usage"]["completion_tokens"] == 0


def test_echo_with_logprobs_scores_the_prompt_by_the_model(client: TestClient, engine: Engine) -> None:
    """As lm-eval asks: one token is generated, and all before it are scored."""
    ids = engine.encode(PROMPT, begins=True)
    logits = log_softmax(whole_logits(engine.config, ids))
    (choice,) = complete(client, max_tokens=0, echo=True, logprobs=1)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    block = choice["logprobs"]
    assert block["token_logprobs"][0] is None
    expected = [logits[place, token] for place, token in enumerate(ids[1:])]
    assert sum(block["token_logprobs"][1:]) == pytest.approx(sum(expected), abs=1e-4)
    before = [b"".join(map(engine.tokenizer.token_bytes, ids[:place])) for place in range(len(ids))]
    assert block["text_offset"] == [len(content.decode(errors="ignore")) for content in before]
    for fields in ({"prompt": PROMPT}, {"prompt": ids}):
        more = complete(client, max_tokens=1, echo=True, logprobs=1, **fields)["choices"][0]["logprobs"]
        assert more["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        assert len(more["tokens"]) == len(ids) + 1
        assert more["token_logprobs"][-1] == max(more["top_logprobs"][-1].values())  # greedy
        pieces = [piece["choices"][0] for piece in streamed(client, max_tokens=1, echo=True, logprobs=1, **fields)]
        for name, values in more.items():
            found = [value for piece in pieces for value in piece["logprobs"][name]]
            assert found == pytest.approx(values, abs=1e-5) if name == "token_logprobs" else len(found) == len(values)


def test_greedy_continuations_are_the_likeliest_ones_in_an_echo(client: TestClient, engine: Engine) -> None:
    ids = engine.encode(PROMPT, begins=True)
    text = engine.generate(ids, max_tokens=4, sampling="greedy")
    for whole, is_greedy in (([*ids, *text.ids], True), ([*ids, 7, 7], False)):
        block = complete(client, prompt=whole, max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
        own = slice(len(ids), -1)  # as lm-eval takes it
        pairs = zip(block["token_logprobs"][own], block["top_logprobs"][own], strict=True)
        assert all(value == max(top.values()) for value, top in pairs) is is_greedy


def test_the_id_that_ends_a_text_is_scored_in_an_echo(client: TestClient, engine: Engine) -> None:
    ids = engine.encode(PROMPT, begins=True)
    stop = engine.generate(ids, max_tokens=1, sampling="greedy").ids[0]
    fields = {"max_tokens": 1, "echo": True, "logprobs": 1, "stop_token_ids": [stop]}
    (choice,) = complete(client, **fields)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "stop")
    block = choice["logprobs"]
    assert len(block["tokens"]) == len(ids) + 1
    assert block["token_logprobs"][-1] == max(block["top_logprobs"][-1].values())
    assert streamed(client, **fields)[-1]["choices"][0]["logprobs"]["token_logprobs"] == block["token_logprobs"][-1:]


def test_a_prompt_of_one_token_has_nothing_to_score(client: TestClient) -> None:
    block = complete(client, prompt=[5], max_tokens=0, echo=True, logprobs=2)["choices"][0]["logprobs"]
    assert (block["token_logprobs"], block["top_logprobs"], block["tokens"]) == ([None], [None], ["\x05"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffixx": "a"}, "suffixx"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e30}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"stream": True, "best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**64}, "seed"),
        ({"prompt": [1], "suffix": "a"}, "suffix"),
        ({"suffix": "a", "echo": True}, "echo"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_json"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_the_fields_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = calls.refused(client, PATH, GREEDY | fields)
    assert (error["param"] or "").startswith(param), error


def test_another_model_is_not_found(client: TestClient) -> None:
    assert client.post(PATH, json=GREEDY | {"model": "other"}).status_code == 404
