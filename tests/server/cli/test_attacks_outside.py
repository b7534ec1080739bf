"""S8, S16, S23, S26 and S31 against whole processes; other tests look at the parts."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

KEYS = {"red": "key-red", "blue": "key-blue"}
OPERATOR = "key-operator"


@pytest.fixture(scope="module")
def keyed(start: Callable, tmp_path_factory: pytest.TempPathFactory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    return start("--api-key-file", keys, "--operator-key", OPERATOR, "--max-model-len", 512)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metric(keyed, name: str) -> int:
    """The sum of a metric over its labels."""
    text = keyed.get("/metrics", headers=bearer(OPERATOR)).text
    found = re.findall(rf"^chunkllama_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, name
    return sum(int(float(value)) for value in found)


def wait_for_no_request(keyed) -> None:
    for _ in range(3000):
        if not metric(keyed, "requests_live"):
            return
        time.sleep(0.02)
    raise AssertionError("requests are still live")


def refused(chunkllama: Callable, folder: Path, pattern: str) -> None:
    done = chunkllama("serve", "--model", folder, "--port", 0)
    (line,) = [line for line in done.stderr.splitlines() if line.split()[1:2] != ["INFO"]]
    assert done.returncode == 2 and re.search(pattern, line), done.stderr


def test_S8_a_folder_with_a_hostile_template_is_not_served(chunkllama, broken_model) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (broken_model / "chat_template.jinja").write_text(source)
    refused(chunkllama, broken_model, r"chat_template\.jinja: .*longer than 1 s")


def test_S23_a_folder_with_overlapping_tensors_is_not_served(chunkllama, broken_model) -> None:
    path = broken_model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second, *_ = (name for name in header if name != "__metadata__")
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [begin, begin + size]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    refused(chunkllama, broken_model, re.escape(second) + "|" + re.escape(first))


def test_S16_wrong_keys_get_one_answer(keyed) -> None:
    """Equal in all but its id, whatever the key has in common with a right one."""
    right = KEYS["red"]
    assert keyed.get("/v1/models", headers=bearer(right)).status_code == 200
    answers = set()
    for key in (right[:-1], f"{right}x", right.upper(), f"x{right[1:]}", "x", "y" * 5000):
        answer = keyed.get("/v1/models", headers=bearer(key))
        text = answer.text.replace(answer.headers["x-request-id"], "ID")
        answers.add((answer.status_code, text))
    assert [status for status, _ in answers] == [401]


def complete(keyed, tenant: str, prompt: list[int], **fields: object) -> dict:
    body = {"model": keyed.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **fields}
    url = f"{keyed.url}/v1/completions"
    answer = httpx.post(url, json=body, headers=bearer(KEYS[tenant]), timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(seed: int, count: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(256) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 64, 65, 300])
def test_S26_what_another_tenant_has_cached_is_computed_again(keyed, length: int) -> None:
    def ask(tenant: str, prompt: list[int]) -> tuple[int, int]:
        before = metric(keyed, "prefill_tokens_computed_total")
        usage = complete(keyed, tenant, prompt)["usage"]
        computed = metric(keyed, "prefill_tokens_computed_total") - before
        return usage["prompt_tokens_details"]["cached_tokens"], computed

    known, new = tokens(length, length), tokens(1000 + length, length)
    ask("red", known)
    assert ask("blue", known) == ask("blue", new) == (0, length)
    assert ask("red", known) == (length - 1, 1), "the same tenant finds it, so the test can fail"


def test_S31_requests_cancelled_and_sent_again(keyed) -> None:
    """240 on shared prefixes, most of them left after up to 30 ms: nothing leaks, none is wrong."""
    prefix = tokens(7, 150)
    prompts = [prefix[:cut] + tokens(cut, 20) for cut in (64, 100, 128, 150)]
    fields = {"max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    expected = [complete(keyed, "blue", p, cache_salt="x", **fields) for p in prompts]

    def storm(worker: int) -> None:
        drawn = random.Random(worker)
        with httpx.Client(base_url=keyed.url, headers=bearer(KEYS["red"]), timeout=120) as http:
            for _ in range(20):
                prompt = drawn.choice(prompts)
                body = {"model": keyed.model, "prompt": prompt, "stream": True, "temperature": 0}
                with http.stream("POST", "/v1/completions", json=body | fields) as answer:
                    assert answer.status_code == 200
                    time.sleep(drawn.random() * 0.03)
                    if drawn.random() < 0.3:
                        assert answer.read().endswith(b"data: [DONE]\n\n")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(storm, range(12)))
    wait_for_no_request(keyed)
    for prompt, whole in zip(prompts, expected, strict=True):
        again = complete(keyed, "red", prompt, **fields)
        assert again["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
    wait_for_no_request(keyed)
    assert metric(keyed, "invariant_violations") == 0
    text = keyed.get("/metrics", headers=bearer(OPERATOR)).text
    states = dict(re.findall(r'^chunkllama_kv_chunks{state="(\w+)"} (\S+)$', text, re.MULTILINE))
    assert float(states["referenced"]) == float(states["private"]) == 0
