"""The whole API through openai-python, any release from 1.x on.

python openai_flow.py '{"url": ..., "key": ..., "model": ..., "keys": {...}}'
"""

import io
import json
import sys
import time
from typing import Any

import openai
from openai import OpenAI

GIVEN = json.loads(sys.argv[1])
MODEL = GIVEN["model"]
ROWS = b"".join(
    json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}).encode() + b"\n"
    for i in range(32)
)


def client(key: str = GIVEN["key"], **options: Any) -> OpenAI:
    return OpenAI(base_url=GIVEN["url"], api_key=key, **options)


def wait(read: Any, ended: tuple[str, ...], limit_s: float = 120) -> Any:
    deadline = time.monotonic() + limit_s
    while (found := read()).status not in ended:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def completions(api: OpenAI) -> dict[str, Any]:
    options: dict[str, Any] = {"model": MODEL, "prompt": "The cat", "max_tokens": 8}
    whole = api.completions.create(**options, temperature=0, logprobs=2, echo=True)
    assert whole.object == "text_completion"
    assert whole._request_id.startswith("req_")
    choice = whole.choices[0]
    assert choice.text.startswith("The cat")
    assert choice.finish_reason in ("length", "stop")
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
    assert choice.logprobs.token_logprobs[0] is None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        api.completions.create(
            **options, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    streamed = "".join(c.choices[0].text for c in chunks if c.choices)
    assert choice.text == "The cat" + streamed
    several = api.completions.create(**{**options, "prompt": ["a", "b"]}, n=2, best_of=3)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    raw = api.completions.with_raw_response.create(**options)
    assert raw.headers["x-request-id"] == raw.parse()._request_id
    return {"text": choice.text}


def chat(api: OpenAI) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = api.chat.completions.create(**options, logprobs=True, top_logprobs=3, store=True)
    message = whole.choices[0].message
    assert (message.role, message.refusal) == ("assistant", None)
    assert all(len(t.top_logprobs) >= 3 for t in whole.choices[0].logprobs.content)
    chunks = list(api.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    if hasattr(api.chat.completions, "stream"):
        with api.chat.completions.stream(**options, logit_bias={"2": 100}) as stream:  # EOS
            final = stream.get_final_completion()
        assert final.choices[0].message.content == ""
    api.chat.completions.update(whole.id, metadata={"rating": "1"})
    assert [c.id for c in api.chat.completions.list(metadata={"rating": "1"})] == [whole.id]
    assert api.chat.completions.retrieve(whole.id).metadata == {"rating": "1"}
    assert [m.content for m in api.chat.completions.messages.list(whole.id)]
    assert api.chat.completions.delete(whole.id).deleted
    return {"content": message.content}


def files(api: OpenAI) -> str:
    made = api.files.create(
        file=("rows.jsonl", ROWS),
        purpose="fine-tune",
        extra_body={"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
    )
    assert (made.object, made.bytes, made.purpose) == ("file", len(ROWS), "fine-tune")
    assert made.expires_at == made.created_at + 3600
    assert api.files.wait_for_processing(made.id).status == "processed"
    assert api.files.content(made.id).read() == ROWS
    kept = api.files.create(file=io.BytesIO(ROWS), purpose="fine-tune")
    listed = [file.id for file in api.files.list(limit=1)]  # pages by itself
    assert {made.id, kept.id} <= set(listed)
    assert api.files.retrieve(made.id).filename == "rows.jsonl"
    assert api.files.delete(made.id).deleted
    try:
        api.files.retrieve(made.id)
    except openai.NotFoundError as error:
        assert "No such File object" in str(error)
    else:
        raise AssertionError("a deleted file was found")
    return kept.id


def uploads(api: OpenAI) -> dict[str, Any]:
    upload = api.uploads.create(
        bytes=len(ROWS), filename="big.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    parts = [api.uploads.parts.create(upload.id, data=piece) for piece in (ROWS[:99], ROWS[99:])]
    done = api.uploads.complete(upload.id, part_ids=[part.id for part in parts])
    assert (done.status, done.file.bytes) == ("completed", len(ROWS))
    assert api.files.content(done.file.id).read() == ROWS
    dropped = api.uploads.create(bytes=9, filename="a", mime_type="a/b", purpose="user_data")
    assert api.uploads.cancel(dropped.id).status == "cancelled"
    chunked = api.uploads.upload_file_chunked(
        file=ROWS,
        filename="c.jsonl",
        bytes=len(ROWS),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=500,
    )
    assert chunked.file.bytes == len(ROWS)
    return {"file": done.file.id}


def fine_tuning(api: OpenAI, file_id: str) -> dict[str, Any]:
    jobs = api.fine_tuning.jobs
    job = jobs.create(
        model=MODEL,
        training_file=file_id,
        suffix="official",
        seed=7,
        metadata={"who": "client"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}},
        },
    )
    assert (job.object, job.seed, job.metadata) == ("fine_tuning.job", 7, {"who": "client"})
    assert job.status in ("validating_files", "queued", "running")
    dropped = jobs.create(model=MODEL, training_file=file_id)
    assert jobs.cancel(dropped.id).status == "cancelled"
    try:
        jobs.cancel(dropped.id)
    except openai.BadRequestError as error:
        assert error.code == "invalid_state"
    else:
        raise AssertionError("a cancelled job was cancelled")
    assert {job.id, dropped.id} <= {found.id for found in jobs.list(limit=1)}
    found = wait(lambda: jobs.retrieve(job.id), ("succeeded", "failed", "cancelled"))
    assert found.status == "succeeded", found
    assert found.method.supervised.hyperparameters.n_epochs == 2
    messages = [event.message for event in jobs.list_events(job.id, limit=2)]
    assert messages[0] == "The job has successfully completed"
    assert messages[-1].startswith("Created fine-tuning job")
    steps = [checkpoint.step_number for checkpoint in jobs.checkpoints.list(job.id)]
    assert steps == sorted(steps, reverse=True)
    assert steps
    table = api.files.content(found.result_files[0]).text
    assert table.startswith("step,")
    tuned = found.fine_tuned_model
    answer = api.completions.create(model=tuned, prompt="1 + 1 =", max_tokens=4)
    assert answer.model == tuned
    assert api.models.retrieve(tuned).owned_by
    assert tuned in {model.id for model in api.models.list()}
    assert api.models.delete(tuned).deleted
    return {"job": job.id, "events": len(messages), "checkpoints": steps}


def batches(api: OpenAI) -> dict[str, Any]:
    lines = [
        {
            "custom_id": f"row-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": MODEL, "prompt": "The cat", "max_tokens": 4, "temperature": 0},
        }
        for i in range(3)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = api.files.create(file=("in.jsonl", content), purpose="batch")
    batch = api.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    done = wait(lambda: api.batches.retrieve(batch.id), ("completed", "failed", "expired"))
    assert (done.status, done.request_counts.completed) == ("completed", 3), done
    answers = [json.loads(line) for line in api.files.content(done.output_file_id).iter_lines()]
    assert {answer["custom_id"] for answer in answers} == {"row-0", "row-1", "row-2"}
    assert batch.id in {found.id for found in api.batches.list(limit=1)}
    other = api.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    assert api.batches.cancel(other.id).status in ("cancelling", "cancelled", "completed")
    return {"texts": sorted({a["response"]["body"]["choices"][0]["text"] for a in answers})}


def embeddings(api: OpenAI) -> dict[str, Any]:
    packed = api.embeddings.create(model=MODEL, input=["one", "two"])
    plain = api.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1]
    for a, b in zip(packed.data, plain.data, strict=True):
        assert all(abs(x - y) < 1e-6 for x, y in zip(a.embedding, b.embedding, strict=True))
    return {"size": len(plain.data[0].embedding)}


def errors(api: OpenAI) -> dict[str, Any]:
    """Make each error happen; returns class, code and param by condition."""
    asked = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    keys = GIVEN["keys"]
    limited = client(keys["limited"], max_retries=0)
    limited.completions.create(**asked)
    calls = {
        "key": lambda: client(keys["unknown"]).completions.create(**asked),
        "suspended": lambda: client(keys["suspended"]).completions.create(**asked),
        "project": lambda: client(project="proj_x").models.list(),
        "model": lambda: api.completions.create(**{**asked, "model": "absent"}),
        "value": lambda: api.completions.create(**asked, temperature=200),
        "unknown": lambda: api.completions.create(**asked, extra_body={"temprature": 1}),
        "context": lambda: api.completions.create(**{**asked, "prompt": "x" * 4000}),
        "rate": lambda: limited.completions.create(**asked),
        "file": lambda: api.fine_tuning.jobs.create(model=MODEL, training_file="file-x"),
        "rows": lambda: api.files.create(file=("a.jsonl", b"{}\n["), purpose="fine-tune"),
        "after": lambda: api.files.list(after="file-x"),
        "url": lambda: api.post("/nothing", body={}, cast_to=object),
        "method": lambda: api.put("/models", cast_to=object),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except openai.APIStatusError as error:
            assert error.message
            assert error.request_id.startswith("req_")
            told[name] = [type(error).__name__, error.status_code, error.code, error.param]
        else:
            raise AssertionError(f"{name}: no error")
    stream = api.completions.create(**{**asked, "max_tokens": 200}, stream=True)
    next(iter(stream))
    stream.close()  # leaving a stream is no error
    return told


def main() -> None:
    api = client()
    model = api.models.retrieve(MODEL)
    assert (model.id, model.object) == (MODEL, "model")
    told = {
        "version": openai.__version__,
        "completions": completions(api),
        "chat": chat(api),
        "embeddings": embeddings(api),
        "uploads": uploads(api),
        "fine_tuning": fine_tuning(api, files(api)),
        "batches": batches(api),
        "errors": errors(api),
    }
    print(json.dumps(told))


main()
