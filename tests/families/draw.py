"""Draws random small models, and writes what Hugging Face transformers computes with them.

    python3 draw.py FAMILY COUNT SEED [ROPE] > cases.jsonl           needs: torch transformers==5.24.0

FAMILY is one of FAMILIES below, ROPE one of ROPES; if it is left out, the drawings have each in turn. Each drawing is a config.json as a checkpoint of the hub could
carry it: keys are left out so that the class's defaults apply, or null, in the old or the new spelling, or in both. transformers
reads that very file and builds the model. A drawing that transformers itself refuses is drawn again; how often, and why, is told on
stderr. The same arguments give the same drawings.

No weights are stored: `values` makes each tensor from its name, as tests/families.rs does.

A line is an object:
  family    FAMILY
  rope      ROPE
  config    what config.json has
  shift     the embedding table is smaller by 2^-shift, so that what norms add under the root counts
  tensors   [name, shape] of each tensor of the checkpoint
  ids       the prompt
  rows      positions of the prompt, its last among them
  logits    the logits at each of these, from one pass in F32 over the whole prompt without a cache
"""
import collections, json, random, sys, tempfile, warnings

import numpy as np

FAMILIES = "llama mistral ministral qwen2 qwen3 phi3 gemma2 gemma3_text gemma3 smollm3 granite olmo2".split()
ROPES = "default linear dynamic yarn longrope llama3".split()

# Other families take all of them.
ROPES_OF = {"phi3": ["default", "longrope"]}

# What transformers takes where a key is left out; None: as many as query heads, or hidden_size / heads.
KV_HEADS = {"mistral": 8, "ministral": 8, "qwen2": 32, "qwen3": 32, "gemma2": 4, "gemma3_text": 4, "smollm3": 4}
HEAD_DIM = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
MODEL_CLASS = {"llama": "Llama", "mistral": "Mistral", "ministral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3",
               "gemma2": "Gemma2", "gemma3_text": "Gemma3", "smollm3": "SmolLM3", "granite": "Granite", "olmo2": "Olmo2"}


