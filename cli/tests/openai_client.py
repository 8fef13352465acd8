#!/usr/bin/env python3
"""Asks a running `layer-streamer serve` through the official client of OpenAI, and checks the answers.

    pip install openai
    cargo run --release -- serve --model FOLDER --api-key sesame &
    cli/tests/openai_client.py http://127.0.0.1:8080/v1 sesame

Any model will do; chats are left out where the model has no chat template. `cargo test` does not run this.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai

base = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
client = openai.OpenAI(base_url=base, api_key=sys.argv[2] if len(sys.argv) > 2 else "none", max_retries=0)
checked = []


def check(what, holds, seen=None):
    if not holds:
        sys.exit(f"{what}: no; {seen!r}")
    checked.append(what)
    print(f"{what}: yes")


def refused(kind, status, param, ask):
    try:
        ask()
    except kind as error:
        return error.status_code == status and error.param == param, error
    return False, "not refused"


print(f"openai {openai.__version__}")
model = client.models.list().data[0]
check("the model is listed and found by its name", client.models.retrieve(model.id).id == model.id, model)

# Completions.
drawn = {"model": model.id, "prompt": "12=", "max_tokens": 12, "temperature": 1.5, "seed": 7}
one = client.completions.create(**drawn)
check("a completion has text, an end and usage",
      one.choices[0].finish_reason in ("stop", "length") and one.usage.completion_tokens <= 12, one)
check("the same seed gives the same text", client.completions.create(**drawn).choices[0].text == one.choices[0].text)
with ThreadPoolExecutor(20) as pool:
    others = [pool.submit(client.completions.create, **{**drawn, "seed": seed}) for seed in range(20)]
    again = pool.submit(client.completions.create, **drawn).result()
    [other.result() for other in others]
check("and so it does in the company of twenty others", again.choices[0].text == one.choices[0].text, again)
pieces = list(client.completions.create(**drawn, stream=True, stream_options={"include_usage": True}))
check("a stream gives the same text",
      "".join(piece.choices[0].text for piece in pieces if piece.choices) == one.choices[0].text, pieces)
check("and then the usage", pieces[-1].usage == one.usage, pieces[-1])
several = client.completions.create(**drawn, n=3, logprobs=2)
check("three answers have their numbers", [choice.index for choice in several.choices] == [0, 1, 2], several)
logprobs = several.choices[0].logprobs
check("each token has its probability",
      len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
      and "".join(logprobs.tokens) == several.choices[0].text, logprobs)

# Errors.
check("a value out of range is a BadRequestError that names it",
      *refused(openai.BadRequestError, 400, "temperature", lambda: client.completions.create(**{**drawn, "temperature": 3})))
check("another model is a NotFoundError",
      *refused(openai.NotFoundError, 404, "model", lambda: client.completions.create(**{**drawn, "model": "other"})))
if len(sys.argv) > 2:
    wrong = openai.OpenAI(base_url=base, api_key="wrong", max_retries=0)
    check("a wrong key is an AuthenticationError", *refused(openai.AuthenticationError, 401, None, wrong.models.list))

# Chats.
turns = {"model": model.id, "messages": [{"role": "user", "content": "12"}], "max_completion_tokens": 12, "temperature": 0}
if getattr(model, "has_chat_template", False):
    chat = client.chat.completions.create(**turns, logprobs=True, top_logprobs=2)
    message = chat.choices[0].message
    check("a chat is answered by the assistant", message.role == "assistant" and message.content, chat)
    content = chat.choices[0].logprobs.content
    check("and its tokens have probabilities",
          b"".join(bytes(token.bytes) for token in content).decode() == message.content
          and all(len(token.top_logprobs) == 2 for token in content), content)
    pieces = list(client.chat.completions.create(**turns, stream=True))
    check("its stream gives the same text",
          "".join(piece.choices[0].delta.content or "" for piece in pieces) == message.content, pieces)
    with client.chat.completions.stream(**turns) as stream:
        final = [event for event in stream][-1] and stream.get_final_completion()
    check("the client's own reader of streams takes it", final.choices[0].message.content == message.content, final)
    stop = message.content[len(message.content) // 2 :][:3]
    short = client.chat.completions.create(**turns, stop=[stop]).choices[0]
    check("a stop text is not in the answer",
          stop not in short.message.content and message.content.startswith(short.message.content), short)
    follow = [*turns["messages"], message.model_dump(exclude_none=True), {"role": "user", "content": "13"}]
    check("a message of the client's goes back as it came",
          client.chat.completions.create(**{**turns, "messages": follow}).choices[0].message.content is not None)
else:
    print("no chat template: chats are left out")
print(f"{len(checked)} checks")
