"""Make transformers' Auto classes know our models, without importing transformers before its user does.

Two steps, because modules of transformers import one another in circles. The *configuration* is
registered as soon as the module that holds `AutoConfig` exists. The *models* follow when the first
`PeerConfig` is made: no Auto class can look up a model before it has a configuration, and by then
everything that modelling needs can be imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .versions import UnsupportedTransformers, check_transformers

__all__ = ["register_when_transformers_is_imported"]

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_when_transformers_is_imported() -> None:
    """Register with transformers' Auto classes: now if they are loaded, else when they are.

    Needs neither transformers nor torch, imports neither, and may be called more than once. Should
    registration fail (a transformers too old, say), it warns: importing transformers must go on working.
    """
    if _is_loaded(_AUTO_CONFIG):
        _register_config()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register_models() -> None:
    """Register `PeerModel` and `PeerForCausalLM` with AutoModel and AutoModelForCausalLM, once."""
    global _models_registered
    if _models_registered:
        return
    _models_registered = True
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        from transformers.models.auto import modeling_auto

        from .configuration import PeerConfig
        from .modeling import PeerForCausalLM, PeerModel

        AutoConfig.register("peer", PeerConfig, exist_ok=True)
        AutoModel.register(PeerConfig, PeerModel, exist_ok=True)
        AutoModelForCausalLM.register(PeerConfig, PeerForCausalLM, exist_ok=True)
        # By this list Trainer's label smoothing knows whose labels to shift, and `transformers serve` a
        # language model.
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["peer"] = PeerForCausalLM.__name__
    except BaseException:
        _models_registered = False
        raise


_models_registered = False


def _register_config() -> None:
    try:
        config: type
        try:
            check_transformers()
            from .configuration import PeerConfig as config
        except UnsupportedTransformers as error:
            config = _refusing(error)
        sys.modules[_AUTO_CONFIG].AutoConfig.register("peer", config, exist_ok=True)
    except Exception as error:
        warnings.warn(
            f"million_experts could not register its models with transformers: {error!r}", stacklevel=2
        )


def _refusing(error: UnsupportedTransformers) -> type:
    """A configuration that says why no model can be loaded, where transformers would advise to upgrade it."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    return type("PeerConfig", (), {"model_type": "peer", "__init__": refuse, "from_dict": refuse})


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the other finders work, and registers after the module has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            loader.exec_module = execute
            execute(module)
            _register_config()

        loader.exec_module = execute_and_register
        return spec
