"""The only code that touches the user's model: hooks on modules, passes and optimizers."""
