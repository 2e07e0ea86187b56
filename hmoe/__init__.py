"""HMoE: mixture-of-experts language models whose experts differ in size, for Hugging Face Transformers.

`import hmoe` registers the models with the Auto classes of Transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_hmoe import HMoEConfig, ParameterCounts, count_parameters
from .lora import lora_config
from .modeling_hmoe import (
    HMoEForCausalLM,
    HMoEForQuestionAnswering,
    HMoEForSequenceClassification,
    HMoEForTokenClassification,
    HMoEModel,
    HMoEPreTrainedModel,
)
from .presets import PRESETS
from .sizes import expert_sizes


__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "HMoEConfig",
    "HMoEForCausalLM",
    "HMoEForQuestionAnswering",
    "HMoEForSequenceClassification",
    "HMoEForTokenClassification",
    "HMoEModel",
    "HMoEPreTrainedModel",
    "ParameterCounts",
    "__version__",
    "count_parameters",
    "expert_sizes",
    "lora_config",
]

AutoConfig.register(HMoEConfig.model_type, HMoEConfig, exist_ok=True)
AutoModel.register(HMoEConfig, HMoEModel, exist_ok=True)
AutoModelForCausalLM.register(HMoEConfig, HMoEForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(HMoEConfig, HMoEForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(HMoEConfig, HMoEForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HMoEConfig, HMoEForTokenClassification, exist_ok=True)
