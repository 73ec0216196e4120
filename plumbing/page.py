"""Fills page.html with a network, as plain values that JavaScript reads."""

import base64
import gzip
import hashlib
import json
import os

import torch

from layers import BatchNorm1d
from plumbing.cli import MAX_LENGTH, log
from plumbing.fast import LAYERS, is_stack_of
from plumbing.files import atomic_write, holds

TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html")


def packed(tensor):
    """A vector as base64 of float32; a matrix as int8 with one float32 scale per row."""
    if tensor.dim() == 1:
        return base64.b64encode(tensor.numpy().tobytes()).decode()
    scale = tensor.abs().amax(1).clamp(min=1e-30) / 127
    values = base64.b64encode((tensor / scale.unsqueeze(1)).round().char().numpy().tobytes())
    sizes = {"rows": len(tensor), "columns": tensor.shape[1]}
    return sizes | {"scale": packed(scale), "values": values.decode()}


@torch.no_grad()
def page_layers(net):
    """The layers in eval mode as plain values, each BatchNorm1d folded into the Linear before."""
    stack = []
    for layer in net:
        entry = {"class": type(layer).__name__, "n": getattr(layer, "n", None)}
        entry |= {"bias": None} | dict(layer.named_parameters())
        if isinstance(layer, BatchNorm1d):
            scale, shift = layer.scale_and_shift()
            entry |= {"weight": scale, "bias": shift}
            if stack[-1]["class"] == "Linear":
                linear = stack.pop()
                bias = 0.0 if linear["bias"] is None else linear["bias"]
                linear["weight"] = linear["weight"] * scale.unsqueeze(1)
                entry = linear | {"bias": entry["bias"] + scale * bias}
        stack += [entry] * (entry["class"] != "Dropout")
    return [{k: packed(v) if torch.is_tensor(v) else v for k, v in e.items()} for e in stack]


def is_page(path):
    """Whether a file is a page that write_page() wrote: the template holds no network."""
    return holds(path, b'id="network">{')


def write_page(
    path,
    net,
    vocab,
    title,
    names,
    temperature=1.0,
    *,
    quantiles=None,
    heading=None,
    lengths=(1, MAX_LENGTH),
):
    """Fill page.html with the network, and with the list where only new names are wanted.

    `title` is what the list is called; `heading` stands at the top, and in the title bar. With the
    `quantiles` of losses that training keeps, a name's number is how many percent fit worse.
    """
    if not is_stack_of(net, LAYERS):
        known = ", ".join(layer.__name__ for layer in LAYERS)
        raise ValueError(f"--page knows only {known}, and this network has others")
    with open(TEMPLATE, encoding="utf-8") as file:
        before, mark, after = file.read().partition('id="network">null<')
    if not mark:
        raise ValueError(f"{TEMPLATE} has no place for the network: get it anew")
    network = {"config": net.config, "chars": list(vocab.chars), "mark": vocab.mark or -1}
    network |= {"layers": page_layers(net)}
    network["id"] = hashlib.sha256(json.dumps(network).encode()).hexdigest()[:12]
    network |= {"title": title, "heading": heading, "temperature": temperature}
    network |= {"minLength": lengths[0], "maxLength": lengths[1], "quantiles": quantiles}
    said = f"; it holds the list of {len(names):,} names: mind who may see it" if names else ""
    if names:
        names = base64.b64encode(gzip.compress("\n".join(names).encode(), mtime=0)).decode()
    network["names"] = names
    filled = json.dumps(network).replace("<", "\\u003c")  # no text in it ends the script
    page = f'{before}id="network">{filled}<{after}'
    atomic_write(path, page.encode(), own=f".{os.getpid()}")
    log(f"written: {path}, to be opened in a browser{said}")
