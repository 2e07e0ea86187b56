"""HMoE: mixture-of-experts language models whose experts differ in size, for Hugging Face Transformers.

`import hmoe` makes the Auto classes of Transformers know the model type `hmoe`. It is quick: torch and transformers
are imported when first needed.
"""

from __future__ import annotations

import importlib
from typing import Any

import wrapt


__version__ = "0.1.0"

_PUBLIC = {
    "configuration_hmoe": ["PRESETS", "HMoEConfig"],
    "costs": ["ParameterCounts", "count_parameters"],
    "lora": ["lora_config"],
    "modeling_hmoe": [
        "HMoEForCausalLM",
        "HMoEForQuestionAnswering",
        "HMoEForSequenceClassification",
        "HMoEForTokenClassification",
        "HMoEModel",
        "HMoEPreTrainedModel",
    ],
    "sizes_hmoe": ["expert_sizes"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


# Transformers knows a third-party model only once it is registered. This waits until its Auto classes are imported,
# and gives them stand-ins that import the modeling file when first used: importing it in the middle of their import
# would fail.
@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_config(auto: Any) -> None:
    from .configuration_hmoe import HMoEConfig

    auto.AutoConfig.register(HMoEConfig.model_type, HMoEConfig, exist_ok=True)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_models(auto: Any) -> None:
    from .configuration_hmoe import AUTO_MAP, HMoEConfig

    for auto_class, reference in AUTO_MAP.items():
        module, _, class_name = reference.partition(".")
        if module == "modeling_hmoe":
            model_class = wrapt.lazy_import(f"{__name__}.{module}", class_name)
            getattr(auto, auto_class)._model_mapping.register(HMoEConfig, model_class, exist_ok=True)
