"""langchain-openai: chat, completions, embeddings, streams, batches, and its own errors.

python langchain_flow.py '{"url": ..., "key": ..., "model": ..., "keys": {...}}'
"""

import asyncio
import json
import sys
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

GIVEN = json.loads(sys.argv[1])
MODEL = GIVEN["model"]
ACCESS: dict[str, Any] = {"base_url": GIVEN["url"], "api_key": GIVEN["key"], "model": MODEL}
SHORT: dict[str, Any] = {**ACCESS, "temperature": 0, "max_tokens": 8}


def chat() -> dict[str, Any]:
    model = ChatOpenAI(**SHORT, seed=1, logprobs=True, top_logprobs=2)
    answer = model.invoke([("system", "Be short."), ("human", "Hello")])
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] in ("length", "stop")
    assert answer.response_metadata["logprobs"]["content"]
    plain = ChatOpenAI(**SHORT, stream_usage=True)
    messages: Any = [("system", "Be short."), ("human", "Hello")]
    streamed = None
    for chunk in plain.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.content == answer.content
    assert streamed.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    several = plain.batch(["One", "Two", "Three"])
    assert several[0].content == plain.invoke("One").content
    later = asyncio.run(plain.ainvoke(messages))
    assert later.content == answer.content
    two = ChatOpenAI(**{**SHORT, "temperature": 1}, n=2).generate(
        [plain._convert_input("x").to_messages()]
    )
    assert len(two.generations[0]) == 2
    stopped = plain.invoke(messages, stop=[answer.content[:1]]) if answer.content else answer
    assert stopped.content == "" or not answer.content
    return {"content": answer.content}


def completions() -> dict[str, Any]:
    model = OpenAI(**SHORT)
    answer = model.invoke("The cat")
    assert "".join(model.stream("The cat")) == answer
    assert model.batch(["The cat", "The dog"])[0] == answer
    found = OpenAI(**{**SHORT, "temperature": 1}, n=2, best_of=3, logit_bias={"5": 1}, seed=3)
    generations = found.generate(["a", "b", "c"]).generations
    assert [len(one) for one in generations] == [2, 2, 2]
    scored = OpenAI(**SHORT, logprobs=2).generate(["The cat"])
    assert scored.generations[0][0].generation_info["logprobs"]["tokens"]
    assert scored.llm_output["token_usage"]["total_tokens"] > 0
    return {"text": answer}


def embeddings() -> dict[str, Any]:
    # Without this LangChain sends the ids of OpenAI's own tokenizer, which mean nothing here.
    model = OpenAIEmbeddings(**ACCESS, check_embedding_ctx_length=False)
    documents = model.embed_documents(["one", "two"])
    query = model.embed_query("one")
    assert all(abs(a - b) < 1e-6 for a, b in zip(documents[0], query, strict=True))
    return {"size": len(query)}


def errors() -> dict[str, str]:
    calls = {
        "chat too long": lambda: ChatOpenAI(**SHORT).invoke("x" * 4000),
        "key": lambda: ChatOpenAI(**{**SHORT, "api_key": "sk-wrong"}).invoke("x"),
        "model": lambda: ChatOpenAI(**{**SHORT, "model": "absent"}).invoke("x"),
        "value": lambda: ChatOpenAI(**{**SHORT, "temperature": 9}).invoke("x"),
        "tools": lambda: ChatOpenAI(**SHORT).bind(tools=[{"type": "function"}]).invoke("x"),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except ContextOverflowError:
            told[name] = "ContextOverflowError"
        except Exception as error:  # noqa: BLE001  whatever it is, its ancestors are told
            told[name] = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "openai")
        else:
            raise AssertionError(f"{name}: no error")
    return told


print(
    json.dumps(
        {
            "chat": chat(),
            "completions": completions(),
            "embeddings": embeddings(),
            "errors": errors(),
        }
    )
)
