"""What a training step keeps for its backward pass, by operator."""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from .measuring import autocast
from .models import create_model, random_image
from .profiles import operator_family


def measure_kept(name: str, size: int, batch: int, args: argparse.Namespace) -> list[dict]:
    """The rows of `kept_for` for the loss of a model's training step."""
    model = create_model(name, size, args.device).train()  # a new one: a stage that is replayed is one node
    image = random_image(size, batch, args)
    with autocast(args):
        loss = model(image).float().mean()
    return kept_for(loss, [image, *model.parameters(), *model.buffers()])


def kept_for(loss: Tensor, given: Sequence[Tensor]) -> list[dict]:
    """Tensors that wait for the backward pass from a loss, and their bytes, by families of operators, largest first.

    Memory counts once: with the first of the operators that keep it. What was given does not, such as parameters, which
    are there without a backward pass; their copies in another dtype do.
    """
    known = set(map(_memory, given))
    alive = []  # until all are counted: what is unpacked for a look may come to lie where another has lain
    families: dict[str, dict] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for node in sorted(_nodes(loss.grad_fn), key=lambda node: node._sequence_nr()):
        row = families[operator_family(_operator(node))]
        for t in _kept_by(node):
            alive.append(t)
            if _memory(t) not in known:
                known.add(_memory(t))
                row["tensors"] += 1
                row["bytes"] += t.untyped_storage().nbytes()
    rows = [{"operators": family} | row for family, row in families.items() if row["tensors"]]
    return sorted(rows, key=lambda row: -row["bytes"])


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _nodes(last: Node) -> set[Node]:
    """All nodes of the graph that ends in one."""
    found, waiting = {last}, [last]
    while waiting:
        new = {node for node, _ in waiting.pop().next_functions if node is not None} - found
        found |= new
        waiting += new
    return found


def _kept_by(node: Node) -> Iterator[Tensor]:
    """What a node has saved: PyTorch's own have an attribute for each, those in Python one for all."""
    names = [name for name in dir(node) if name == "saved_tensors" or name.startswith("_saved_")]
    for value in tree_leaves([getattr(node, name) for name in names]):
        if isinstance(value, Tensor):
            yield value


def _operator(node: Node) -> str:
    """The name that vim2's operators give their nodes, or one of the node's, as aten::addmm of AddmmBackward0."""
    name = re.sub(r"Backward\d*$", "", node.name())
    return getattr(node, "operator", None) or "aten::" + re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower()
