"""Computes what transformers answers, greedily and in F32 on the CPU, to ten prompts of several kinds.

    python3 make_answers.py FOLDER OUT      needs: torch transformers==5.24.0 jinja2

FOLDER is a model with a chat template, OUT a JSON file. Stored here: smollm2/answers.json, of what `ci/smollm2` makes.

OUT has a list of conversations, one a line, each with its system prompt or null, and its turns:
  asked    what the user says
  prompt   the conversation up to there, through the chat template
  ids      how many tokens that is
  tokens   the answer, without its stop token
  end      "stop token", or "max new tokens" after TOKENS
  text     the answer as text
  certain  null, or how many tokens come before the first that is a near tie: the best logit is less than NEAR above the second,
           so that another order of the same sums may choose the other
"""
import json, sys
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TOKENS, NEAR = 200, 1e-4

# System prompt, and what the user says in each turn.
CONVERSATIONS = [
    (None, ["What is the capital of France?", "And what is it known for?"]),
    ("You are a pirate. You answer in rhymes, in no more than two sentences.", ["Why is the sky blue?"]),
    (None, ["List ten animals that live in the sea, one on each line, with numbers."]),
    (None, ["What is 12345 + 67890? Then put these in order: 3.14159, -7, 1e-5, 1,000,000, 0x1F, ½."]),
    (None, ["Écris une courte lettre à ma grand-mère Zoë, qui fête ses 80 ans à Nîmes : « Où es-tu ? »"]),
    (None, ["请用中文介绍一下长城。🏯 それから日本語で「こんにちは」と言ってください。👩‍👩‍👧 Danke schön, große Übergröße!"]),
    (None, ["What does this print, and why?\n\n```python\ndef f(n):\n    # n!\n    return 1 if n < 2 else n * f(n - 1)\n\n"
            "for i in range(3, 6):\n\tprint(f\"{i}! = {f(i)}\")\n```"]),
    (None, ["  Write a poem that begins so:\n\nThe rain falls down,   \n   the river climbs,\n\n\n\tand nobody ...\n"]),
    (None, ["Read this, then tell me in one paragraph who took the lamp, and how the keeper found out.\n\n"
            + "\n\n".join([
                "The lighthouse at Skarn Point had stood for a hundred and twelve years when its lamp went missing. Old Brannoch, "
                "who had kept it since his father's death, climbed the stairs on the evening of the third of November, as he had on "
                "every evening before, and found the lantern room empty. The glass was whole. The door had been locked. Only the "
                "brass stand was left, and on it lay a fine white dust, which he took for salt.",
                "He said nothing to the village. There was a spare lamp in the cellar, a poor thing from the time of the war, and "
                "he lit it and sat beside it all night, listening. Three boats came home by its light. The fourth, the Annika, did "
                "not, although the sea was calm; she was found at noon, tied up in a cove on the far side of the point, with nobody "
                "aboard and her nets dry.",
                "The skipper of the Annika was a young man called Tove Marrin. His sister Ilse taught at the school, and it was she "
                "who came to Brannoch that afternoon, with chalk on her sleeves, and asked whether he had seen her brother. "
                "Brannoch looked at the chalk for a long time. Then he asked her how she had known that the lamp was gone, for she "
                "had looked, as she came in, not at him but up the stairs. She sat down on the bench by the door and began to cry.",
                "Tove owed money, she said, to a dealer in Harrow who bought old brass and glass and asked no questions. She had a "
                "key, because the school brought children to see the light each spring. She had meant to put the lamp back before "
                "dark, when the dealer had been shown that it was real; but Tove had taken the boat round to the cove with the lamp "
                "wrapped in a blanket, and had not come to where they had agreed to meet."])]),
]


def answer(model, ids):
    """The answer's tokens, and by how much the best logit of each is above the second best."""
    found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                           max_new_tokens=TOKENS, output_logits=True, return_dict_in_generate=True)
    best = torch.cat(found.logits).topk(2).values
    return found.sequences[0, len(ids):].tolist(), (best[:, 0] - best[:, 1]).tolist()


def conversation(model, tokenizer, system, questions):
    messages = [{"role": "system", "content": system}] if system else []
    turns = []
    for asked in questions:
        messages.append({"role": "user", "content": asked})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        tokens, above = answer(model, ids)
        certain = next((n for n, by in enumerate(above) if by < NEAR), None)
        end = "stop token" if tokens[-1] == tokenizer.eos_token_id else "max new tokens"
        tokens = tokens[:-1] if end == "stop token" else tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        print(f"{len(ids)} tokens in, {len(tokens)} out, certain: {certain or 'all'}, the best above the second by {min(above):.1e} or "
              f"more: {asked[:40]!r}", flush=True)
        turns.append({"asked": asked, "prompt": prompt, "ids": len(ids), "tokens": tokens, "end": end, "text": text,
                      "certain": certain})
    return {"system": system, "turns": turns}


def main():
    folder, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found = [conversation(model, tokenizer, *given) for given in CONVERSATIONS]
    with open(out, "w") as file:
        file.write("[" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in found) + "]\n")


if __name__ == "__main__":
    main()
