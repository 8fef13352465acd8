"""Runs the MLP of every layer of a model in NumPy, over ctypes alone: python3 mlp.py LIBRARY MODEL_FOLDER

The weights are streamed, and become F32 on arrival; NumPy reads them where they lie, nothing is copied.
"""
import ctypes as c
import sys

import numpy as np

ls = c.CDLL(sys.argv[1])
ls.ls_last_error.restype = c.c_char_p
LS_F32 = 12
WEIGHTS = ["post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]


class Handle(c.Structure):
    _fields_ = [("id", c.c_uint64)]


class UnitTensor(c.Structure):
    _fields_ = [("name", c.c_char_p), ("stored", c.c_char_p), ("dtype", c.c_int32), ("rows", c.c_size_t), ("columns", c.c_size_t)]


class Unit(c.Structure):
    _fields_ = [("name", c.c_char_p), ("tensors", c.POINTER(UnitTensor)), ("count", c.c_size_t), ("tier", c.c_int32)]


class Options(c.Structure):
    _fields_ = [(name, c.c_size_t) for name in ("size", "n_gpu", "n_cpu_pinned", "n_cpu", "b_gpu", "b_pinned", "b_cpu")]
    _fields_ += [("reader", c.c_int32), ("cache", c.c_int32), ("units", c.POINTER(Unit)), ("unit_count", c.c_size_t)]
    _fields_ += [(name, c.c_void_p) for name in ("tiers", "progress", "progress_user", "log", "log_user")]
    _fields_ += [(name, c.c_size_t) for name in ("ram", "ram_n", "pinned", "pinned_n", "gpu", "gpu_n", "host_budget", "budget")]


class Tensor(c.Structure):
    _fields_ = [("data", c.c_void_p), ("dtype", c.c_int32), ("rank", c.c_uint32), ("shape", c.c_size_t * 8)]


def check(status):
    if status != 0:
        raise RuntimeError(ls.ls_last_error().decode())


def weight(layer, name):
    tensor = Tensor()
    check(ls.ls_layer_tensor(layer, name.encode(), c.byref(tensor)))
    data = c.cast(tensor.data, c.POINTER(c.c_float))
    return np.ctypeslib.as_array(data, tuple(tensor.shape[: tensor.rank]))


device, stream, checkpoint, streamer, options = Handle(), Handle(), Handle(), Handle(), Options()
check(ls.ls_device_cpu(c.byref(device)))
check(ls.ls_stream_open(device, c.byref(stream)))
check(ls.ls_checkpoint_open(sys.argv[2].encode(), c.byref(checkpoint)))
check(ls.ls_streamer_options_init(c.byref(options), c.c_size_t(c.sizeof(options))))
rows = [[UnitTensor(w.encode(), f"model.layers.{n}.{w}".encode(), LS_F32) for w in WEIGHTS] for n in range(8)]
units = [Unit(f"mlp {n}".encode(), (UnitTensor * len(row))(*row), len(row), 0) for n, row in enumerate(rows)]
options.units, options.unit_count = (Unit * len(units))(*units), len(units)
check(ls.ls_streamer_open(device, checkpoint, c.byref(options), c.byref(streamer)))

state = {"x": np.linspace(-1, 1, 128, dtype=np.float32), "layers": 0}


@c.CFUNCTYPE(c.c_int32, c.c_void_p, Handle)
def layer_function(_user, layer):
    norm, gate, up, down = (weight(layer, name) for name in WEIGHTS)
    x = state["x"]
    g = gate @ (h := x / np.sqrt(np.mean(x * x) + 1e-6) * norm)
    state["x"] = x + down @ (g / (1 + np.exp(-g)) * (up @ h))
    state["layers"] += 1
    return 0


check(ls.ls_run_pass(streamer, stream, layer_function, None))
assert state["layers"] == len(units), "ctypes goes on after an error in layer_function"
print(*(f"{value:.5f}" for value in state["x"]))
for close, handle in ((ls.ls_streamer_close, streamer), (ls.ls_checkpoint_close, checkpoint), (ls.ls_device_close, device)):
    check(close(handle))
check(ls.ls_stream_close(stream))
