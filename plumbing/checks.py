"""Whether a network can be trained here: on its device, written and loaded again."""

import io

import torch

import model
from plumbing.processes import log


def without_dropout(config, weights):
    """The network as it is written. By position: without Dropout, layers have other numbers."""
    net = model.WaveNet(**config)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    return net


def check_network(net, vocab, tokens):
    """Raise ValueError, before the work, for a network that could not be written and loaded."""
    try:
        file, plain = io.BytesIO(), without_dropout(net.config, net.state_dict())
        values = net.config, vocab.chars, model.layer_names(plain), {}, dict(plain.state_dict())
        torch.save(dict(zip(model.CHECKPOINT, values)), file)
        content = torch.load(io.BytesIO(file.getvalue()), "cpu", weights_only=True)
        again = model.rebuild(content, file.tell())
        losses = [model.token_losses(each, tokens[:99]) for each in (net, again)]
        if not torch.allclose(*losses, atol=1e-3, equal_nan=True):
            raise ValueError("it gives other numbers then")
    except Exception as error:  # whatever its layers raise
        raise ValueError(f"WaveNet cannot be run, written and loaded: {error!r:.300}") from None
    if not hasattr(net[-1], "weight"):
        log("the last layer has no weight: the logits will not be scaled")


def moved(net, device, tokens):
    """The network on the device. Raises ValueError where that computes other losses than a CPU."""
    losses = model.token_losses(net, tokens)
    if not torch.allclose(losses, model.token_losses(net.to(device), tokens), atol=1e-3):
        raise ValueError(f"--device {device} computes wrongly here: leave it out")
    return net
