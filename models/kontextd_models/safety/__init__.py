"""What may be handed out: classifiers, the gate in front of them, and the screen for previews. Imports nothing heavy.

`SafetyGate(config.safety)` is the entry; everything fails closed.
"""

from kontextd_models.safety.checker import Checker
from kontextd_models.safety.gate import SafetyGate
from kontextd_models.safety.screen import PreviewScreen

__all__ = ["Checker", "PreviewScreen", "SafetyGate"]
