"""A portable checkpoint as an ONNX model with a cache, and a page that runs it in a browser.

In: a checkpoint's folder and what was loaded from it, of the portable shape. Out: a folder with
`index.html` and `model/`, laid out and named as transformers.js and optimum expect. Needs the
`onnx` package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from config import ModelConfig, UserError
from hearth.export import card, huggingface, qwen3
from hearth.training.checkpoint import Loaded

PAGE = Path(__file__).with_name("onnx.html")
OPSET = 18  # in every onnxruntime since 1.15
USAGE = """```
python -m http.server --directory FOLDER
```

then open http://localhost:8000. The page brings transformers.js from cdn.jsdelivr.net; prompts and
answers stay in the browser. In Python: onnxruntime runs `model/onnx/model.onnx`."""


def write(checkpoint: Path, loaded: Loaded, out: Path) -> None:
    """Write the folder `out` for `loaded`, which came from the folder `checkpoint`."""
    library = onnx_package()
    with huggingface.new_folder(out) as folder:
        model = folder / "model"
        huggingface.write(checkpoint, loaded, model)
        for name in ("model.safetensors", "README.md"):
            (model / name).unlink()
        if huggingface.is_chat(loaded):
            template_into_config(model)
        (model / "onnx").mkdir()
        graph = build(loaded.config.model, qwen3.weights(loaded.model), library)
        library.save(graph, model / "onnx" / "model.onnx")
        shutil.copyfile(PAGE, folder / "index.html")
        text = card.text(checkpoint, loaded, "transformers.js", USAGE)
        (folder / "README.md").write_text(text, encoding="utf-8")


def template_into_config(folder: Path) -> None:
    """transformers.js reads the chat template there."""
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["chat_template"] = template.read_text(encoding="utf-8")
    huggingface.write_json(config, settings)
    template.unlink()


def onnx_package() -> ModuleType:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise UserError(
            "--to onnx needs the package onnx. Install it with `uv sync --group dev`."
        ) from error
    return onnx


def build(c: ModelConfig, weights: dict[str, Tensor], library: ModuleType) -> Any:
    """The model as ONNX. B rows, T new tokens, P cached ones, S = P + T; in: `input_ids` and
    `position_ids` (B, T), `attention_mask` (B, S), 1 where a token is no padding, and of each layer
    `past_key_values.N.key` and `.value` (B, G, P, E); out: `logits` (B, T, V), `present.N.…`.
    """
    graph = Graph(library)
    ids = graph.input("input_ids", np.int64, ("B", "T"))
    seen = graph.input("attention_mask", np.int64, ("B", "S"))
    positions = graph.input("position_ids", np.int64, ("B", "T"))
    mask, rotary = mask_of(graph, ids, seen), rotary_of(graph, c, positions)
    x = graph("Gather", graph.weight(weights["model.embed_tokens.weight"]), ids)
    for layer in range(c.n_layer):
        prefix = f"model.layers.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        block = Block(graph, c, {name.split(".")[-2]: weight for name, weight in own.items()})
        x = graph("Add", x, block.attention(x, layer, rotary, mask))
        x = graph("Add", x, block.mlp(x))
    x = graph("Mul", graph.rms_norm(x), graph.weight(weights["model.norm.weight"]))
    graph.output("logits", graph.product(x, weights["lm_head.weight"]), ("B", "T", c.vocab_size))
    return graph.model()


class Graph:
    """An ONNX graph being built: called with an operator and its inputs' names, it gives the name
    of the output, or of several.
    """

    def __init__(self, library: ModuleType) -> None:
        self.library, self.nodes, self.initialisers = library, [], []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def __call__(self, kind: str, *inputs: str, n_outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind}_{len(self.nodes)}_{n}" for n in range(n_outputs)]
        self.nodes.append(self.library.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if n_outputs == 1 else names

    def _typed(self, name: str, dtype: Any, shape: tuple[Any, ...]) -> Any:
        helper = self.library.helper
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    def input(self, name: str, dtype: Any, shape: tuple[Any, ...]) -> str:
        self.inputs.append(self._typed(name, np.dtype(dtype), shape))
        return name

    def output(self, name: str, made: str, shape: tuple[Any, ...]) -> None:
        self.nodes.append(self.library.helper.make_node("Identity", [made], [name]))
        self.outputs.append(self._typed(name, np.dtype(np.float32), shape))

    def weight(self, value: Tensor | np.ndarray | list[int] | float) -> str:
        """A tensor in the file: numbers as int64 where they are whole, else float32."""
        if isinstance(value, Tensor):
            value = value.numpy()
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"weight_{len(self.initialisers)}"
        self.initialisers.append(self.library.numpy_helper.from_array(array, name))
        return name

    def product(self, x: str, weight: Tensor) -> str:
        """x (…, d) times the transposed weight (n, d)."""
        return self("MatMul", x, self.weight(weight.T.contiguous()))

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 takes what is left."""
        return self("Reshape", x, self.weight(list(shape)))

    def rms_norm(self, x: str) -> str:
        squares = self("ReduceMean", self("Mul", x, x), self.weight([-1]), keepdims=1)
        return self("Div", x, self("Sqrt", self("Add", squares, self.weight(1e-6))))

    def size(self, x: str, axis: int) -> str:
        """The length of an axis, without axes."""
        return self("Squeeze", self("Shape", x, start=axis, end=axis + 1), self.weight([0]))

    def model(self) -> Any:
        helper = self.library.helper
        graph = helper.make_graph(
            self.nodes, "hearth", self.inputs, self.outputs, self.initialisers
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def mask_of(graph: Graph, ids: str, seen: str) -> str:
    """What is added to scores (B, G, R, T, S): 0 where a query may attend to a key, else -1e9."""
    n_new, n_all = graph.size(ids, 1), graph.size(seen, 1)
    one = graph.weight(1)
    keys = graph("Range", graph.weight(0), n_all, one)  # (S,)
    queries = graph("Range", graph("Sub", n_all, n_new), n_all, one)  # (T,)
    causal = graph("LessOrEqual", keys, graph("Unsqueeze", queries, graph.weight([1])))  # (T, S)
    real = graph("Equal", graph("Unsqueeze", seen, graph.weight([1, 2, 3])), one)
    allowed = graph("And", real, causal)  # (B, 1, 1, T, S)
    return graph("Where", allowed, graph.weight(0.0), graph.weight(-1e9))


def rotary_of(graph: Graph, c: ModelConfig, positions: str) -> tuple[str, str]:
    """Cosines and sines (B, T, 1, E) of the positions (B, T)."""
    E = c.head_dim
    frequencies = c.rope_base ** (-np.arange(0, E, 2) / E)
    places = graph("Cast", positions, to=graph.library.TensorProto.FLOAT)
    places = graph("Unsqueeze", places, graph.weight([2, 3]))
    angles = graph("Mul", places, graph.weight(np.tile(frequencies, 2)))
    return graph("Cos", angles), graph("Sin", angles)


class Block:
    """One layer's part of the graph; its weights go by the last part of transformers' names."""

    def __init__(self, graph: Graph, c: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.graph, self.config, self.weights = graph, c, weights

    def heads(self, x: str, name: str, n_head: int) -> str:
        """(B, T, n_head, E)"""
        made = self.graph.product(x, self.weights[f"{name}_proj"])
        return self.graph.reshape(made, 0, 0, n_head, self.config.head_dim)

    def turned(self, x: str, name: str, n_head: int, rotary: tuple[str, str]) -> str:
        """Queries or keys, normed and turned to their positions."""
        graph = self.graph
        gain = graph.weight(self.weights[f"{name}_norm"])
        x = graph("Mul", graph.rms_norm(self.heads(x, name, n_head)), gain)
        first, second = graph("Split", x, axis=-1, num_outputs=2, n_outputs=2)
        across = graph("Concat", graph("Neg", second), first, axis=-1)
        return graph("Add", graph("Mul", x, rotary[0]), graph("Mul", across, rotary[1]))

    def cached(self, x: str, layer: int, name: str) -> str:
        """Keys or values (B, G, S, E): those of the cache, then x (B, T, G, E)."""
        graph, c = self.graph, self.config
        G, E = c.n_kv_head, c.head_dim
        past = graph.input(f"past_key_values.{layer}.{name}", np.float32, ("B", G, "P", E))
        x = graph("Concat", past, graph("Transpose", x, perm=[0, 2, 1, 3]), axis=2)
        graph.output(f"present.{layer}.{name}", x, ("B", G, "S", E))
        return x

    def attention(self, x: str, layer: int, rotary: tuple[str, str], mask: str) -> str:
        """R = H / G queries share a key; they are laid out along the queries' axis for it."""
        graph, c = self.graph, self.config
        H, G, E = c.n_head, c.n_kv_head, c.head_dim
        x = graph.rms_norm(x)
        q = self.turned(x, "q", H, rotary)
        k = self.cached(self.turned(x, "k", G, rotary), layer, "key")
        v = self.cached(self.heads(x, "v", G), layer, "value")
        q = graph("Transpose", q, perm=[0, 2, 1, 3])  # (B, H, T, E)
        q = graph("Mul", q, graph.weight(E**-0.5))
        q = graph.reshape(q, 0, G, H // G, -1, E)  # (B, G, R, T, E)
        one = graph.weight([2])
        k = graph("Unsqueeze", graph("Transpose", k, perm=[0, 1, 3, 2]), one)  # (B, G, 1, E, S)
        scores = graph("Add", graph("MatMul", q, k), mask)  # (B, G, R, T, S)
        shares = graph("Softmax", scores, axis=-1)
        attended = graph("MatMul", shares, graph("Unsqueeze", v, one))  # (B, G, R, T, E)
        attended = graph("Transpose", attended, perm=[0, 3, 1, 2, 4])
        return graph.product(graph.reshape(attended, 0, 0, H * E), self.weights["o_proj"])

    def mlp(self, x: str) -> str:
        graph = self.graph
        x = graph.rms_norm(x)
        gate = graph.product(x, self.weights["gate_proj"])
        gate = graph("Mul", gate, graph("Sigmoid", gate))
        up = graph.product(x, self.weights["up_proj"])
        return graph.product(graph("Mul", gate, up), self.weights["down_proj"])
