"""Computes what a checkpoint answers, in NumPy and F64, for models that make_reference.py does not make.

    python3 make_expected.py check REFERENCE...                     compares itself with what transformers computed
    python3 make_expected.py FOLDER OUT TOKENS IDS [--last]         writes OUT/expected.safetensors

TOKENS is how many the greedy continuation has, IDS the prompt, separated by commas; --last keeps the logits of the prompt's last
token alone. Takes numpy. FOLDER is a Hugging Face folder of one of the families llama, mistral, qwen2 and qwen3.

Stored here: for `../../examples/speller`, `speller 8 25,16,23,22,17,19,29`; for what `ci/smollm2` makes, `smollm2 16
6403,1980,253,655,665,436,253,1165,6560,418,260,3374,282,253,6740,28,837,701,3783,971,550,2684,563,260 --last`.
"""
import glob, json, math, os, sys
import numpy as np


def read(path):
    """The tensors of a safetensors file."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header, data = json.loads(f.read(size)), f.read()
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64}
    tensors = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        a = np.frombuffer(data[begin:end], kinds[t["dtype"]]).reshape(t["shape"])
        if t["dtype"] == "BF16":
            a = (a.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = a if t["dtype"] == "I64" else a.astype(np.float64)
    return tensors


class Model:
    def __init__(self, folder):
        self.c = json.load(open(f"{folder}/config.json"))
        self.w = {}
        for path in glob.glob(f"{folder}/model*.safetensors"):
            self.w |= read(path)

    def frequencies(self, head_dim):
        c = self.c
        scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
        theta = c.get("rope_theta") or scaling["rope_theta"]
        f = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        kind = scaling.get("rope_type", "default")
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
            part = np.clip((turns - low) / (high - low), 0, 1)
            f = part * f + (1 - part) * f / scaling["factor"]
        elif kind != "default":
            raise SystemExit(f"rope of type {kind}")
        return f

    def logits(self, ids):
        c, w, T = self.c, self.w, len(ids)
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        dim = c.get("head_dim") or c["hidden_size"] // heads
        window = c.get("sliding_window") if c["model_type"] == "mistral" else None
        angle = np.arange(T)[:, None] * self.frequencies(dim)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        ago = np.arange(T)[:, None] - np.arange(T)
        seen = (ago >= 0) & (ago < (window or T))

        def norm(x, name):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[name]

        def linear(x, name):
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

        def rotate(x):
            a, b = np.split(x, 2, -1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        x = w["model.embed_tokens.weight"][ids]
        for n in range(c["num_hidden_layers"]):
            at = f"model.layers.{n}"
            h = norm(x, f"{at}.input_layernorm.weight")
            q = linear(h, f"{at}.self_attn.q_proj").reshape(T, heads, dim)
            k = linear(h, f"{at}.self_attn.k_proj").reshape(T, kv, dim)
            v = linear(h, f"{at}.self_attn.v_proj").reshape(T, kv, dim)
            if c["model_type"] == "qwen3":
                q, k = norm(q, f"{at}.self_attn.q_norm.weight"), norm(k, f"{at}.self_attn.k_norm.weight")
            q, k, v = rotate(q), np.repeat(rotate(k), heads // kv, 1), np.repeat(v, heads // kv, 1)
            s = np.where(seen, np.einsum("thd,shd->hts", q, k) / math.sqrt(dim), -np.inf)
            s = np.exp(s - s.max(-1, keepdims=True))
            o = np.einsum("hts,shd->thd", s / s.sum(-1, keepdims=True), v)
            x = x + linear(o.reshape(T, heads * dim), f"{at}.self_attn.o_proj")
            h = norm(x, f"{at}.post_attention_layernorm.weight")
            gate = linear(h, f"{at}.mlp.gate_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        x = norm(x, "model.norm.weight")
        return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def continued(model, prompt, count):
    """Logits of the prompt, and its greedy continuation."""
    ids, first, margin = list(prompt), None, math.inf
    for _ in range(count):
        logits = model.logits(ids)
        first = logits if first is None else first
        best = np.sort(logits[-1])[-2:]
        margin = min(margin, best[1] - best[0])
        ids.append(int(logits[-1].argmax()))
    return first, ids[len(prompt):], margin


def check(folder):
    expected = read(f"{folder}/expected.safetensors")
    model = Model(folder)
    logits, ids, _ = continued(model, expected["prompt"], len(expected["continuation"]))
    off = np.linalg.norm(logits - expected["logits"]) / np.linalg.norm(expected["logits"])
    same = ids == list(expected["continuation"])
    print(f"{folder}: logits off by {off:.1e}, continuation {'the same' if same else 'ANOTHER'}")
    return same and off < 1e-5


def write(path, tensors):
    kinds = {"float32": "F32", "int64": "I64"}
    header, body = {}, b""
    for name, a in tensors.items():
        header[name] = {"dtype": kinds[str(a.dtype)], "shape": list(a.shape), "data_offsets": [len(body), len(body) + a.nbytes]}
        body += a.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + body)


if sys.argv[1] == "check":
    sys.exit(not all([check(folder) for folder in sys.argv[2:]]))
folder, out, count, ids = sys.argv[1:5]
prompt = [int(i) for i in ids.split(",")]
logits, continuation, margin = continued(Model(folder), prompt, int(count))
logits = logits[-1:] if "--last" in sys.argv else logits
os.makedirs(out, exist_ok=True)
write(f"{out}/expected.safetensors", {"prompt": np.array(prompt), "continuation": np.array(continuation), "logits": logits.astype(np.float32)})
print(f"{continuation}; the two best differ by {margin:.3f} or more")
