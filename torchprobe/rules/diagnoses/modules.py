"""Bugs in the model and in how it is called: inputs, initialisation, structure, modes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torchprobe.records import Record
from torchprobe.rules.base import Diagnosis, Found, evidence, lasting


@dataclass(frozen=True)
class UnscaledInputs(Diagnosis):
    """The first layer with weights, no normalisation before it, gets numbers whose spread or mean is above 10."""

    name = "unscaled_inputs"
    fact = "input_scale"
    limit = 10.0
    message = "the first layer gets large numbers, such as pixels from 0 to 255: inputs are not normalised"
    advice = (
        "Bring inputs to about mean 0 and standard deviation 1, or at least into [0, 1]; weights are initialised for "
        "that (LeCun et al. 2012, Efficient BackProp, section 4.3)."
    )


@dataclass(frozen=True)
class ConstantInputs(Diagnosis):
    """All examples of a batch, of four and more, are the same in every tensor that the model is called with."""

    name = "constant_inputs"
    fact = "input_varies"
    message = "all examples of a batch are equal where they enter the model: there is nothing to tell them apart by"
    advice = (
        "Look at a batch as the model gets it, after all transforms. A dataset may return one item always, or values "
        "were rounded or clipped away (Karpathy 2019, A recipe for training neural networks: visualize just before the "
        "net)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        values = evidence(record, self.fact)
        same = {name: value for name, value in values.items() if value == 0}
        return self.said(record.step, lasting(kept, same, self.samples)) if values else None


@dataclass(frozen=True)
class RepeatedBatch(Diagnosis):
    """Every sample of the run got the very same inputs, at steps whose distances have no common divisor but 1."""

    name = "repeated_batch"
    serious = False
    fact = "input_sum"
    message = "every sampled step got the very same batch: a full batch, a test of overfitting, or a loader begun anew"
    advice = (
        "A full batch, or one that is to be fitted as a test, is as it should be. `next(iter(loader))` begins anew "
        "each time and gives the first batch again: loop over the loader (PyTorch, Datasets & DataLoaders)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """A loader of a few batches in a fixed order would give others between."""
        now = evidence(record, self.fact).get("")
        if now is None:
            return None
        kept["equal"] = now == kept.setdefault("first", now) and kept.get("equal", True)
        kept["samples"] = kept.get("samples", 0) + 1
        kept["apart"] = math.gcd(kept.get("apart", 0), record.step - kept.setdefault("step", record.step))
        ill = kept["equal"] and kept["samples"] >= self.samples and kept["apart"] == 1
        return [self.alert(record.step, None, kept["samples"], None, self.message)] if ill else []


@dataclass(frozen=True)
class SaturatedUnits(Diagnosis):
    """More than half of what a hidden tanh or sigmoid gives lies beyond 0.97, from the first sample on."""

    name = "saturated_units"
    fact = "saturated"
    limit = 0.5
    message = "most outputs of this tanh or sigmoid are at its ends, where no gradient passes"
    advice = (
        "Units at their ends do not learn. Scale inputs and weights down (Glorot initialisation), put a normalisation "
        "before it, or use a ReLU-like unit (Glorot & Bengio 2010, Understanding the difficulty of training deep "
        "feedforward neural networks)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Layers that were so in each sample of the run; later on a gate may be."""
        values = evidence(record, self.fact)
        if not values:
            return None
        ill = {name: value for name, value in values.items() if value > self.limit}
        kept["samples"] = kept.get("samples", 0) + 1
        kept["always"] = [name for name in kept.get("always", list(ill)) if name in ill]
        said = {name: ill[name] for name in kept["always"]} if kept["samples"] >= self.samples else {}
        return self.said(record.step, said)


@dataclass(frozen=True)
class SymmetricInitialisation(Diagnosis):
    """All units of a layer begin with equal weights and get equal gradients; or the weights of several linear or
    convolutional layers are one number; or all of the model's are 0.
    """

    name = "symmetric_initialisation"
    message = "all units of the layer begin equal, and are pulled alike: they stay copies of one unit"
    advice = (
        "Initialise weights at random (`nn.init.kaiming_normal_`, `xavier_uniform_`); biases alone may be constant "
        "(Goodfellow et al. 2016, Deep Learning, section 8.4)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        symmetric, constant = (
            {name: value for name, value in evidence(record, fact).items() if value}
            for fact in ("symmetric", "constant")
        )
        zero = {name: value for name, value in evidence(record, "all_zero").items() if value}
        if not symmetric and not constant and not zero:
            return None
        found = self.said(record.step, symmetric | (constant if len(constant) > 1 else {}))
        return [*found, *self.said(record.step, zero, "all weights of the model begin at 0: its units stay copies")]


@dataclass(frozen=True)
class _AtOnce(Diagnosis):
    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """The model is looked at once, so that no later sample says that it is over."""
        values = evidence(record, self.fact)
        return self.said(record.step, values) if values else None


@dataclass(frozen=True)
class UnregisteredModules(_AtOnce):
    """Modules or parameters in a plain list or dictionary get gradients, and are in no `parameters()`."""

    name = "unregistered_modules"
    fact = "unregistered"
    message = "what is in a plain list or dictionary gets gradients, but is not in parameters(): it is never trained"
    advice = (
        "Put modules into `nn.ModuleList` or `nn.ModuleDict`, parameters into `nn.ParameterList` or "
        "`nn.ParameterDict`. Only then the optimizer, `to()`, `train()` and `state_dict()` know of them (PyTorch, "
        "torch.nn.ModuleList)."
    )


