"""Diagnoses: rules that name the commonest bugs of training loops, each from evidence of sampled steps."""

from __future__ import annotations

from torchprobe.rules.base import Diagnosis
from torchprobe.rules.diagnoses import learning, losses, modules, optimizers

DIAGNOSES: tuple[Diagnosis, ...] = (
    optimizers.UnoptimizedParameters(),
    optimizers.DetachedParameters(),
    optimizers.UnusedParameters(),
    optimizers.UnusedEmbeddingRows(),
    optimizers.MissingZeroGrad(),
    optimizers.ZeroGradBeforeStep(),
    optimizers.NoOptimizerStep(),
    losses.SoftmaxBeforeCrossEntropy(),
    losses.SigmoidBeforeCrossEntropy(),
    losses.SigmoidBeforeBce(),
    losses.NllWithoutLog(),
    losses.BroadcastTargets(),
    losses.ReluOutput(),
    losses.LargeInitialLoss(),
    learning.ClassNeverOccurs(),
    learning.UnshuffledBatches(),
    modules.RepeatedBatch(),
    losses.TargetsAreInputs(),
    losses.UnshiftedTargets(),
    losses.AttendsToFuture(),
    losses.AttendsToPadding(),
    losses.TargetLeak(),
    learning.AtChance(),
    optimizers.LearningRateZero(),
    learning.LearningRateTooHigh(),
    learning.LearningRateTooLow(),
    optimizers.LearningRateDecaysEarly(),
    learning.WeightDecayTooLarge(),
    modules.UnscaledInputs(),
    modules.ConstantInputs(),
    modules.SaturatedUnits(),
    modules.SymmetricInitialisation(),
    modules.UnregisteredModules(),
    modules.RepeatedLayer(),
    modules.DropoutTooHigh(),
    modules.BatchNormFewValues(),
    modules.GraphKept(),
    modules.TrainedInEvalMode(),
    modules.ValidatedInTrainingMode(),
    modules.DropoutInValidation(),
    modules.Fp16WithoutScaler(),
)
"""All of them, in the order of their worth."""
