"""Temporary."""

from torch.nn.parameter import is_lazy


def first_trained(model):
    parameters = () if model is None else model.parameters()
    return next((p for p in parameters if p.requires_grad and not is_lazy(p)), None)