@dataclass(frozen=True)
class RepeatedLayer(_AtOnce):
    """A list of layers has one and the same module in all places, as `[layer] * n` makes."""

    name = "repeated_layer"
    fact = "repeated"
    message = "layers of the list are one module, as [layer] * n makes: they share their weights"
    advice = (
        "Make each of them anew, `[make() for _ in range(n)]` or `copy.deepcopy`; where sharing is meant, calling one "
        "layer n times says so (PyTorch, torch.nn.ModuleList)."
    )


@dataclass(frozen=True)
class DropoutTooHigh(_AtOnce):
    """A dropout layer drops more than 80 %."""

    name = "dropout_too_high"
    fact = "dropout"
    limit = 0.8
    message = "the layer drops more than 80 % of its inputs: p is the share that is dropped, not the one that is kept"
    advice = (
        "In PyTorch p is the probability of an element to be zeroed. Try p between 0.1 and 0.5 (Srivastava et al. "
        "2014, JMLR 15, section A.4)."
    )


@dataclass(frozen=True)
class BatchNormFewValues(Diagnosis):
    """Batch normalisation in training computes mean and variance of at most four values a channel."""

    values: int = 4

    name = "batch_norm_few_values"
    message = "batch normalisation takes mean and variance of so few values that they are mostly noise"
    advice = (
        "Use larger batches, or drop the last one; GroupNorm and LayerNorm do not depend on the batch (Wu & He 2018, "
        "arXiv 1803.08494)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """In samples running; the last batch of an epoch may be small."""
        values = evidence(record, "norm_values")
        few = {name: count for name, count in values.items() if count <= self.values}
        return (
            self.together(record.step, lasting(kept, few, self.samples), self.values, self.message) if values else None
        )


@dataclass(frozen=True)
class GraphKept(Diagnosis):
    """The graphs of many earlier steps are still alive: a loss is added up or listed without `item()` or `detach()`."""

    samples: int = 1

    name = "graph_kept"
    fact = "graphs_kept"
    limit = 2.0
    message = "graphs of steps long past are still in memory: a loss or output is kept with its graph"
    advice = (
        "Memory grows with every step. Keep `loss.item()` or `loss.detach()` in place of the loss (PyTorch, FAQ: "
        "My model reports cuda runtime error(2): out of memory)."
    )


@dataclass(frozen=True)
class TrainedInEvalMode(Diagnosis):
    """Backward runs through a model in evaluation mode whose dropout or batch normalisation is then off."""

    name = "trained_in_eval_mode"
    serious = False
    fact = "evaluates"
    message = "the model trains in evaluation mode: dropout and batch statistics are off"
    advice = (
        "`eval()` stays on until it is taken back. If that is not meant to freeze normalisation, call `model.train()` "
        "after each validation (PyTorch, torch.nn.Module.eval)."
    )


@dataclass(frozen=True)
class ValidatedInTrainingMode(Diagnosis):
    """Passes without gradients run in training mode between training steps, and change batch normalisation.

    Left alone: such passes in every step, as of a GAN's generator or a target network, and a momentum of None, as
    `torch.optim.swa_utils.update_bn` sets.
    """

    name = "validated_in_training_mode"
    fact = "validates_in_training_mode"
    message = "passes without gradients run in training mode: batch normalisation learns from validation data"
    advice = (
        "`no_grad` does not change the mode. Call `model.eval()` before validation and `model.train()` after it "
        "(PyTorch, torch.nn.Module.eval)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """A validation of several passes that some sample is without, or after fewer than half of the samples."""
        value = evidence(record, self.fact).get("", 0.0)
        row = evidence(record, "validations_in_a_row").get("", 0.0)
        kept["samples"] = kept.get("samples", 0) + 1
        kept["with"] = kept.get("with", 0) + bool(value)
        seldom = kept["samples"] >= self.samples and kept["with"] < kept["samples"] / 2
        several = row > 1 and kept["with"] < kept["samples"]
        ill = value > 1 and (several or seldom)
        return self.said(record.step, {"": value} if ill else {})


@dataclass(frozen=True)
class DropoutInValidation(Diagnosis):
    """Passes without gradients run in training mode with dropout: meant as Monte-Carlo dropout, or not."""

    name = "dropout_in_validation"
    serious = False
    fact = "validates_in_training_mode"
    message = "passes without gradients run in training mode, with dropout: Monte-Carlo dropout, or a forgotten eval()"
    advice = (
        "`no_grad` does not change the mode. If predictions are not meant to be random, call `model.eval()` before "
        "them (PyTorch, torch.nn.Dropout)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Where nothing but dropout depends on the mode."""
        values = evidence(record, self.fact)
        return self.said(record.step, values if values.get("") == 1.0 else {}) if values else None


@dataclass(frozen=True)
class Fp16WithoutScaler(Diagnosis):
    """Outputs are float16, the loss is not scaled, and over half of the gradients' elements are zero."""

    name = "fp16_without_grad_scaler"
    fact = "zero_gradients"
    limit = 0.5
    message = "float16 without a GradScaler: most gradient elements are exactly zero, rounded to nothing"
    advice = (
        "Numbers below 6e-8 are zero in float16. Use `torch.amp.GradScaler`, or bfloat16, which needs none "
        "(Micikevicius et al. 2018, arXiv 1710.03740)."
    )
