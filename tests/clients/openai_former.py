"""Completions, files and fine-tunes through openai-python 0.28.1.

python openai_former.py URL KEY MODEL ROWS
"""

import json
import sys

import openai

openai.api_base, openai.api_key, model, rows = sys.argv[1:]
engines = [engine["id"] for engine in openai.Engine.list()["data"]]
assert openai.Engine.retrieve(model)["ready"] is True
options = {"prompt": "The cat", "max_tokens": 8, "temperature": 0}
by_engine = openai.Completion.create(engine=model, **options)
by_model = openai.Completion.create(model=model, **options)
chunks = openai.Completion.create(engine=model, stream=True, **options)
pieces = [chunk["choices"][0]["text"] for chunk in chunks]
with open(rows, "rb") as stream:
    uploaded = openai.File.create(file=stream, purpose="fine-tune")
made = openai.FineTune.create(
    training_file=uploaded["id"],
    validation_file=uploaded["id"],
    n_epochs=1,
    suffix="old",
    compute_classification_metrics=True,
    classification_n_classes=12,
)
listed = [tune["id"] for tune in openai.FineTune.list()["data"]]
openai.FineTune.cancel(made["id"])
events = [event["message"] for event in openai.FineTune.stream_events(made["id"])]
try:
    openai.Completion.create(engine="absent", prompt="x")
except openai.error.InvalidRequestError as error:
    missing = str(error)
print(
    json.dumps(
        {
            "engines": engines,
            "texts": [
                by_engine["choices"][0]["text"],
                by_model["choices"][0]["text"],
                "".join(pieces),
            ],
            "made": made.to_dict_recursive(),
            "listed": listed,
            "events": events,
            "status": openai.FineTune.retrieve(made["id"])["status"],
            "missing": missing,
        }
    )
)
