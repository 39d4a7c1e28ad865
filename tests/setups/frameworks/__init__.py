"""Training frameworks, each in a few lines as its own documentation would write them.

A new one is a function that calls `run` with its model before it trains, and a line in this table.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.setups.frameworks import libraries as library
from tests.setups.frameworks import trainers as trainer
from tests.setups.frameworks.run import Run

FRAMEWORKS: dict[str, Callable[[Run], None]] = {
    "no framework": trainer.plain,
    "torch.func": trainer.func_api,
    "transformers": trainer.transformers_trainer,
    "transformers, Adafactor": trainer.transformers_adafactor,
    "accelerate": trainer.accelerate,
    "Lightning": trainer.lightning_trainer,
    "Lightning, LBFGS": trainer.lightning_lbfgs,
    "Lightning, manual optimization": trainer.lightning_manual,
    "Lightning Fabric": trainer.fabric,
    "PEFT, LoRA": trainer.peft_lora,
    "skorch": trainer.skorch,
    "Ignite": trainer.ignite,
    "Opacus": trainer.opacus,
    "Schedule-Free": trainer.schedulefree,
    "pytorch_optimizer, SAM": trainer.sam,
    "pytorch_optimizer, Lookahead": trainer.lookahead,
    "higher, MAML": trainer.higher,
    "Stable-Baselines3, PPO": library.stable_baselines("PPO", True, 32, n_steps=16, batch_size=8, n_epochs=2),
    "Stable-Baselines3, A2C": library.stable_baselines("A2C", True, 20),
    "Stable-Baselines3, DQN": library.stable_baselines("DQN", True, 40, learning_starts=10, batch_size=8),
    "Stable-Baselines3, SAC": library.stable_baselines("SAC", False, 16, learning_starts=10, batch_size=8),
    "Stable-Baselines3, TD3": library.stable_baselines("TD3", False, 16, learning_starts=10, batch_size=8),
    "TorchRL, PPO": library.torchrl_ppo,
    "timm": library.timm,
    "torchvision, detection": library.torchvision_detection,
    "PyTorch Geometric": library.torch_geometric,
    "diffusers": library.diffusers,
    "GPyTorch": library.gpytorch_exact,
    "GPyTorch, deep kernel": library.gpytorch_deep_kernel,
    "Pyro, SVI": library.pyro_svi,
    "BLiTZ": library.blitz,
}

LOSS_UNKNOWN = {
    "torch.func": "its gradients come from no backward()",
}
"""Frameworks of which `overview/loss` is not known, which the summary says."""
