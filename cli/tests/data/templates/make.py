"""Makes the files of this folder: what transformers makes of a few conversations with the chat templates of known models.

    pip install transformers==5.24.0 jinja2
    python3 make.py *.json

A new one begins as {"source": where the template is from, "tokens": special tokens by name, "template": its text}; the cases are
made. The clock shows 26 July 2024, and variables that a case has besides are passed on.
"""
import json, sys
from datetime import datetime

import jinja2
from transformers.utils import chat_template_utils


class Clock(datetime):
    @classmethod
    def now(cls):
        return cls(2024, 7, 26, 12)


chat_template_utils.datetime = Clock
SYSTEM = {"role": "system", "content": "  You answer in <b>rhymes</b> & \"quotes\". "}
TURNS = [
    {"role": "user", "content": " Who are you?\n"},
    {"role": "assistant", "content": "<think>\nA question.\n</think>\n\nI am a model,\nein größeres Modell 😀. "},
    {"role": "user", "content": "And what's\n\n2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Thanks"},
]
CONVERSATIONS = [
    (TURNS[:1], True), ([SYSTEM] + TURNS[:1], True), (TURNS, True), ([SYSTEM] + TURNS, True), (TURNS[:2], False),
    ([SYSTEM] + TURNS[:4], False), (TURNS[:1] * 2, True),
]
VARIABLES = {"qwen3": "enable_thinking", "smollm3": "enable_thinking", "granite-3.3": "thinking"}
for path in sys.argv[1:]:
    with open(path) as file:
        fixture = json.load(file)
    name = path.rpartition("/")[2].removesuffix(".json")
    choices = [{}] + [{VARIABLES[name]: choice} for choice in (True, False) if name in VARIABLES]
    if "date_string" in fixture["template"]:
        choices.append({"date_string": "1 Jan 2025"})
    fixture["cases"] = []
    for messages, answers in CONVERSATIONS:
        for variables in choices:
            case = {"messages": messages, "add_generation_prompt": answers, "variables": variables}
            try:
                [case["expected"]], _ = chat_template_utils.render_jinja_template(
                    [messages], chat_template=fixture["template"], add_generation_prompt=answers, **fixture["tokens"], **variables)
            except jinja2.TemplateError as error:
                case["refused"] = str(error)
            fixture["cases"].append(case)
    with open(path, "w") as file:
        json.dump(fixture, file, indent=1, ensure_ascii=False)
        file.write("\n")
