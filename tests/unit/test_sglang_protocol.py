"""Payloads to SGLang and the reading of what it answers, on responses in the form that real servers gave."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest

from spear_megatron.rollout.engine import GenerateRequest, SamplingParams
from spear_megatron.rollout.sglang.protocol import (
    ProtocolError,
    error_message,
    generate_payload,
    make_rid,
    parse_completion,
    policy_versions,
    session_of,
)

REQUEST = GenerateRequest("3-1-0/0/1", (5, 60, 7, 80, 9, 100), SamplingParams(max_new_tokens=4, temperature=0.0), 0)
# SGLang 0.5.21, one greedy request of four tokens.
ANSWER: dict[str, Any] = json.loads(
    """{"text":"..","output_ids":[252,252,62,252],"meta_info":{"id":"R","finish_reason":{"type":"length","length":4},
    "prompt_tokens":6,"weight_version":"default","num_retractions":0,"input_token_logprobs":[],
    "output_token_logprobs":[[-2.8494,252,null],[-2.2119,252,null],[-2.9193,62,null],[-2.2514,252,null]],
    "output_token_logprobs_length":4,"reasoning_tokens":0,"completion_tokens":4,"cached_tokens":0,
    "weight_versions":[{"version":"default","start":0,"end":4}],"cached_tokens_details":null,"dp_rank":null,
    "e2e_latency":0.079,"response_sent_to_client_ts":1795172052.61}}"""
)


def answer(**meta: Any) -> dict[str, Any]:
    """``ANSWER`` with other fields of meta_info."""
    changed = copy.deepcopy(ANSWER)
    changed["meta_info"].update(meta)
    return changed


def parse(body: Any, request: GenerateRequest = REQUEST) -> Any:
    return parse_completion(body, rid="R", request=request, vocab_size=300)


def stopping(*stops: int, limit: int = 9) -> GenerateRequest:
    return GenerateRequest("q", (5, 60, 7, 80, 9, 100), SamplingParams(limit, stop_token_ids=stops), 0)


def test_payload_says_everything_that_shapes_the_distribution() -> None:
    sampling = SamplingParams(16, temperature=0.7, top_p=0.9, top_k=20, stop_token_ids=(2, 3))
    payload = generate_payload(GenerateRequest("1-0-0/0/0", (4, 5), sampling, 99), "R")
    assert payload["rid"] == "R" and payload["input_ids"] == [4, 5] and payload["return_logprob"] is True
    assert payload["stream"] is False and payload["logprob_start_len"] == -1
    assert payload["sampling_params"] == {
        "max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop_token_ids": [2, 3], "min_p": 0.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "n": 1,
        "sampling_seed": 99,
    }  # fmt: skip
    json.dumps(payload)


def test_without_stop_tokens_the_servers_own_end_tokens_are_off() -> None:
    params = generate_payload(REQUEST, "R")["sampling_params"]
    assert params["ignore_eos"] is True and "stop_token_ids" not in params
    assert params["temperature"] == 0.0 and params["top_k"] == -1


def test_no_attempt_id_begins_with_another() -> None:
    numbers = [0, 1, 10, 11, 100, 12345, 999_999_999]
    rids = [make_rid("ab12", session, number) for number in numbers for session in ("1-0-0", "1-0-01", "1-0", "")]
    for one, other in itertools.permutations(rids, 2):
        assert not other.startswith(one)
    assert session_of("3-1-0/0/1") == "3-1-0" and session_of("plain") == "plain"


def test_a_recorded_answer_is_read() -> None:
    result = parse(ANSWER)
    assert result.output_ids == (252, 252, 62, 252) and result.finish == "length"
    assert result.log_probs == (-2.8494, -2.2119, -2.9193, -2.2514)
    assert (result.num_prompt_tokens, result.num_cached_tokens) == (6, 0)
    assert result.policy_versions == ()  # "default" is no policy version


def test_an_answer_of_0_5_15_has_one_version_for_all_tokens() -> None:
    body = answer(weight_version="7")
    del body["meta_info"]["weight_versions"]
    assert parse(body).policy_versions == (7, 7, 7, 7)


def test_spans_become_versions_of_tokens() -> None:
    spans = [{"version": "11", "start": 0, "end": 3}, {"version": "12", "start": 3, "end": 4}]
    assert parse(answer(weight_versions=spans, weight_version="12")).policy_versions == (11, 11, 11, 12)
    late = [{"version": "default", "start": 0, "end": 1}, {"version": "12", "start": 1, "end": 4}]
    assert parse(answer(weight_versions=late)).policy_versions == ()
    assert policy_versions({"weight_versions": [{"version": "3", "start": 0, "end": 0}]}, 0) == ()


@pytest.mark.parametrize(
    "spans",
    [
        [{"version": "1", "start": 0, "end": 3}],
        [{"version": "1", "start": 0, "end": 5}],
        [{"version": "1", "start": 1, "end": 4}],
        [{"version": "1", "start": 0, "end": 3}, {"version": "2", "start": 2, "end": 4}],
        [{"version": "1", "start": 0}],
        [{"version": "1", "start": 0, "end": 2}, {"version": "2", "start": 2, "end": 1}],
        ["1"],
        "1",
        [],
    ],
)
def test_spans_that_do_not_cover_every_token_once_are_refused(spans: Any) -> None:
    with pytest.raises(ProtocolError, match="weight_versions"):
        parse(answer(weight_versions=spans))


def test_a_stop_token_is_kept_with_its_log_prob() -> None:
    body = answer(finish_reason={"type": "stop", "matched": 252})
    body["output_ids"][0] = body["meta_info"]["output_token_logprobs"][0][1] = 17
    body["output_ids"][1] = body["meta_info"]["output_token_logprobs"][1][1] = 18
    result = parse(body, stopping(252))
    assert result.finish == "stop" and result.output_ids == (17, 18, 62, 252) and len(result.log_probs) == 4


@pytest.mark.parametrize(
    ("reason", "request_", "message"),
    [
        ({"type": "stop", "matched": 62}, stopping(62), "not its last token"),
        ({"type": "stop", "matched": "text"}, stopping(62), "not its last token"),
        ({"type": "stop", "matched": 252}, stopping(252), "went on after a stop token"),
        ({"type": "length", "length": 4}, stopping(1), "after 4 of max_new_tokens=9.*--context-length"),
        ({"type": "length", "length": 4}, stopping(1, limit=3), "4 tokens for max_new_tokens=3"),
        ({"type": "other"}, REQUEST, "finish_reason .* is unknown"),
        (None, REQUEST, "finish_reason None is unknown"),
    ],
)
def test_ends_that_contradict_the_tokens_are_refused(reason: Any, request_: GenerateRequest, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse(answer(finish_reason=reason), request_)


def test_aborts_keep_whole_tokens_or_none() -> None:
    running = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    result = parse(answer(finish_reason=running, weight_version="4", weight_versions=None), stopping(1))
    assert result.finish == "abort" and result.message == "Aborted"
    assert len(result.output_ids) == len(result.log_probs) == len(result.policy_versions) == 4
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    queued = {"text": "", "meta_info": {"id": "R", "finish_reason": reason}}
    result = parse(queued)
    assert result.output_ids == result.log_probs == () and result.message == "Abort in waiting queue"
    unlogged = answer(finish_reason=running, output_token_logprobs=None, output_token_logprobs_length=0)
    result = parse(unlogged, stopping(1))
    assert result.output_ids == result.log_probs == result.policy_versions == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "other"}, "is that of request 'other'"),
        ({"completion_tokens": 5}, "completion_tokens=5"),
        ({"output_token_logprobs_length": 3}, "output_token_logprobs_length=3"),
        ({"output_token_logprobs": [[-1.0, 252, None]] * 3}, "differ at position 2"),
        ({"output_token_logprobs": [[-1.0, 252, None]] * 2}, "4 tokens but 2 log-probs"),
        ({"output_token_logprobs": [[None, 252, None]] * 4}, "malformed"),
        ({"output_token_logprobs": None}, "4 tokens but 0 log-probs"),
        ({"prompt_tokens": -1}, "prompt_tokens=-1"),
        ({"prompt_tokens": 5}, "read 5 of 6 prompt tokens.*--allow-auto-truncate"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse(answer(**change))


@pytest.mark.parametrize("body", [None, [], [ANSWER], {"output_ids": [1]}, {"meta_info": None}, "text"])
def test_answers_of_another_form_are_refused(body: Any) -> None:
    with pytest.raises(ProtocolError, match="no meta_info"):
        parse(body)


def test_impossible_tokens_and_log_probs_are_refused() -> None:
    with pytest.raises(ProtocolError, match="252 at 0 is outside the vocabulary of 252"):
        parse_completion(ANSWER, rid="R", request=REQUEST, vocab_size=252)
    body = answer()
    body["meta_info"]["output_token_logprobs"][2][0] = float("nan")
    with pytest.raises(ProtocolError, match="log-prob nan of token 2"):
        parse(body)


def test_error_answers_are_put_in_words() -> None:
    assert error_message("", {"error": {"message": "too long"}}) == "too long"
    assert error_message("", {"detail": "busy"}) == "busy"
    assert error_message("", {"object": "error", "message": "no"}) == "no"
    assert error_message("Internal Server Error", None) == "Internal Server Error"
    assert error_message("", None) == "(no text)"
