"""LoRA on every part of an HMoE model, with PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .routing_hmoe import ROUTERS


if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora_config(
    r: int = 8,
    *,
    attention: bool = True,
    experts: bool = True,
    router: bool = False,
    task_type: str | None = "CAUSAL_LM",
    **lora_kwargs: Any,
) -> LoraConfig:
    """A PEFT `LoraConfig` for an HMoE model.

    The expert banks and the router are bare parameters, so PEFT adapts them through `target_parameters`, which has no
    dropout; an expert gets one pair of rank r for each of its tiles, so wider experts get more.

    Args:
        r: rank.
        attention, experts, router: which parts to adapt. The router starts off: fine-tuning data that is small or
            narrow easily collapses it.
        lora_kwargs: further fields of `LoraConfig`, such as `lora_alpha`.

    Raises:
        ValueError: if nothing is adapted, or dropout is asked for on experts or router.
    """
    from peft import LoraConfig

    # Those of every router type: PEFT takes the ones that the model at hand has.
    matrices = dict.fromkeys(name for router_class in ROUTERS.values() for name in router_class.matrices)
    parameters = (EXPERT_PARAMETERS if experts else []) + [f"mlp.gate.{name}" for name in matrices if router]
    if not attention and not parameters:
        raise ValueError("`attention`, `experts` and `router` are all False: nothing would be adapted")
    if parameters and lora_kwargs.get("lora_dropout"):
        raise ValueError(
            f"`lora_dropout`={lora_kwargs['lora_dropout']} cannot be used on expert banks and routers (PEFT adapts "
            "them as bare parameters): set it to 0, or adapt attention only with experts=False, router=False"
        )
    return LoraConfig(
        r=r,
        # PEFT takes an empty list as "no modules" only beside target_parameters.
        target_modules=ATTENTION_MODULES if attention else [],
        target_parameters=parameters or None,
        task_type=task_type,
        **lora_kwargs,
    )
