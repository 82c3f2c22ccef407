#!/usr/bin/env python
"""How well a model's features tell classes apart that it was not trained on, beside the same model with random weights.

python tools/comparisons/features.py --data-dir imagenette128.npz --model vim2_nano --pretrained

The model itself stays as it is. Its pooled features, of images resized and cropped as for validation, are classified
by k nearest neighbours (cosine similarity, each neighbour's vote weighted by exp(similarity / 0.07), as in
arXiv 1805.01978) and by a linear probe (logistic regression on standardised features, with L2 decay).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import time

import torch
from torch import Tensor, nn

from vim2.benchmark.measuring import positive
from vim2.classify.data import open_train_and_val
from vim2.classify.memory import eval_loader
from vim2.classify.models import create_model, input_config, load_checkpoint_model
from vim2.classify.options import InputOptions
from vim2.command.errors import UserError
from vim2.command.processes import Processes, start_processes

TEMPERATURE = 0.07


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR", help="class folders, or a pack (.npz), with both splits or without")
    add("--model", default="vim2_nano", metavar="NAME", help="default %(default)s")
    add("--pretrained", action="store_true", help="its pretrained weights")
    add("--checkpoint", metavar="FILE", help="its weights, in place of pretrained ones")
    add("--img-size", type=positive, metavar="PIXELS", help="default: the model's")
    add("--neighbours", type=positive, default=20, metavar="K", help="default %(default)s")
    add("--decay", type=float, default=1e-3, help="L2 decay of the probe; default %(default)s")
    add("--batch-size", type=positive, default=64, metavar="N", help="images a step; default %(default)s")
    add("--workers", type=int, default=2, metavar="N", help="processes that decode; default %(default)s")
    add("--device", help="default: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.neighbours < 1 or args.batch_size < 1 or args.decay < 0:
        raise UserError("--neighbours and --batch-size must be 1 or more, --decay 0 or more.")
    processes = start_processes(args.device, "tools/comparisons/features.py")
    trained, _ = load_checkpoint_model(args.checkpoint, args.model, pretrained=args.pretrained)
    torch.manual_seed(0)
    config = input_config(trained, InputOptions(), args.img_size)
    splits = open_train_and_val("", args.data_dir)[:2]
    print(
        f"{args.model}, {config['input_size'][1]} pixels, {len(splits[0])} images to learn from, "
        f"{len(splits[1])} to test"
    )
    print(f"| weights | {args.neighbours}-NN, % | linear probe, % | features, s |\n|---|---|---|---|")
    for name, model in (("trained", trained), ("random", create_model(args.model))):
        start = time.perf_counter()
        (x, y), (test_x, test_y) = (extract(model, split, config, args, processes) for split in splits)
        seconds = time.perf_counter() - start
        near = accuracy(nearest(x, y, test_x, args.neighbours), test_y)
        probe = accuracy(linear_probe(x, y, test_x, args.decay), test_y)
        print(f"| {name} | {near:.2f} | {probe:.2f} | {seconds:.0f} |", flush=True)


@torch.inference_mode()
def extract(model: nn.Module, images, config: dict, args, processes: Processes) -> tuple[Tensor, Tensor]:
    """Pooled features, (n, C) float32, and classes, (n,), of all images."""
    model.to(processes.device).eval()
    loader = eval_loader(images, config, args.batch_size, args.workers, processes)
    pairs = [(model.forward_head(model.forward_features(x), pre_logits=True).float(), y) for x, y in loader]
    features, classes = (torch.cat(parts) for parts in zip(*pairs))
    return features, classes


def nearest(x: Tensor, y: Tensor, test_x: Tensor, k: int) -> Tensor:
    """Classes, (m,), that the k most similar of (n, C) features, of classes (n,), vote for."""
    similarity = nn.functional.normalize(test_x, dim=1) @ nn.functional.normalize(x, dim=1).T
    values, indices = similarity.topk(min(k, len(x)), dim=1)
    votes = values.new_zeros(len(test_x), int(y.max()) + 1)
    return votes.scatter_add_(1, y[indices], (values / TEMPERATURE).exp()).argmax(1)


def linear_probe(x: Tensor, y: Tensor, test_x: Tensor, decay: float) -> Tensor:
    """Classes, (m,), by a logistic regression on (n, C) features of classes (n,)."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, test_x = ((value - mean).div(deviation).clone() for value in (x, test_x))  # out of inference mode
    layer = nn.Linear(x.shape[1], int(y.max()) + 1, device=x.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(layer(x), y.clone()) + decay * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return layer(test_x).argmax(1)


def accuracy(found: Tensor, truth: Tensor) -> float:
    return 100 * (found == truth).float().mean().item()


if __name__ == "__main__":
    sys.exit(run_tool(main))
