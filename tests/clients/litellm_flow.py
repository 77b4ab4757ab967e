"""litellm as a library: completions, embeddings, its reading of our errors, fine-tuning jobs.

python litellm_flow.py '{"url": ..., "key": ..., "model": ..., "keys": {...}, "job": ID}'
"""

import json
import os
import sys
import warnings
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks no other server

import litellm

GIVEN = json.loads(sys.argv[1])
ACCESS: dict[str, Any] = {"api_base": GIVEN["url"], "api_key": GIVEN["key"]}
CHAT = f"openai/{GIVEN['model']}"
TEXT = f"text-completion-openai/{GIVEN['model']}"
HELLO = [{"role": "user", "content": "Hello"}]
SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0, **ACCESS}
litellm.suppress_debug_info = True


def completions() -> dict[str, Any]:
    chat = litellm.completion(model=CHAT, messages=HELLO, **SHORT)
    assert chat.usage.completion_tokens > 0
    chunks = list(litellm.completion(model=CHAT, messages=HELLO, stream=True, **SHORT))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat.choices[0].message.content
    completion = litellm.text_completion(model=TEXT, prompt="The cat", logprobs=2, **SHORT)
    pieces = litellm.text_completion(model=TEXT, prompt="The cat", stream=True, **SHORT)
    streamed = "".join(chunk.choices[0].text or "" for chunk in pieces)
    assert streamed == completion.choices[0].text
    several = litellm.text_completion(model=TEXT, prompt=["The cat", "The dog"], n=2, **SHORT)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    found = litellm.embedding(model=CHAT, input=["one", "two"], **ACCESS)
    assert len(found.data) == 2
    return {"text": streamed, "content": text}


def errors() -> dict[str, str]:
    keys = GIVEN["keys"]
    limited = {**SHORT, "api_key": keys["limited"], "max_retries": 0, "num_retries": 0}
    litellm.completion(model=CHAT, messages=HELLO, **limited)
    long = [{"role": "user", "content": "x" * 4000}]
    calls = {
        "key": lambda: litellm.completion(
            model=CHAT, messages=HELLO, **{**SHORT, "api_key": keys["unknown"]}
        ),
        "suspended": lambda: litellm.completion(
            model=CHAT, messages=HELLO, **{**SHORT, "api_key": keys["suspended"]}
        ),
        "model": lambda: litellm.completion(model="openai/absent", messages=HELLO, **SHORT),
        "too long": lambda: litellm.completion(model=CHAT, messages=long, **SHORT),
        "text too long": lambda: litellm.text_completion(model=TEXT, prompt="x" * 4000, **SHORT),
        "value": lambda: litellm.completion(
            model=CHAT, messages=HELLO, **{**SHORT, "temperature": 9}
        ),
        "429 in the words": lambda: litellm.completion(
            model=CHAT, messages=HELLO, **{**SHORT, "max_tokens": 429_000}
        ),
        "rate": lambda: litellm.completion(model=CHAT, messages=HELLO, **limited),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # noqa: BLE001  litellm's classes share no base of their own
            told[name] = type(error).__name__
        else:
            raise AssertionError(f"{name}: no error")
    return told


def fine_tuning() -> dict[str, Any]:
    """Every job is read again by litellm's strict class; a warning is a field of a wrong type."""
    options = {"custom_llm_provider": "openai", **ACCESS}
    rows = b"".join(
        json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n"
        for i in range(12)
    )
    file = litellm.create_file(file=("rows.jsonl", rows), purpose="fine-tune", **options)
    job = litellm.create_fine_tuning_job(
        model=GIVEN["model"], training_file=file.id, suffix="lite", **options
    )
    cancelled = litellm.cancel_fine_tuning_job(fine_tuning_job_id=job.id, **options)
    assert cancelled.status == "cancelled"
    listed = [found.id for found in litellm.list_fine_tuning_jobs(limit=5, **options)]
    assert job.id in listed
    done = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=GIVEN["job"], **options)
    for found in (job, cancelled, done):
        type(found)(**found.model_dump(warnings="error"))
    assert litellm.file_content(file_id=file.id, **options).content == rows
    return {"class": type(done).__name__, "status": done.status, "model": done.fine_tuned_model}


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    told = {"completions": completions(), "errors": errors(), "fine_tuning": fine_tuning()}
print(json.dumps(told))
