"""What can be seen of a pipeline from outside, to be compared with what is seen later."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Snapshot:
    """Everything on a pipeline that attaching to it might change.

    Args:
        pipe: a pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self._identities: dict[str, Any] = {}  # compared with `is`
        self._values: dict[str, Any] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        parts = {"pipe": pipe}
        for name, part in vars(pipe).items():
            if isinstance(part, nn.Module):
                for path, module in part.named_modules():
                    parts[f"{name}.{path}"] = module
                self._read_tensors(name, part)
            elif hasattr(part, "timesteps"):
                parts[name] = part
        for name, part in parts.items():
            self._identities[f"{name} itself"] = part
            self._identities[f"class of {name}"] = type(part)
            self._values[f"attributes of {name}"] = sorted(vars(part))
            if isinstance(part, nn.Module):
                self._read_module(name, part)

    def _read_module(self, name: str, module: nn.Module) -> None:
        own = vars(module)
        self._values[f"children of {name}"] = list(module._modules)
        self._values[f"mode of {name}"] = module.training
        for key, hooks in own.items():
            if key.endswith("_hooks") and hooks is not None:
                self._values[f"{key} of {name}"] = list(hooks.items())
        for key in ("processor", "forward", "_hf_hook", "_old_forward", "_compiled_call_impl"):
            self._identities[f"{key} of {name}"] = (
                getattr(module, key) if key == "processor" and hasattr(module, key) else own.get(key)
            )

    def _read_tensors(self, name: str, module: nn.Module) -> None:
        both = [*module.named_parameters(), *module.named_buffers()]
        for path, tensor in both:
            key = f"{name}.{path}"
            self._identities[f"tensor {key}"] = tensor
            self._identities[f"gradient of {key}"] = tensor.grad
            self._values[f"{key} needs a gradient"] = tensor.requires_grad
            self._tensors[key] = tensor.detach().clone()

    def check(self, pipe: Any) -> None:
        """Asserts that a pipeline is still as it was."""
        now = Snapshot(pipe)
        for kind, same in (
            ("_identities", lambda a, b: a is b),
            ("_values", lambda a, b: a == b),
            ("_tensors", torch.equal),
        ):
            was, there = getattr(self, kind), getattr(now, kind)
            changed = [
                key
                for key in was.keys() | there.keys()
                if key not in was or key not in there or not same(was[key], there[key])
            ]
            assert not changed, sorted(changed)[:5]
