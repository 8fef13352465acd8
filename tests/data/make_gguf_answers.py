"""Computes how transformers, which reads GGUF files by its own loader, goes on with ten prompts: greedily, in F32 on the CPU.

    python3 make_gguf_answers.py FILE OUT      needs: torch transformers==5.24.0 gguf accelerate

Stored here: gemma/answers.json, of the file that `ci/gemma` fetches.

OUT has a list, one prompt a line:
  prompt   the text
  ids      its tokens
  tokens   the next TOKENS tokens
  text     those as text
  above    by how much the best logit was above the second, at least
"""
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 24
PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The quick brown fox",
           "In 1969, humans", "La vie est", "Ein Mann ging", "1, 2, 3, 5, 8,", "The three primary colors are"]


def main():
    file, out = sys.argv[1:]
    folder, name = os.path.split(os.path.abspath(file))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    lines = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                               max_new_tokens=TOKENS, output_logits=True, return_dict_in_generate=True)
        tokens, best = found.sequences[0, len(ids):].tolist(), torch.cat(found.logits).topk(2).values
        lines.append(json.dumps({"prompt": prompt, "ids": ids, "tokens": tokens, "text": tokenizer.decode(tokens),
                                 "above": (best[:, 0] - best[:, 1]).min().item()}, ensure_ascii=False))
    with open(out, "w") as written:
        written.write("[" + ",\n".join(lines) + "]\n")


if __name__ == "__main__":
    main()