class Drawing:
    """Draws one configuration. `put` leaves a key out, or writes null, with the chances that it is given."""

    def __init__(self, rng, family, rope):
        self.rng, self.family, self.rope, self.config = rng, family, rope, {}
        self.tokens = rng.randint(5, 48)

    def chance(self, of_100):
        return self.rng.random() < of_100 / 100

    def one(self, *values):
        return self.rng.choice(values)

    def put(self, key, value, absent=0, null=0):
        where = 100 * self.rng.random()
        if where >= absent:
            self.config[key] = None if where < absent + null else value

    def heads(self):
        """Heads, their width, and the width of the residual stream."""
        default = KV_HEADS.get(self.family)
        way = self.one("given", "given", "given", "absent", "null")
        if way == "absent" and default == 32 and not self.chance(25):
            way = "given"
        if way == "absent" and default:
            heads = default * self.one(1, 2)
        else:
            heads = self.one(1, 2, 2, 3, 4, 4, 6)
        if way != "absent":
            kv = self.one(*[n for n in range(1, heads + 1) if heads % n == 0])
            self.put("num_key_value_heads", None if way == "null" else kv)
        self.config["num_attention_heads"] = heads
        own = self.one("derived", "own", "absent")
        if own == "absent" and self.family in HEAD_DIM and heads <= 4:
            self.head_dim = HEAD_DIM[self.family]
            hidden = heads * self.rng.randint(-(-32 // heads), 96 // heads)
        elif own == "derived" and self.family not in HEAD_DIM:
            self.head_dim = 2 * self.rng.randint(max(2, -(-16 // heads)), max(2, 48 // heads))
            hidden = heads * self.head_dim
            self.put("head_dim", None, absent=70)
        else:
            self.head_dim = self.one(16, 16, 18, 24, 32, 34, 48, 64)
            hidden = heads * self.rng.randint(-(-32 // heads), max(1, 96 // heads))
            self.config["head_dim"] = self.head_dim
        self.config["hidden_size"] = hidden

    def sizes(self):
        self.layers = self.rng.randint(1, 5)
        self.config["num_hidden_layers"] = self.layers
        self.config["intermediate_size"] = self.one(37, 8 * self.rng.randint(3, 20), 8 * self.rng.randint(3, 20))
        self.vocab = self.rng.randint(96, 160)
        self.config["vocab_size"] = self.vocab
        self.put("rms_norm_eps", self.one(1e-5, 1e-6, 1e-2, 1e-8), absent=35)
        self.put("tie_word_embeddings", self.chance(50), absent=35)
        # Some classes have defaults that are no tokens of so small a vocabulary.
        self.put("pad_token_id", self.one(0, 1), null=50)
        self.put("bos_token_id", 1, null=10)
        self.put("eos_token_id", self.one(2, [2, 5]), null=10)
        if not self.family.startswith("gemma"):
            self.put("hidden_act", "silu", absent=30)
        self.put(self.one("torch_dtype", "dtype"), self.one("bfloat16", "float32"), absent=40)
        self.put("use_cache", True, absent=50)
        self.put("initializer_range", 0.02, absent=50)

    def window(self, absent=20, null=20):
        """A window that hides something, mostly."""
        self.put("sliding_window", self.one(1, 2, *(self.rng.randint(3, 12) for _ in range(4)), self.tokens, 4096), absent, null)

    def layer_types(self, absent):
        kinds = [self.one("sliding_attention", "full_attention") for _ in range(self.layers)]
        self.put("layer_types", kinds, absent)

    def only_some_windows(self):
        """Qwen's keys."""
        self.put("use_sliding_window", self.chance(70), absent=25)
        self.window()
        self.put("max_window_layers", self.rng.randint(0, self.layers + 1), absent=25)
        self.layer_types(absent=60)

    def rope_values(self):
        """What a rope of this kind says of itself, without its name and theta."""
        r, t = self.rng, self.tokens
        half = int(self.head_dim * self.partial) // 2
        longest = self.one(t, t + 1, 64, 512, 4096, 131072)
        if self.rope == "dynamic":
            longest = self.one(max(2, t // 2), max(2, t - 1), t, t + 1, 2 * t)
        self.original = self.one(8, 16, 64, 512, 4096)
        if self.rope == "longrope":
            self.original = self.one(max(2, t // 2), t - 1, t, t + 1, 2 * t)
            longest = max(t, self.original * self.one(1, 2, 4, 32))
        # Dynamic ropes compare with the default, which is far away.
        self.put("max_position_embeddings", max(longest, 1), absent=15)
        factor = self.one(1, 1.0, 1.5, 2.0, 4, 8.0, 32.0)
        if self.rope in ("linear", "dynamic"):
            return {"factor": factor}
        if self.rope == "llama3":
            return {"factor": factor, "low_freq_factor": self.one(1.0, 1, 0.5), "high_freq_factor": self.one(4.0, 4, 2.0)}
        if self.rope == "longrope":
            values = {"short_factor": [self.one(1, 1.0, round(r.uniform(1, 2), 3)) for _ in range(half)],
                      "long_factor": [self.one(1.0, round(r.uniform(1, 20), 3)) for _ in range(half)]}
            self.some(values, factor=factor if self.chance(80) else None, attention_factor=self.one(1.0, 1.19, 2, None))
            return values
        if self.rope == "yarn":
            values = {"factor": factor if self.chance(90) else None}
            self.some(values, attention_factor=self.one(1.0, 0.8, 1.3, None), beta_fast=self.one(32, 32.0, 4, 2.5, None),
                      beta_slow=self.one(1, 1.0, 0.25, None), truncate=self.chance(50), mscale=self.one(1.0, 0.707, 2, 0),
                      mscale_all_dim=self.one(1.0, 0.707, 0.5, 0))
            return values
        return {}

    def some(self, values, **more):
        values.update({key: value for key, value in more.items() if self.chance(35)})

    def theta(self):
        return self.one(100.0, 1000.0, 10000.0, 10000, 500000.0, 1e6)

    def named(self, values):
        """With the kind's name, as `type`, `rope_type` or both."""
        kind = self.rope
        if self.family == "phi3" and kind == "longrope" and self.chance(30):
            # What older checkpoints call it.
            kind = self.one("su", "yarn")
        keys = self.one(["type"], ["rope_type"], ["rope_type"], ["type", "rope_type"])
        named = values | dict.fromkeys(keys, kind)
        if len(keys) == 2 and self.chance(20):
            named["type"] = "linear"
        return named

    def rope_keys(self):
        """Rope keys in the old spelling, the new one, or both."""
        self.partial = 1.0
        if self.family == "phi3":
            self.partial = self.one(1.0, 1.0, 0.75, 0.5, 0.25)
            # Nothing could turn.
            if int(self.head_dim * self.partial) < 2:
                self.partial = 1.0
        values = self.rope_values()
        if self.rope in ("yarn", "longrope", "llama3"):
            where = self.one("inside", "inside", "inside", "outside", "both", "neither")
            if where in ("inside", "both"):
                values["original_max_position_embeddings"] = self.original
            if where in ("outside", "both"):
                self.config["original_max_position_embeddings"] = self.original * (1 if where == "outside" else self.one(1, 2))
        elif self.family == "phi3":
            self.put("original_max_position_embeddings", 4096, absent=50)
        partial_inside = {}
        if self.partial != 1.0 or self.family == "phi3" and self.chance(30):
            if self.chance(50):
                self.config["partial_rotary_factor"] = self.partial
            else:
                partial_inside = {"partial_rotary_factor": self.partial}
        spelling = self.one("old", "old", "new", "both")
        if partial_inside and spelling == "old":
            self.config |= partial_inside
            partial_inside = {}
        if spelling == "old" or self.chance(20):
            self.put("rope_theta", self.theta(), absent=20)
        if spelling == "old" and self.rope == "default":
            self.put("rope_scaling", self.named({}), absent=40, null=50)
        elif spelling == "old":
            self.config["rope_scaling"] = self.named(values | ({"rope_theta": self.theta()} if self.chance(10) else {}))
        else:
            theta = {"rope_theta": self.theta()} if self.chance(85) else {}
            self.config["rope_parameters"] = self.named(values | theta | partial_inside)
            if self.rope == "default" and self.chance(15):
                self.put("rope_parameters", None)
            if spelling == "both":
                self.put("rope_scaling", self.named(values), absent=50, null=20)

    def rope_keys_of_two(self):
        """Gemma 3's: one rope for each type of layer."""
        self.partial = 1.0
        values = self.rope_values()
        if self.rope in ("yarn", "longrope", "llama3") and (self.rope == "longrope" or self.chance(80)):
            values["original_max_position_embeddings"] = self.original
        spelling = self.one("old", "old", "new", "both")
        if spelling != "new":
            self.put("rope_theta", self.theta(), absent=30)
            self.put("rope_local_base_freq", self.theta(), absent=30)
        if spelling != "old":
            each = {"full_attention": self.named(values | ({"rope_theta": self.theta()} if self.chance(80) else {})),
                    "sliding_attention": {"rope_type": "default"} | ({"rope_theta": self.theta()} if self.chance(80) else {})}
            if self.chance(15):
                each["sliding_attention"] = {"rope_type": "linear", "factor": self.one(2.0, 4), "rope_theta": self.theta()}
            if self.chance(15):
                each.pop("sliding_attention")
            self.config["rope_parameters"] = each
            if self.rope == "default" and self.chance(15):
                self.config["rope_parameters"] = None
        elif self.rope == "default":
            self.put("rope_scaling", self.named({}), absent=40, null=50)
        else:
            named = self.named(values)
            # Here transformers takes no notice of `type` alone; without a rope that stretches, the prompt would be too long.
            if self.rope == "dynamic":
                named["rope_type"] = "dynamic"
            self.config["rope_scaling"] = named

    def gemma(self):
        third = self.family == "gemma3_text"
        self.put("hidden_activation", "gelu_pytorch_tanh", absent=40)
        self.put("hidden_act", self.one("gelu_pytorch_tanh", "gelu"), absent=70)
        self.put("attention_bias", self.chance(30), absent=50)
        self.put("query_pre_attn_scalar", self.one(self.head_dim, 16, 24, 100, 144, 256), absent=25)
        self.put("attn_logit_softcapping", self.one(0.5, 1.0, 2, 50.0), absent=30, null=30)
        self.put("final_logit_softcapping", self.one(0.5, 1.0, 3, 30.0), absent=30, null=30)
        self.put("use_bidirectional_attention", False, absent=80, null=10)
        self.put("cache_implementation", "hybrid", absent=70)
        self.window(null=0)
        if third:
            self.put("sliding_window_pattern", self.rng.randint(1, 4), absent=40)
            self.put("_sliding_window_pattern", self.rng.randint(1, 6), absent=70)
        self.layer_types(absent=70)

    def of_family(self):
        family, put, chance = self.family, self.put, self.chance
        if family in ("llama", "smollm3", "granite"):
            put("mlp_bias", chance(40), absent=40)
        if family in ("llama", "qwen3", "smollm3", "granite", "olmo2"):
            put("attention_bias", chance(40), absent=40)
        if family in ("mistral", "phi3"):
            self.window()
        if family == "ministral":
            self.window(absent=10, null=10)
            self.layer_types(absent=0 if self.config["model_type"] == "mistral" else 30)
        if family in ("qwen2", "qwen3"):
            self.only_some_windows()
        if family.startswith("gemma"):
            self.gemma()
        if family == "smollm3":
            put("use_sliding_window", chance(80), absent=20)
            self.window(absent=10, null=10)
            put("max_window_layers", 28, absent=50)
            put("no_rope_layer_interval", self.rng.randint(1, 5), absent=40)
            put("no_rope_layers", [self.one(0, 1) for _ in range(self.layers + self.one(0, 0, 2))], absent=50, null=10)
            # Without use_sliding_window it depends on the attention's implementation whether such layers have a window.
            if self.config.get("use_sliding_window"):
                self.layer_types(absent=60)
        if family == "granite":
            put("embedding_multiplier", self.one(12, 12.0, 1.0, 0.5), absent=25)
            put("logits_scaling", self.one(8, 16.0, 0.25, 1.0), absent=25)
            put("residual_multiplier", self.one(0.22, 1, 1.5), absent=25)
            put("attention_multiplier", self.one(0.0078125, 0.015625, 0.25, 1), absent=25)
        if family == "llama" and chance(10):
            # Of another family: it means nothing here.
            self.window(absent=0, null=0)

    def whole(self):
        family = self.family
        name = "mistral" if family == "ministral" and self.chance(60) else family
        self.config |= {"architectures": [f"{MODEL_CLASS[family]}ForCausalLM"], "model_type": name}
        self.heads()
        self.sizes()
        (self.rope_keys_of_two if family == "gemma3_text" else self.rope_keys)()
        self.of_family()
        return self.config


def wrapped(drawing):
    """A Gemma 3 with its vision tower."""
    text = drawing.whole()
    text.pop("architectures")
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text, "vision_config": vision,
              "mm_tokens_per_image": 4, "boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 95}
    if drawing.chance(30):
        config["tie_word_embeddings"] = text.get("tie_word_embeddings", True)
    return config


def stored_name(name, family, as_is):
    """As checkpoints of the hub have it: Gemma 3 with vision has other names in memory."""
    if family != "gemma3" or as_is:
        return name
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    for inside, stored in [("model.language_model.", "language_model.model."), ("model.", "")]:
        if name.startswith(inside):
            return stored + name[len(inside):]
    return name


def fnv1a64(name):
    hashed = 0xCBF29CE484222325
    for byte in name.encode():
        hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    return hashed


def values(family, name, shape, shift):
    """What tensor `name` holds. From the name's FNV-1a hash, splitmix64 makes element by element a number in [-1, 1); a matrix
    has it times a power of two, which keeps the variance of products near 1 to 3."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64(fnv1a64(name)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = ((z >> np.uint64(40)).astype(np.int64) - 2**23).astype(np.float32) * np.float32(2.0**-23)
    if len(shape) > 1:
        down = max((int(shape[-1]).bit_length() - 1) // 2 - 1, 0) + (shift if "embed_tokens" in name else 0)
        made = unit * np.float32(2.0**-down)
    elif "norm" in name:
        made = unit / np.float32(8) + np.float32(0 if family.startswith("gemma") else 1)
    else:
        made = unit / np.float32(4)
    return made.reshape(shape)


def computed(config, family, ids, shift, as_is):
    """The checkpoint's tensors, and all logits; an exception if transformers cannot take the configuration, or if F32 is too coarse
    for it to tell right from wrong."""
    import torch, transformers

    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(config, file)
        read = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(read, attn_implementation="eager", dtype=torch.float32).eval()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and tied:
                continue
            stored = stored_name(name, family, as_is)
            tensor.copy_(torch.from_numpy(values(family, stored, tuple(tensor.shape), shift)))
            tensors.append([stored, list(tensor.shape)])
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        finer = model.double()(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite")
    if np.linalg.norm(logits - finer) > 1e-5 * np.linalg.norm(finer):
        raise ValueError("so sensitive that the rounding of F32 shows")
    return tensors, logits


def drawn(family, rope, rng):
    drawing = Drawing(rng, "gemma3_text" if family == "gemma3" else family, rope)
    config = wrapped(drawing) if family == "gemma3" else drawing.whole()
    ids = [rng.randrange(96) for _ in range(drawing.tokens)]
    if family == "gemma3":
        # Such a token would ask for an image.
        ids = [id % 90 for id in ids]
    shift = rng.choice([0, 0, 8])
    tensors, logits = computed(config, family, ids, shift, rng.random() < 0.25)
    rows = sorted(rng.sample(range(len(ids) - 1), min(5, len(ids) - 1)) + [len(ids) - 1])
    rounded = [[float(f"{logit:.7g}") for logit in logits[row]] for row in rows]
    return {"family": family, "rope": rope, "config": config, "shift": shift, "tensors": tensors, "ids": ids, "rows": rows,
            "logits": rounded}


def main():
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in FAMILIES or sys.argv[4:] not in [[]] + [[rope] for rope in ROPES]:
        sys.exit(__doc__)
    family, count, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    import torch, transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    refused = collections.Counter()
    ropes = sys.argv[4:] or ROPES_OF.get(family, ROPES)
    for number in range(count):
        rope = ropes[number % len(ropes)]
        for attempt in range(200):
            rng = random.Random(f"{family} {seed} {sys.argv[4:]} {number} {attempt}")
            try:
                line = drawn(family, rope, rng)
            except Exception as error:  # transformers has no type of its own for what it refuses.
                refused[f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"] += 1
                continue
            print(json.dumps(line, separators=(",", ":")), flush=True)
            break
        else:
            sys.exit(f"{family}: 200 drawings in a row were refused, the last by: {list(refused)[-1]}")
    for why, times in refused.most_common():
        print(f"{family} {' '.join(sys.argv[4:])}: refused {times} times: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
