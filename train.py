"""Train the network on a list of names and write model_state.pth."""

from plumbing import cli

if __name__ == "__main__":
    cli.as_script()  # before torch is imported: that takes a second, in which Ctrl-C may come

import copy
import random
from functools import partial

import torch

import model
from layers import Embedding
from model import Vocabulary, WaveNet, contexts_and_targets, token_losses, windows
from plumbing import checks, fast, lists, processes, recipe, report, runs
from plumbing.cli import MAX_LENGTH, NAMES, bounded
from plumbing.processes import log, rank, world_size
from plumbing.recipe import smooth_targets, truncate
from sampling import generate, score

VAL_WINDOWS, FINAL_WINDOWS = 25_000, 430_000  # at most: in each validation; of a split at the end
SCALES = [percent / 100 for percent in range(30, 136, 5)]  # of the logits, for calibrate()


# The data and the minibatches


def split(names):
    """Distinct names, shuffled -> {"train": the first 80 %, "test": 10 %, "val": the last 10 %}."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = {"train": names[:a], "val": names[b:], "test": names[a:b]}
    if not all(parts.values()):
        raise ValueError(f"{len(names)} names are too few to split in three: give some hundreds")
    return parts


def minibatches(net, tokens, start, args):
    """Yield the minibatch of each step from `start` on: (rows, targets), windows drawn at random.

    rows are those of fast.distinct_rows(); targets are tokens (B,), or with --smoothing their
    probabilities (B, vocab_size). plumbing/recipe.py says why contexts are truncated and targets
    smoothed.
    """
    vocab_size = net.config["vocab_size"]
    # Hidden tokens use WaveNet's extra row; without one they become padding.
    mask = vocab_size if isinstance(net[0], Embedding) and len(net[0].weight) > vocab_size else 0
    if args.smoothing:
        smoothed = smooth_targets(tokens, vocab_size, args.smoothing).to(args.device)
    # A hundred at once, as the calls take about as long as those for one: with one at a time a step
    # takes 1.2 times as long, with the sizes of the lecture 1.7 times. 2^22 tokens are 32 MB.
    chunk = max(1, min(100, 2**22 // (args.batch_size * args.block_size)))
    own = slice(rank(), None, world_size())  # each process takes its own windows
    for first in range(start - start % chunk, args.steps, chunk):
        # The seed depends on --seed and the chunk alone: so a resumed training draws the same, from
        # the beginning of its chunk, and skips the steps that are done.
        generator = torch.Generator().manual_seed(args.seed * 10**9 + first)
        drawn = torch.randint(len(tokens), (chunk, args.batch_size), generator=generator)
        contexts, targets = contexts_and_targets(tokens[drawn])
        contexts = truncate(contexts, args.truncate, mask, generator)[:, own].to(args.device)
        targets, drawn = targets[:, own].to(args.device), drawn[:, own]
        for i, rows in enumerate(fast.distinct_rows(net, contexts)):
            if start <= first + i < args.steps:
                yield rows, smoothed[drawn[i]] if args.smoothing else targets[i]


# One step


def learning_rate(step, args):
    """--lr for the first half of the steps, a tenth of it for the second."""
    return args.lr if step < args.steps // 2 else args.lr / 10


def train_step(net, rows, targets, lr, parameters, weight_decay=0.0, pretrained=()):
    """One step of SGD -> the loss in nats per token. Equivalent to this, usually faster:

        loss = F.cross_entropy(net(contexts), targets)
        loss.backward()
        for parameter in parameters:
            parameter -= lr * (parameter.grad + weight_decay * parameter)

    Only matrices decay; with `pretrained`, the weights that training started from, it is
    (parameter - pretrained) that decays: L2-SP, arXiv:1802.01483.
    """
    loss = fast.gradients(net, rows, targets)
    with torch.inference_mode():
        if world_size() > 1:
            processes.average_gradients(parameters)
        for i, parameter in enumerate(parameters):
            if weight_decay and parameter.dim() == 2:
                parameter.mul_(1 - lr * weight_decay)
                if pretrained:
                    parameter.add_(pretrained[i], alpha=lr * weight_decay)
            parameter.sub_(parameter.grad, alpha=lr)
    return loss.item()


# The training


def update_average(average, net, n):
    """Polynomial-decay averaging, arXiv:1212.1824: the nth weights (n from 0) count 4 / (n + 4).

    1 / (n + 1) would be the plain mean of all. With 4, earlier ones count less and less: the last
    quarter has two thirds of the weight.
    """
    for mean, weight in zip(average.parameters(), net.parameters()):
        mean.lerp_(weight, 4 / (n + 4))


@torch.no_grad()
def train(net, average, vocab, data, args, run):
    """SGD from run.step to args.steps, unless a signal stops it. Raises ValueError for nan losses.

    run.best becomes the averaged weights of least validation loss. Candidates are the averages of
    the second half of the steps and, with --init-from, the weights that training started from.
    """
    parameters = list(net.train().parameters())
    for norm in batch_norms(net):
        norm.momentum = 0.0  # no running statistics: validate() computes the average's
    pretrained = [weight.to(args.device) for weight in run.pretrained]
    weight_decay = recipe.weight_decay(len(data["train"]), args.steps, bool(pretrained))
    eval_every = recipe.eval_every(len(data["val"]), args.steps)
    # A case mark is a token, but not a character: there may be more nats per character than token.
    per_character = len(data["train"]) / n_characters(data["train"], vocab)
    with run.watching():  # a progress bar; Ctrl-C waits for the end of a step
        if pretrained and run.step == 0 and not rank():  # what it starts from may remain best
            validate(average, vocab, data, args, run)
        for rows, targets in minibatches(net, data["train"], run.step, args):
            # For dropout; below zero, as minibatches() has the other seeds.
            torch.manual_seed(-1 - args.seed * 10**9 - run.step)
            lr = learning_rate(run.step, args)
            loss = train_step(net, rows, targets, lr, parameters, weight_decay, pretrained)
            run.record(loss * per_character)  # counts the step, for the curve in the picture
            last = run.step == args.steps
            if run.step % 10 == 0 or last:  # not at each step: neighbours are nearly the same
                update_average(average, net, (run.step - 1) // 10)
            if (run.step % eval_every == 0 or last) and not rank():
                validate(average, vocab, data, args, run)
            if run.checkpoint():  # saves when it is time to; true after Ctrl-C
                break


# Measuring


def batch_norms(net):
    """The layers that keep running statistics."""
    return [each for each in net.modules() if getattr(each, "running_mean", None) is not None]


def token_counts(tokens, vocab):
    """How often each token is the target of a window, (V,)."""
    parts = tokens[:, -1].split(2**22)  # in parts: a list of ten million fits
    return sum(torch.bincount(part, minlength=len(vocab)) for part in parts)


def n_characters(tokens, vocab):
    """How many windows have a character or the end of a name as target: not a mark."""
    return len(tokens) - ((tokens[:, -1] == vocab.mark).sum().item() if vocab.mark else 0)


def evaluate(net, tokens, vocab, scales=(1.0,), progress=iter):
    """The mean loss, in nats per character of the names and their ends, for each scale."""
    losses = token_losses(net, tokens, scales, progress)
    return (losses.double().sum(0) / n_characters(tokens, vocab)).tolist()


def calibrate(net, tokens, vocab):
    """(loss, scale): the scale of what the network adds to its bias that has the least loss.

    A network is too sure of what it knows by heart, arXiv:1706.04599: less of it leaves more to the
    bias, the frequencies of the characters.
    """
    scales = SCALES if hasattr(net[-1], "weight") else [1.0]
    return min(zip(evaluate(net, tokens, vocab, scales), scales))


@torch.no_grad()
def recompute_statistics(net, tokens, batches):
    """Set the statistics of BatchNorm layers, by windows drawn at random, always the same ones.

    Those from training would belong to the weights before the average: arXiv:1803.05407.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [norm.train() for norm in batch_norms(net.eval())]  # without Dropout
    # A short list has few distinct windows, which need no large batch.
    batch_size = min(8192, max(2048, len(tokens) // 4))
    for i in range(batches):
        for norm in norms:
            norm.momentum = 1 / (i + 1)  # so they become the mean of all batches
        drawn = torch.randint(len(tokens), (batch_size,), generator=generator)
        contexts, _ = contexts_and_targets(tokens[drawn].to(next(net.parameters()).device))
        fast.logits(net, contexts)
    net.eval()


def validate(average, vocab, data, args, run):
    """Measure the averaged weights, and keep a copy of them where none was better."""
    recompute_statistics(average, data["train"], batches=1)
    loss, _ = calibrate(average, data["val"], vocab)
    run.record_validation(loss)
    # In the first half a small validation split would choose far too early a step.
    if loss < run.best["loss"] and (run.step == 0 or run.step > args.steps // 2):
        weights = copy.deepcopy(average.state_dict())
        run.best = dict(step=run.step, loss=loss, state_dict=weights)
    report.validation(run, generate(average, vocab, 20, max_length=100))


@torch.no_grad()
def finalize(config, best, data, vocab):
    """(network, scale): the best weights as they are written, without Dropout, logits scaled."""
    net = checks.without_dropout(config, best["state_dict"])
    recompute_statistics(net, data["train"], batches=16)
    _, scale = calibrate(net, data["val"], vocab)
    if scale != 1:
        net[-1].weight.mul_(scale)
    return net.eval(), scale


# The command line, and what lies between the list of names and the files


def build_parser():
    parser = cli.Parser(description=__doc__)
    whole, real = partial(bounded, int), partial(bounded, float)
    n, size = partial(whole, 1, 10**12), partial(whole, 1, cli.MAX_SIZE)
    block = partial(whole, 1, cli.MAX_BLOCK_SIZE)
    batch_size, threads = partial(whole, 2, 10**6), partial(whole, 1, 1024)
    seed, dropout = partial(whole, 0, 2**32 - 1), partial(real, 0, 0.99)
    share, positive = partial(real, 0, 1), partial(real, 1e-6, 1e6)
    add = parser.add_argument_group("files").add_argument
    add("--data", metavar="LIST", default=NAMES, help="one name per line (names.txt)")
    add("--column", metavar="C", help="of a table: the number or the heading of its column")
    add("--out", metavar="FILE.pth", help="the network; its picture becomes FILE.png")
    add("--init-from", metavar="FILE", help="start from this network, not from random weights")
    add("--resume", action="store_true", help="go on with an interrupted training")
    add("--checkpoint-every", type=n, metavar="N", default=3000, help="steps between saves (3000)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=n, metavar="N", help="steps of SGD (what suits the list)")
    add("--dropout", type=dropout, metavar="P", help="share of channels (what suits the list)")
    add("--truncate", type=share, metavar="P", help="share of short contexts (what suits the list)")
    add("--smoothing", type=share, metavar="P", help="share from n-grams (what suits the list)")
    add("--lr", type=positive, metavar="X", default=0.1, help="learning rate at first (0.1)")
    add("--batch-size", type=batch_size, metavar="N", default=96, help="windows per step (96)")
    add("--seed", type=seed, metavar="N", default=1, help="another seed, another network (1)")
    add("--threads", type=threads, metavar="N", default=1, help="processor cores to use (1)")
    add("--device", type=cli.device, metavar="D", default="cpu", help="cpu, cuda or mps (cpu)")
    add = parser.add_argument_group("network").add_argument
    add("--block-size", type=block, metavar="N", default=16, help="2, 4, 8 ... 1024 (16)")
    add("--n-embd", type=size, metavar="N", default=24, help="size of a character's vector (24)")
    add("--n-hidden", type=size, metavar="N", default=280, help="channels of each level (280)")
    return parser


def main(argv=None):
    cli.run_cli(lambda: runs.start(build_parser(), argv, train_list))


def train_list(args, setup):
    """Read the list, train, and write the network -> the signal that stopped it before, or 0."""
    torch.set_num_threads(args.threads)
    names = lists.read_names(args.data, args.column, log)
    vocab, parts = Vocabulary(names), split(names)
    data = {part: windows(some, vocab, args.block_size) for part, some in parts.items()}
    chosen = recipe.fill_in(args, len(data["train"]), len(vocab))
    net = new_network(args, vocab, data["train"], setup.pretrained)
    checks.check_network(net, vocab, data["train"])
    average = copy.deepcopy(net)
    run = runs.Run(args, setup, net, average, lists.sha256(names))
    report.describe(len(names), vocab, data, net, chosen)
    # At most 2^25 logits, so that a large alphabet does not make a validation slow.
    few = data | {"val": data["val"][: min(VAL_WINDOWS, 2**25 // len(vocab))]}
    with run.resumable():
        train(net, average, vocab, few, args, run)
        if not run.signum and not rank():
            net, scale = finalize(net.config, run.best, few, vocab)
            finish(net, scale, vocab, parts, data, run)
    return run.signum


def new_network(args, vocab, tokens, pretrained):
    """The network of the seed, on --device, or with what another one has learned: --init-from.

    Its head's bias starts at the log frequencies, so that rare tokens need not be unlearned.
    """
    torch.manual_seed(args.seed)
    net = WaveNet(len(vocab), args.block_size, args.n_embd, args.n_hidden, args.dropout)
    if getattr(net[-1], "bias", None) is not None:
        net[-1].bias.data = (token_counts(tokens, vocab) + 0.5).log().log_softmax(0)
    if pretrained:
        report.taken(args.init_from, model.load_pretrained(net, vocab, *pretrained[:2]))
    return net if args.device == "cpu" else checks.moved(net, args.device, tokens[:1000])


def finish(net, scale, vocab, parts, data, run):
    """Write the network and its picture, and print its losses and a few names.

    Raises ValueError, and writes nothing, when it learned no more than the frequencies.
    """
    losses = {}
    for part, tokens in data.items():
        bar = partial(report.measuring_bar, part)
        losses[part] = evaluate(net, tokens[:FINAL_WINDOWS], vocab, progress=bar)[0]
    frequencies = token_counts(data["train"], vocab) / len(data["train"])
    per_token = torch.special.entr(frequencies).sum().item()  # the loss of these frequencies
    unigram = per_token * len(data["train"]) / n_characters(data["train"], vocab)
    if not losses["train"] < unigram:
        what = f"its loss is {losses['train']:.3f}, that of counting characters {unigram:.3f}"
        raise ValueError(f"the network learned nothing, {what}: lower --lr, or more --steps")
    held_out = parts["val"][:VAL_WINDOWS] + parts["test"][:VAL_WINDOWS]
    scores, names = score(net, vocab, held_out), sum(parts.values(), [])
    lengths = [min(most(map(len, names)), MAX_LENGTH) for most in (min, max)]
    temperature, drawn = recipe.choose_temperature(net, vocab, names, *lengths)
    metadata = runs.about(run, len(names), losses, scores, lengths, temperature)
    runs.write_network(run, net, vocab, metadata)
    report.finished(run, net, losses, scale, metadata, drawn, names)


if __name__ == "__main__":
    main()
