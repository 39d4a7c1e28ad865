"""Why an output says nothing of its uncertainty, or cannot be judged, and which option settles it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchprobe.capture.predictions.forms import BINARY, FEW_CLASSES, FEW_ROWS, LAST, Form, row_count

NO_VARIANCE = (
    "the model predicts numbers without a variance, so that there is no interval to judge: return one beside the mean, "
    "such as a field called variance or log_var, or train with nn.GaussianNLLLoss()"
)
NO_TARGETS = (
    "the model returns a mean and a variance, but no target was seen: of functional losses a Gaussian likelihood alone "
    "tells them, by its gradients at both; use nn.GaussianNLLLoss(), or nn.MSELoss() on the mean"
)


def doubt(tensor: Tensor) -> str:
    """Of a plain tensor whose dimensions can be several things."""
    return (
        f"the model's output is a plain tensor of shape {tuple(tensor.shape)}, whose first dimensions can be samples, "
        "batch or time: Uncertainty(sample_dim=0) says that the first one is samples, "
        "Uncertainty(task='classification') that the last one is classes"
    )


def too_few(tensor: Tensor, forms: Sequence[Form]) -> str:
    """Why a gradient would not tell which of the forms an output has, and what would; empty where it does."""
    form = next((form for form in forms if form in (LAST, BINARY)), None)
    if form is None or row_count(tensor, form) >= FEW_ROWS or (form == LAST and tensor.shape[-1] > FEW_CLASSES):
        return ""
    classes = tensor.shape[-1] if form == LAST else 2
    return (
        f"the gradients of fewer than {FEW_ROWS} predictions of {classes} classes may be those of any loss: use a loss "
        "module such as nn.CrossEntropyLoss(), hand the model its labels=, or "
    )
