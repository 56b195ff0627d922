"""The engine's weights and optimizer state moved to host memory while a colocated engine generates, and back."""

from dcpo_openrlhf.policy.deepspeed.step import ZeroStep


class ZeroOffload:
    """DeepSpeed's own offload of everything that it holds."""

    def __init__(self, step: ZeroStep) -> None:
        self.engine, self._away = step.engine, False

    def away(self) -> None:
        """Free the device memory of the policy; an update begins with zero gradients."""
        if self._away:
            raise RuntimeError("the policy is in host memory already: bring it back before it is moved there again")
        self.engine.offload_states(pin_memory=False)
        self._away = True

    def back(self) -> None:
        """Give the policy its device memory and numbers again."""
        if self._away:
            self.engine.reload_states()
            self._away = False
