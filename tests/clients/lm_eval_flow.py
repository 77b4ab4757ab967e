"""Two tasks of our own rows by lm-evaluation-harness, over HTTP and in process.

OPENAI_API_KEY=... python lm_eval_flow.py '{"url", "key", "folder", "runs": [[kind, arguments]]}'

Prints what every run found: metrics, and of each row the log-likelihoods or the text.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

GIVEN = json.loads(sys.argv[1])
os.environ["OPENAI_API_KEY"] = GIVEN["key"]

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/choices.jsonl"}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """
task: own_texts
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/texts.jsonl"}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "e", "zz", "#", "qq", "77"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""
WORDS = [
    "cat",
    "sat",
    "mat",
    "red",
    "tree",
    "house",
    "seven",
    "moon",
    "river",
    "bread",
    "glass",
    "stone",
]


def write_tasks(folder: Path) -> None:
    choices = [
        {
            "question": f"Which of {WORDS[i % 12]} and {WORDS[(i * 5 + 1) % 12]} is the {i}th?",
            "choices": [" " + " ".join(WORDS[(i + j) % 12 :][: 1 + j]) for j in range(4)],
            "answer": i % 4,
        }
        for i in range(40)
    ]
    characters = [chr(code) for code in range(32, 127)]  # one of which may be the likeliest
    choices += [{"question": f"{i}?", "choices": characters, "answer": 0} for i in range(4)]
    texts = [{"prompt": f"{word} and {i}:", "answer": "x"} for i, word in enumerate(WORDS)]
    for name, rows in (("choices", choices), ("texts", texts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "own_choices.yaml").write_text(CHOICES.replace("FOLDER", str(folder)))
    (folder / "own_texts.yaml").write_text(TEXTS.replace("FOLDER", str(folder)))


def evaluate(kind: str, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["own_choices", "own_texts"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = found["samples"]
    return {
        "acc": found["results"]["own_choices"]["acc,none"],
        "acc_norm": found["results"]["own_choices"]["acc_norm,none"],
        "choices": [
            [[float(value), str(greedy)] for value, greedy in sample["filtered_resps"]]
            for sample in sorted(samples["own_choices"], key=lambda s: s["doc_id"])
        ],
        "texts": [
            sample["filtered_resps"][0]
            for sample in sorted(samples["own_texts"], key=lambda s: s["doc_id"])
        ],
    }


folder = Path(GIVEN["folder"])
write_tasks(folder)
print(json.dumps({name: evaluate(*run, folder) for name, run in GIVEN["runs"].items()}))
