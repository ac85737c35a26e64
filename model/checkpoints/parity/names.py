"""Cases of full size: every tensor's name, shape and type, without values."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from model.checkpoints.parity.comparison import Case, Comparison, exact


def check_names(case: Case, make: Callable[[], nn.Module]) -> Iterator[Comparison]:
    """The tensors and the parameter count of the network that `make` gives, equal or not."""
    rows = case.header["keys"]
    if isinstance(rows, list):
        recorded = {row["key"]: (row["shape"], row["dtype"]) for row in rows}
        parameters = case.header["parameters"]
    else:
        recorded = {name: (shape, dtype) for name, (shape, dtype) in rows.items()}
        parameters = case.header["total_parameters"]
    with torch.device("meta"):
        network = make()
    ours = {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in network.state_dict().items()
    }
    for name, tensor in recorded.items():
        if ours.get(name) != tensor:
            yield exact(f"{name} {ours.get(name)} for {tensor}", ours.get(name), tensor)
    yield exact(f"names of {len(recorded)} tensors", sorted(ours), sorted(recorded))
    yield exact(f"{parameters:,} parameters", sum(p.numel() for p in network.parameters()), parameters)
